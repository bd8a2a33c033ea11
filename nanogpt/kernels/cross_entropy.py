"""Softmax cross-entropy, on logits or on what they are made from.

loss = mean over rows with targets[n] != ignore_index of
       logsumexp_v(logits[n, v]) - logits[n, targets[n]]
"""

from typing import Any

import torch
import torch.nn.functional as F

from nanogpt.kernels.dispatch import check_devices, differentiable_once, resolve, triton_kernels

_ROW_MULTIPLE = 64


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
    reuse_logits: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Mean negative log-likelihood of the targets, in nats.

    loss = mean_n (logsumexp_v logits[n, v] - logits[n, targets[n]])

    Args:
        logits: (N, V) floating.
        targets: (N,) int64; rows equal to `ignore_index` do not count.
        ignore_index: the target that marks a row as not counted.
        reuse_logits: the caller never reads the logits again, so that their gradient may be
            written over them. Only where no other step of the graph saved them.
        impl: "auto" | "triton" | "torch" | "reference"; a named one never falls back.
    Returns: scalar, fp32 or wider; NaN where no row counts.
    Raises: ValueError where shapes or dtypes disagree; RuntimeError where the named
        implementation cannot run, with the reason. A target outside the vocabulary is torch's
        error with "torch", and a loss of NaN with "triton", which reads nothing there.
    """
    _check(logits, targets)
    picked = resolve("cross_entropy", impl, logits, targets)
    if picked == "reference":
        return reference(logits, targets, ignore_index)
    if picked == "triton":
        kernels = triton_kernels("cross_entropy")
        return kernels.cross_entropy(logits, targets, ignore_index, reuse_logits)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=ignore_index)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """The loss of an output head, without more than `chunk_bytes` of its logits at a time.

    loss = cross_entropy(hidden weight^T, targets)

    Each chunk of rows makes its logits, turns them into their gradient in place and at once into
    the gradients of `hidden` and `weight`; nothing of size N x V outlives its chunk.

    Args:
        hidden: (N, C) floating; weight: (V, C); targets: (N,) int64.
        ignore_index: the target that marks a row as not counted.
        chunk_bytes: most memory of logits at a time (at least one row); None for all rows at once.
        impl: "auto" | "triton" | "torch" | "reference"; a named one never falls back.
    Returns: scalar, fp32 or wider; NaN where no row counts. Products are made in the dtype of
        `hidden`, in an autocast region in its own.
    Raises: as `cross_entropy`; ValueError where chunk_bytes is not positive.
    Source: the order of work of Hsu et al. 2024, Liger kernel, section 3.2 (arXiv:2410.10989).
    """
    check_devices(hidden=hidden, weight=weight, targets=targets)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must be (N, C) and weight {tuple(weight.shape)} (V, C)"
        )
    _check_targets(targets, len(hidden))
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, not {chunk_bytes}")
    picked = resolve("cross_entropy", impl, hidden, targets, weight)
    if picked == "reference" or (picked == "torch" and chunk_bytes is None):
        logits = F.linear(hidden, weight)
        return cross_entropy(logits, targets, ignore_index=ignore_index, impl=picked)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets = targets.contiguous()
    rows = len(hidden)
    if chunk_bytes is not None:
        width = _row_length(weight.shape[0], hidden)
        rows = max(1, min(rows, chunk_bytes // (width * hidden.element_size())))
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, rows, picked, wanted)


def _row_length(vocabulary: int, hidden: torch.Tensor) -> int:
    """Logits of a row in memory: tensor cores want rows that begin at multiples of 16 bytes.

    GPT-2's 50,257 tokens of bfloat16 begin anywhere, which leaves its head to slower products.
    """
    if hidden.is_cuda and hidden.element_size() == 2:
        return -(-vocabulary // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return vocabulary


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one sweep over the rows; backward multiplies by a scalar."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, hidden, weight, targets, ignore_index, chunk, picked, wanted
    ):
        step = _gradient_in_place if picked == "torch" else _triton_gradient_in_place
        wide = torch.promote_types(weight.dtype, torch.float32)
        count = (targets != ignore_index).sum().to(wide)
        factor = stored_factor(count, hidden.dtype)
        # No rows at all leave the sum at zero, too.
        many = chunk != len(hidden) or not len(hidden)
        dhidden = torch.empty_like(hidden)
        vocabulary = len(weight)
        width = _row_length(vocabulary, hidden)
        if width != vocabulary:
            weight = F.pad(weight, (0, 0, 0, width - vocabulary))
        # Sums over chunks are kept in float32; a single chunk has one product and no sum.
        dweight = torch.zeros_like(weight, dtype=wide) if wanted and many else weight
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(hidden), max(1, chunk)):
                part = slice(first, first + chunk)
                logits = hidden[part] @ weight.t()  # (rows, V), or wider
                losses = step(logits, targets[part], factor, ignore_index, vocabulary)
                total = total + losses.sum()
                if not wanted:
                    continue
                torch.mm(logits, weight, out=dhidden[part])
                product = logits.t() @ hidden[part]  # (V, C)
                dweight = dweight.add_(product) if many else product
                del logits
        if wanted:
            # Where no row counts the gradients are zero, as torch's are.
            rest = torch.where(count > 0, 1 / (count * factor), 0.0)
            ctx.save_for_backward(dhidden, dweight[:vocabulary], rest)
            ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        dhidden, dweight, rest = ctx.saved_tensors
        scale = grad * rest
        return (
            dhidden * scale.to(dhidden.dtype) if ctx.needs_input_grad[0] else None,
            (dweight * scale).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None,
            *(None,) * 5,
        )


def _triton_gradient_in_place(
    logits: torch.Tensor,
    targets: torch.Tensor,
    factor: torch.Tensor,
    ignore_index: int,
    vocabulary: int,
) -> torch.Tensor:
    kernels = triton_kernels("cross_entropy")
    return kernels.loss_and_gradient_in_place(logits, targets, factor, ignore_index, vocabulary)


def _gradient_in_place(
    logits: torch.Tensor,
    targets: torch.Tensor,
    factor: torch.Tensor,
    ignore_index: int,
    vocabulary: int,
) -> torch.Tensor:
    """Losses (N,); the logits become factor (softmax - one-hot), zero in ignored rows.

    What lies beyond the vocabulary is not read, and becomes zero.
    """
    logits[:, vocabulary:] = 0
    logits = logits[:, :vocabulary]
    counted = targets != ignore_index
    ids = targets.where(counted, torch.zeros_like(targets))[:, None]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = wide.logsumexp(1, keepdim=True)
    losses = (lse - wide.gather(1, ids))[:, 0]
    gradient = torch.exp(wide.sub_(lse) if wide is logits else wide - lse)
    gradient.scatter_add_(1, ids, torch.full_like(lse, -1.0))
    # Not by multiplication alone: nothing that an ignored row holds may come through.
    logits.copy_((gradient * factor).masked_fill_(~counted[:, None], 0.0))
    return losses.where(counted, torch.zeros_like(losses))


def stored_factor(count: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a stored gradient is multiplied by: 1/count, kept off float16's underflow."""
    count = count.clamp(min=1)
    return (1024 / count).clamp(max=1.0) if dtype == torch.float16 else 1 / count


def _check(logits: torch.Tensor, targets: torch.Tensor) -> None:
    check_devices(logits=logits, targets=targets)
    if logits.dim() != 2:
        raise ValueError(f"logits must be (N, V), not of shape {tuple(logits.shape)}")
    _check_targets(targets, len(logits))


def _check_targets(targets: torch.Tensor, rows: int) -> None:
    if targets.shape != (rows,):
        raise ValueError(f"targets {tuple(targets.shape)} must be (N,) = ({rows},)")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, not {targets.dtype}")
