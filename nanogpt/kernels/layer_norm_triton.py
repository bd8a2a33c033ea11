"""Layer normalisation in Triton, with the residual addition in the same pass.

Forward: a program holds a tile of whole rows in registers, adds the residual, takes mean and
variance in two steps and writes the sum, the normalised rows and two numbers a row. Saved are the
sum, the means and the reciprocal deviations; nothing is recomputed. Backward: as many programs as
the device holds walk over the tiles in a fixed order; each keeps the gradients of weight and bias
of its rows in registers and writes one partial row, which are added at the end, so that two runs
agree bit for bit.

Floor: forward reads x and residual and writes sum and y once; backward reads the sum, dy and the
sum's gradient and writes dx once.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from nanogpt.kernels.dispatch import differentiable_once
from nanogpt.kernels.launch_triton import (
    autocast_dtype,
    device_of,
    operator,
    refuse_dtypes,
    target_of,
)

WIDEST = 8192
# Elements of a tile and warps; not measured on any device yet.
_TILE_ELEMENTS = 2048


def tile(width: int) -> tuple[int, int, int]:
    """Rows BR and columns BC of a tile, and warps, for rows of `width` elements."""
    columns = triton.next_power_of_2(width)
    rows = max(1, min(16, _TILE_ELEMENTS // columns))
    return rows, columns, max(1, min(16, rows * columns // 256))


@triton.jit
def _forward_kernel(
    p_x, p_residual, p_weight, p_bias, p_y, p_sum, p_mean, p_rstd,
    n_rows, n_columns, stride_x, stride_residual, eps,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    m_r, m_c = o_r < n_rows, o_c < n_columns
    m = m_r[:, None] & m_c[None, :]
    b_s = tl.load(p_x + o_r[:, None] * stride_x + o_c[None, :], m, 0.0).to(tl.float32)  # [BR, BC]
    o_dense = o_r[:, None] * n_columns + o_c[None, :]
    if p_residual is not None:
        o_residual = o_r[:, None] * stride_residual + o_c[None, :]
        b_s += tl.load(p_residual + o_residual, m, 0.0).to(tl.float32)
        # What is normalised is what is stored, so that backward sees the same numbers.
        b_stored = b_s.to(p_sum.dtype.element_ty)
        tl.store(p_sum + o_dense, b_stored, m)
        b_s = b_stored.to(tl.float32)
    b_mean = tl.sum(b_s, 1) / n_columns  # [BR]
    b_centred = tl.where(m, b_s - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_centred * b_centred, 1) / n_columns + eps)
    b_y = b_centred * b_rstd[:, None] * tl.load(p_weight + o_c, m_c, 0.0).to(tl.float32)[None, :]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_c, m_c, 0.0).to(tl.float32)[None, :]
    tl.store(p_y + o_dense, b_y.to(p_y.dtype.element_ty), m)
    tl.store(p_mean + o_r, b_mean, m_r)
    tl.store(p_rstd + o_r, b_rstd, m_r)


@triton.jit
def _backward_kernel(
    p_sum, p_weight, p_mean, p_rstd, p_dy, p_dsum, p_dx, p_dresidual, p_dweight, p_dbias,
    n_rows, n_columns, stride_sum,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # ds = rstd (g - mean(g) - z mean(g z)) + dsum,  g = dy w,  z = (s - mean) rstd
    # dw = sum over rows of dy z,  db = sum over rows of dy
    i_program = tl.program_id(0)
    o_c = tl.arange(0, BC)
    m_c = o_c < n_columns
    b_weight = tl.load(p_weight + o_c, m_c, 0.0).to(tl.float32)
    b_dweight = tl.zeros([BC], tl.float32)
    b_dbias = tl.zeros([BC], tl.float32)
    for i_tile in range(i_program, tl.cdiv(n_rows, BR), tl.num_programs(0)):
        o_r = tl.cast(i_tile, tl.int64) * BR + tl.arange(0, BR)
        m_r = o_r < n_rows
        m = m_r[:, None] & m_c[None, :]
        o_dense = o_r[:, None] * n_columns + o_c[None, :]
        b_s = tl.load(p_sum + o_r[:, None] * stride_sum + o_c[None, :], m, 0.0).to(tl.float32)
        b_dy = tl.load(p_dy + o_dense, m, 0.0).to(tl.float32)  # [BR, BC]
        b_mean, b_rstd = tl.load(p_mean + o_r, m_r, 0.0), tl.load(p_rstd + o_r, m_r, 0.0)
        b_z = tl.where(m, (b_s - b_mean[:, None]) * b_rstd[:, None], 0.0)
        b_g = b_dy * b_weight[None, :]
        b_along = tl.sum(b_g * b_z, 1) / n_columns  # [BR]
        b_across = tl.sum(b_g, 1) / n_columns
        b_ds = b_rstd[:, None] * (b_g - b_across[:, None] - b_z * b_along[:, None])
        if p_dsum is not None:
            b_ds += tl.load(p_dsum + o_dense, m, 0.0).to(tl.float32)
        tl.store(p_dx + o_dense, b_ds.to(p_dx.dtype.element_ty), m)
        if p_dresidual is not None:
            tl.store(p_dresidual + o_dense, b_ds.to(p_dresidual.dtype.element_ty), m)
        b_dweight += tl.sum(b_dy * b_z, 0)
        b_dbias += tl.sum(b_dy, 0)
    o_partial = i_program * n_columns + o_c
    tl.store(p_dweight + o_partial, b_dweight, m_c)
    if p_dbias is not None:
        tl.store(p_dbias + o_partial, b_dbias, m_c)


def _forward_fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    y_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    n_rows = len(x)
    total = x.new_empty(0)
    if residual is not None:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    y = x.new_empty(x.shape, dtype=y_dtype)
    return (
        y,
        total,
        x.new_empty(n_rows, dtype=torch.float32),
        x.new_empty(n_rows, dtype=torch.float32),
    )


@operator("layer_norm_forward", _forward_fake)
def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    y_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised rows (N, C), the sum (N, C) (empty without a residual), means and 1/deviations."""
    y, total, mean, rstd = _forward_fake(x, residual, weight, bias, eps, y_dtype)
    n_rows, n_columns = x.shape
    rows, columns, warps = tile(n_columns)
    if n_rows:
        with device_of(x):
            _forward_kernel[(triton.cdiv(n_rows, rows),)](
                x, residual, weight, bias, y, None if residual is None else total, mean, rstd,
                n_rows, n_columns, x.stride(0), 0 if residual is None else residual.stride(0), eps,
                BR=rows, BC=columns, num_warps=warps,
            )  # fmt: skip
    return y, total, mean, rstd


def _backward_fake(
    total: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    has_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = dy.new_empty(total.shape, dtype=x_dtype)
    separate = residual_dtype is not None and residual_dtype != x_dtype
    dresidual = dy.new_empty(total.shape if separate else (0,), dtype=residual_dtype or x_dtype)
    dbias = weight.new_empty(weight.shape if has_bias else (0,))
    return dx, dresidual, torch.empty_like(weight), dbias


@operator("layer_norm_backward", _backward_fake)
def backward(
    total: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    has_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, of the residual (empty where it equals x's), of weight and of bias."""
    dx, dresidual, dweight, dbias = _backward_fake(
        total, weight, mean, rstd, dy, dsum, x_dtype, residual_dtype, has_bias
    )
    n_rows, n_columns = total.shape
    if not n_rows:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    rows, columns, warps = tile(n_columns)
    programs = min(triton.cdiv(n_rows, rows), 4 * target_of(dy).multiprocessors)
    partial = dy.new_empty(2 if has_bias else 1, programs, n_columns, dtype=torch.float32)
    with device_of(dy):
        _backward_kernel[(programs,)](
            total, weight, mean, rstd, dy, dsum, dx, dresidual if dresidual.numel() else None,
            partial[0], partial[1] if has_bias else None,
            n_rows, n_columns, total.stride(0),
            BR=rows, BC=columns, num_warps=warps,
        )  # fmt: skip
    summed = partial.sum(1).to(weight.dtype)
    return dx, dresidual, summed[0].clone(), summed[1].clone() if has_bias else dbias


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, eps, y_dtype):
        ctx.shape = shape = x.shape
        rows = x.reshape(-1, shape[-1])
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        flat = None if residual is None else residual.reshape(-1, shape[-1])
        if flat is not None and flat.stride(1) != 1:
            flat = flat.contiguous()
        weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        y, total, mean, rstd = forward(rows, flat, weight, bias, eps, y_dtype)
        ctx.save_for_backward(rows if residual is None else total, weight, mean, rstd)
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.has_bias = bias is not None
        ctx.set_materialize_grads(False)
        return (y, None if residual is None else total)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy, dsum):
        total, weight, mean, rstd = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(dsum)
        rows = [None if g is None else g.reshape(total.shape).contiguous() for g in (dy, dsum)]
        dx, dresidual, dweight, dbias = backward(
            total, weight, mean, rstd, *rows, *ctx.dtypes, ctx.has_bias
        )
        dx = dx.view(ctx.shape)
        if ctx.dtypes[1] is None:
            dresidual = None
        else:
            # One tensor for both, as autograd's own addition gives: two views of one memory would
            # be taken for two gradients and be added to twice.
            dresidual = dresidual.view(ctx.shape) if dresidual.numel() else dx
        return dx, dresidual, dweight, dbias if ctx.has_bias else None, None, None


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y and the sum, as nanogpt.kernels.layer_norm; in an autocast region y has its precision.

    (What reads y in a transformer is a product, which would cast it; so this halves the bytes.)
    """
    y, total = _LayerNorm.apply(x, residual, weight, bias, eps, autocast_dtype(x) or x.dtype)
    # Shaped here: an output of a Function that is a view cannot be added to in place.
    return y.view(x.shape), None if total is None else total.view(x.shape)


def unsupported(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> str | None:
    """Why these arguments cannot run here, or None."""
    if x.shape[-1] > WIDEST:
        return f"rows of {x.shape[-1]} elements are longer than the {WIDEST} that one program holds"
    return refuse_dtypes(x=x, weight=weight, bias=bias, residual=residual)
