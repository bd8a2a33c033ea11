"""SIGINT and SIGTERM: a run saves and ends in order."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one acts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("stopping after this step; once more stops at once", file=sys.stderr)

    with _handlers({signal.SIGINT: note, signal.SIGTERM: note}):
        yield received


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the process in order, so that temporary files go.

    Compiled code may swallow what the handler raises and raise something of its own, which is then
    no error: the process was told to end.
    """
    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(EXIT_CODES[signal.SIGTERM])

    with _handlers({signal.SIGTERM: leave, signal.SIGINT: leave}):
        try:
            yield
        except Exception:
            if not received:
                raise
            if received[-1] == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(EXIT_CODES[signal.SIGTERM]) from None


@contextmanager
def _handlers(
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]],
) -> Iterator[None]:
    before = {}
    with suppress(ValueError):  # only the main thread may set them
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
