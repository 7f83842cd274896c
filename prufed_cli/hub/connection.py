"""The Hub's client, and what its errors mean to a user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from prufed_cli.errors import AUTHENTICATION, FAILED, NOT_FOUND, USAGE, PrufedError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ORIGINALS: Final = "prufed-original/"
"""Where a repository keeps the published bytes of files that the Hub needs in another form."""

_SIGN_IN: Final = "`hf auth login`, or set HF_TOKEN to a token that may write"


def connect() -> HfApi:
    """Return a client for the configured endpoint with the user's own token."""
    from huggingface_hub import HfApi

    from prufed_cli.models.base import quiet_transformers

    quiet_transformers()
    return HfApi(library_name="prufed")


def check_repository(name: str) -> None:
    """Refuse what is not ``owner/name``.

    Raises:
        PrufedError: the name is not one the Hub takes.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise PrufedError("a repository is named owner/name", "for example me/my-model", USAGE)


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn the client's errors into one sentence each; tokens never appear in it."""
    from huggingface_hub import errors

    # The root of the errors of whatever HTTP client this huggingface_hub uses.
    transport: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except errors.GatedRepoError as error:
        raise PrufedError(
            f"cannot {what}: access to the repository is gated",
            "ask for access on its page, then sign in",
            AUTHENTICATION,
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _not_found(what, error) from error
    except errors.RevisionNotFoundError as error:
        raise PrufedError(
            f"cannot {what}: there is no such revision", "see the tags of the repository", NOT_FOUND
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(what) from error
    except errors.OfflineModeIsEnabled as error:
        raise PrufedError(
            f"cannot {what}: HF_HUB_OFFLINE is set", "unset it and run the command again", FAILED
        ) from error
    except errors.HfHubHTTPError as error:
        raise _from_status(what, error) from error
    except (transport, ConnectionError, TimeoutError) as error:
        raise _unreachable(what) from error


def _not_found(what: str, error: Exception) -> PrufedError:
    status = getattr(getattr(error, "response", None), "status_code", 404)
    if status == 401:
        # The Hub does not tell a private repository from one that does not exist.
        return PrufedError(
            f"cannot {what}: the repository does not exist, or you may not see it",
            f"check its name; {_SIGN_IN}",
            AUTHENTICATION,
        )
    return PrufedError(f"cannot {what}: there is no such repository", "check its name", NOT_FOUND)


def _from_status(what: str, error: Exception) -> PrufedError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in {401, 403}:
        return PrufedError(f"cannot {what}: the Hub refuses the token", _SIGN_IN, AUTHENTICATION)
    if status == 409:
        return PrufedError(f"cannot {what}: it conflicts with what is there", "run it again")
    if status == 412:
        return PrufedError(
            f"cannot {what}: somebody else changed the repository meanwhile", "run it again"
        )
    return PrufedError(
        f"cannot {what}: the Hub answered {status}", "run it again later; nothing was published"
    )


def _unreachable(what: str) -> PrufedError:
    return PrufedError(
        f"cannot {what}: the Hub cannot be reached",
        "check the network and HF_ENDPOINT; `prufed doctor` looks too",
    )
