"""Causal attention in Triton: forward, two forms of backward, and decoding.

Forward: a program holds a tile of queries and walks over the keys they see, keeping a running
maximum and sum, so that no score leaves the chip; tiles wholly below the diagonal need no mask and
have a loop of their own. The heaviest tiles (the last queries) start first, heads in groups whose
keys and values stay in the cache. Saved are q, k, v, out and one base-2 log-sum-exp a query;
backward recomputes the probabilities from them. The fast backward makes five products a tile pair
and adds dQ atomically in float32; the deterministic one makes seven, dK and dV by tiles of keys,
dQ by tiles of queries, and two runs agree bit for bit. Decoding (one query) splits the keys over
programs and joins their partial sums in a second kernel.

Floor of forward: 4 B H T S D operations, half of them where T = S; q, k, v and out move once.

Source: Dao 2023, FlashAttention-2, algorithms 1 and 2 (arXiv:2307.08691); Dao et al. 2023,
Flash-Decoding.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanogpt.kernels.dispatch import differentiable_once
from nanogpt.kernels.launch_triton import (
    LOG2_E,
    aligned,
    device_of,
    dot_precision,
    operator,
    refuse_dtype,
    target_of,
)

WIDEST = 256


@dataclass(frozen=True)
class Tile:
    """BT queries and BS keys, warps of a program, depth of the copy pipeline."""

    BT: int
    BS: int
    warps: int
    stages: int


# (kernel, head width up to, bytes an element, generation) -> tile. Registers, spills and shared
# memory of every entry are read by tests/test_codegen.py; no time has been measured on a device.
TILES: dict[tuple[str, int, int, int], Tile] = {
    ("forward", 64, 2, 80): Tile(128, 64, 8, 3),
    ("forward", 64, 2, 90): Tile(128, 64, 4, 3),
    ("forward", 64, 2, 100): Tile(128, 128, 8, 2),
    ("forward", 128, 2, 80): Tile(128, 32, 8, 2),
    ("forward", 128, 2, 90): Tile(128, 128, 8, 2),
    ("forward", 128, 2, 100): Tile(128, 128, 8, 2),
    ("forward", 256, 2, 80): Tile(64, 32, 8, 2),
    ("forward", 256, 2, 90): Tile(128, 64, 8, 2),
    ("forward", 256, 2, 100): Tile(64, 32, 4, 2),
    ("forward", 64, 4, 80): Tile(32, 32, 8, 1),
    ("forward", 128, 4, 80): Tile(16, 32, 8, 1),
    ("forward", 256, 4, 80): Tile(16, 16, 8, 1),
    ("by_keys_dq", 64, 2, 80): Tile(32, 64, 4, 2),
    ("by_keys_dq", 64, 2, 90): Tile(64, 128, 8, 3),
    ("by_keys_dq", 64, 2, 100): Tile(64, 64, 4, 2),
    ("by_keys_dq", 128, 2, 80): Tile(32, 64, 8, 2),
    ("by_keys_dq", 128, 2, 90): Tile(64, 64, 8, 2),
    ("by_keys_dq", 128, 2, 100): Tile(32, 64, 8, 2),
    ("by_keys_dq", 64, 4, 80): Tile(32, 32, 8, 1),
    ("by_keys_dq", 128, 4, 80): Tile(16, 32, 8, 1),
    ("by_keys", 64, 2, 80): Tile(32, 64, 4, 2),
    ("by_keys", 64, 2, 90): Tile(64, 128, 8, 3),
    ("by_keys", 64, 2, 100): Tile(64, 64, 4, 2),
    ("by_keys", 128, 2, 80): Tile(32, 64, 8, 2),
    ("by_keys", 128, 2, 90): Tile(64, 128, 8, 2),
    ("by_keys", 128, 2, 100): Tile(32, 64, 8, 2),
    ("by_keys", 256, 2, 80): Tile(16, 32, 8, 1),
    ("by_keys", 256, 2, 90): Tile(32, 64, 8, 2),
    ("by_keys", 256, 2, 100): Tile(64, 64, 8, 1),
    ("by_keys", 64, 4, 80): Tile(32, 32, 8, 1),
    ("by_keys", 128, 4, 80): Tile(16, 32, 8, 1),
    ("by_keys", 256, 4, 80): Tile(16, 16, 8, 1),
    ("by_queries", 64, 2, 80): Tile(64, 32, 4, 2),
    ("by_queries", 64, 2, 90): Tile(128, 64, 8, 3),
    ("by_queries", 64, 2, 100): Tile(64, 64, 4, 2),
    ("by_queries", 128, 2, 80): Tile(64, 32, 4, 2),
    ("by_queries", 128, 2, 90): Tile(128, 64, 8, 2),
    ("by_queries", 128, 2, 100): Tile(64, 32, 4, 2),
    ("by_queries", 256, 2, 80): Tile(32, 16, 4, 1),
    ("by_queries", 256, 2, 90): Tile(64, 32, 8, 2),
    ("by_queries", 256, 2, 100): Tile(64, 32, 8, 1),
    ("by_queries", 64, 4, 80): Tile(16, 32, 8, 1),
    ("by_queries", 128, 4, 80): Tile(16, 32, 8, 1),
    ("by_queries", 256, 4, 80): Tile(16, 16, 8, 1),
}
# (device name, head width, dtype) where the warp-specialised forward of attention_gluon was
# measured faster than this one and as exact: none yet, because no device has run either.
GLUON: set[tuple[str, int, torch.dtype]] = set()
# Keys of a tile of decoding: 64 rows of up to 64 elements, fewer of wider ones.
_DECODE_ELEMENTS = 4096
# Keys and values of the heads that run together: half of a Hopper's cache of 50 MB.
_GROUP_BYTES = 24 * 2**20


def tile(kernel: str, width: int, size: int, generation: int) -> Tile:
    """The entry of TILES for a head width and element size; float32 has one for all devices."""
    up_to = next(limit for limit in (64, 128, 256) if width <= limit)
    return TILES[kernel, up_to, size, generation if size == 2 else 80]


@triton.jit
def _load_rows(
    x, i_b, i_h, i_row, n_rows, stride_b, stride_h, stride_t, D,
    BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr, MASK_ROWS: tl.constexpr,
    MASK_D: tl.constexpr,
):  # fmt: skip
    """Rows i_row … i_row + BT - 1 of x[i_b, i_h], zeros beyond its end: [BT, BD]."""
    if TMA:
        b_x = x.load([i_b, i_h, i_row, 0]).reshape([BT, BD])
    else:
        o_t = i_row + tl.arange(0, BT)
        o_d = tl.arange(0, BD)
        base = x + tl.cast(i_b, tl.int64) * stride_b + tl.cast(i_h, tl.int64) * stride_h
        pointers = base + tl.cast(o_t, tl.int64)[:, None] * stride_t + o_d[None, :]
        if MASK_ROWS and MASK_D:
            b_x = tl.load(pointers, (o_t[:, None] < n_rows) & (o_d[None, :] < D), 0.0)
        elif MASK_ROWS:
            b_x = tl.load(pointers, o_t[:, None] < n_rows, 0.0)
        elif MASK_D:
            b_x = tl.load(pointers, o_d[None, :] < D, 0.0)
        else:
            b_x = tl.load(pointers)
    return b_x


@triton.jit
def _store_rows(
    p_x, b_x, i_b, i_h, i_row, n_rows, stride_b, stride_h, stride_t, D,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_t = i_row + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    base = p_x + tl.cast(i_b, tl.int64) * stride_b + tl.cast(i_h, tl.int64) * stride_h
    pointers = base + tl.cast(o_t, tl.int64)[:, None] * stride_t + o_d[None, :]
    m = (o_t[:, None] < n_rows) & (o_d[None, :] < D)
    tl.store(pointers, b_x.to(p_x.dtype.element_ty), m)


@triton.jit
def _schedule(i_program, n_tiles, n_heads, GROUP: tl.constexpr):
    """(tile rank, head): heads in groups of GROUP, in each group rank by rank over its heads."""
    i_group = i_program // (GROUP * n_tiles)
    i_first = i_group * GROUP
    n_members = tl.minimum(GROUP, n_heads - i_first)
    i_within = i_program - i_first * n_tiles
    return i_within // n_members, i_first + i_within % n_members


@triton.jit
def _forward_step(
    b_q, b_m, b_l, b_acc, k, v, i_b, i_h, i_s, o_t, S, offset, scale_log2,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, D,
    BS: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr, DIAGONAL: tl.constexpr,
    MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_k = _load_rows(
        k, i_b, i_h, i_s, S, stride_kb, stride_kh, stride_ks, D, BS, BD, TMA, DIAGONAL, MASK_D
    )
    # [BT, BD] @ [BD, BS] -> [BT, BS]
    b_scores = tl.dot(b_q, b_k.T, input_precision=PRECISION) * scale_log2
    if DIAGONAL:
        o_s = i_s + tl.arange(0, BS)
        b_scores = tl.where(o_s[None, :] <= offset + o_t[:, None], b_scores, float("-inf"))
    b_top = tl.maximum(b_m, tl.max(b_scores, 1))
    b_p = tl.exp2(b_scores - b_top[:, None])
    b_shrink = tl.exp2(b_m - b_top)
    b_l = b_l * b_shrink + tl.sum(b_p, 1)
    b_acc = b_acc * b_shrink[:, None]
    b_v = _load_rows(
        v, i_b, i_h, i_s, S, stride_vb, stride_vh, stride_vs, D, BS, BD, TMA, DIAGONAL, MASK_D
    )
    # [BT, BS] @ [BS, BD] -> [BT, BD]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_top, b_l, b_acc


@triton.jit
def _forward_kernel(
    q, k, v, p_out, p_lse,
    n_heads, H, T, S, D, scale_log2,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_ot,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(T, BT)
    i_rank, i_bh = _schedule(tl.program_id(0), n_tiles, n_heads, GROUP)
    i_t = (n_tiles - 1 - i_rank) * BT  # the heaviest first
    i_b, i_h = i_bh // H, i_bh % H
    offset = S - T
    o_t = i_t + tl.arange(0, BT)
    b_q = _load_rows(
        q, i_b, i_h, i_t, T, stride_qb, stride_qh, stride_qt, D, BT, BD, TMA, True, MASK_D
    )
    b_m = tl.full([BT], float("-inf"), tl.float32)
    b_l = tl.zeros([BT], tl.float32)
    b_acc = tl.zeros([BT, BD], tl.float32)
    # Every row of the tile sees keys 0 … offset + i_t; the last row sees offset + i_t + BT.
    n_full = (offset + i_t + 1) // BS * BS
    n_seen = tl.minimum(S, offset + i_t + BT)
    for i_s in tl.range(0, n_full, BS, num_stages=STAGES):
        b_m, b_l, b_acc = _forward_step(
            b_q, b_m, b_l, b_acc, k, v, i_b, i_h, i_s, o_t, S, offset, scale_log2,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, D,
            BS, BD, TMA, False, MASK_D, PRECISION,
        )  # fmt: skip
    for i_s in tl.range(n_full, n_seen, BS, num_stages=STAGES):
        b_m, b_l, b_acc = _forward_step(
            b_q, b_m, b_l, b_acc, k, v, i_b, i_h, i_s, o_t, S, offset, scale_log2,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, D,
            BS, BD, TMA, True, MASK_D, PRECISION,
        )  # fmt: skip
    b_acc = b_acc / b_l[:, None]
    _store_rows(p_out, b_acc, i_b, i_h, i_t, T, stride_ob, stride_oh, stride_ot, D, BT, BD)
    tl.store(p_lse + tl.cast(i_bh, tl.int64) * T + o_t, b_m + tl.log2(b_l), o_t < T)


@triton.jit
def _delta_kernel(
    p_out, p_dout, p_delta,
    H, T, D,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # delta_i = sum_d out_id dout_id, the part of dS that a softmax subtracts
    i_bh, i_t = tl.program_id(0), tl.program_id(1) * BT  # y holds 65,535 at most
    i_b, i_h = i_bh // H, i_bh % H
    b_out = _load_rows(
        p_out, i_b, i_h, i_t, T, stride_ob, stride_oh, stride_ot, D, BT, BD, False, True, True
    )
    b_dout = _load_rows(
        p_dout, i_b, i_h, i_t, T, stride_gb, stride_gh, stride_gt, D, BT, BD, False, True, True
    )
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    o_t = i_t + tl.arange(0, BT)
    tl.store(p_delta + tl.cast(i_bh, tl.int64) * T + o_t, b_delta, o_t < T)


@triton.jit
def _by_keys_step(
    b_k, b_v, b_dk, b_dv, q, dout, p_lse, p_delta, p_dq, i_b, i_h, i_t, o_s, T, offset, scale_log2,
    stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt, D,
    BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr, DIAGONAL: tl.constexpr,
    ADD_DQ: tl.constexpr, MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_t = i_t + tl.arange(0, BT)
    b_q = _load_rows(
        q, i_b, i_h, i_t, T, stride_qb, stride_qh, stride_qt, D, BT, BD, TMA, True, MASK_D
    )
    # Beyond the last query the log-sum-exp is +inf, so that the probability there is zero.
    b_lse = tl.load(p_lse + o_t, o_t < T, float("inf"))
    # [BS, BD] @ [BD, BT] -> [BS, BT]
    b_scores = tl.dot(b_k, b_q.T, input_precision=PRECISION) * scale_log2
    b_p = tl.exp2(b_scores - b_lse[None, :])
    if DIAGONAL:
        b_p = tl.where(o_s[:, None] <= offset + o_t[None, :], b_p, 0.0)
    b_dout = _load_rows(
        dout, i_b, i_h, i_t, T, stride_gb, stride_gh, stride_gt, D, BT, BD, TMA, True, MASK_D
    )
    # dV = P^T dOut: [BS, BT] @ [BT, BD] -> [BS, BD]
    b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
    # dP^T = V dOut^T: [BS, BD] @ [BD, BT] -> [BS, BT]
    b_dp = tl.dot(b_v, b_dout.T, input_precision=PRECISION)
    b_delta = tl.load(p_delta + o_t, o_t < T, 0.0)
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
    # dK = dS^T Q: [BS, BT] @ [BT, BD] -> [BS, BD]
    b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
    if ADD_DQ:
        # dQ = dS K: [BT, BS] @ [BS, BD] -> [BT, BD]
        b_dq = tl.dot(b_ds.T, b_k, input_precision=PRECISION)
        o_d = tl.arange(0, BD)
        m = (o_t[:, None] < T) & (o_d[None, :] < D)
        tl.atomic_add(p_dq + o_t[:, None] * D + o_d[None, :], b_dq, m, sem="relaxed")
    return b_dk, b_dv


@triton.jit
def _by_keys_kernel(
    q, k, v, dout, p_lse, p_delta, p_dq, p_dk, p_dv,
    n_heads, H, T, S, D, scale_log2, scale,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gt,
    stride_dkb, stride_dkh, stride_dks,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, ADD_DQ: tl.constexpr, MASK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(S, BS)
    i_rank, i_bh = _schedule(tl.program_id(0), n_tiles, n_heads, GROUP)
    i_s = i_rank * BS  # the first keys are seen by most queries: the heaviest first
    i_b, i_h = i_bh // H, i_bh % H
    offset = S - T
    o_s = i_s + tl.arange(0, BS)
    b_k = _load_rows(
        k, i_b, i_h, i_s, S, stride_kb, stride_kh, stride_ks, D, BS, BD, TMA, True, MASK_D
    )
    b_v = _load_rows(
        v, i_b, i_h, i_s, S, stride_vb, stride_vh, stride_vs, D, BS, BD, TMA, True, MASK_D
    )
    b_dk = tl.zeros([BS, BD], tl.float32)
    b_dv = tl.zeros([BS, BD], tl.float32)
    i_row = tl.cast(i_bh, tl.int64) * T
    p_lse, p_delta = p_lse + i_row, p_delta + i_row
    p_dq = p_dq + i_row * D if ADD_DQ else p_dq
    # Query t sees key s where s <= offset + t: the first tile with such a query, and the first
    # in which every query sees every key of this tile.
    i_first = tl.maximum(0, i_s - offset) // BT * BT
    i_whole = tl.minimum(
        tl.cdiv(tl.maximum(0, i_s + BS - 1 - offset), BT) * BT, tl.cdiv(T, BT) * BT
    )
    for i_t in tl.range(i_first, i_whole, BT, num_stages=STAGES):
        b_dk, b_dv = _by_keys_step(
            b_k, b_v, b_dk, b_dv, q, dout, p_lse, p_delta, p_dq, i_b, i_h, i_t, o_s, T, offset,
            scale_log2, stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt, D,
            BT, BD, TMA, True, ADD_DQ, MASK_D, PRECISION,
        )  # fmt: skip
    for i_t in tl.range(i_whole, T, BT, num_stages=STAGES):
        b_dk, b_dv = _by_keys_step(
            b_k, b_v, b_dk, b_dv, q, dout, p_lse, p_delta, p_dq, i_b, i_h, i_t, o_s, T, offset,
            scale_log2, stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt, D,
            BT, BD, TMA, False, ADD_DQ, MASK_D, PRECISION,
        )  # fmt: skip
    b_dk = b_dk * scale
    _store_rows(p_dk, b_dk, i_b, i_h, i_s, S, stride_dkb, stride_dkh, stride_dks, D, BS, BD)
    _store_rows(p_dv, b_dv, i_b, i_h, i_s, S, stride_dkb, stride_dkh, stride_dks, D, BS, BD)


@triton.jit
def _by_queries_step(
    b_q, b_dout, b_lse, b_delta, b_dq, k, v, i_b, i_h, i_s, o_t, S, offset, scale_log2,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, D,
    BS: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr, DIAGONAL: tl.constexpr,
    MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_k = _load_rows(
        k, i_b, i_h, i_s, S, stride_kb, stride_kh, stride_ks, D, BS, BD, TMA, DIAGONAL, MASK_D
    )
    b_v = _load_rows(
        v, i_b, i_h, i_s, S, stride_vb, stride_vh, stride_vs, D, BS, BD, TMA, DIAGONAL, MASK_D
    )
    # [BT, BD] @ [BD, BS] -> [BT, BS]
    b_p = tl.exp2(tl.dot(b_q, b_k.T, input_precision=PRECISION) * scale_log2 - b_lse[:, None])
    if DIAGONAL:
        o_s = i_s + tl.arange(0, BS)
        b_p = tl.where(o_s[None, :] <= offset + o_t[:, None], b_p, 0.0)
    # dP = dOut V^T: [BT, BD] @ [BD, BS] -> [BT, BS]
    b_dp = tl.dot(b_dout, b_v.T, input_precision=PRECISION)
    b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
    # dQ = dS K: [BT, BS] @ [BS, BD] -> [BT, BD]
    return tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)


@triton.jit
def _by_queries_kernel(
    q, k, v, dout, p_lse, p_delta, p_dq,
    n_heads, H, T, S, D, scale_log2, scale,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gt,
    stride_dqb, stride_dqh, stride_dqt,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(T, BT)
    i_rank, i_bh = _schedule(tl.program_id(0), n_tiles, n_heads, GROUP)
    i_t = (n_tiles - 1 - i_rank) * BT
    i_b, i_h = i_bh // H, i_bh % H
    offset = S - T
    o_t = i_t + tl.arange(0, BT)
    b_q = _load_rows(
        q, i_b, i_h, i_t, T, stride_qb, stride_qh, stride_qt, D, BT, BD, TMA, True, MASK_D
    )
    b_dout = _load_rows(
        dout, i_b, i_h, i_t, T, stride_gb, stride_gh, stride_gt, D, BT, BD, TMA, True, MASK_D
    )
    i_row = tl.cast(i_bh, tl.int64) * T
    b_lse = tl.load(p_lse + i_row + o_t, o_t < T, float("inf"))
    b_delta = tl.load(p_delta + i_row + o_t, o_t < T, 0.0)
    b_dq = tl.zeros([BT, BD], tl.float32)
    n_full = (offset + i_t + 1) // BS * BS
    n_seen = tl.minimum(S, offset + i_t + BT)
    for i_s in tl.range(0, n_full, BS, num_stages=STAGES):
        b_dq = _by_queries_step(
            b_q, b_dout, b_lse, b_delta, b_dq, k, v, i_b, i_h, i_s, o_t, S, offset, scale_log2,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, D,
            BS, BD, TMA, False, MASK_D, PRECISION,
        )  # fmt: skip
    for i_s in tl.range(n_full, n_seen, BS, num_stages=STAGES):
        b_dq = _by_queries_step(
            b_q, b_dout, b_lse, b_delta, b_dq, k, v, i_b, i_h, i_s, o_t, S, offset, scale_log2,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, D,
            BS, BD, TMA, True, MASK_D, PRECISION,
        )  # fmt: skip
    b_dq = b_dq * scale
    _store_rows(p_dq, b_dq, i_b, i_h, i_t, T, stride_dqb, stride_dqh, stride_dqt, D, BT, BD)


@triton.jit
def _decode_kernel(
    p_q, p_k, p_v, p_length, p_partial, p_lse,
    H, S, D, n_splits, scale_log2,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    BS: tl.constexpr, BD: tl.constexpr, MASK_D: tl.constexpr,
):  # fmt: skip
    i_bh, i_split = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    if p_length is not None:
        S = tl.load(p_length)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    base_q = tl.cast(i_b, tl.int64) * stride_qb + tl.cast(i_h, tl.int64) * stride_qh
    b_q = tl.load(p_q + base_q + o_d, m_d, 0.0).to(tl.float32) * scale_log2
    b_m = tl.full([1], float("-inf"), tl.float32)
    b_l = tl.zeros([1], tl.float32)
    b_acc = tl.zeros([BD], tl.float32)
    # A run of whole tiles for each split, as even as they come.
    n_tiles = tl.cdiv(S, BS)
    i_from = i_split * n_tiles // n_splits * BS
    i_to = tl.minimum(S, (i_split + 1) * n_tiles // n_splits * BS)
    for i_s in tl.range(i_from, i_to, BS, num_stages=3):
        m_s = i_s + tl.arange(0, BS) < S
        b_k = _load_rows(
            p_k, i_b, i_h, i_s, S, stride_kb, stride_kh, stride_ks, D, BS, BD, False, True, MASK_D
        )
        b_scores = tl.sum(b_k.to(tl.float32) * b_q[None, :], 1)  # [BS]
        b_scores = tl.where(m_s, b_scores, float("-inf"))
        b_top = tl.maximum(b_m, tl.max(b_scores, 0))
        b_p = tl.exp2(b_scores - b_top)
        b_shrink = tl.exp2(b_m - b_top)
        b_v = _load_rows(
            p_v, i_b, i_h, i_s, S, stride_vb, stride_vh, stride_vs, D, BS, BD, False, True, MASK_D
        )
        b_l = b_l * b_shrink + tl.sum(b_p, 0)
        b_acc = b_acc * b_shrink + tl.sum(b_p[:, None] * b_v.to(tl.float32), 0)
        b_m = b_top
    # A split without keys leaves m = -inf and weighs nothing when the splits are joined.
    i_row = tl.cast(i_bh, tl.int64) * n_splits + i_split
    b_acc = b_acc / tl.where(b_l > 0, b_l, 1.0)
    tl.store(p_partial + i_row * D + o_d, b_acc, m_d)
    tl.store(p_lse + i_row + tl.arange(0, 1), b_m + tl.log2(tl.where(b_l > 0, b_l, 1.0)))


@triton.jit
def _join_kernel(
    p_partial, p_lse, p_out,
    D, n_splits,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_bh = tl.cast(tl.program_id(0), tl.int64)
    o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
    m_n, m_d = o_n < n_splits, o_d < D
    b_lse = tl.load(p_lse + i_bh * n_splits + o_n, m_n, float("-inf"))
    b_weight = tl.exp2(b_lse - tl.max(b_lse, 0))  # [BN]
    o_partial = (i_bh * n_splits + o_n)[:, None] * D + o_d[None, :]
    b_partial = tl.load(p_partial + o_partial, m_n[:, None] & m_d[None, :], 0.0)
    b_out = tl.sum(b_weight[:, None] * b_partial, 0) / tl.sum(b_weight, 0)
    tl.store(p_out + i_bh * D + o_d, b_out.to(p_out.dtype.element_ty), m_d)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _group(n_heads: int, n_keys: int, width: int, size: int) -> int:
    """Heads that run together: as many as the cache holds keys and values of, a power of two."""
    fitting = max(1, _GROUP_BYTES // (2 * n_keys * width * size))
    return min(1 << (fitting.bit_length() - 1), 1 << max(0, n_heads - 1).bit_length())


def _operand(x: torch.Tensor, rows: int, width: int, tma: bool) -> Any:
    """A tensor as kernels take it: a descriptor of tiles of `rows` rows, or itself."""
    return TensorDescriptor.from_tensor(x, [1, 1, rows, width]) if tma else x


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _uses_descriptors(generation: int, x: torch.Tensor) -> bool:
    """Whether tiles come by descriptors: not for float32, whose products read registers anyway."""
    return generation >= 90 and x.element_size() == 2


def _empty_like_q(q: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) in memory as (B, T, H, D), so that joining the heads afterwards is free.

    Rows begin at multiples of 16 elements, as in `aligned`.
    """
    _, heads, positions, width = q.shape
    row = -(-width // 16) * 16
    strides = positions * heads * row, row, heads * row, 1
    return q.new_empty_strided(q.shape, strides)  # not a view: callers may add to it in place


def _picks_gluon(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> bool:
    """Whether GLUON names these arguments and that kernel can run them."""
    if not GLUON or not q.is_cuda:
        return False
    if (torch.cuda.get_device_name(q.device), q.shape[-1], q.dtype) not in GLUON:
        return False
    from nanogpt.kernels import attention_gluon

    return scale > 0 and attention_gluon.unsupported(q, k, v) is None


def _forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like_q(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("attention_forward", _forward_fake)
def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, T, D) and the base-2 log-sum-exp of scale log2(e) <q, k>, (B, H, T) float32."""
    out, lse = _forward_fake(q, k, v, scale)
    batch, heads, n_queries, width = q.shape
    n_keys = k.shape[2]
    if not out.numel():
        return out, lse
    q, k, v = aligned(q), aligned(k), aligned(v)
    if _picks_gluon(q, k, v, scale):
        from nanogpt.kernels import attention_gluon

        return attention_gluon.forward(q, k, v, scale)
    generation = target_of(q).generation
    tma = _uses_descriptors(generation, q)
    padded = _padded(width)
    chosen = tile("forward", padded, q.element_size(), generation)
    with device_of(q):
        _forward_kernel[(triton.cdiv(n_queries, chosen.BT) * batch * heads,)](
            _operand(q, chosen.BT, padded, tma),
            _operand(k, chosen.BS, padded, tma),
            _operand(v, chosen.BS, padded, tma),
            out, lse, batch * heads, heads, n_queries, n_keys, width, scale * LOG2_E,
            *_strides(q, k, v, out),
            BT=chosen.BT, BS=chosen.BS, BD=padded, STAGES=chosen.stages,
            GROUP=_group(batch * heads, n_keys, width, q.element_size()),
            TMA=tma, MASK_D=padded != width, PRECISION=dot_precision("ieee"),
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
    return out, lse


def _backward_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_like_q(q), _empty_like_q(k), _empty_like_q(k)


@operator("attention_backward", _backward_fake)
def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; `deterministic` picks the form that two runs repeat bit for bit."""
    dq, dk, dv = _backward_fake(q, k, v, out, lse, dout, scale, deterministic)
    batch, heads, n_queries, width = q.shape
    n_keys = k.shape[2]
    if not dq.numel():
        return dq, dk.zero_(), dv.zero_()
    q, k, v, dout = aligned(q), aligned(k), aligned(v), aligned(dout)
    n_heads = batch * heads
    generation, size = target_of(q).generation, q.element_size()
    tma = _uses_descriptors(generation, q)
    padded = _padded(width)
    delta = torch.empty_like(lse)
    shape = (n_heads, heads, n_queries, n_keys, width, scale * LOG2_E, scale)
    options = {
        "BD": padded,
        "GROUP": _group(n_heads, n_keys, width, size),
        "TMA": tma,
        "MASK_D": padded != width,
        "PRECISION": dot_precision("ieee"),
    }
    # The single pass does not fit the registers at a width of 256.
    deterministic |= padded > 128
    by_keys = tile("by_keys" if deterministic else "by_keys_dq", padded, size, generation)
    sums = q.new_zeros(q.shape, dtype=torch.float32) if not deterministic else None
    with device_of(q):
        rows = max(8, min(32, 2048 // padded))
        _delta_kernel[(n_heads, triton.cdiv(n_queries, rows))](
            out, dout, delta, heads, n_queries, width, *_strides(out, dout), BT=rows, BD=padded,
        )  # fmt: skip
        _by_keys_kernel[(triton.cdiv(n_keys, by_keys.BS) * n_heads,)](
            _operand(q, by_keys.BT, padded, tma),
            _operand(k, by_keys.BS, padded, tma),
            _operand(v, by_keys.BS, padded, tma),
            _operand(dout, by_keys.BT, padded, tma),
            lse, delta, sums, dk, dv, *shape, *_strides(q, k, v, dout, dk),
            BT=by_keys.BT, BS=by_keys.BS, STAGES=by_keys.stages, ADD_DQ=not deterministic,
            num_warps=by_keys.warps, num_stages=by_keys.stages, **options,
        )  # fmt: skip
        if sums is not None:
            return torch.mul(sums, scale, out=dq), dk, dv
        chosen = tile("by_queries", padded, size, generation)
        _by_queries_kernel[(triton.cdiv(n_queries, chosen.BT) * n_heads,)](
            _operand(q, chosen.BT, padded, tma),
            _operand(k, chosen.BS, padded, tma),
            _operand(v, chosen.BS, padded, tma),
            _operand(dout, chosen.BT, padded, tma),
            lse, delta, dq, *shape, *_strides(q, k, v, dout, dq),
            BT=chosen.BT, BS=chosen.BS, STAGES=chosen.stages,
            num_warps=chosen.warps, num_stages=chosen.stages, **options,
        )  # fmt: skip
    return dq, dk, dv


def _decode_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, length: torch.Tensor | None
) -> torch.Tensor:
    return q.new_empty(q.shape)


@operator("attention_decode", _decode_fake)
def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, length: torch.Tensor | None
) -> torch.Tensor:
    """One query against all keys, (B, H, 1, D).

    Args:
        length: (1,) int32 on the device, how many of the S keys count, or None for all. It may
            change between replays of a CUDA graph, as the cache fills.
    """
    out = _decode_fake(q, k, v, scale, length)
    batch, heads, _, width = q.shape
    n_keys = k.shape[2]
    if not out.numel():
        return out
    q, k, v = aligned(q), aligned(k), aligned(v)
    # Four programs a multiprocessor, as far as there are tiles.
    wanted = triton.cdiv(4 * target_of(q).multiprocessors, batch * heads)
    padded = _padded(width)
    rows = min(64, _DECODE_ELEMENTS // padded)
    n_splits = max(1, min(wanted, triton.cdiv(n_keys, rows), 64))
    partial = q.new_empty(batch * heads, n_splits, width, dtype=torch.float32)
    lse = q.new_empty(batch * heads, n_splits, dtype=torch.float32)
    with device_of(q):
        _decode_kernel[(batch * heads, n_splits)](
            q, k, v, length, partial, lse, heads, n_keys, width, n_splits, scale * LOG2_E,
            *q.stride()[:2], *_strides(k, v),
            BS=rows, BD=padded, MASK_D=padded != width, num_warps=4, num_stages=3,
        )  # fmt: skip
        _join_kernel[(batch * heads,)](
            partial, lse, out, width, n_splits,
            BN=triton.next_power_of_2(n_splits), BD=padded, num_warps=4,
        )  # fmt: skip
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, scale):
        # Copied here, and not only by the launchers, so that backward finds the copies.
        if not torch.compiler.is_compiling():
            q, k, v = aligned(q), aligned(k), aligned(v)
        out, lse = forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout):
        exact = torch.are_deterministic_algorithms_enabled()
        return *backward(*ctx.saved_tensors, dout, ctx.scale, exact), None


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """As nanogpt.kernels.causal_attention, through these kernels."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.shape[2] == 1 and not wanted:
        return decode(q, k, v, scale, None)
    return _Attention.apply(q, k, v, scale)


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why these arguments cannot run here, or None."""
    if q.shape[-1] > WIDEST:
        return f"heads are {q.shape[-1]} wide; the kernels take up to {WIDEST}"
    return refuse_dtype("q", q)
