"""The rule by which kernels are judged, and two sources of trouble: poison and guard bands."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nanogpt.kernels import launch_triton
from nanogpt.kernels.launch_triton import Target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 is wrong; on a device it is tested like the rest.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
# The pointer path and the path of tensor descriptors; a device has its own.
TARGETS = [None] if torch.cuda.is_available() else [Target(80, 4), Target(90, 4)]


def assert_exact(ours, torchs, exact, floor=1.0):
    """|ours - exact| <= 2 |torch in the same dtype - exact| + tiny: the hardware sets the limit.

    `floor` is the size of the numbers that were added up, where the exact result is near zero.
    """
    assert ours.shape == exact.shape
    tiny = 4 * torch.finfo(torchs.dtype).eps * max(exact.abs().max().item(), floor)
    limit = 2 * (torchs.double() - exact).abs().max().item() + tiny
    error = (ours.double() - exact).abs().max().item()
    assert error <= limit, f"error {error:.3g} above {limit:.3g}"


def outputs_and_gradients(function, tensors, dtype=None, seed=1):
    """[outputs…, gradients…] of `function` for fixed random weights of its outputs."""
    leaves = [None if x is None else x.detach().to(dtype or x.dtype) for x in tensors]
    leaves = [None if x is None else x.requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator, device=x.device) for x in outputs]
    weights = [w.to(x.dtype) for w, x in zip(weights, outputs, strict=True)]
    wanted = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(outputs, wanted, weights)
    return [*(x.detach() for x in outputs), *gradients]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN, and only what repeats bit for bit may run."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def compiled_for(target: Target | None) -> Iterator[None]:
    """Launchers take the path of `target`."""
    launch_triton.compile_for = target
    try:
        yield
    finally:
        launch_triton.compile_for = None
