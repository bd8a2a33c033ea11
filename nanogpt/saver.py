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
        if start is not None:
            self._best = start.folder / "best.safetensors"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._written: int | None = None

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
            trainer, state: see `RunDirectory.save`.
            is_best: whether the model is better than those before it; the first one always is.
        """
        self.wait()
        taken = checkpoint.snapshot(model)
        copies = _copied(trainer), _copied(state)
        self._writing = self._thread.submit(self._write, step, taken, *copies, is_best)

    def wait(self) -> None:
        """Return once everything is written or has failed.

        Raises: what went wrong in writing, unless it is an OSError.
        """
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def has(self, step: int) -> bool:
        """Whether the latest checkpoint is of this step and was written."""
        self.wait()
        return self._written == step

    def best(self) -> GPT:
        """The best model so far, in evaluation mode, on the CPU; there has been a save."""
        self.wait()
        assert self._best is not None
        if isinstance(self._best, Snapshot):
            return self._best.to_model()
        return checkpoint.load(self._best)[0]

    def _write(self, step: int, model: Snapshot, trainer: Any, state: Any, is_best: bool) -> None:
        best = model if is_best or self._best is None else self._best
        try:
            saved = self._folder.save(step, model, trainer, state, best)
            self._best, self._written = saved.folder / "best.safetensors", step
        except OSError as error:
            self._best = best
            reason = error.strerror or error
            self._warn(f"WARNING: the checkpoint of {self._unit} {step:,} failed: {reason}")


def _copied(value: Any) -> Any:
    """The same values, tensors copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copied(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value
