"""The steps of a training run without its files: what a measurement of training goes through."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nanogpt.config import TrainConfig
from nanogpt.data import Corpus, gather
from nanogpt.model import GPT
from nanogpt.plan import choose_kernels, choose_step, machine_choices, make_plan
from nanogpt.tokenizer import CharTokenizer
from nanogpt.trainer import Outcome, make_trainer, optimizer_step

_FIRST_CHARACTER = 0x100


class Rehearsal:
    """Everything that `train` decides and builds before its first step, and that step.

    Attributes:
        plan: every choice; `plan.choices` says them in words.
        trainer: model, optimizer and position.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, initial: GPT | None = None) -> None:
        """Args: as `make_plan`; weights are those of `initial`, or new ones."""
        device, dtype, choices = machine_choices(config)
        self.plan = make_plan(config, corpus, initial, device, dtype, choices)
        picked, choices["kernels"] = choose_kernels(
            config.kernels, self.plan.shape, device, dtype, self.plan.micro_batch_size, None
        )
        self.kernels = picked
        self.plan, _ = choose_step(self.plan, None)
        self.trainer = make_trainer(self.plan, corpus, initial, None, picked)
        self.trainer.model.train()
        self._tokens, _ = corpus.split(config.val_fraction)
        whole = self.trainer.model
        self._model: Callable[..., Any] = torch.compile(whole) if config.compile else whole

    def step(self, windows: np.ndarray | None = None) -> float:
        """One optimizer step: its mean loss in nats.

        Args:
            windows: (B, T + 1) ids; by default the run's own next ones.
        """
        position = self.trainer.position
        if windows is None:
            starts = self.plan.order.starts(position.step)
            windows = gather(self._tokens, starts, self.plan.shape.block_size)
        outcome = optimizer_step(self.plan, self.trainer, self._model, windows)
        position.step += 1
        return (outcome.read() if isinstance(outcome, Outcome) else outcome)[0]


def random_corpus(vocab_size: int, n_tokens: int) -> Corpus:
    """Tokens drawn evenly from a character vocabulary of `vocab_size` ids, the special one too.

    Raises: ValueError where there are not so many characters.
    """
    if not 2 <= vocab_size <= 0xD800 - _FIRST_CHARACTER:
        raise ValueError(f"there is no character vocabulary of {vocab_size} ids")
    letters = "".join(map(chr, range(_FIRST_CHARACTER, _FIRST_CHARACTER + vocab_size - 1)))
    ids = np.random.default_rng(0).integers(0, vocab_size - 1, n_tokens)
    kind = np.uint16 if vocab_size <= 2**16 else np.uint32
    return Corpus(ids.astype(kind), CharTokenizer(letters), 1, 2 * n_tokens, "", "random")
