"""The plan of a training run: every choice before the first step, and what identifies the run."""

import hashlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from nanogpt import metadata
from nanogpt.config import (
    PRESETS,
    GPTConfig,
    TrainConfig,
    as_plain_dict,
    default_learning_rate,
    shape_from_flags,
)
from nanogpt.data import BatchOrder, Corpus
from nanogpt.errors import InputError, UsageError
from nanogpt.model import GPT

_LARGEST_MICRO_BATCH_TOKENS = 65_536
_IDENTITY_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """A run with every choice made; nothing of it changes while it goes on.

    Attributes:
        total_steps: optimizer steps.
        bytes_per_target: raw bytes of validation text per validation target, or None without.
        choices: what was picked, and why, for the user.
    """

    config: TrainConfig
    shape: GPTConfig
    device: torch.device
    dtype: torch.dtype
    micro_batch_size: int
    order: BatchOrder
    total_steps: int
    eval_interval: int
    log_interval: int
    warmup_steps: int
    peak_lr: float
    min_lr: float
    bytes_per_target: float | None
    choices: dict[str, str]

    def learning_rate(self, step: int) -> float:
        """Linear warmup, then a cosine to min_lr at the last step."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / (self.warmup_steps + 1)
        last = max(1, self.total_steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / last)
        return self.min_lr + 0.5 * (self.peak_lr - self.min_lr) * (1 + math.cos(math.pi * progress))

    def bits_per_byte(self, nats_per_target: float) -> float:
        """A loss per token as bits per raw byte of text, which tokenizers cannot change."""
        return nats_per_target / math.log(2) / (self.bytes_per_target or math.nan)


def make_plan(
    config: TrainConfig,
    corpus: Corpus,
    initial: GPT | None,
    device: torch.device,
    dtype: torch.dtype,
    choices: dict[str, str],
) -> Plan:
    """Turn flags and text into a plan.

    Raises: UsageError where the shape is impossible; InputError where the text is too short.
    """
    if initial is None:
        shape = shape_from_flags(config, corpus.tokenizer.vocab_size)
    else:
        shape = GPTConfig(**{**initial.describe()["config"], "dropout": config.dropout})
    if config.compile and device.type == "cpu" and not shutil.which("g++"):
        raise UsageError(
            "--compile needs a C++ compiler (g++) on a CPU: install one or leave it out"
        )
    train_tokens, val_tokens = corpus.split(config.val_fraction)
    order = BatchOrder(len(train_tokens), shape.block_size, config.batch_size, config.seed)
    total = _total_steps(config, order.steps_per_epoch)
    eval_interval = config.eval_interval or min(1000, max(1, math.ceil(total / 10)))
    warmup = config.warmup_steps
    peak = config.learning_rate or default_learning_rate(shape.n_embd)
    if config.min_lr is not None and config.min_lr > peak:
        raise UsageError(f"--min-lr {config.min_lr:g} is above the learning rate, {peak:g}")
    micro = config.micro_batch_size or max(1, _LARGEST_MICRO_BATCH_TOKENS // shape.block_size)
    bytes_per_target = None
    if len(val_tokens) > 1:
        n_bytes = corpus.count_bytes(val_tokens[1:])
        bytes_per_target = n_bytes / (len(val_tokens) - 1) if n_bytes else None
    return Plan(
        config=config,
        shape=shape,
        device=device,
        dtype=dtype,
        micro_batch_size=min(micro, config.batch_size),
        order=order,
        total_steps=total,
        eval_interval=eval_interval,
        log_interval=max(1, total // 1000),
        warmup_steps=min(100, total // 20) if warmup is None else warmup,
        peak_lr=peak,
        min_lr=peak / 10 if config.min_lr is None else config.min_lr,
        bytes_per_target=bytes_per_target,
        choices=choices,
    )


def _total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    epochs = config.epochs
    if epochs is None and config.max_steps is None:
        epochs = 1
    limits = [] if epochs is None else [epochs * steps_per_epoch]
    return min([*limits, *([] if config.max_steps is None else [config.max_steps])])


def check_against_initial(config: TrainConfig, initial: GPT | None) -> None:
    """Flags that contradict the model of --init.

    Raises: UsageError naming the first one; InputError for a model without a tokenizer.
    """
    if initial is None:
        return
    if initial.tokenizer is None:
        raise InputError(f"{config.init} holds no tokenizer, so it cannot read text")
    if config.tokenizer not in (None, initial.tokenizer.kind):
        raise UsageError(
            f"--tokenizer {config.tokenizer}: the model of --init has a "
            f"{initial.tokenizer.kind} tokenizer"
        )
    preset = TrainConfig.__dataclass_fields__["preset"].default
    wanted: dict[str, Any] = dict(PRESETS[config.preset]) if config.preset != preset else {}
    for name in ("n_layer", "n_head", "n_embd", "block_size", "bias"):
        if getattr(config, name) is not None:
            wanted[name] = getattr(config, name)
    for name, value in wanted.items():
        theirs = getattr(initial.config, name)
        if theirs != value:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {value}: the model of --init has {theirs}")


def make_identity(config: TrainConfig, corpus: Corpus, initial: GPT | None) -> dict[str, Any]:
    """What makes two runs the same: flags, text, tokenizer and starting weights."""
    flags = as_plain_dict(config)
    # The paths of text and --init do not matter; what the files hold does.
    own = {
        entry.name: flags[entry.name]
        for entry in fields(config)
        if entry.metadata["identity"] and entry.name not in ("text", "init")
    }
    start = None
    if initial is not None:
        start = metadata.tensor_digest(dict(initial.named_parameters()))
    tokenizer = metadata.canonical_json(corpus.tokenizer.to_dict())
    return {
        **own,
        "text (SHA-256)": corpus.content_sha256,
        "tokenizer (SHA-256)": hashlib.sha256(tokenizer).hexdigest(),
        "init weights (SHA-256)": start,
        "version": _IDENTITY_VERSION,
    }


def first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first entry in which two identities differ, in words, or None."""
    missing = object()
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        there, here = theirs.get(name, missing), ours.get(name, missing)
        if there != here:
            if name not in TrainConfig.__dataclass_fields__:
                return f"its {name.removesuffix(' (SHA-256)')} differs"
            there_text = "not set" if there is missing or there is None else there
            here_text = "not set" if here is missing or here is None else here
            return f"its --{name.replace('_', '-')} is {there_text}, not {here_text}"
    return None


def run_path(
    config: TrainConfig, corpus: Corpus, shape: GPTConfig, identity: dict[str, Any]
) -> Path:
    """Where the run lives: --resume PATH, --run-dir, or a name from what identifies it.

    Raises: InputError where --resume names no run directory.
    """
    if config.resume not in ("auto", "never"):
        path = Path(config.resume)
        if not (path / "run.json").is_file():
            raise InputError(f"--resume {path}: there is no run directory (no run.json in it)")
        return path
    if config.run_dir is not None:
        return Path(config.run_dir)
    digest = hashlib.sha256(metadata.canonical_json(identity)).hexdigest()
    return Path("runs") / f"{corpus.name}-{shape.n_layer}x{shape.n_embd}-{digest[:10]}"


def bpe_vocab_size(config: TrainConfig, note: Callable[[str], None]) -> int | None:
    """--vocab-size for a bpe tokenizer; a note that it is ignored for the others."""
    if config.tokenizer == "bpe":
        return config.vocab_size or 4096
    if config.vocab_size is not None:
        note("--vocab-size applies to --tokenizer bpe only and is ignored")
    return None
