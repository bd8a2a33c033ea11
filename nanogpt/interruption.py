"""SIGINT, SIGTERM and SIGUSR1: a run saves and ends in order.

SIGTERM comes from `kill` and from a machine that goes down, SIGUSR1 from a batch system that is
about to end a job.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

EXIT_CODES = {each: 128 + each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Collect the signals instead of dying; a second one acts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("stopping after this step; once more stops at once", file=sys.stderr)

    with _handlers(note):
        yield received


@contextmanager
def terminable() -> Iterator[None]:
    """The signals end the process in order, so that temporary files go.

    Compiled code may swallow what the handler raises and raise something of its own, which is then
    no error: the process was told to end.
    """
    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(EXIT_CODES[signal.Signals(number)])

    with _handlers(leave):
        try:
            yield
        except Exception:
            if not received:
                raise
            if received[-1] == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(EXIT_CODES[signal.Signals(received[-1])]) from None


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before: dict[int, Any] = {}
    with suppress(ValueError):  # only the main thread may set them
        before = {number: signal.signal(number, handler) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
