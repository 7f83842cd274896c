"""What can go wrong with stored artifacts, each with the exit code the command line uses."""

from __future__ import annotations


class RegistryError(Exception):
    """A registry operation failed: one sentence, and a hint that says what to do.

    Attributes:
        message: what is wrong, lower case, naming the value.
        hint: what to do about it, a command where there is one.
        exit_code: 1 failed, 2 a bad name or request, 3 not found, 5 damaged.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InvalidRequest(RegistryError):  # noqa: N818
    """A name, alias, reference or request that the registry does not accept."""

    exit_code = 2


class NotFound(RegistryError):  # noqa: N818
    """No such artifact, version or alias."""

    exit_code = 3


class Damaged(RegistryError):  # noqa: N818
    """Stored bytes are not what was published."""

    exit_code = 5
