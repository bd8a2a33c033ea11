"""The progress of a run on standard error: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self

_REFRESH_SECONDS = 0.25
_LINE_SECONDS = 10.0


class _Display:
    """A bar with the time left, and messages that pass above it.

    Args:
        count: rich's text of how far it is, before the bar.
        total: where it ends.
        done: what an earlier process has done.
        quiet: show nothing but messages.
    """

    def __init__(self, count: str, total: float, done: float, quiet: bool) -> None:
        self.count, self.total, self.first, self.quiet = count, total, done, quiet
        self._bar: Any = None
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if sys.stderr.isatty() and not self.quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn(self.count),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=Console(stderr=True),
                refresh_per_second=4,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, completed=self.first, shown="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, file=sys.stderr, flush=True)

    def _due(self, done: float) -> bool:
        """Whether it is time to show something again; it always is at the end."""
        now = time.monotonic()
        wait = _REFRESH_SECONDS if self._bar is not None else _LINE_SECONDS
        if now - self._shown < wait and done < self.total:
            return False
        self._shown = now
        return True

    def _show(self, done: float, count: str, shown: str) -> None:
        """Move the bar, or print a line of `count` and `shown`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, shown=shown)
        elif not self.quiet:
            pace = (self._shown - self._started) / max(1, done - self.first)
            self.say(f"{count}  {shown}  {duration(pace * max(0, self.total - done))} left")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 07:05:09; of more than a day the days as well."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days:,} days " * (days > 0) + f"{hours:02}:{minutes:02}:{whole:02}"


class TrainingProgress(_Display):
    """Shows step, loss, tokens a second and time left; messages pass above the bar.

    Args:
        total: steps of the run.
        done: steps that an earlier process has done.
        quiet: show nothing but messages.
    """

    def __init__(self, total: int, done: int = 0, *, quiet: bool = False) -> None:
        count = "step {task.completed:,.0f} of {task.total:,.0f}"
        super().__init__(count, total, done, quiet)
        self._val_loss: float | None = None

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show the state after `step` steps; cheap to call at every one."""
        if not self._due(step):
            return
        validation = "" if self._val_loss is None else f"  val {self._val_loss:.4f}"
        shown = f"loss {loss:.4f}{validation}  {tokens_per_second:,.0f} tokens/s"
        self._show(step, f"step {step:,} of {self.total:,}", shown)

    def evaluated(self, step: int, val_loss: float, bits_per_byte: float, best: bool) -> None:
        """Show a validation loss."""
        self._val_loss = val_loss
        mark = "  (best so far)" if best else ""
        text = f"step {step:,}: validation {val_loss:.4f} nats a token"
        self.say(f"{text}, {bits_per_byte:.4f} bits a byte{mark}")


class WorkProgress(_Display):
    """Shows the share of all the work that is done, what is being done, and the time left.

    Args:
        quiet: show nothing but messages.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__("{task.percentage:3.0f} %", 1.0, 0.0, quiet)
        self._begun = False

    def update(self, done: float, total: float, what: str) -> None:
        """Show the state after `done` of `total`, in any one unit; cheap to call often."""
        if not self._begun:
            # What is done at the first call may be an earlier process's and tells nothing of pace.
            self._begun, self.first, self._started = True, done, time.monotonic()
        self.total = total
        if self._due(done):
            self._show(done, f"{done / max(total, 1e-9):4.0%}", what)
