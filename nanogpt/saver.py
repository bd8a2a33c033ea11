"""Checkpoints behind a run's back: its state is copied, and one thread writes the copies."""

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from nanogpt import checkpoint
from nanogpt.checkpoint import Snapshot
from nanogpt.model import GPT
from nanogpt.run_directory import Checkpoint, RunDirectory


class Saver:
    """Saves a run while it goes on, one checkpoint after the other.

    A save begins where the one before it has ended, and the end of the context waits for the last.
    One that fails is told at once and changes nothing else: the run goes on, and so does the
    checkpoint before it.

    Args:
        folder: where the checkpoints go.
        start: what the run goes on from; its best model counts until there is a better one.
        warn: receives the sentence about a save that failed, from the thread that writes.
        unit: what the number of a checkpoint counts.
    """

    def __init__(
        self,
        folder: RunDirectory,
        start: Checkpoint | None,
        warn: Callable[[str], None],
        *,
        unit: str = "step",
    ) -> None:
        self._folder, self._warn, self._unit = folder, warn, unit
        self._best: Snapshot | Path | None = None
        self._written: int | None = None
        if start is not None:
            self._best, self._written = start.folder / "best.safetensors", start.state["step"]
        self._thread = _writer()
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            # Of two errors the run's own is the one to tell.
            with contextlib.suppress(Exception) if error else contextlib.nullcontext():
                self.wait()
        finally:
            self._thread.shutdown()

    def save(
        self,
        step: int,
        model: GPT,
        trainer: Mapping[str, Any],
        state: Mapping[str, Any],
        *,
        is_best: bool,
    ) -> None:
        """Copy everything as it is now and have it written.

        Args:
            trainer, state: see `RunDirectory.save`; the sizes of the journals are added here.
            is_best: whether the model is better than those before it; the first one always is.
        """
        self.wait()
        best = self._best
        try:
            taken = checkpoint.snapshot(model)
            best = taken if is_best or best is None else best
            whole = {**state, "journals": self._folder.journal_sizes()}
            copies = _copied(trainer), _copied(whole)
        except (OSError, MemoryError) as error:
            self._failed(step, best, error)
            return
        try:
            self._writing = self._thread.submit(self._write, step, taken, *copies, best)
        except RuntimeError:  # the system gives no thread: the run waits for the checkpoint
            # A writer that could not start keeps what it was given, and would write it one day.
            self._thread = _writer()
            self._write(step, taken, *copies, best)

    def wait(self) -> None:
        """Return once everything is written or has failed.

        Raises: what went wrong in writing, unless it is an OSError or a MemoryError.
        """
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def has(self, step: int) -> bool:
        """Whether the latest checkpoint is of this step and was written."""
        return self.written == step

    @property
    def written(self) -> int | None:
        """The step of the latest checkpoint that was written, by this process or before it."""
        self.wait()
        return self._written

    def goes_on(self) -> str:
        """Where the same command would go on, as the end of a sentence."""
        if self.written is None:
            return "the same command begins anew"
        return f"the same command goes on from {self._unit} {self._written:,}"

    def best(self) -> GPT:
        """The best model so far, in evaluation mode, on the CPU; there has been a save."""
        self.wait()
        assert self._best is not None
        if isinstance(self._best, Snapshot):
            return self._best.to_model()
        return checkpoint.load(self._best)[0]

    def _write(
        self, step: int, model: Snapshot, trainer: Any, state: Any, best: Snapshot | Path
    ) -> None:
        try:
            saved = self._folder.save(step, model, trainer, state, best)
            self._best, self._written = saved.folder / "best.safetensors", step
        except (OSError, MemoryError) as error:
            self._failed(step, best, error)

    def _failed(
        self, step: int, best: Snapshot | Path | None, error: OSError | MemoryError
    ) -> None:
        self._best = best
        reason = getattr(error, "strerror", None) or str(error) or "no memory is left"
        self._warn(f"WARNING: the checkpoint of {self._unit} {step:,} failed: {reason}")


def _writer() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="checkpoint")


def _copied(value: Any) -> Any:
    """The same values, tensors copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copied(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value
