"""The error every use case raises for what a user can mend, and the exit codes."""

from __future__ import annotations

from typing import Final

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
AUTHENTICATION: Final = 4
INTEGRITY: Final = 5
INTERRUPTED: Final = 130


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during work that can be taken up again.

    Attributes:
        hint: how it goes on.
    """

    def __init__(self, hint: str) -> None:
        super().__init__(hint)
        self.hint = hint


class PrufedError(Exception):
    """Something the user can mend: one sentence, and a hint that says what to do.

    Attributes:
        message: what is wrong, lower case, naming the value.
        hint: what to do about it, a command where there is one.
        exit_code: the process's exit code.
    """

    def __init__(self, message: str, hint: str | None = None, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
