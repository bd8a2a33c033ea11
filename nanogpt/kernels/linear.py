"""A linear map with few rows, as decoding needs it: bound by one pass over the weights.

out = x w^T + b
"""

import functools
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

_FEW_ROWS = 4
_LARGE_WEIGHT = 100_000
_ROUNDS = 5


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch.nn.functional.linear, faster on some CPUs for few rows where no gradient is wanted.

    F.linear computes x w^T. On some processors the library below it streams the weights at a
    fraction of the memory's speed when x is thin, and the same product as w x^T, cut into a part
    for each thread, reads them two to five times as fast; on others it is half as fast
    (`benchmarks/test_linear.py` measures both). Which one this is, is measured once a process.

    Args:
        x: (..., C) floating; weight: (F, C); bias: (F,) or None.
    Returns: (..., F).
    """
    rows = x.numel() // max(1, x.shape[-1])
    thin = 0 < rows <= _FEW_ROWS and x.device.type == "cpu" and x.dtype == torch.float32
    # A small weight stays in the cache, where F.linear is as fast with fewer calls.
    thin = thin and weight.numel() >= _LARGE_WEIGHT
    if not thin or torch.is_grad_enabled() or weight.dtype != x.dtype:
        return F.linear(x, weight, bias)
    if not cuts_pay(torch.get_num_threads()):
        return F.linear(x, weight, bias)
    return in_parts(x, weight, bias)


def in_parts(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product as w x^T in one batched call, a part of the weight for each thread."""
    rows = x.numel() // max(1, x.shape[-1])
    parts = max(2, torch.get_num_threads())
    whole = weight.shape[0] - weight.shape[0] % parts
    columns = x.reshape(rows, -1).t()  # (C, rows)
    cut = weight[:whole].view(parts, whole // parts, -1)  # (parts, F/parts, C)
    out = torch.bmm(cut, columns.expand(parts, -1, -1))  # (parts, F/parts, rows)
    out = out.view(whole, rows).t()  # (rows, F) but for the remainder
    if whole != weight.shape[0]:
        out = torch.cat([out, F.linear(x.reshape(rows, -1), weight[whole:])], dim=1)
    out = out if bias is None else out + bias
    return out.reshape(*x.shape[:-1], weight.shape[0])


@functools.cache
def cuts_pay(threads: int) -> bool:
    """Whether `in_parts` is faster than F.linear here, with so many threads: some 30 ms, once."""
    x = torch.full((1, 1024), 0.5)
    # Six weights in turn, 25 MB in all, so that they come from memory as a model's do.
    weights = torch.full((6, 1024, 1024), 0.5).unbind(0)

    def seconds(operation: Callable[..., torch.Tensor]) -> float:
        started = time.perf_counter()
        for weight in weights:
            operation(x, weight, None)
        return time.perf_counter() - started

    times = [(seconds(in_parts), seconds(F.linear)) for _ in range(_ROUNDS + 1)][1:]
    ours, theirs = (median(column) for column in zip(*times, strict=True))
    return ours < theirs
