"""What the launchers of all Triton kernels share: the device, its limits, opaque operators."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Target:
    """The device that kernels are compiled for.

    Attributes:
        capability: compute capability times ten: 80, 90, 100.
        multiprocessors: how many programs run side by side at least.
    """

    capability: int
    multiprocessors: int

    @property
    def generation(self) -> int:
        """The key of the tile tables: 90, 100, or 80 for all others.

        Those from 120 on have the instructions and the 99 KB of shared memory of older small GPUs.
        """
        if self.capability < 90 or self.capability >= 120:
            return 80
        return 90 if self.capability < 100 else 100


# Set while nanogpt.kernels.codegen compiles for a device that is not here (tensors on "meta").
compile_for: Target | None = None


def target_of(x: torch.Tensor) -> Target:
    """The target of the device that holds `x`."""
    if compile_for is not None:
        return compile_for
    if x.device.type != "cuda":
        return Target(80, 4)  # the interpreter: the pointer path, few programs
    return _target(x.device.index or 0)


@functools.cache
def _target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


def refuse_dtype(name: str, x: torch.Tensor) -> str | None:
    """Why kernels cannot read `x`, or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{name} is {x.dtype}; the kernels take float32, float16 and bfloat16"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return f"{name} is bfloat16, which Triton's interpreter computes wrongly"
    return None


def refuse_dtypes(**named: torch.Tensor | None) -> str | None:
    """Why kernels cannot read one of these, or what an autocast region makes of them, or None."""
    for name, x in named.items():
        reason = None if x is None else refuse_dtype(name, x)
        if reason is not None:
            return reason
    x = next(x for x in named.values() if x is not None)
    cast = autocast_dtype(x)
    return None if cast is None else refuse_dtype("autocast's product", x.new_empty(0, dtype=cast))


def fits_descriptor(x: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can address `x`: 16-byte strides, last stride 1."""
    size = x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in x.stride()[:-1])
    return aligned and x.stride(-1) == 1 and 0 not in x.shape and 0 not in x.stride()


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where its rows begin at multiples of 16 elements, else a copy that is so.

    Rows that are not aligned so are read element by element (Triton knows of no other alignment),
    which costs more than the copy, and descriptors cannot address them.
    """
    strides = x.stride()
    fits = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides[:-1])
    if fits and strides[-1] == 1 and 0 not in strides:
        return x
    width = -(-x.shape[-1] // 16) * 16
    return x.new_empty(*x.shape[:-1], width)[..., : x.shape[-1]].copy_(x)


def dot_precision(exact: str = "tf32x3") -> str:
    """How float32 products are made: tf32 only where torch was told so, else `exact`.

    Args:
        exact: "tf32x3", three products that keep float32's accuracy, or "ieee", which needs fewer
            registers.
    """
    # The older allow_tf32 sets this too, but raises when read after this was set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else exact


_Function = TypeVar("_Function", bound=Callable[..., Any])


def operator(name: str, fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    """Decorate a launcher: opaque to torch.compile, which sees one node; called directly else.

    Args:
        fake: gives the results' shapes and dtypes for torch.compile, from the same arguments.
        mutates: names of the arguments that are written.
    """

    def wrap(function: _Function) -> _Function:
        custom = torch.library.custom_op(f"nanogpt::{name}", function, mutates_args=mutates)
        custom.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return custom(*args) if torch.compiler.is_compiling() else function(*args)

        return call  # type: ignore[return-value]

    return wrap


def device_of(x: torch.Tensor) -> Any:
    """A context in which kernels go to x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The precision of products in an autocast region, or None outside."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
