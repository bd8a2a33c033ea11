"""The GELU feed-forward of a transformer block.

out = gelu(x w1^T + b1) w2^T + b2,   gelu(u) = u/2 (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3)))
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanogpt.kernels.dispatch import check_devices, resolve, triton_kernels
from nanogpt.kernels.linear import linear


def reference(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
) -> torch.Tensor:
    """The definition, in fp32 or wider. Shapes as in `gelu_ffn`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    u = x.to(wide) @ w1.to(wide).T  # (..., F)
    u = u if b1 is None else u + b1.to(wide)
    hidden = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    out = hidden @ w2.to(wide).T  # (..., C)
    return (out if b2 is None else out + b2.to(wide)).to(x.dtype)


def gelu_ffn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    recompute: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Two linear maps with the tanh form of GELU between them.

    out = gelu(x w1^T + b1) w2^T + b2

    Args:
        x: (..., C) floating.
        w1: (F, C), w2: (C, F), as torch.nn.functional.linear takes them.
        b1: (F,) or None, b2: (C,) or None.
        recompute: keep x alone for backward and compute what lies in the hidden layer once more
            there: N F elements less memory in Triton, two to three times that in torch, for one
            product more.
        impl: "auto" | "triton" | "torch" | "reference"; a named one never falls back.
    Returns: (..., C), dtype of x (of the autocast region under autocast).
    Raises: ValueError where shapes disagree; RuntimeError where the named implementation cannot
        run, with the reason.
    Source: Hendrycks and Gimpel 2016, GELUs, section 2 (arXiv:1606.08415).
    """
    _check(x, w1, b1, w2, b2)
    picked = resolve("ffn", impl, x, w1, b1, w2, b2)
    if picked == "triton":
        return triton_kernels("ffn").gelu_ffn(x, w1, b1, w2, b2, recompute)
    plain = reference if picked == "reference" else _torch
    if recompute and torch.is_grad_enabled():
        return checkpoint(plain, x, w1, b1, w2, b2, use_reentrant=False)
    return plain(x, w1, b1, w2, b2)


def _torch(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
) -> torch.Tensor:
    return linear(F.gelu(linear(x, w1, b1), approximate="tanh"), w2, b2)


def _check(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
) -> None:
    check_devices(x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    if w1.dim() != 2 or x.dim() < 1 or w1.shape[1] != x.shape[-1]:
        raise ValueError(f"w1 {tuple(w1.shape)} must be (F, C) with C of x {tuple(x.shape)}")
    if w2.shape != w1.T.shape:
        raise ValueError(f"w2 {tuple(w2.shape)} must be (C, F), the transpose of w1's shape")
    if b1 is not None and b1.shape != w1.shape[:1]:
        raise ValueError(f"b1 {tuple(b1.shape)} must be (F,) = {tuple(w1.shape[:1])}")
    if b2 is not None and b2.shape != w2.shape[:1]:
        raise ValueError(f"b2 {tuple(b2.shape)} must be (C,) = {tuple(w2.shape[:1])}")
