"""A linear map with few rows, as decoding needs it: bound by one pass over the weights.

out = x w^T + b
"""

import torch
import torch.nn.functional as F

_FEW_ROWS = 4
_LARGE_WEIGHT = 100_000


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch.nn.functional.linear, faster on a CPU where x has few rows and no gradient is wanted.

    F.linear computes x w^T, which streams the weights at a fraction of the memory's speed when x
    is thin. The same product as w x^T, cut into a part for each thread, reads them two to five
    times as fast (`benchmarks/test_linear.py` measures both).

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
    parts = max(2, torch.get_num_threads())
    whole = weight.shape[0] - weight.shape[0] % parts
    columns = x.reshape(rows, -1).t()  # (C, rows)
    cut = weight[:whole].view(parts, whole // parts, -1)  # (parts, F/parts, C)
    out = torch.bmm(cut, columns.expand(parts, -1, -1))  # (parts, F/parts, rows)
    out = out.view(whole, rows).t()
    if whole < weight.shape[0]:
        out = torch.cat([out, F.linear(columns.t(), weight[whole:])], 1)
    out = out if bias is None else out + bias
    return out.reshape(*x.shape[:-1], -1)
