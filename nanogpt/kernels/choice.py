"""Which implementation of each operation is faster here, at the shapes of a run: a measurement.

On a GPU `auto` runs both implementations forward and backward on random numbers, takes Triton only
where it is faster and its results are as close to float32 as torch's are, and says what it saw.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from nanogpt.kernels.attention import causal_attention
from nanogpt.kernels.cross_entropy import linear_cross_entropy
from nanogpt.kernels.dispatch import OPERATIONS, describe, resolve, unsupported
from nanogpt.kernels.ffn import gelu_ffn
from nanogpt.kernels.layer_norm import layer_norm

_REPEATS = 5


@dataclass(frozen=True)
class Workload:
    """What a run asks of the operations: one micro-batch of it.

    Attributes:
        batch, positions: B sequences of T tokens.
        heads, head_width: H and D; the model's width is their product.
        vocabulary: V.
        dtype: of the products.
    """

    batch: int
    positions: int
    heads: int
    head_width: int
    vocabulary: int
    dtype: torch.dtype


def choose(
    impl: str, device: torch.device, workload: Workload, earlier: dict[str, str] | None = None
) -> tuple[dict[str, str], str]:
    """The implementation of each operation, and a line for the user.

    Args:
        impl: what was asked for; a name holds for every operation and is not measured.
        earlier: what an earlier process of the run chose; it is kept.
    Raises: RuntimeError where a named implementation cannot run, with the reason.
    """
    note = ""
    if earlier is not None:
        if all(unsupported(name, device) is None for name in earlier.values()):
            return earlier, f"{_summary(earlier)} (as this run began)"
        note = f"{_summary(earlier)} when this run began, which cannot run here; now "
    if impl == "triton":
        refuse_shape(device, workload.heads, workload.head_width, workload.dtype)
    if impl != "auto" or device.type != "cuda" or unsupported("triton", device) is not None:
        picked = impl if impl != "auto" else "torch"
        return dict.fromkeys(OPERATIONS, picked), note + describe(impl, device)
    picked_by, lines = {}, []
    for operation in OPERATIONS:
        picked_by[operation], line = measure(operation, device, workload)
        lines.append(f"{operation} {line}")
    return picked_by, note + "measured: " + "; ".join(lines)


def refuse_shape(device: torch.device, heads: int, head_width: int, dtype: torch.dtype) -> None:
    """Raises: RuntimeError with the reason where the Triton kernels cannot run such a model."""
    x = torch.empty(0, heads * head_width, device=device, dtype=dtype)
    q = torch.empty(0, heads, 0, head_width, device=device, dtype=dtype)
    given = {
        "attention": (q, q, q),
        "ffn": (x, x, None, x, None),
        "cross_entropy": (x, x),
        "layer_norm": (x, x),
    }
    for operation, tensors in given.items():
        resolve(operation, "triton", *tensors)


def measure(operation: str, device: torch.device, workload: Workload) -> tuple[str, str]:
    """The faster implementation of one operation that is exact enough, and why."""
    try:
        return _compare(operation, device, workload)
    except torch.OutOfMemoryError:
        return "torch", "torch (too little memory to compare the two)"


def _compare(operation: str, device: torch.device, workload: Workload) -> tuple[str, str]:
    call, arguments = calls(device, workload)[operation]
    exact = results(call, [x.float() for x in arguments], "torch")
    theirs = results(call, arguments, "torch")
    try:
        ours = results(call, arguments, "triton")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's or a driver's: whatever it is, torch runs
        first = (str(error).splitlines() or [""])[0]
        return "torch", f"torch (Triton: {type(error).__name__}: {first[:80]})"
    for got, peer, want in zip(ours, theirs, exact, strict=True):
        # The results differ by rounding alone: the rule of the tests.
        tiny = 4 * torch.finfo(workload.dtype).eps * want.abs().max()
        limit = 2 * (peer.float() - want).abs().max() + tiny
        if not bool((got.float() - want).abs().max() <= limit):
            return "torch", "torch (Triton's result is not as exact)"
    del ours, theirs, exact
    seconds = {
        impl: _median_seconds(partial(results, call, arguments, impl), device)
        for impl in ("triton", "torch")
    }
    ratio = seconds["torch"] / seconds["triton"]
    winner = "triton" if ratio >= 1 else "torch"
    return winner, f"{winner} ({ratio:.2f} times torch's speed)"


def calls(
    device: torch.device, work: Workload
) -> dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]]:
    """Each operation with random arguments of the run's shapes; gradients go to all of them.

    Activations have the precision of products; weights and the residual stream are float32.
    """
    width, rows = work.heads * work.head_width, work.batch * work.positions
    generator = torch.Generator(device).manual_seed(0)

    def weight(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator) * scale

    def random(*shape: int) -> torch.Tensor:
        return weight(*shape).to(work.dtype)

    def attention(qkv: torch.Tensor, *, impl: str) -> torch.Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return causal_attention(q, k, v, impl=impl)

    def norm(x: torch.Tensor, r: torch.Tensor, *weights: torch.Tensor, impl: str) -> torch.Tensor:
        y, total = layer_norm(x, *weights, residual=r, impl=impl)
        return y.to(x.dtype) + total  # a product would read y in its own precision

    targets = torch.randint(work.vocabulary, (rows,), device=device, generator=generator)

    def head(hidden: torch.Tensor, weight: torch.Tensor, *, impl: str) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, targets, impl=impl)

    qkv = random(work.batch, work.positions, 3, work.heads, work.head_width)
    x, small = random(rows, width), width**-0.5
    return {
        "attention": (attention, [qkv]),
        "ffn": (
            gelu_ffn,
            [
                x,
                *(weight(4 * width, width, scale=small), weight(4 * width)),
                *(weight(width, 4 * width, scale=small / 2), weight(width)),
            ],
        ),
        "cross_entropy": (head, [x, weight(work.vocabulary, width, scale=0.02)]),
        "layer_norm": (norm, [x, weight(rows, width), weight(width), weight(width)]),
    }


def results(
    call: Callable[..., torch.Tensor], arguments: list[torch.Tensor], impl: str
) -> list[torch.Tensor]:
    """The output and the gradient of every argument."""
    leaves = [x.detach().requires_grad_() for x in arguments]
    half = arguments[0].dtype
    with (
        torch.enable_grad(),
        torch.autocast(arguments[0].device.type, half, enabled=half != torch.float32),
    ):
        out = call(*leaves, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        _synchronise(device)
        started = time.perf_counter()
        work()
        _synchronise(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(picked: dict[str, str]) -> str:
    return ", ".join(f"{operation} {impl}" for operation, impl in picked.items())
