"""The plan of a training run: every choice before the first step, and what identifies the run."""

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from nanogpt import machine, memory, metadata, native
from nanogpt.config import (
    PRESETS,
    SHAPE_FLAGS,
    AdvancedConfig,
    ExploreConfig,
    GPTConfig,
    MachineFlags,
    RunFlags,
    TrainConfig,
    VocabularyFlags,
    as_plain_dict,
    shape_from_flags,
)
from nanogpt.data import BatchOrder, Corpus
from nanogpt.errors import InputError, NanoGPTError, UsageError
from nanogpt.kernels.choice import Workload, choose
from nanogpt.model import GPT
from nanogpt.native_step import choose_engine, unfit
from nanogpt.recipe import RECIPES, Recipe, resolve
from nanogpt.run_directory import Checkpoint, RunDirectory
from nanogpt.tokenizer import Tokenizer

_LARGEST_MICRO_BATCH_TOKENS = 65_536
_IDENTITY_VERSION = 1
_SLOW_PRODUCTS = 2
"""Times as slow as float32 from which a precision that was asked for is remarked on."""
# Tokens of the micro-batch on which the implementations are compared.
_MEASURED_TOKENS = 8_192

AnyRun = TrainConfig | AdvancedConfig


@dataclass(frozen=True)
class Plan:
    """A run with every choice made; nothing of it changes while it goes on.

    Attributes:
        total_steps: optimizer steps.
        bytes_per_target: raw bytes of validation text per validation target, or None without.
        choices: what was picked, and why, for the user.
        engine: who computes the steps: "torch" or "native".
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
    engine: str = "torch"

    def evaluates_after(self, step: int) -> bool:
        """Whether so many steps are followed by an evaluation and a checkpoint."""
        return step == self.total_steps or step % self.eval_interval == 0

    def learning_rate(self, step: int) -> float:
        """Of a step; what is Muon's has a multiple of it."""
        return self.recipe.rate(
            step, self.total_steps, self.warmup_steps, self.peak_lr, self.min_lr
        )

    @property
    def batch_size(self) -> int:
        """Sequences of an optimizer step."""
        return self.order.batch_size

    @property
    def recipe(self) -> Recipe:
        """What --recipe stands for."""
        return RECIPES[self.config.recipe]

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
    config = resolve(config)
    if initial is None:
        shape = shape_from_flags(config, corpus.tokenizer.vocab_size)
    else:
        shape = GPTConfig(**{**initial.describe()["config"], "dropout": config.dropout})
    if config.compile and device.type == "cpu" and not shutil.which("g++"):
        raise UsageError(
            "--compile needs a C++ compiler (g++) on a CPU: install one or leave it out"
        )
    train_tokens, val_tokens = corpus.split(config.val_fraction)
    if config.batch_size is None:  # with --init the recipe waits for the model's context
        config = replace(config, batch_size=RECIPES[config.recipe].sequences(shape.block_size))
    assert config.batch_size is not None
    order = BatchOrder(len(train_tokens), shape.block_size, config.batch_size, config.seed)
    total = _total_steps(config, order.steps_per_epoch)
    recipe = RECIPES[config.recipe]
    usual = min(1000, max(1, math.ceil(total / recipe.evaluations)))
    eval_interval = config.eval_interval or usual
    warmup = config.warmup_steps
    peak = config.learning_rate or recipe.learning_rate(shape.n_embd)
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
        min_lr=peak * recipe.least if config.min_lr is None else config.min_lr,
        bytes_per_target=bytes_per_target,
        choices=choices,
    )


def _total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    epochs = config.epochs
    if epochs is None and config.max_steps is None:
        epochs = 1
    limits = [] if epochs is None else [epochs * steps_per_epoch]
    return min([*limits, *([] if config.max_steps is None else [config.max_steps])])


def check_against_initial(config: AnyRun, initial: GPT | None) -> None:
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
    for name in SHAPE_FLAGS:
        if getattr(config, name) is not None:
            wanted[name] = getattr(config, name)
    for name, value in wanted.items():
        theirs = getattr(initial.config, name)
        flag = name.replace("_", "-")
        if theirs != value and isinstance(value, bool):
            raise UsageError(
                f"--{'' if value else 'no-'}{flag}: the model of --init was made "
                f"with{'' if theirs else 'out'} it"
            )
        if theirs != value:
            raise UsageError(f"--{flag} {value}: the model of --init has {theirs}")


def make_identity(
    config: Any,
    content_sha256: str,
    tokenizer: Tokenizer | None,
    initial: GPT | None,
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What makes two runs the same: flags, text, tokenizer and starting weights.

    Args:
        tokenizer: None where the data alone decide it.
        without: flags that name files, whose content counts instead of their paths.
    """
    flags = as_plain_dict(config)
    own = {
        entry.name: flags[entry.name]
        for entry in fields(config)
        if entry.metadata["identity"] and entry.name not in (*without, "init")
        if entry.metadata["since"] == 1 or flags[entry.name] != entry.default
    }
    start = None
    if initial is not None:
        start = metadata.tensor_digest(dict(initial.named_parameters()))
    vocabulary = None
    if tokenizer is not None:
        description = metadata.canonical_json(tokenizer.to_dict())
        vocabulary = hashlib.sha256(description).hexdigest()
    return {
        **own,
        "text (SHA-256)": content_sha256,
        "tokenizer (SHA-256)": vocabulary,
        "init weights (SHA-256)": start,
        "version": _IDENTITY_VERSION,
    }


def first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first entry in which two identities differ, in words, or None."""
    missing = object()
    configs = (TrainConfig, AdvancedConfig, ExploreConfig)
    known = {name for each in configs for name in each.__dataclass_fields__}
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        there, here = theirs.get(name, missing), ours.get(name, missing)
        if there != here:
            if name not in known:
                return f"its {name.removesuffix(' (SHA-256)')} differs"
            flag = f"its --{name.replace('_', '-')}"
            unset = (missing, None)
            if here in unset:
                there_text = "unknown" if there in unset else there
                return f"{flag} is {there_text}, and here it is not set"
            there_text = "not set" if there in unset else there
            return f"{flag} is {there_text}, not {here}"
    return None


def run_path(
    config: RunFlags, name: str, shape: GPTConfig | None, identity: dict[str, Any]
) -> Path:
    """Where the run lives: --resume PATH, --run-dir, or a name from what identifies it.

    Args:
        shape: goes into the name where it is known.
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
    size = "" if shape is None else f"-{shape.n_layer}x{shape.n_embd}"
    return Path("runs") / f"{name}{size}-{digest[:10]}"


def find_start(
    config: RunFlags, folder: RunDirectory, identity: dict[str, Any]
) -> Checkpoint | None:
    """The checkpoint to go on from, or None to begin.

    Raises: UsageError where the directory holds another configuration's run.
    """
    return folder.newest() if goes_on(config, folder, identity) else None


def goes_on(config: RunFlags, folder: RunDirectory, identity: dict[str, Any]) -> bool:
    """Whether the directory holds this very run and --resume lets it go on.

    Raises: UsageError where the directory holds another configuration's run.
    """
    try:
        found = folder.read_identity()
    except NanoGPTError:
        if config.resume != "never":
            raise
        return False
    if found is None:
        return False
    difference = first_difference(found["identity"], identity)
    if difference:
        raise UsageError(f"{folder.path} holds the run of another configuration: {difference}")
    return config.resume != "never"


def choose_kernels(
    impl: str,
    shape: GPTConfig,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    begun: RunDirectory | None,
) -> tuple[dict[str, str], str]:
    """The implementation of each fused operation, as the run began or measured now, and why.

    Args:
        batch: sequences computed at once.
        begun: the directory of a run that goes on.
    Raises: UsageError where the named implementation cannot run these shapes.
    """
    earlier = (begun.read_identity() or {}).get("kernels") if begun else None
    try:
        return choose(impl, device, workload(shape, dtype, batch), earlier)
    except RuntimeError as error:
        if impl == "auto":
            raise
        raise UsageError(f"--kernels {impl}: {error}; use auto") from None


def workload(shape: GPTConfig, dtype: torch.dtype, batch: int) -> Workload:
    """What the implementations are compared on: a micro-batch of the run, or a part of it."""
    return Workload(
        batch=min(batch, max(1, _MEASURED_TOKENS // shape.block_size)),
        positions=shape.block_size,
        heads=shape.n_head,
        head_width=shape.n_embd // shape.n_head,
        vocabulary=shape.vocab_size,
        dtype=dtype,
    )


def choose_step(plan: Plan, begun: RunDirectory | None) -> tuple[Plan, dict[str, str]]:
    """Who computes the steps and in which precision, as the run began or measured now.

    Args:
        begun: the directory of a run that goes on.
    Returns: the plan with both, and what the run directory keeps of them.
    """
    config, device = plan.config, plan.device
    earlier = _earlier_step(plan, begun)
    isa = ""
    if earlier is not None:
        engine, dtype, why = (
            earlier["engine"],
            machine.DTYPES[earlier["dtype"]],
            "as this run began",
        )
        reason = unfit(plan.shape, device, dtype, compiled=config.compile)
        if engine == "native" and reason is not None:
            engine, why = "torch", f"the native engine began this run and cannot go on: {reason}"
        isa = earlier.get("instruction_set", "")
    else:
        found = choose_engine(
            plan.shape, config.dtype, device, kernels=config.kernels, compiled=config.compile
        )
        engine, dtype, why = found or ("torch", plan.dtype, _emulated(plan))
    name = str(dtype).removeprefix("torch.")
    if why:
        plan.choices["dtype"] = f"{name} ({why})"
    kept = {"engine": engine, "dtype": name, "device": device.type}
    steps = "torch"
    if engine == "native":
        kept["instruction_set"] = native.training_instruction_set(bf16=dtype == torch.bfloat16)
        steps = f"native engine, {name}, {kept['instruction_set']}"
        if isa and isa != kept["instruction_set"]:
            steps += f" (this run began with {isa}: the last bits of its results may change here)"
    plan.choices["steps"] = steps
    return replace(plan, engine=engine, dtype=dtype), kept


def _emulated(plan: Plan) -> str:
    """What to say of a precision that was asked for where the CPU has no products of it."""
    if plan.device.type != "cpu" or plan.dtype == torch.float32:
        return ""
    times = machine.products_slowdown(plan.dtype)
    if times < _SLOW_PRODUCTS:
        return ""
    return f"asked for; this CPU takes {times:.0f} times as long for its products as in float32"


def _earlier_step(plan: Plan, begun: RunDirectory | None) -> dict[str, str] | None:
    """What a run that goes on has kept of its choice for this kind of device, or None."""
    if begun is None:
        return None
    kept = (begun.read_identity() or {}).get("step")
    if kept is None:  # a run of the first version
        return {"engine": "torch", "dtype": str(plan.dtype).removeprefix("torch.")}
    known = isinstance(kept, dict) and kept.get("dtype") in machine.DTYPES
    if not known or kept.get("engine") not in ("native", "torch"):
        return None
    return kept if kept.get("device", plan.device.type) == plan.device.type else None


def forecast_memory(plan: Plan, kernels: Mapping[str, str]) -> memory.Forecast:
    """The peak memory of a run on its device; what the process takes already counts on a CPU.

    Args:
        kernels: the implementation of each operation.
    """
    program = machine.resident_bytes() if plan.device.type == "cpu" else 0
    return memory.forecast(memory_workload(plan, kernels), program)


def memory_workload(plan: Plan, kernels: Mapping[str, str]) -> memory.Workload:
    """What of a plan decides how much memory it takes."""
    return memory.Workload(
        shape=plan.shape,
        batch=plan.micro_batch_size,
        accumulates=plan.micro_batch_size < plan.batch_size,
        product_bytes=plan.dtype.itemsize,
        device=plan.device.type,
        kernels=kernels,
        recompute=plan.config.recompute,
        engine=plan.engine,
        threads=torch.get_num_threads(),
        muon=plan.recipe.muon,
    )


def describe_memory(plan: Plan, forecast: memory.Forecast, kernels: Mapping[str, str]) -> str:
    """The forecast in words, and where it is more than there is, what would help."""
    free = machine.available_bytes(plan.device)
    there = "" if free is None else f" of {_gigabytes(forecast.program + free)}"
    parts = [("weights and optimizer", forecast.weights + forecast.optimizer)]
    if forecast.evaluation > forecast.step:
        parts.append(("evaluation", forecast.evaluation))
    else:
        parts.append(("a step", forecast.step))
    if plan.device.type == "cpu":
        parts = [("program", forecast.program), *parts, ("saving", forecast.saving)]
    shown = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts)
    line = f"about {_gigabytes(forecast.total)}{there} (forecast: {shown})"
    if free is None or forecast.model <= free:
        return line
    return f"{line}. WARNING: this may not fit: {_remedies(plan, free, kernels)}"


def _remedies(plan: Plan, free: int, kernels: Mapping[str, str]) -> str:
    """Flags with which a run would fit into so many bytes."""
    work = memory_workload(plan, kernels)
    less = replace(work, recompute=True)
    found = []
    batch = memory.largest_batch(work, free)
    if batch is not None:
        found.append(f"--micro-batch-size {batch}")
    if not work.recompute and memory.forecast(less).model <= free:
        found.append("--recompute")
    if not found and not work.recompute:
        batch = memory.largest_batch(less, free)
        if batch is not None:
            found.append(f"--recompute --micro-batch-size {batch}")
    if not found:
        return "a smaller --block-size, --n-embd or --n-layer would take less"
    return f"{' or '.join(found)} would"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def keep_threads(threads: int | None, begun: RunDirectory, choices: dict[str, str]) -> None:
    """Compute with as many threads as the run began with: the order of sums depends on it.

    Args:
        threads: of --threads, which wins.
        begun: the directory of a run that goes on.
        choices: told what was picked.
    """
    earlier = (begun.read_identity() or {}).get("threads")
    if threads is None and isinstance(earlier, int) and earlier > 0:
        machine.set_threads(earlier)
        choices["threads"] = f"{earlier} (as this run began)"


def machine_choices(config: MachineFlags) -> tuple[torch.device, torch.dtype, dict[str, str]]:
    """Device, precision, and what was picked for the machine, in words; --threads is applied."""
    device = machine.resolve_device(config.device)
    dtype, why = machine.resolve_dtype(config.dtype, device)
    choices = {
        "device": str(device),
        "dtype": f"{str(dtype).removeprefix('torch.')} ({why})",
        "kernels": machine.check_kernels(config.kernels, device),
        "threads": machine.set_threads(config.threads),
    }
    return device, dtype, choices


def bpe_vocab_size(config: VocabularyFlags, note: Callable[[str], None]) -> int | None:
    """--vocab-size for a bpe tokenizer; a note that it is ignored for the others."""
    if config.tokenizer == "bpe":
        return config.vocab_size or 4096
    if config.vocab_size is not None:
        note("--vocab-size applies to --tokenizer bpe only and is ignored")
    return None
