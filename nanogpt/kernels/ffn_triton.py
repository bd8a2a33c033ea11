"""The GELU feed-forward in Triton: a matrix product whose epilogues make and undo the activation.

Forward: one kernel computes u = x w1^T + b1 and, from the tile it still holds, h = gelu(u); the
second product is plain. Backward: one kernel computes dh = dy w2, reads u, and writes
du = dh gelu'(u), h = gelu(u) once more, and the column sums of du over each tile of rows, which are
added at the end, so that two runs agree bit for bit; three plain products remain. Saved are x, u
and the weights, or x and the weights alone, and then u is computed once more. From capability 9.0
on, tiles travel through the tensor memory accelerator and as many programs as there are
multiprocessors walk over the tiles; elsewhere, or where a tensor is not aligned to 16 bytes, they
are read through pointers, a program a tile.

Floor: no pass over the hidden layer beside the products; u and h are written once and u is read
once.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanogpt.kernels.dispatch import constant_when_compiled, differentiable_once
from nanogpt.kernels.launch_triton import (
    LOG2_E,
    Target,
    autocast_dtype,
    device_of,
    dot_precision,
    fits_descriptor,
    operator,
    refuse_dtypes,
    target_of,
)


@dataclass(frozen=True)
class Tile:
    """How a program cuts its product.

    Attributes:
        rows, columns: of the result's tile; inner: the step along the summed dimension.
        warps, stages: as Triton takes them.
        parts: the epilogue handles the columns in so many parts one after the other, which saves
            shared memory and registers.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    parts: int = 1


# (kind, generation, bytes of an element, size class); not measured on any device yet. Kinds: "up"
# is x w1^T with the activation, "dhidden" is dy w2 with its gradient, "plain" any other product.
# Generation 80 stays within the 99 KB of shared memory that its small GPUs have.
TILES: dict[tuple[str, int, int, str], Tile] = {
    ("up", 80, 2, "large"): Tile(128, 128, 32, 8, 4, parts=2),
    ("up", 80, 2, "small"): Tile(64, 64, 64, 4, 4),
    ("up", 80, 2, "thin"): Tile(16, 64, 128, 4, 4),
    ("up", 80, 2, "odd"): Tile(64, 32, 32, 4, 3),
    ("dhidden", 80, 2, "large"): Tile(128, 128, 32, 8, 4, parts=2),
    ("dhidden", 80, 2, "small"): Tile(64, 64, 64, 4, 4),
    ("dhidden", 80, 2, "thin"): Tile(16, 64, 128, 4, 4),
    ("dhidden", 80, 2, "odd"): Tile(64, 32, 32, 4, 3),
    ("plain", 80, 2, "large"): Tile(128, 128, 32, 4, 4),
    ("plain", 80, 2, "small"): Tile(64, 64, 64, 4, 4),
    ("plain", 80, 2, "thin"): Tile(16, 64, 128, 4, 4),
    ("plain", 80, 2, "odd"): Tile(64, 32, 32, 4, 3),
    ("up", 80, 4, "large"): Tile(64, 64, 16, 4, 4),
    ("up", 80, 4, "small"): Tile(64, 32, 16, 4, 4),
    ("up", 80, 4, "thin"): Tile(16, 32, 64, 4, 3),
    ("up", 80, 4, "odd"): Tile(32, 32, 16, 2, 2),
    ("dhidden", 80, 4, "large"): Tile(64, 64, 16, 4, 4),
    ("dhidden", 80, 4, "small"): Tile(64, 32, 16, 4, 4),
    ("dhidden", 80, 4, "thin"): Tile(16, 32, 64, 4, 3),
    ("dhidden", 80, 4, "odd"): Tile(32, 32, 16, 4, 2),
    ("plain", 80, 4, "large"): Tile(64, 64, 16, 4, 4),
    ("plain", 80, 4, "small"): Tile(64, 32, 16, 4, 4),
    ("plain", 80, 4, "thin"): Tile(16, 32, 64, 4, 3),
    ("plain", 80, 4, "odd"): Tile(32, 32, 16, 2, 2),
    ("up", 90, 2, "large"): Tile(128, 256, 64, 8, 4, parts=2),
    ("up", 90, 2, "small"): Tile(128, 128, 64, 8, 4),
    ("up", 90, 2, "thin"): Tile(16, 64, 128, 4, 4),
    ("dhidden", 90, 2, "large"): Tile(128, 256, 64, 8, 4, parts=4),
    ("dhidden", 90, 2, "small"): Tile(128, 128, 64, 8, 4, parts=2),
    ("dhidden", 90, 2, "thin"): Tile(16, 64, 128, 4, 4),
    ("plain", 90, 2, "large"): Tile(128, 256, 64, 8, 4, parts=2),
    ("plain", 90, 2, "small"): Tile(128, 128, 64, 8, 4),
    ("plain", 90, 2, "thin"): Tile(16, 64, 128, 4, 4),
    ("up", 90, 4, "large"): Tile(128, 128, 32, 8, 3),
    ("up", 90, 4, "small"): Tile(64, 64, 32, 4, 3),
    ("up", 90, 4, "thin"): Tile(16, 32, 64, 4, 3),
    ("dhidden", 90, 4, "large"): Tile(128, 128, 32, 8, 3, parts=2),
    ("dhidden", 90, 4, "small"): Tile(64, 64, 32, 4, 3),
    ("dhidden", 90, 4, "thin"): Tile(16, 32, 64, 4, 3),
    ("plain", 90, 4, "large"): Tile(128, 128, 32, 8, 3),
    ("plain", 90, 4, "small"): Tile(64, 64, 32, 4, 3),
    ("plain", 90, 4, "thin"): Tile(16, 32, 64, 4, 3),
    ("up", 100, 2, "large"): Tile(128, 256, 64, 8, 3, parts=2),
    ("up", 100, 2, "small"): Tile(128, 128, 64, 8, 4),
    ("up", 100, 2, "thin"): Tile(16, 64, 128, 4, 4),
    ("dhidden", 100, 2, "large"): Tile(128, 128, 64, 8, 4, parts=2),
    ("dhidden", 100, 2, "small"): Tile(128, 128, 64, 8, 4, parts=2),
    ("dhidden", 100, 2, "thin"): Tile(16, 64, 128, 4, 4),
    ("plain", 100, 2, "large"): Tile(128, 256, 64, 8, 3, parts=2),
    ("plain", 100, 2, "small"): Tile(128, 128, 64, 8, 4),
    ("plain", 100, 2, "thin"): Tile(16, 64, 128, 4, 4),
    ("up", 100, 4, "large"): Tile(64, 64, 32, 4, 3),
    ("up", 100, 4, "small"): Tile(64, 64, 32, 4, 3),
    ("up", 100, 4, "thin"): Tile(16, 32, 64, 4, 3),
    ("dhidden", 100, 4, "large"): Tile(64, 64, 32, 4, 3),
    ("dhidden", 100, 4, "small"): Tile(64, 64, 32, 4, 3),
    ("dhidden", 100, 4, "thin"): Tile(16, 32, 64, 4, 3),
    ("plain", 100, 4, "large"): Tile(64, 64, 32, 4, 3),
    ("plain", 100, 4, "small"): Tile(64, 64, 32, 4, 3),
    ("plain", 100, 4, "thin"): Tile(16, 32, 64, 4, 3),
}
_THIN_ROWS = 32
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# (device name, kind, M, N, K, dtype) -> seconds in Triton and in cuBLAS of a plain product, whose
# kind is "out" (h w2^T + b2), "dx", "dw1" or "dw2". Empty: not measured on any device yet.
MEASURED: dict[tuple[str, str, int, int, int, torch.dtype], tuple[float, float]] = {}

_GROUP = tl.constexpr(8)  # rows of tiles that are walked together, for the second-level cache
# y = 2 sqrt(2/pi) (u + 0.044715 u^3), once in bits and once its derivative.
_LINEAR_BITS = tl.constexpr(2 * math.sqrt(2 / math.pi) * LOG2_E)
_CUBIC_BITS = tl.constexpr(0.044715 * 2 * math.sqrt(2 / math.pi) * LOG2_E)
_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
_SLOPE_SQUARE = tl.constexpr(3 * 0.044715 * 2 * math.sqrt(2 / math.pi))
_FAR = tl.constexpr(1e4)  # the square of a u beyond which the curve is straight


def tile(kind: str, target: Target, size: int, n_m: int, n_n: int, aligned: bool) -> Tile:
    """The tile of an (n_m, n_n) result of `size` bytes an element; size classes in this order.

    "odd": tensors that are not aligned, through pointers; "thin": few rows, as in decoding;
    "small": fewer large tiles than multiprocessors; else "large".
    """
    generation = target.generation
    if not aligned:
        return TILES[kind, 80, size, "odd"]
    if n_m <= _THIN_ROWS:
        return TILES[kind, generation, size, "thin"]
    large = TILES[kind, generation, size, "large"]
    tiles = triton.cdiv(n_m, large.rows) * triton.cdiv(n_n, large.columns)
    return large if tiles >= target.multiprocessors else TILES[kind, generation, size, "small"]


def _aligned(target: Target, *tensors: torch.Tensor | None) -> bool:
    """Whether descriptors can address all; in generation 80, whether lines start at multiples."""
    given = [tensor for tensor in tensors if tensor is not None]
    if target.generation == 80 and any(t.stride(0) % 16 or t.shape[1] % 16 for t in given):
        return False
    return all(fits_descriptor(tensor) for tensor in given)


def picks_triton(
    kind: str, n_m: int, n_n: int, n_k: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether Triton makes a plain product: where MEASURED says that it is faster than cuBLAS."""
    if not MEASURED or device.type != "cuda":
        return False
    seconds = MEASURED.get((_device_name(device.index or 0), kind, n_m, n_n, n_k, dtype))
    return seconds is not None and seconds[0] < seconds[1]


@constant_when_compiled
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@triton.jit
def _sigmoid(b_u):
    # gelu(u) = u s(y),  s = 1 / (1 + exp(-y)),  y = 2 sqrt(2/pi) (u + 0.044715 u^3)
    # With w = exp(-|y|) in [0, 1] nothing overflows: s is 1/(1+w) or w/(1+w), s' = w/(1+w)^2.
    b_y = b_u * (b_u * b_u * _CUBIC_BITS + _LINEAR_BITS)
    b_w = tl.exp2(-tl.abs(b_y))
    b_r = 1.0 / (1.0 + b_w)
    return tl.where(b_y < 0, b_w * b_r, b_r), b_w * b_r * b_r


@triton.jit
def _gelu_and_slope(b_u):
    # gelu'(u) = s + u s' 2 sqrt(2/pi) (1 + 3 0.044715 u^2);  far out s' is 0
    b_s, b_ds = _sigmoid(b_u)
    b_square = tl.minimum(b_u * b_u, _FAR)
    return b_u * b_s, b_s + b_u * b_ds * (b_square * _SLOPE_SQUARE + _SLOPE)


@triton.jit
def _read(
    p, first_row, first_column, n_rows, n_columns, stride,
    BR: tl.constexpr, BC: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    if DESCRIBED:
        b = p.load([first_row, first_column])
    else:
        o_r = (first_row + tl.arange(0, BR)).to(tl.int64)
        o_c = first_column + tl.arange(0, BC)
        m = (o_r < n_rows)[:, None] & (o_c < n_columns)[None, :]
        b = tl.load(p + o_r[:, None] * stride + o_c[None, :], m, 0.0)
    return b  # [BR, BC], zero outside


@triton.jit
def _write(
    p, b, first_row, first_column, n_rows, n_columns,
    BR: tl.constexpr, BC: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    if DESCRIBED:
        p.store([first_row, first_column], b)
    else:
        o_r = (first_row + tl.arange(0, BR)).to(tl.int64)
        o_c = first_column + tl.arange(0, BC)
        m = (o_r < n_rows)[:, None] & (o_c < n_columns)[None, :]
        tl.store(p + o_r[:, None] * n_columns + o_c[None, :], b, m)


@triton.jit
def _epilogue(
    b_acc, p_bias, p_u, p_c, p_h, p_partial, i_m, first_row, first_column, n_m, n_n,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
    DTYPE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    if PARTS > 1:
        b_left, b_right = b_acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        _epilogue(
            b_left, p_bias, p_u, p_c, p_h, p_partial, i_m, first_row, first_column, n_m, n_n,
            BM, BN // 2, PARTS // 2, DTYPE, DESCRIBED,
        )  # fmt: skip
        _epilogue(
            b_right, p_bias, p_u, p_c, p_h, p_partial, i_m, first_row, first_column + BN // 2,
            n_m, n_n, BM, BN // 2, PARTS // 2, DTYPE, DESCRIBED,
        )  # fmt: skip
    else:
        _finish(
            b_acc, p_bias, p_u, p_c, p_h, p_partial, i_m, first_row, first_column, n_m, n_n,
            BM, BN, DTYPE, DESCRIBED,
        )  # fmt: skip


@triton.jit
def _finish(
    b_acc, p_bias, p_u, p_c, p_h, p_partial, i_m, first_row, first_column, n_m, n_n,
    BM: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    o_n = first_column + tl.arange(0, BN)
    if p_u is not None:
        # du = dh gelu'(u);  db1 = sum over rows of du, as it is stored
        b_u = _read(p_u, first_row, first_column, n_m, n_n, n_n, BM, BN, DESCRIBED)
        b_h, b_slope = _gelu_and_slope(b_u.to(tl.float32))
        b_c = (b_acc * b_slope).to(DTYPE)
        _write(p_c, b_c, first_row, first_column, n_m, n_n, BM, BN, DESCRIBED)
        if p_partial is not None:
            # Rows outside are zero: dy and u are zero there.
            o_partial = tl.cast(i_m, tl.int64) * n_n + o_n
            tl.store(p_partial + o_partial, tl.sum(b_c.to(tl.float32), 0), o_n < n_n)
        if p_h is not None:
            _write(p_h, b_h.to(DTYPE), first_row, first_column, n_m, n_n, BM, BN, DESCRIBED)
    else:
        if p_bias is not None:
            b_acc += tl.load(p_bias + o_n, o_n < n_n, 0.0).to(tl.float32)[None, :]
        b_c = b_acc.to(DTYPE)
        if p_c is not None:
            _write(p_c, b_c, first_row, first_column, n_m, n_n, BM, BN, DESCRIBED)
        if p_h is not None:
            # The activation of what is stored, so that backward sees the same numbers.
            b_u = b_c.to(tl.float32)
            b_s, _ = _sigmoid(b_u)
            b_h = (b_u * b_s).to(DTYPE)
            _write(p_h, b_h, first_row, first_column, n_m, n_n, BM, BN, DESCRIBED)


@triton.jit
def _tile_kernel(
    i_tile, p_a, p_b, p_bias, p_u, p_c, p_h, p_partial, n_m, n_n, n_k, stride_a, stride_b,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr,
    PARTS: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n_wide = tl.cdiv(n_n, BN)
    i_group = i_tile // (_GROUP * n_wide)
    n_group = tl.minimum(tl.cdiv(n_m, BM) - i_group * _GROUP, _GROUP)
    i_inside = i_tile - i_group * _GROUP * n_wide
    i_m = i_group * _GROUP + i_inside % n_group
    o_m = i_m * BM
    o_n = (i_inside // n_group) * BN
    b_acc = tl.zeros([BM, BN], tl.float32)
    for o_k in tl.range(0, n_k, BK):
        if A_TRANSPOSED:
            b_a = _read(p_a, o_k, o_m, n_k, n_m, stride_a, BK, BM, DESCRIBED).T
        else:
            b_a = _read(p_a, o_m, o_k, n_m, n_k, stride_a, BM, BK, DESCRIBED)
        if B_TRANSPOSED:
            b_b = _read(p_b, o_n, o_k, n_n, n_k, stride_b, BN, BK, DESCRIBED).T
        else:
            b_b = _read(p_b, o_k, o_n, n_k, n_n, stride_b, BK, BN, DESCRIBED)
        # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_acc = tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)
    _epilogue(
        b_acc, p_bias, p_u, p_c, p_h, p_partial, i_m, o_m, o_n, n_m, n_n,
        BM, BN, PARTS, DTYPE, DESCRIBED,
    )  # fmt: skip


@triton.jit
def _product_kernel(
    p_a, p_b, p_bias, p_u, p_c, p_h, p_partial, n_m, n_n, n_k, stride_a, stride_b,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr,
    PARTS: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # c = a b + bias, h = gelu(c);  or, where u is given, c = (a b) gelu'(u), h = gelu(u)
    if DESCRIBED:
        n_tiles = tl.cdiv(n_m, BM) * tl.cdiv(n_n, BN)
        for i_tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
            _tile_kernel(
                i_tile, p_a, p_b, p_bias, p_u, p_c, p_h, p_partial,
                n_m, n_n, n_k, stride_a, stride_b,
                BM, BN, BK, A_TRANSPOSED, B_TRANSPOSED, DTYPE, PARTS, DESCRIBED, PRECISION,
            )  # fmt: skip
    else:
        _tile_kernel(
            tl.program_id(0), p_a, p_b, p_bias, p_u, p_c, p_h, p_partial,
            n_m, n_n, n_k, stride_a, stride_b,
            BM, BN, BK, A_TRANSPOSED, B_TRANSPOSED, DTYPE, PARTS, DESCRIBED, PRECISION,
        )  # fmt: skip


def _product(
    kind: str,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    u: torch.Tensor | None,
    c: torch.Tensor | None,
    h: torch.Tensor | None,
    a_transposed: bool,
    b_transposed: bool,
    want_partial: bool = False,
) -> torch.Tensor | None:
    """Launch the kernel; returns the column sums of c over the tiles of rows if wanted."""
    n_m, n_k = a.shape[::-1] if a_transposed else a.shape
    n_n = b.shape[0] if b_transposed else b.shape[1]
    target = target_of(a)
    aligned = _aligned(target, a, b, u, c, h)
    cut = tile(kind, target, a.element_size(), n_m, n_n, aligned)
    n_tall, n_wide = triton.cdiv(n_m, cut.rows), triton.cdiv(n_n, cut.columns)
    partial = a.new_empty(n_tall, n_n, dtype=torch.float32) if want_partial else None
    if not n_tall * n_wide:
        return partial
    described = aligned and target.generation >= 90
    operands: list[Any] = [a, b]
    results: list[Any] = [u, c, h]
    if described:
        block_a, block_b = [cut.rows, cut.inner], [cut.inner, cut.columns]
        operands = [
            TensorDescriptor.from_tensor(a, block_a[::-1] if a_transposed else block_a),
            TensorDescriptor.from_tensor(b, block_b[::-1] if b_transposed else block_b),
        ]
        block = [cut.rows, cut.columns // cut.parts]
        results = [None if t is None else TensorDescriptor.from_tensor(t, block) for t in results]
    programs = min(n_tall * n_wide, target.multiprocessors) if described else n_tall * n_wide
    with device_of(a):
        _product_kernel[(programs,)](
            *operands, bias, *results, partial, n_m, n_n, n_k, a.stride(0), b.stride(0),
            BM=cut.rows, BN=cut.columns, BK=cut.inner,
            A_TRANSPOSED=a_transposed, B_TRANSPOSED=b_transposed, DTYPE=_TYPES[a.dtype],
            PARTS=cut.parts, DESCRIBED=described,
            PRECISION=dot_precision() if a.dtype == torch.float32 else "tf32",
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    return partial


def _forward_fake(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, want_u: bool, want_h: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = x.shape[0], w1.shape[0]
    return x.new_empty(shape if want_u else (0,)), x.new_empty(shape if want_h else (0,))


@operator("ffn_forward_up", _forward_fake)
def forward_up(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, want_u: bool, want_h: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """u = x w1^T + b1 and h = gelu(u), both (N, F), for x (N, C); empty where not wanted."""
    u, h = _forward_fake(x, w1, b1, want_u, want_h)
    _product("up", x, w1, b1, None, u if want_u else None, h if want_h else None, False, True)
    return u, h


def _backward_fake(
    dy: torch.Tensor, w2: torch.Tensor, u: torch.Tensor, want_h: bool, want_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    du, db1 = dy.new_empty(u.shape), dy.new_empty(u.shape[1] if want_bias else 0)
    return du, dy.new_empty(u.shape if want_h else (0,)), db1


@operator("ffn_backward_hidden", _backward_fake)
def backward_hidden(
    dy: torch.Tensor, w2: torch.Tensor, u: torch.Tensor, want_h: bool, want_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """du = (dy w2) gelu'(u) and h = gelu(u), both (N, F), and db1 (F,); empty where not wanted."""
    du, h, db1 = _backward_fake(dy, w2, u, want_h, want_bias)
    partial = _product(
        "dhidden", dy, w2, None, u, du, h if want_h else None, False, False, want_bias
    )
    return du, h, db1 if partial is None else partial.sum(0).to(dy.dtype)


def _multiply_fake(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    a_transposed: bool,
    b_transposed: bool,
) -> torch.Tensor:
    return a.new_empty(a.shape[1 if a_transposed else 0], b.shape[0 if b_transposed else 1])


@operator("ffn_multiply", _multiply_fake)
def multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    a_transposed: bool,
    b_transposed: bool,
) -> torch.Tensor:
    """a b + bias (M, N), for a (M, K), or (K, M) if transposed, and b (K, N), or (N, K)."""
    c = _multiply_fake(a, b, bias, a_transposed, b_transposed)
    _product("plain", a, b, bias, None, c, None, a_transposed, b_transposed)
    return c


def _plain(
    kind: str,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    a_transposed: bool,
    b_transposed: bool,
) -> torch.Tensor:
    """`multiply` in Triton or in cuBLAS."""
    left, right = a.t() if a_transposed else a, b.t() if b_transposed else b
    shape = left.shape[0], right.shape[1], left.shape[1]
    if picks_triton(kind, *shape, a.dtype, a.device):
        return multiply(a, b, bias, a_transposed, b_transposed)
    return left @ right if bias is None else torch.addmm(bias, left, right)


def _rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """x as (N, width) with last stride 1, copied only where needed."""
    rows = x.reshape(math.prod(x.shape[:-1]), width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


class _GeluFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, w1, b1, w2, b2, keep, recompute):
        rows, w1, w2 = x, _rows(w1, w1.shape[1]), _rows(w2, w2.shape[1])
        b1 = None if b1 is None else b1.contiguous()
        u, h = forward_up(rows, w1, b1, keep and not recompute, True)
        out = _plain("out", h, w2, b2, False, True)
        ctx.save_for_backward(rows, w1, b1, w2, None if recompute else u)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout):
        x, w1, b1, w2, u = ctx.saved_tensors
        needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[:5]
        dy = _rows(dout, x.shape[1])
        dx = dw1 = db1 = dw2 = None
        if needs_x or needs_w1 or needs_b1 or needs_w2:
            if u is None:
                u, _ = forward_up(x, w1, b1, True, False)
            du, h, db1 = backward_hidden(dy, w2, u, needs_w2, needs_b1)
            dx = _plain("dx", du, w1, None, False, False) if needs_x else None
            dw1 = _plain("dw1", du, x, None, True, False) if needs_w1 else None
            dw2 = _plain("dw2", dy, h, None, True, False) if needs_w2 else None
        db2 = dy.sum(0) if needs_b2 else None
        return dx, dw1, db1 if needs_b1 else None, dw2, db2, None, None


def gelu_ffn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    recompute: bool,
) -> torch.Tensor:
    """As nanogpt.kernels.gelu_ffn; no rows give no rows and zero gradients of the weights."""
    cast = autocast_dtype(x)
    if cast is not None:
        x, w1, w2 = x.to(cast), w1.to(cast), w2.to(cast)
        b1, b2 = None if b1 is None else b1.to(cast), None if b2 is None else b2.to(cast)
    sources = (tensor for tensor in (x, w1, b1, w2) if tensor is not None)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sources)
    rows = _rows(x, x.shape[-1])
    return _GeluFfn.apply(rows, w1, b1, w2, b2, keep, recompute).view(x.shape)


def unsupported(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
) -> str | None:
    """Why these arguments cannot run here, or None."""
    named = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    for name, tensor in named.items():
        if autocast_dtype(x) is None and tensor is not None and tensor.dtype != x.dtype:
            return f"{name} is {tensor.dtype}, x {x.dtype}; outside autocast they must agree"
    return refuse_dtypes(x=x, **named)
