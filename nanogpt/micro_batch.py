"""The micro-batch of every step: where memory runs out it is halved, and the run goes on.

The sizes so far are kept in run.json as [first step, size] pairs, written before a step is
repeated. A run that goes on from an older checkpoint therefore computes every step once more with
the size that it had, and ends with the same weights as one that was never interrupted.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from nanogpt import machine
from nanogpt.errors import NanoGPTError, is_out_of_memory
from nanogpt.plan import Plan
from nanogpt.run_directory import RunDirectory
from nanogpt.trainer import Outcome, Trainer

_NAME = "micro_batches"
Result = tuple[float, float] | Outcome
Step = Callable[[Plan, Trainer, Callable[..., Any], np.ndarray], Result]


class MicroBatches:
    """Sizes of the micro-batch, by the step from which they hold.

    Args:
        plan: of the run; its micro-batch is the first one.
        folder: the run's directory, which keeps them.
        say: receives a sentence and the step about each size that did not fit.
    """

    def __init__(self, plan: Plan, folder: RunDirectory, say: Callable[[int, str], None]) -> None:
        self._plan, self._folder, self._say = plan, folder, say
        self.sizes = stored_sizes(folder) or [[0, plan.micro_batch_size]]

    def at(self, step: int) -> int:
        """The size of a step's micro-batch: the smallest that holds so far."""
        return min(size for first, size in self.sizes if first <= step)

    def take(
        self, step: Step, trainer: Trainer, model: Callable[..., Any], windows: np.ndarray
    ) -> Result:
        """One optimizer step, repeated with half the micro-batch until it fits.

        The effective batch and its windows stay, and what was computed of it is discarded: the
        weights are those before the step, and nothing counts twice.

        Returns: what `step` returns.
        Raises: NanoGPTError where a single sequence does not fit.
        """
        position = trainer.position
        while True:
            size = min(self.at(position.step), len(windows))
            try:
                return step(replace(self._plan, micro_batch_size=size), trainer, model, windows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error).splitlines()[0] if str(error) else type(error).__name__
            # Out of the handler: the error's traceback holds on to the activations.
            _discard(trainer)
            if size == 1:
                raise NanoGPTError(self._advice(message))
            self._halve(position.step, size, message)

    def _halve(self, step: int, size: int, message: str) -> None:
        smaller = size // 2
        self.sizes = [*(pair for pair in self.sizes if pair[0] < step), [step, smaller]]
        self._say(
            step,
            f"out of memory with {size:,} sequences at once ({message[:200]}): from step "
            f"{step + 1:,} on {smaller:,} are computed at once, and the batch stays "
            f"{self._plan.batch_size:,}",
        )
        try:
            self._folder.remember(**{_NAME: self.sizes})
        except OSError as error:
            reason = error.strerror or error
            self._say(step, f"the smaller micro-batch cannot be written to run.json: {reason}")

    def _advice(self, message: str) -> str:
        shape, config = self._plan.shape, self._plan.config
        ways = ["a smaller --block-size, --n-embd or --n-layer"]
        ways += [] if config.recompute else ["--recompute"]
        if self._plan.device.type == "cuda" and self._plan.dtype == torch.float32:
            ways.append("--dtype bfloat16")
        return (
            f"out of memory with a single sequence of {shape.block_size:,} tokens at once "
            f"({message[:200]}): {' or '.join(ways)} needs less"
        )


def stored_sizes(folder: RunDirectory) -> list[list[int]] | None:
    """[first step, size] pairs of a run that has begun, or None."""
    pairs = (folder.read_identity() or {}).get(_NAME)
    if not isinstance(pairs, list) or not pairs:
        return None
    for pair in pairs:
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)
        if not whole or pair[0] < 0 or pair[1] < 1:
            return None
    return pairs if any(first == 0 for first, _ in pairs) else None


def _discard(trainer: Trainer) -> None:
    """Forget a step that was cut off, and give its memory back."""
    trainer.optimizer.zero_grad(set_to_none=True)
    machine.give_back_memory()
