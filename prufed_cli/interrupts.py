"""Ctrl-C, remembered when it is pressed.

The ``KeyboardInterrupt`` that it raises may not arrive: compiled code turns it into an error of its
own, which looks like a client that failed, and destructors and callbacks drop it. Long work
therefore asks, where it could stop, whether there was one.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

_pressed: list[int] = []


def watch() -> None:
    """Remember every Ctrl-C from now on; it interrupts as ever.

    A process that was started to ignore Ctrl-C goes on to, and other threads cannot listen.
    """
    _pressed.clear()
    listening = signal.getsignal(signal.SIGINT) in {signal.default_int_handler, _enter}
    if listening and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _enter)


def pressed() -> bool:
    """Say whether Ctrl-C was pressed since :func:`watch`."""
    return bool(_pressed)


def check() -> None:
    """Raise the interrupt that got lost; do nothing while one is being handled.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    if _pressed and not isinstance(sys.exc_info()[1], KeyboardInterrupt):
        raise KeyboardInterrupt


def _enter(number: int, frame: FrameType | None) -> None:
    _pressed.append(number)
    signal.default_int_handler(number, frame)
