"""The moving parts of a run: model, optimizer, position; one step and one evaluation."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nanogpt import machine
from nanogpt.data import Corpus, gather, validation_windows
from nanogpt.errors import is_out_of_memory
from nanogpt.memory import evaluation_batch
from nanogpt.model import GPT
from nanogpt.muon import Muon, start_state
from nanogpt.native_step import NativeStep
from nanogpt.plan import Plan
from nanogpt.recipe import MUON_MOMENTUM, MUON_RATE, RECIPES
from nanogpt.run_directory import Checkpoint


@dataclass
class Position:
    """Where a run is; saved in every checkpoint and restored from it.

    Attributes:
        step: optimizer steps done.
        seconds: time of all processes of the run so far.
        loss_sum, loss_count: the training losses since the last row of metrics.
        row_seconds, row_tokens: time and tokens of the steps since then.
        recent: [training, validation] loss of the last evaluations, for the alarm.
    """

    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    row_seconds: float = 0.0
    row_tokens: int = 0
    skipped_steps: int = 0
    best_step: int | None = None
    best_val_loss: float | None = None
    recent: list[list[float]] = field(default_factory=list)
    finished: bool = False


@dataclass
class Trainer:
    """The moving parts of a run.

    Attributes:
        native: computes the steps where the native engine does, else None.
        deferring: whether `optimizer_step` gives an `Outcome` that nothing has waited for.
    """

    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    position: Position
    native: NativeStep | None = None
    deferring: bool = False

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}


def make_trainer(
    plan: Plan,
    corpus: Corpus,
    initial: GPT | None,
    start: Checkpoint | None,
    kernels: Mapping[str, str],
) -> Trainer:
    """Model, optimizer and scaler, new or as they were saved.

    Args:
        kernels: the implementation of each operation.
    """
    torch.manual_seed(plan.config.seed)
    model = start.load_model() if start else GPT(plan.shape)
    if start is None and plan.recipe.quick_beginning:
        model.begin_quickly()
    model.config = plan.shape
    if start is None and initial is not None:
        model.load_state_dict(initial.state_dict())
    model.tokenizer = corpus.tokenizer
    model.mark_calibration_stale()
    model.set_kernels(kernels).to(plan.device)
    model.recompute = plan.config.recompute
    config = plan.config
    betas = (config.beta1, config.beta2)
    if plan.recipe.muon:
        make: Callable[..., torch.optim.Optimizer] = make_muon
    else:
        make = make_plain_adamw if plan.engine == "native" else make_optimizer
    optimizer = make(model, plan.peak_lr, config.weight_decay, betas)
    scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.dtype == torch.float16)
    trainer = Trainer(model, optimizer, scaler, Position())
    reserve_moments(optimizer)
    if start is not None:
        saved = start.load_trainer()
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        trainer.position = Position(**start.state["position"])
    if plan.engine == "native":
        trainer.native = NativeStep(model, plan.dtype, torch.get_num_threads())
    return trainer


def make_optimizer(
    model: torch.nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, fused where torch has it.

    Source: Loshchilov and Hutter 2019, Decoupled weight decay regularization (arXiv:1711.05101).
    """
    groups = _adamw_groups(model.parameters(), lr, weight_decay, betas)
    return torch.optim.AdamW(groups, fused=True)


def make_plain_adamw(
    model: torch.nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]
) -> Muon:
    """The state of `make_optimizer` for the native engine, which needs no torch for the update."""
    return Muon(_adamw_groups(model.parameters(), lr, weight_decay, betas))


def _adamw_groups(
    parameters: Iterable[torch.nn.Parameter],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> list[dict[str, Any]]:
    """Matrices, which decay, and vectors, which do not."""
    parameters = list(parameters)
    return [
        {
            "params": [p for p in parameters if (p.dim() >= 2) == matrices],
            "lr": lr,
            "betas": betas,
            "eps": 1e-8,
            "weight_decay": weight_decay if matrices else 0.0,
        }
        for matrices in (True, False)
    ]


def make_muon(model: GPT, lr: float, weight_decay: float, betas: tuple[float, float]) -> Muon:
    """Muon for the blocks' matrices, AdamW for embeddings and vectors.

    Args:
        lr: AdamW's at the peak; Muon's has a fixed ratio to it.
        weight_decay: of AdamW's matrices; Muon's have none.
    """
    muon: dict[int, list[torch.nn.Parameter]] = {1: [], 3: []}
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".h." in name:
            muon[3 if "c_attn" in name else 1].append(parameter)  # queries, keys and values
        else:
            rest.append(parameter)
    usual = RECIPES["speed"].learning_rate(model.config.n_embd)
    groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "parts": parts,
            "rate": MUON_RATE / usual,
            "lr": lr,
            "momentum": MUON_MOMENTUM,
            "weight_decay": 0.0,
        }
        for parts, parameters in muon.items()
    ]
    groups += _adamw_groups(rest, lr, weight_decay, betas)
    return Muon(groups)


def reserve_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's state before its first step, as zeros, as it would itself in that step.

    An update of the weights then allocates nothing: where memory runs out in a step, it does so
    before any weight has changed, and the step can be repeated.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            start_state(optimizer, group, parameter)


class Outcome:
    """Loss and gradient norm of a step, on their way from the device to the main memory.

    Args:
        values: (2,) on the device.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        self._done: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            # Of this step alone: the device may have the next one to do while it is waited for.
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(values.device))

    def read(self) -> tuple[float, float]:
        """Waits for the step, and for nothing that was begun after it."""
        if self._done is not None:
            self._done.synchronize()
        loss, grad_norm = self._values.tolist()
        return loss, grad_norm


def can_defer(plan: Plan, trainer: Trainer) -> bool:
    """Whether the device can decide by itself that a step is skipped.

    Torch's fused AdamW can; a scaler of float16 and Muon ask the host.
    """
    fused = isinstance(trainer.optimizer, torch.optim.AdamW)
    return plan.device.type == "cuda" and fused and not trainer.scaler.is_enabled()


def optimizer_step(
    plan: Plan, trainer: Trainer, model: Callable[..., Any], windows: np.ndarray
) -> tuple[float, float] | Outcome:
    """One step over a batch of windows (B, T + 1): mean loss in nats and the gradient's norm.

    The weights stay as they are where either is not finite.
    """
    position, config = trainer.position, plan.config
    for group in trainer.optimizer.param_groups:
        group["lr"] = plan.learning_rate(position.step) * group.get("rate", 1.0)
    if trainer.native is not None:
        return _native_step(plan, trainer, trainer.native, windows)
    total = torch.zeros((), device=plan.device)
    for index, first in enumerate(range(0, len(windows), plan.micro_batch_size)):
        part = _on_device(windows[first : first + plan.micro_batch_size], plan.device)
        if plan.shape.dropout:
            seed_dropout(config.seed, position.step, index)
        with machine.autocast(plan.device, plan.dtype):
            _, loss = model(part[:, :-1], part[:, 1:], return_logits=False)
        loss = loss * (len(part) / len(windows))  # windows are equally long: a mean over targets
        trainer.scaler.scale(loss).backward()
        total = total + loss.detach()
    trainer.scaler.unscale_(trainer.optimizer)
    limit = config.grad_clip or math.inf
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), limit)
    outcome = Outcome(torch.stack([total, norm.to(total)]))
    if trainer.deferring:
        is_finite = torch.isfinite(total) & torch.isfinite(norm)
        optimizer: Any = trainer.optimizer
        optimizer.found_inf = (~is_finite).to(torch.float32)  # as a GradScaler tells it
        optimizer.step()
        del optimizer.found_inf
    elif all(map(math.isfinite, outcome.read())):
        trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    trainer.optimizer.zero_grad(set_to_none=True)
    return outcome if trainer.deferring else outcome.read()


def _on_device(windows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Windows where they are computed; a GPU fetches them while it is busy."""
    tokens = torch.from_numpy(windows)
    if device.type == "cuda":
        return tokens.pin_memory().to(device, non_blocking=True)
    return tokens.to(device)


def _native_step(
    plan: Plan, trainer: Trainer, native: NativeStep, windows: np.ndarray
) -> tuple[float, float]:
    total = 0.0
    for index, first in enumerate(range(0, len(windows), plan.micro_batch_size)):
        part = windows[first : first + plan.micro_batch_size]
        share = len(part) / len(windows)
        drawn = dropout_seed(plan.config.seed, trainer.position.step, index)
        loss = native.gradients(part, scale=share, add=index > 0, dropout_seed=drawn)
        total += loss * share
    grad_norm = native.gradient_norm()
    if math.isfinite(total) and math.isfinite(grad_norm):
        limit = plan.config.grad_clip or math.inf
        native.update(trainer.optimizer, grad_scale=min(1.0, limit / (grad_norm + 1e-6)))
    return total, grad_norm


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Dropout is a function of (seed, step, micro-batch), so that a resumed run repeats it."""
    torch.manual_seed(dropout_seed(seed, step, micro_batch))


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """64 bits for the dropout of a micro-batch."""
    words = np.random.SeedSequence((seed, step, micro_batch)).generate_state(2)
    return int(words[0]) << 32 | int(words[1])


@torch.inference_mode()
def evaluate(
    model: GPT,
    tokens: np.ndarray,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    native: NativeStep | None = None,
) -> float:
    """Mean loss in nats per target over all of `tokens`, in consecutive windows of the context.

    Where memory runs out fewer windows are computed at once.

    Args:
        tokens: (n,) ids, n >= 2; the n - 1 targets count once each.
        native: computes it, where it is given, from the same weights.
    """
    was_training = model.training
    model.eval()
    block = model.config.block_size
    size = evaluation_batch(model.config, device.type)
    total, count = 0.0, 0
    for starts, length in validation_windows(len(tokens), block):
        first = 0
        while first < len(starts):
            windows = gather(tokens, starts[first : first + size], length)
            loss = _loss_or_none(model, windows, device, dtype, native)
            if loss is None:
                machine.give_back_memory()
                size = len(windows) // 2
                continue
            first += len(windows)
            targets = len(windows) * length
            total += loss * targets
            count += targets
    model.train(was_training)
    return total / count


def _loss_or_none(
    model: GPT,
    windows: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
    native: NativeStep | None,
) -> float | None:
    """Mean loss of (B, T + 1) windows; None where several of them do not fit into memory."""
    try:
        if native is not None:
            return native.loss(windows)
        part = torch.from_numpy(windows).to(device)
        with machine.autocast(device, dtype):
            return float(model(part[:, :-1], part[:, 1:], return_logits=False)[1])
    except (RuntimeError, MemoryError) as error:
        if len(windows) == 1 or not is_out_of_memory(error):
            raise
    return None


def overfits(recent: list[list[float]]) -> bool:
    """Whether validation rose twice in a row while training fell.

    Args:
        recent: [training, validation] losses of the last three evaluations.
    """
    if len(recent) < 3:
        return False
    (train_0, val_0), (_, val_1), (train_2, val_2) = recent[-3:]
    return val_0 < val_1 < val_2 and train_2 < train_0
