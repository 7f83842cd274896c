"""The Hub's client, and what its errors mean to a user."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from prufed_cli.errors import AUTHENTICATION, FAILED, NOT_FOUND, USAGE, PrufedError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

MANIFEST: Final = "prufed.json"
ORIGINALS: Final = "prufed-original/"
"""Where a repository keeps the published bytes of files that the Hub needs in another form."""

_SIGN_IN: Final = "run `hf auth login`, or set HF_TOKEN to a token that may do this"


def connect() -> HfApi:
    """Return a client for ``HF_ENDPOINT`` with the user's own token, silent on the terminal.

    Raises:
        PrufedError: ``HF_ENDPOINT`` is not an address.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    # Its warnings quote addresses, which may be signed, and what it retries is not news.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    disable_progress_bars()
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    if endpoint and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", endpoint):
        raise PrufedError(
            f"HF_ENDPOINT {endpoint!r} is not an address",
            "for example https://huggingface.co",
            USAGE,
        )
    return HfApi(endpoint=endpoint or None, library_name="prufed")


def check_signed_in(what: str) -> None:
    """Refuse to go on without a token.

    Raises:
        PrufedError: there is none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise PrufedError(f"cannot {what}: you are not signed in", _SIGN_IN, AUTHENTICATION)


def check_repository(name: str) -> None:
    """Refuse what is not ``owner/name``.

    Raises:
        PrufedError: the name is not one the Hub takes.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise PrufedError(
            f"{name!r} is not a repository", "a repository is named owner/name: me/my-model", USAGE
        )


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn the client's errors into one sentence each; tokens never appear in it.

    Args:
        what: what was being done, after "cannot".
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        explained = _explain(what, error)
        if explained is None:
            raise
        raise explained from error


def _explain(what: str, error: BaseException) -> PrufedError | None:
    """Return the sentence for an error of the client, which wraps them in one another."""
    from huggingface_hub import errors

    transport: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    for each in chain:
        if isinstance(each, errors.HfHubHTTPError):
            return _refused(what, each)
        if isinstance(each, errors.OfflineModeIsEnabled):
            return PrufedError(
                f"cannot {what}: HF_HUB_OFFLINE is set", "unset it and run the command again"
            )
    if any(isinstance(each, transport | ConnectionError | TimeoutError) for each in chain):
        return _unreachable(what)
    if isinstance(error, errors.LocalEntryNotFoundError | json.JSONDecodeError):
        return PrufedError(
            f"cannot {what}: what answers is not a Hub", "check HF_ENDPOINT and the proxy"
        )
    if isinstance(error, OSError) and error.errno is None:
        return PrufedError(f"cannot {what}: a file arrived incomplete", "run it again")
    return None


def _refused(what: str, error: HfHubHTTPError) -> PrufedError:
    """Return the sentence for an answer that is not a success."""
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        problem = "access to the repository is gated"
        return _problem(what, problem, "ask for access on its page, then sign in", AUTHENTICATION)
    if isinstance(error, errors.RepositoryNotFoundError) and status == 401:
        # The Hub does not tell a private repository from one that does not exist.
        problem = "the repository does not exist, or you may not see it"
        return _problem(what, problem, f"check its name; {_SIGN_IN}", AUTHENTICATION)
    if isinstance(error, errors.RepositoryNotFoundError):
        problem = "there is no such repository, or you may not see it"
        return _problem(what, problem, "check its name", NOT_FOUND)
    if isinstance(error, errors.RevisionNotFoundError):
        return _problem(what, "there is no such revision", "see its tags on the Hub", NOT_FOUND)
    if status in {401, 403}:
        problem = "the Hub refuses the token" if status == 401 else "the token may not do this"
        return _problem(what, problem, _SIGN_IN, AUTHENTICATION)
    if status in {409, 412}:
        problem = "somebody else changed the repository meanwhile"
        return _problem(what, problem, "run it again", FAILED)
    if status == 400 and (reason := (error.server_message or "").strip()):
        problem = f"the Hub answered: {reason.splitlines()[0]}"
        return _problem(what, problem, "see the artifact's README.md", FAILED)
    hint = "run it again later; what has arrived is not sent twice"
    return _problem(what, f"the Hub answered {status}", hint, FAILED)


def _unreachable(what: str) -> PrufedError:
    hint = "check the network and HF_ENDPOINT; `prufed doctor` looks too"
    return _problem(what, "the Hub cannot be reached", hint, FAILED)


def _problem(what: str, problem: str, hint: str, exit_code: int) -> PrufedError:
    return PrufedError(f"cannot {what}: {problem}", hint, exit_code)
