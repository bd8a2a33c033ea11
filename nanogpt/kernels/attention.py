"""Causal softmax attention.

out[b,h,i] = sum_j softmax_j(scale * <q[b,h,i], k[b,h,j]>) v[b,h,j],   j <= S - T + i
"""

import torch
import torch.nn.functional as F

from nanogpt.kernels.dispatch import resolve, triton_kernels

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The definition, in fp32 or wider. Shapes as in `causal_attention`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scale * q.to(wide) @ k.to(wide).transpose(-2, -1)  # (B, H, T, S)
    scores = scores.masked_fill(~_visible(q, k), float("-inf"))
    return (scores.softmax(-1) @ v.to(wide)).to(q.dtype)  # (B, H, T, D)


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Softmax attention in which query i of T sees keys 0 … S-T+i.

    out[b,h,i] = sum_j softmax_j(scale * <q[b,h,i], k[b,h,j]>) v[b,h,j]

    Args:
        q: (B, H, T, D) fp32 | fp16 | bf16 | fp64, any strides.
        k, v: (B, H, S, D), S >= T, dtype and device of q.
        scale: multiplies the logits, dimensionless; default D**-0.5.
        impl: "auto" | "triton" | "torch" | "reference"; a named one never falls back.
    Returns: (B, H, T, D), dtype of q; softmax and sums in fp32 or wider.
    Raises: ValueError where shapes, dtypes or devices disagree; RuntimeError where the named
        implementation cannot run, with the reason.
    Source: Vaswani et al. 2017, equation 1 (arXiv:1706.03762), with a causal mask aligned to the
        last key, as Dao 2023, FlashAttention-2 (arXiv:2307.08691), from version 2.1.
    """
    _check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    picked = resolve("attention", impl, q, k, v)
    if picked == "reference":
        return reference(q, k, v, scale)
    if picked == "triton":
        return triton_kernels("attention").causal_attention(q, k, v, scale)
    n_queries, n_keys = q.shape[2], k.shape[2]
    if n_queries == n_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    # PyTorch's is_causal aligns the mask to the first key; ours is aligned to the last.
    mask = None if n_queries == 1 else _visible(q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """One query against the first `length` keys of a cache, a number that stays on the device.

    out[b,h] = sum_{j < length} softmax_j(scale * <q[b,h], k[b,h,j]>) v[b,h,j]

    Nothing is read back to the host, so that a CUDA graph can replay it as the cache fills.

    Args:
        q: (B, H, 1, D); k, v: (B, H, S, D), as in `causal_attention`; no gradient.
        length: (1,) int32 on q's device, from 1 to S; what lies behind it may be anything finite.
        scale, impl: as in `causal_attention`.
    Returns: (B, H, 1, D), dtype of q.
    Raises: as `causal_attention`.
    """
    _check(q, k, v)
    if q.shape[2] != 1:
        raise ValueError(f"q must have one position, not {q.shape[2]}")
    if length.shape != (1,) or length.dtype != torch.int32 or length.device != q.device:
        raise ValueError(f"length must be (1,) int32 on {q.device}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    picked = resolve("attention", impl, q, k, v)
    if picked == "triton":
        return triton_kernels("attention").decode(q, k, v, scale, length)
    seen = torch.arange(k.shape[2], device=k.device) < length  # (S,)
    if picked == "torch":
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen[None, None, None], scale=scale
        )
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scale * q.to(wide) @ k.to(wide).transpose(-2, -1)  # (B, H, 1, S)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v.to(wide)).to(q.dtype)


def _visible(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(T, S) bool: query i sees key j."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device)
    return ones.tril(n_keys - n_queries)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (B, H, T|S, D), not of shape {tuple(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be a floating tensor, not {tensor.dtype}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but q is {q.dtype} on {q.device}"
            )
    if k.shape != v.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must have the same shape")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in B, H or D")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q has more positions ({q.shape[2]}) than k ({k.shape[2]})")
