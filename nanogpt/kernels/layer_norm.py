"""Layer normalisation with an optional residual addition before it.

s = x + residual,   y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias
"""

from typing import overload

import torch
import torch.nn.functional as F

from nanogpt.kernels.dispatch import check_devices, resolve, triton_kernels


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The definition without a residual, in fp32 or wider. Shapes as in `layer_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return (normal if bias is None else normal + bias).to(x.dtype)


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    residual: None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> torch.Tensor: ...


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    residual: torch.Tensor,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise each vector of the last dimension to mean 0 and variance 1, then scale and shift.

    s = x + residual;   y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

    Args:
        x: (..., C) floating.
        weight: (C,); bias: (C,) or None.
        residual: (..., C) of x's shape, added first, or None.
        eps: added to the variance.
        impl: "auto" | "triton" | "torch" | "reference"; a named one never falls back.
    Returns: y (..., C); with a residual the pair (y, s).
    Raises: ValueError where shapes disagree; RuntimeError where the named implementation cannot
        run, with the reason.
    Source: Ba, Kiros and Hinton 2016, equation 4 (arXiv:1607.06450).
    """
    _check(x, weight, bias, residual)
    picked = resolve("layer_norm", impl, x, weight, bias, residual)
    if picked == "triton":
        normal, summed = triton_kernels("layer_norm").layer_norm(x, weight, bias, residual, eps)
        return normal if residual is None else (normal, summed)
    total = x if residual is None else x + residual
    if picked == "reference":
        normal = reference(total, weight, bias, eps)
    else:
        normal = F.layer_norm(total, weight.shape, weight, bias, eps)
    return normal if residual is None else (normal, total)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    check_devices(x=x, weight=weight, bias=bias, residual=residual)
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} must be (C,) with C of x {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"bias {tuple(bias.shape)} must have weight's shape {tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must have x's shape {tuple(x.shape)}")
