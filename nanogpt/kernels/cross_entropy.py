"""Softmax cross-entropy.

loss = mean over rows with targets[n] != ignore_index of
       logsumexp_v(logits[n, v]) - logits[n, targets[n]]
"""

import torch
import torch.nn.functional as F

from nanogpt.kernels.dispatch import resolve


def reference(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The definition, in fp32 or wider. Shapes as in `cross_entropy`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = targets != ignore_index
    picked = wide.gather(1, targets.where(counted, torch.zeros_like(targets))[:, None])[:, 0]
    nats = wide.logsumexp(1) - picked  # (N,)
    return nats.where(counted, torch.zeros_like(nats)).sum() / counted.sum()


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    impl: str = "auto",
) -> torch.Tensor:
    """Mean negative log-likelihood of the targets, in nats.

    loss = mean_n (logsumexp_v logits[n, v] - logits[n, targets[n]])

    Args:
        logits: (N, V) floating.
        targets: (N,) int64; rows equal to `ignore_index` do not count.
        ignore_index: the target that marks a row as not counted.
        impl: "auto" | "triton" | "torch" | "reference"; a named one never falls back.
    Returns: scalar, fp32 or wider; NaN where no row counts.
    Raises: ValueError where shapes or dtypes disagree; RuntimeError where the named
        implementation cannot run, with the reason.
    """
    _check(logits, targets)
    picked = resolve("cross_entropy", impl, logits, targets)
    if picked == "reference":
        return reference(logits, targets, ignore_index)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=ignore_index)


def _check(logits: torch.Tensor, targets: torch.Tensor) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits must be (N, V), not of shape {tuple(logits.shape)}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be (N,) = {tuple(logits.shape[:1])}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, not {targets.dtype}")
