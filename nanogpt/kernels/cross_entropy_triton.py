"""Softmax cross-entropy in Triton, on logits that exist and with the gradient in the same pass.

A program walks over one row in blocks, keeping a running maximum and sum; where a gradient is
wanted it walks over the row again, which by then lies in the cache, and writes softmax minus
one-hot over the logits themselves, if the caller allows, or into a new tensor in backward. It is
stored with a factor that suits its precision, and backward multiplies by the rest, which for
float32 and bfloat16 is one, so that the pass returns at once. Saved is the gradient, or the logits
and one log-sum-exp a row. Sums are in float32 and nothing is added atomically.

Floor with the gradient in place: the logits are read once and written once.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from nanogpt.kernels.cross_entropy import stored_factor
from nanogpt.kernels.dispatch import differentiable_once
from nanogpt.kernels.launch_triton import device_of, operator, refuse_dtypes

# A row up to this long is one block, held in registers; not measured on any device yet.
_LONGEST_BLOCK = 8192


def block(vocabulary: int) -> tuple[int, int]:
    """Elements BV of a block and warps for rows of `vocabulary` logits."""
    elements = max(64, min(_LONGEST_BLOCK, triton.next_power_of_2(vocabulary)))
    return elements, max(1, min(16, elements // 512))


@triton.jit
def _write_gradient(
    p_row, p_grad, b_x, i_target, counted, lse, factor, V,
    BV: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    # d loss / d x_v = (softmax(x)_v - [v = target]) factor; zero where the row does not count
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        m_v = o_v < V
        if ONE_BLOCK:  # noqa: SIM108  (a compile-time choice)
            b_row = b_x
        else:
            b_row = tl.load(p_row + o_v, m_v, float("-inf")).to(tl.float32)
        b_p = tl.exp(b_row - lse)
        b_p = tl.where(o_v == i_target, b_p - 1.0, b_p)
        b_p = tl.where(counted, b_p * factor, 0.0)
        tl.store(p_grad + o_v, b_p.to(p_grad.dtype.element_ty), m_v)


@triton.jit
def _loss_kernel(
    p_logits, p_targets, p_loss, p_lse, p_grad, p_factor,
    V, N_V, ignore_index, stride_n,
    BV: tl.constexpr, ONE_BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    # loss = log(sum_v exp x_v) - x_target, in nats
    i_n = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_n * stride_n
    i_target = tl.load(p_targets + i_n)
    counted = i_target != ignore_index
    inside = (i_target >= 0) & (i_target < V)
    x_target = tl.load(p_row + i_target, counted & inside, 0.0).to(tl.float32)
    # A target outside the vocabulary makes loss and gradient NaN; it is never read there.
    x_target = tl.where(counted & (inside == 0), float("nan"), x_target)
    top, total = float("-inf"), 0.0
    b_x = tl.zeros([BV], tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_x = tl.load(p_row + o_v, o_v < V, float("-inf")).to(tl.float32)
        block_top = tl.maximum(top, tl.max(b_x, 0))
        # A block of -inf alone would give inf - inf.
        shift = tl.where(block_top == float("-inf"), 0.0, block_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(b_x - shift), 0)
        top = block_top
    lse = top + tl.log(total)
    tl.store(p_loss + i_n, tl.where(counted, lse - x_target, 0.0))
    if p_lse is not None:
        tl.store(p_lse + i_n, lse)
    if p_grad is not None:
        factor = tl.load(p_factor)
        factor = tl.where(counted & (inside == 0), float("nan"), factor)
        _write_gradient(
            p_row, p_grad + i_n * stride_n, b_x, i_target, counted, lse, factor, V, BV, ONE_BLOCK
        )
        if PADDED:
            o_v = V + tl.arange(0, PADDED)
            b_zero = tl.zeros([PADDED], p_grad.dtype.element_ty)
            tl.store(p_grad + i_n * stride_n + o_v, b_zero, o_v < N_V)


@triton.jit
def _gradient_kernel(
    p_logits, p_targets, p_lse, p_grad, p_factor,
    V, ignore_index, stride_n, stride_grad,
    BV: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    i_target = tl.load(p_targets + i_n)
    counted = i_target != ignore_index
    inside = (i_target >= 0) & (i_target < V)
    factor = tl.where(counted & (inside == 0), float("nan"), tl.load(p_factor))
    b_unused = tl.zeros([BV], tl.float32)
    _write_gradient(
        p_logits + i_n * stride_n, p_grad + i_n * stride_grad, b_unused, i_target, counted,
        tl.load(p_lse + i_n), factor, V, BV, False,
    )  # fmt: skip


@triton.jit
def _scale_kernel(p_x, p_factor, V, stride_n, BV: tl.constexpr):
    # x *= factor, and nothing at all where the factor is one
    factor = tl.load(p_factor)
    if factor != 1.0:
        p_row = p_x + tl.program_id(0).to(tl.int64) * stride_n
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            b_x = tl.load(p_row + o_v, o_v < V, 0.0).to(tl.float32)
            tl.store(p_row + o_v, (b_x * factor).to(p_x.dtype.element_ty), o_v < V)


def _forward_fake(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = logits.new_empty(len(logits), dtype=torch.float32)
    return rows, torch.empty_like(rows)


@operator("cross_entropy_forward", _forward_fake)
def forward(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (N,) and log-sum-exps (N,) in float32 nats; the loss of an ignored row is 0."""
    losses, lse = _forward_fake(logits, targets, ignore_index)
    elements, warps = block(logits.shape[1])
    if len(logits):
        with device_of(logits):
            _loss_kernel[(len(logits),)](
                logits, targets, losses, lse, None, None,
                logits.shape[1], logits.shape[1], ignore_index, logits.stride(0),
                BV=elements, ONE_BLOCK=False, PADDED=0, num_warps=warps,
            )  # fmt: skip
    return losses, lse


def _in_place_fake(
    logits: torch.Tensor,
    targets: torch.Tensor,
    factor: torch.Tensor,
    ignore_index: int,
    vocabulary: int,
) -> torch.Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


@operator("cross_entropy_in_place", _in_place_fake, ("logits",))
def loss_and_gradient_in_place(
    logits: torch.Tensor,
    targets: torch.Tensor,
    factor: torch.Tensor,
    ignore_index: int,
    vocabulary: int,
) -> torch.Tensor:
    """Losses (N,) float32; the logits become factor (softmax - one-hot), and zero beyond V.

    Args:
        logits: (N, V) or wider rows, whose other columns are not read.
        factor: scalar float32 on the device.
        vocabulary: V.
    """
    losses = _in_place_fake(logits, targets, factor, ignore_index, vocabulary)
    elements, warps = block(vocabulary)
    padded = logits.shape[1] - vocabulary
    if len(logits):
        with device_of(logits):
            _loss_kernel[(len(logits),)](
                logits, targets, losses, None, logits, factor,
                vocabulary, logits.shape[1], ignore_index, logits.stride(0),
                BV=elements, ONE_BLOCK=elements >= vocabulary,
                PADDED=triton.next_power_of_2(padded) if padded else 0, num_warps=warps,
            )  # fmt: skip
    return losses


def _backward_fake(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    factor: torch.Tensor,
    ignore_index: int,
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


@operator("cross_entropy_backward", _backward_fake)
def backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    factor: torch.Tensor,
    ignore_index: int,
) -> torch.Tensor:
    """factor (softmax - one-hot), (N, V), dtype of the logits."""
    gradient = _backward_fake(logits, targets, lse, factor, ignore_index)
    elements, warps = block(logits.shape[1])
    if len(logits):
        with device_of(logits):
            _gradient_kernel[(len(logits),)](
                logits, targets, lse, gradient, factor,
                logits.shape[1], ignore_index, logits.stride(0), gradient.stride(0),
                BV=elements, num_warps=warps,
            )  # fmt: skip
    return gradient


def _scale_fake(x: torch.Tensor, factor: torch.Tensor) -> None:
    return None


@operator("cross_entropy_scale", _scale_fake, ("x",))
def scale_in_place(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x (N, V) *= factor, a scalar float32 on the device; free where that is one."""
    elements, warps = block(x.shape[1])
    if len(x):
        with device_of(x):
            _scale_kernel[(len(x),)](
                x, factor, x.shape[1], x.stride(0), BV=elements, num_warps=warps
            )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, targets, ignore_index, reuse):
        count = (targets != ignore_index).sum().float()
        ctx.ignore_index, ctx.reuse, ctx.spent = ignore_index, reuse, False
        if reuse:
            factor = stored_factor(count, logits.dtype)
            losses = loss_and_gradient_in_place(
                logits, targets, factor, ignore_index, logits.shape[1]
            )
            torch.autograd.graph.increment_version(logits)  # a step that saved them says so
            ctx.save_for_backward(logits, torch.where(count > 0, 1 / (count * factor), 0.0))
        else:
            losses, lse = forward(logits, targets, ignore_index)
            ctx.save_for_backward(logits, targets, lse, count)
        return losses.sum() / count

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad):
        if not ctx.reuse:
            logits, targets, lse, count = ctx.saved_tensors
            return backward(logits, targets, lse, grad / count, ctx.ignore_index), None, None, None
        if ctx.spent:
            raise RuntimeError("reuse_logits: the gradient of the logits can be taken only once")
        ctx.spent = True
        gradient, rest = ctx.saved_tensors
        scale_in_place(gradient, grad * rest)
        return gradient.detach(), None, None, None


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, reuse_logits: bool
) -> torch.Tensor:
    """As nanogpt.kernels.cross_entropy, through these kernels."""
    if logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]:  # rows that share memory
        logits = logits.contiguous()
    targets = targets.contiguous()
    wanted = torch.is_grad_enabled() and logits.requires_grad
    # torch.compile keeps its own account of memory: there the gradient has a tensor of its own.
    reuse = reuse_logits and wanted and not torch.compiler.is_compiling()
    return _CrossEntropy.apply(logits, targets, ignore_index, reuse)


def unsupported(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None = None
) -> str | None:
    """Why these arguments cannot run here, or None."""
    return refuse_dtypes(logits=logits, weight=weight)
