"""One rule for all operations: `auto` picks, a named implementation never falls back."""

import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch.autograd.function import once_differentiable

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")
OPERATIONS = ("attention", "ffn", "cross_entropy", "layer_norm")
OLDEST_CAPABILITY = (8, 0)

_T = TypeVar("_T")


def unsupported(impl: str, device: torch.device | str = "cpu") -> str | None:
    """Why `impl` cannot run on `device` in this installation, or None where it can.

    Raises: ValueError for a name that is not in IMPLEMENTATIONS.
    """
    _check_name(impl)
    return _no_triton(torch.device(device)) if impl == "triton" else None


def resolve(operation: str, impl: str, *tensors: torch.Tensor | None) -> str:
    """The implementation that runs for the requested `impl`: "triton", "torch" or "reference".

    Args:
        operation: one of OPERATIONS.
        tensors: the operation's arguments, which its Triton kernels may not support.
    Raises: ValueError for an unknown name; RuntimeError with the reason where a named
        implementation cannot run.
    """
    if impl in ("torch", "reference"):
        return impl
    _check_name(impl)
    given = [tensor for tensor in tensors if tensor is not None]
    if impl == "auto" and given[0].device.type != "cuda":
        return "torch"  # Triton's interpreter is for tests
    reason = _no_triton(given[0].device) or triton_kernels(operation).unsupported(*tensors)
    if reason is None:
        return "triton"
    if impl == "triton":
        raise RuntimeError(f'{operation}: impl="triton" cannot run: {reason}')
    return "torch"


def describe(impl: str, device: torch.device | str = "cpu") -> str:
    """One line for the user: what `impl` resolves to on `device`, and why.

    Raises: RuntimeError where a named implementation cannot run there.
    """
    reason = unsupported(impl, device)
    if reason is not None:
        raise RuntimeError(f'impl="{impl}" cannot run: {reason}')
    if impl != "auto":
        return f"{impl} (asked for)"
    if torch.device(device).type == "cpu":
        return "torch (auto: the Triton kernels are for a GPU)"
    reason = _no_triton(torch.device(device))
    return "triton (auto)" if reason is None else f"torch (auto: {reason})"


def check_devices(**named: torch.Tensor | None) -> None:
    """Raises: ValueError where a tensor is on another device than the first one."""
    (first, reference), *others = named.items()
    assert reference is not None
    for name, tensor in others:
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(f"{name} is on {tensor.device}, but {first} is on {reference.device}")


def triton_kernels(operation: str) -> ModuleType:
    """The Triton side of an operation, imported when it is first needed."""
    if operation == "attention":
        from nanogpt.kernels import attention_triton

        return attention_triton
    if operation == "ffn":
        from nanogpt.kernels import ffn_triton

        return ffn_triton
    if operation == "cross_entropy":
        from nanogpt.kernels import cross_entropy_triton

        return cross_entropy_triton
    from nanogpt.kernels import layer_norm_triton

    return layer_norm_triton


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a backward: a second derivative is refused whatever the first was multiplied by.

    (torch's own once_differentiable refuses only where the incoming gradient needs one itself;
    elsewhere it would drop the second derivative without a word.)
    """
    refusing = once_differentiable(backward)

    def call(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = tuple(g if g is None else g.detach().requires_grad_() for g in gradients)
        return refusing(ctx, *gradients)

    return call


def _check_name(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, not {impl!r}")


def constant_when_compiled(function: Callable[..., _T]) -> Callable[..., _T]:
    """torch.compile calls the function while it traces, and takes the result for a constant.

    As torch.compiler.assume_constant_result, which would import the whole compiler for it: three
    seconds at the start of every process.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def _no_triton(device: torch.device) -> str | None:
    """Why no Triton kernel can run on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton runs on a GPU, or on a CPU under TRITON_INTERPRET=1 (slow, for tests)"
    if device.type != "cuda" or torch.version.hip:
        return f"the Triton kernels are for NVIDIA GPUs, not for {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        major, minor = capability
        return f"they need compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None
