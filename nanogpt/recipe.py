"""What --recipe stands for: the defaults, the optimizer and the schedule of a training run.

A flag that is given wins over its recipe.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from nanogpt.config import TrainConfig, default_learning_rate, shape_from_flags


@dataclass(frozen=True)
class Recipe:
    """The choices that flags leave open.

    Attributes:
        shape: of the model, where neither a flag nor --init says so.
        tiny_block_size: the context of the smallest preset, or None for the preset's.
        batch_tokens: of an optimizer step; None for 64 sequences.
        max_steps: where neither --epochs nor --max-steps is given; None for one epoch.
        muon: whether the blocks' matrices are Muon's.
        quick_beginning: whether weights begin as `GPT.begin_quickly` makes them.
        decay: the part of the steps in which the rate falls, linearly; None for a cosine.
        least: the last rate as a part of the peak.
        evaluations: of a run, where --eval-interval is not given.
    """

    name: str
    shape: dict[str, Any]
    tiny_block_size: int | None = None
    batch_tokens: int | None = None
    max_steps: int | None = None
    muon: bool = False
    quick_beginning: bool = False
    decay: float | None = None
    least: float = 0.1
    evaluations: int = 10

    def sequences(self, block_size: int) -> int:
        """Of an optimizer step, where --batch-size is not given."""
        return max(1, round(self.batch_tokens / block_size)) if self.batch_tokens else 64

    def learning_rate(self, n_embd: int) -> float:
        """Of AdamW, at the peak."""
        return default_learning_rate(n_embd) * (1.5 if self.muon else 1.0)

    def rate(self, step: int, total: int, warmup: int, peak: float, least: float) -> float:
        """The learning rate of a step."""
        if self.decay is None:
            return scheduled_rate(step, total, warmup, peak, least)
        return trapezoid_rate(step, total, warmup, peak, least, self.decay)


RECIPES = {
    "standard": Recipe("standard", shape={}),
    "speed": Recipe(
        "speed",
        shape={"rotary": True, "qk_norm": True},
        tiny_block_size=64,
        batch_tokens=768,
        max_steps=250,
        muon=True,
        quick_beginning=True,
        decay=0.5,
        least=0.0,
        evaluations=1,
    ),
}

MUON_RATE = 0.03
"""Muon's learning rate at the peak of the schedule: one for all widths."""
MUON_MOMENTUM = 0.9


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with what its recipe says in place of flags that were not given.

    With --init the batch stays open, since it depends on the model's context.
    """
    recipe = RECIPES[config.recipe]
    found: dict[str, Any] = {}
    if config.init is None:
        found |= {
            name: value for name, value in recipe.shape.items() if getattr(config, name) is None
        }
        if recipe.tiny_block_size and config.preset == "tiny" and config.block_size is None:
            found["block_size"] = recipe.tiny_block_size
    if config.max_steps is None and config.epochs is None:
        found["max_steps"] = recipe.max_steps
    if config.batch_size is None and config.init is None:
        block = shape_from_flags(replace(config, **found), vocab_size=257).block_size
        found["batch_size"] = recipe.sequences(block)
    return replace(config, **found)


def scheduled_rate(step: int, total: int, warmup: int, peak: float, least: float) -> float:
    """Linear warmup, then a cosine to `least` at the last step."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    last = max(1, total - 1 - warmup)
    progress = min(1.0, (step - warmup) / last)
    return least + 0.5 * (peak - least) * (1 + math.cos(math.pi * progress))


def trapezoid_rate(
    step: int, total: int, warmup: int, peak: float, least: float, decay: float
) -> float:
    """Linear warmup, the peak, and in the last part `decay` of the steps a straight way down.

    Source: Hägele et al. 2024, Scaling laws and compute-optimal training beyond fixed training
    durations (arXiv:2405.18392).
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    left = (total - step) / max(1.0, decay * total)
    return least + (peak - least) * min(1.0, left)
