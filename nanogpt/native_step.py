"""A training step by the native engine: loss, gradients and the optimizer's update, without torch.

The engine works in place on the model's weights, on their `grad` and on the state of the torch
optimizer, so that a checkpoint is the same whoever computed the step.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from nanogpt import machine, native
from nanogpt.config import GPTConfig
from nanogpt.model import GPT
from nanogpt.muon import start_state

_MEASURED_TOKENS = 512
_REPEATS = 5


def unfit(
    shape: GPTConfig, device: torch.device, dtype: torch.dtype, *, compiled: bool = False
) -> str | None:
    """Why the engine cannot train such a model here, in words, or None."""
    if device.type != "cpu":
        return f"the device is {device}"
    if compiled:
        return "--compile is torch's"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it has no {str(dtype).removeprefix('torch.')}"
    if not native.available():
        return native.why_not()
    return native.training_unfit(shape, bf16=dtype == torch.bfloat16) or None


class NativeStep:
    """The engine's training step, bound to a model.

    Args:
        model: float32, on the CPU. Its parameters get a `grad` each, which stays theirs; its
            `recompute` holds here too.
        dtype: of the operands of products; float32 or bfloat16.
        threads: CPU threads. Results do not depend on them.
    Raises: UsageError where it cannot run; see `unfit`.
    """

    def __init__(self, model: GPT, dtype: torch.dtype, threads: int) -> None:
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._grads = {parameter: torch.zeros_like(parameter) for parameter in self._names}
        self._places = [parameter.data_ptr() for parameter in self._names]
        self._own_gradients()
        self._step = native.training_step(
            model.config,
            {name: (numbers(p), numbers(self._grads[p])) for p, name in self._names.items()},
            bf16=dtype == torch.bfloat16,
            threads=threads,
            recompute=model.recompute,
        )

    @property
    def workspace_bytes(self) -> int:
        """What the passes so far have made room for."""
        return self._step.workspace_bytes

    @property
    def instruction_set(self) -> str:
        return self._step.instruction_set

    def gradients(
        self, windows: np.ndarray, *, scale: float = 1.0, add: bool = False, dropout_seed: int = 0
    ) -> float:
        """The mean loss in nats of windows (B, T + 1); gradients of scale times it are written.

        Args:
            add: they are added to what is there.
            dropout_seed: 64 bits, of which what is dropped is a function.
        """
        self._own_gradients()
        return self._step.gradients(windows, scale=scale, add=add, dropout_seed=dropout_seed)

    def dropout_masks(self) -> np.ndarray:
        """What the last `gradients` kept (1) or dropped (0): (2 L + 1, N, C) uint8.

        Of the embeddings, then of attention and feed-forward of each layer.
        """
        return self._step.dropout_masks()

    def loss(self, windows: np.ndarray) -> float:
        """The mean loss in nats of windows (B, T + 1)."""
        return self._step.loss(windows)

    def gradient_norm(self) -> float:
        """The Euclidean norm of all gradients."""
        return self._step.gradient_norm()

    def update(self, optimizer: torch.optim.Optimizer, grad_scale: float = 1.0) -> None:
        """One step of an AdamW or a Muon that has this model's parameters.

        Args:
            grad_scale: the gradients count so much.
        """
        for group in optimizer.param_groups:
            arrays = self._arrays(optimizer, group)
            if "parts" in group:
                self._step.muon(
                    arrays,
                    lr=group["lr"],
                    momentum=group["momentum"],
                    weight_decay=group["weight_decay"],
                    grad_scale=grad_scale,
                )
            elif arrays:
                steps = [optimizer.state[p]["step"] for p in group["params"]]
                self._step.adamw(
                    arrays,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    count=int(steps[0]) + 1,
                    grad_scale=grad_scale,
                )
                torch._foreach_add_(steps, 1)
        # Torch counts changes of a tensor, and others ask it; these it has not seen.
        torch.autograd.graph.increment_version(list(self._names))

    def _own_gradients(self) -> None:
        """The parameters' `grad` are what the engine writes, whatever has become of them since.

        Raises: RuntimeError where a parameter no longer lies where the engine knows it.
        """
        if [parameter.data_ptr() for parameter in self._names] != self._places:
            raise RuntimeError("the model's parameters have moved: bind a new NativeStep to it")
        for parameter, grad in self._grads.items():
            parameter.grad = grad

    def _arrays(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state of a group by the parameters' names, shared."""
        arrays: dict[str, Any] = {}
        for parameter in group["params"]:
            start_state(optimizer, group, parameter)
            state, name = optimizer.state[parameter], self._names[parameter]
            if "parts" in group:
                arrays[name] = (numbers(state["momentum_buffer"]), group["parts"])
            else:
                arrays[name] = (numbers(state["exp_avg"]), numbers(state["exp_avg_sq"]))
        return arrays


def numbers(tensor: torch.Tensor | None) -> np.ndarray:
    """A tensor's own numbers."""
    assert tensor is not None
    array: np.ndarray = tensor.detach().numpy()
    return array


def choose_engine(
    shape: GPTConfig, wanted: str, device: torch.device, *, kernels: str, compiled: bool
) -> tuple[str, torch.dtype, str] | None:
    """Who computes the steps on this CPU, "native" or "torch", in which precision, and why.

    One block of the model's widths is trained for a few hundred tokens by each candidate.

    Args:
        wanted: --dtype; "auto" leaves it to the measurement.
        kernels: --kernels; a name means torch's path.
    Returns: None where only torch can, in the precision that it would have anyway.
    """
    if kernels != "auto":
        return None
    dtypes = (torch.float32, torch.bfloat16) if wanted == "auto" else (machine.DTYPES[wanted],)
    native_dtypes = [d for d in dtypes if unfit(shape, device, d, compiled=compiled) is None]
    if not native_dtypes:
        return None
    candidates = [("native", dtype) for dtype in native_dtypes]
    if (
        native.training_instruction_set(bf16=False) in ("scalar", "neon")
        and torch.float32 in dtypes
    ):
        candidates.append(("torch", torch.float32))  # which has libraries for such processors
    if machine.has_matrix_tiles() and torch.bfloat16 in dtypes:
        candidates.append(("torch", torch.bfloat16))
    if len(candidates) == 1:
        return *candidates[0], "asked for" if wanted != "auto" else "the only one here"
    steps = {each: _step_of_one_block(shape, *each) for each in candidates}
    seconds = dict.fromkeys(candidates, math.inf)
    for _ in range(_REPEATS):  # by turns, so that another program's work falls on all of them
        for each, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[each] = min(seconds[each], time.perf_counter() - started)
    best = min(seconds, key=lambda each: seconds[each])
    others = ", ".join(
        f"{seconds[each] / seconds[best]:.1f} times as fast as {each[0]} "
        f"{str(each[1]).removeprefix('torch.')}"
        for each in candidates
        if each != best
    )
    return *best, f"measured: {others}"


def _step_of_one_block(shape: GPTConfig, engine: str, dtype: torch.dtype) -> Callable[[], object]:
    """Loss and gradients of a model with one block of these widths."""
    small = GPTConfig(
        vocab_size=min(shape.vocab_size, 512),
        block_size=min(shape.block_size, _MEASURED_TOKENS),
        n_layer=1,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
    )
    batch = max(1, _MEASURED_TOKENS // small.block_size)
    windows = np.zeros((batch, small.block_size + 1), dtype=np.int64)
    windows += np.arange(small.block_size + 1) % small.vocab_size
    with torch.random.fork_rng(devices=[]):
        model = GPT(small)
    if engine == "native":
        return partial(NativeStep(model, dtype, torch.get_num_threads()).gradients, windows)
    tokens = torch.from_numpy(windows)

    def step() -> object:
        with machine.autocast(torch.device("cpu"), dtype):
            _, loss = model(tokens[:, :-1], tokens[:, 1:], return_logits=False)
        loss.backward()
        return loss

    return step
