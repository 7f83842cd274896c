"""The one error a method raises for what a user can mend."""

from __future__ import annotations


class MethodError(Exception):
    """A method cannot do what was asked: one sentence, and a hint that says what to do.

    Attributes:
        message: what is wrong, lower case, naming the value.
        hint: what to do about it, a command where there is one.
        exit_code: 2, since the request is at fault; :class:`UpdateError` uses 1.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UpdateError(MethodError):
    """What one client sent cannot be aggregated. Names the client.

    Attributes:
        client: the name of the client at fault.
    """

    exit_code = 1

    def __init__(self, client: str, message: str, hint: str | None = None) -> None:
        super().__init__(f"client {client}: {message}", hint)
        self.client = client
