"""The progress of a run on standard error: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

_REFRESH_SECONDS = 0.25
_LINE_SECONDS = 10.0


class TrainingProgress:
    """Shows step, loss, tokens a second and time left; messages pass above the bar.

    Args:
        total: steps of the run.
        done: steps that an earlier process has done.
        quiet: show nothing but messages.
    """

    def __init__(self, total: int, done: int = 0, *, quiet: bool = False) -> None:
        self.total, self.first, self.quiet = total, done, quiet
        self._bar: Any = None
        self._started = self._shown = time.monotonic()
        self._val_loss: float | None = None

    def __enter__(self) -> "TrainingProgress":
        self._started = time.monotonic()
        if sys.stderr.isatty() and not self.quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=Console(stderr=True),
                refresh_per_second=4,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "train", total=self.total, completed=self.first, shown=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show the state after `step` steps; cheap to call at every one."""
        now = time.monotonic()
        wait = _REFRESH_SECONDS if self._bar is not None else _LINE_SECONDS
        if now - self._shown < wait and step < self.total:
            return
        self._shown = now
        validation = "" if self._val_loss is None else f"  val {self._val_loss:.4f}"
        shown = f"loss {loss:.4f}{validation}  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
        elif not self.quiet:
            pace = (now - self._started) / max(1, step - self.first)
            left = time.strftime("%H:%M:%S", time.gmtime(pace * (self.total - step)))
            self.say(f"step {step:,} of {self.total:,}  {shown}  {left} left")

    def evaluated(self, step: int, val_loss: float, bits_per_byte: float, best: bool) -> None:
        """Show a validation loss."""
        self._val_loss = val_loss
        mark = "  (best so far)" if best else ""
        text = f"step {step:,}: validation {val_loss:.4f} nats a token"
        self.say(f"{text}, {bits_per_byte:.4f} bits a byte{mark}")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, file=sys.stderr, flush=True)
