# mypy: disable-error-code="no-untyped-def"
"""Causal attention, forward, for Hopper, in Gluon: warps that specialise.

A program takes tiles of 64 * CONSUMERS queries of one head and walks over their keys in blocks of
128, from the diagonal to the left, with the running maximum and sum of Milakov and Gimelshein. One
warp only copies: the tensor memory accelerator brings queries, keys and values into rings in shared
memory, and memory barriers say which slot is full and which is free. Every consumer is a group of
four warps with 64 query rows; it issues the scores of the next block before it adds the values of
this one, so that the tensor cores work while it takes exponentials. The consumers hand each other
a turn before they issue products, so that one takes exponentials while the other multiplies. Only
blocks that reach beyond the diagonal are masked; blocks to its right are never loaded.

Saved for backward is one number a row, lse2 = m + log2(l), the base-2 logarithm of the sum of
2 ** (scale * log2(e) * <q, k>): the contract of the ordinary Triton forward, so that either can
feed the same backward. Scores and probabilities are never written.

NO GPU HAS RUN THIS KERNEL YET. It is compiled for sm_90 in the tests, where registers, spills,
shared memory and instructions are checked; its loop bounds are checked on an emulation in torch and
its barriers on a simulation. Nothing picks it by default: it is for use only where a measurement on
the device at hand says that it is faster and equally exact.

Source: Dao 2023, FlashAttention-2, algorithm 1 (arXiv:2307.08691); Shah et al. 2024,
FlashAttention-3, algorithm 2 and section 3.2 (arXiv:2407.08608).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

GLUON_MISSING: str | None = None
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    jit, constexpr_function = gluon.jit, gluon.constexpr_function
except ImportError as error:  # another Triton: the module still says why it cannot run
    GLUON_MISSING = f"this Triton has no Gluon that the kernel knows ({error})"

    def jit(function: Any = None, **_: Any) -> Any:
        """Leave the function as it is, bare or with options."""
        return function if function is not None else lambda same: same

    def constexpr_function(function: Any) -> Any:
        """Leave the function as it is."""
        return function


ROWS = 64  # query rows of one consumer: the height of a warp group's matrix instruction
BS = 128  # keys of a block
STAGES = 2  # slots of each ring; a power of two
CONSUMERS = 2
# Registers of a consumer's and of the producer's threads, by the number of consumers; they come
# out of 65,536 for all warp groups. Chosen for no spills; not measured on any device yet.
_REGISTERS = {2: (240, 24), 3: (160, 32)}
# Keys and values of the heads that run side by side should stay in the second-level cache.
_CACHE_BYTES = 32 * 1024 * 1024
_LOG2_E = 1.4426950408889634
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
# Hardware barriers of the turns; Triton numbers its own from 0.
_FIRST_TURN = 8


# The schedule. These four run inside the kernel, and as plain Python (`.fn`) in the tests.


@jit
def rounds_of(i_program, n_programs, n_tiles):
    """How many tiles a program takes. All numbers are integers, n_programs <= n_tiles."""
    n_full = n_tiles // n_programs
    i_place = i_program + (n_full % 2) * (n_programs - 1 - 2 * i_program)
    return n_full + (n_tiles - n_full * n_programs - i_place + n_programs - 1) // n_programs


@jit
def tile_of(i_round, i_program, n_programs, n_rows, n_heads, n_group):
    """The row of tiles and the head (of B * H) that a program takes in a round.

    Groups of n_group heads follow each other; within one, the last rows, which see most keys, come
    first. Every other round deals in the opposite order, which evens the sums out.
    """
    i_tile = i_round * n_programs + i_program + (i_round % 2) * (n_programs - 1 - 2 * i_program)
    i_group = i_tile // (n_group * n_rows)
    i_inside = i_tile - i_group * n_group * n_rows
    n_inside = min(n_group, n_heads - i_group * n_group)
    return n_rows - 1 - i_inside // n_inside, i_group * n_group + i_inside % n_inside


@jit
def blocks_of(i_row, T, S, BT, BS):
    """How many blocks of keys the row of tiles sees: 1 or more, none beyond S."""
    return (min(S, S - T + (i_row + 1) * BT) + BS - 1) // BS


@jit
def free_of(o_row, n_blocks, T, S, BS):
    """How many blocks of keys need no mask for queries from o_row on; the last one has it."""
    return min((S - T + o_row + 1) // BS, n_blocks - 1)


# Rings: block i lies in slot i mod STAGES; from lap to lap the parity of its barriers alternates.
# Division, not bits: with & and >> here, ptxas gives up overlapping products (note C7513).


@jit
def _slot(i_number, STAGES: gl.constexpr):
    return i_number % STAGES


@jit
def _parity(i_number, STAGES: gl.constexpr):
    return (i_number // STAGES) & 1


# Pieces of the consumer.


@constexpr_function
def _turn_assembly(verb, i_turn, n_consumers):
    return f"bar.{verb} {_FIRST_TURN + i_turn % n_consumers}, 256; mov.u32 $0, 0;"


@jit
def _turn(verb: gl.constexpr, i_turn: gl.constexpr, CONSUMERS: gl.constexpr):
    """Wait for ("sync") or hand over ("arrive") the turn: 128 threads wait, 128 hand over."""
    assembly: gl.constexpr = _turn_assembly(verb, i_turn, CONSUMERS)
    gl.inline_asm_elementwise(assembly, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@constexpr_function
def _pack_assembly(dtype):
    return f"cvt.rn.{'bf16' if dtype == gl.bfloat16 else 'f16'}x2.f32 $0, $2, $1;"


@jit
def _pack(b_p, dtype: gl.constexpr):
    # Two neighbours in one register: halves that a loop carries would be taken apart and put
    # together again in every turn.
    b_even, b_odd = gl.split(gl.reshape(b_p, [b_p.shape[0], b_p.shape[1] // 2, 2]))
    assembly: gl.constexpr = _pack_assembly(dtype)
    return gl.inline_asm_elementwise(
        assembly, "=r,f,f", [b_even, b_odd], dtype=gl.int32, is_pure=True, pack=1
    )


@jit
def _unpack(b_pairs, dtype: gl.constexpr, layout: gl.constexpr):
    b_even = b_pairs.to(gl.int16).to(dtype, bitcast=True)
    b_odd = (b_pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    b_p = gl.reshape(gl.join(b_even, b_odd), [b_pairs.shape[0], 2 * b_pairs.shape[1]])
    return gl.convert_layout(b_p, layout, assert_trivial=True)


@jit
def _mask(b_s, o_first_key, o_last_key, BS: gl.constexpr):
    o_s = o_first_key + gl.arange(0, BS, gl.SliceLayout(0, b_s.type.layout))
    return gl.where(o_s[None, :] <= o_last_key[:, None], b_s, float("-inf"))


@jit
def _softmax_step(b_s, b_m, b_l, scale2, masked: gl.constexpr, dtype: gl.constexpr):
    # m' = max(m, s),  p = 2^(scale2 (s - m')),  alpha = 2^(scale2 (m - m')),  l' = alpha l + sum p
    b_m_new = gl.maximum(b_m, gl.max(b_s, 1))
    b_top = b_m_new * scale2
    if masked:  # a row that has seen no key yet: 2^(-inf - 0) = 0
        b_top = gl.where(b_m_new == float("-inf"), 0.0, b_top)
    b_p = gl.exp2(b_s * scale2 - b_top[:, None])
    b_alpha = gl.exp2(b_m * scale2 - b_top)
    b_l = b_l * b_alpha + gl.sum(b_p, 1)
    return _pack(b_p, dtype), b_m_new, b_l, b_alpha


@jit
def _step(
    W: gl.constexpr, masked: gl.constexpr, s_q, s_k, s_v,
    full_k, full_v, free_k, free_v,
    b_o, b_pairs, b_m, b_l, i_v, o_first_key, o_last_key, more, scale2,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, BS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Add block i_v and take the scores of the next, whose keys the caller has waited for."""
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BS, 16])
    layout_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_o, 2)
    i_k = i_v + 1
    b_zero = gl.zeros([64, BS], gl.float32, layout_s)
    b_p = _unpack(b_pairs, s_v.dtype, layout_p)
    _turn("sync", W, CONSUMERS)
    # [64, D] @ [D, BS] -> [64, BS]
    b_s = warpgroup_mma(
        s_q, s_k.index(_slot(i_k, STAGES)).permute((1, 0)), b_zero, use_acc=False, is_async=True
    )
    mbarrier.wait(full_v.index(_slot(i_v, STAGES)), _parity(i_v, STAGES))
    # [64, BS] @ [BS, D] -> [64, D]
    b_o = warpgroup_mma(b_p, s_v.index(_slot(i_v, STAGES)), b_o, is_async=True)
    _turn("arrive", W + 1, CONSUMERS)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    mbarrier.arrive(free_k.index(_slot(i_k, STAGES)), count=1)
    if masked:
        b_s = _mask(b_s, o_first_key, o_last_key, BS)
    b_pairs_new, b_m, b_l, b_alpha = _softmax_step(b_s, b_m, b_l, scale2, masked, s_v.dtype)
    # The keys of the next step are awaited here, not there: the loop of this wait is what keeps
    # ptxas from moving the exponentials above behind the wait for the product below.
    mbarrier.wait(full_k.index(_slot(i_k + 1, STAGES)), _parity(i_k + 1, STAGES), pred=more)
    # b_pairs stands in deps so that its registers are not reused while the product reads them.
    b_o, b_pairs = warpgroup_mma_wait(0, deps=[b_o, b_pairs])
    mbarrier.arrive(free_v.index(_slot(i_v, STAGES)), count=1)
    b_o = b_o * gl.convert_layout(b_alpha, gl.SliceLayout(1, layout_o))[:, None]
    return b_o, b_pairs_new, b_m, b_l, i_k


@jit
def _consume(
    W: gl.constexpr, desc_o, p_lse, r_q, r_k, r_v, r_o,
    full_q, full_k, full_v, free_q, free_k, free_v,
    T, S, H, n_heads, n_group, scale2,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, BS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Consumer W: rows 64 W to 64 W + 63 of every tile. i_v counts blocks over all tiles."""
    dtype: gl.constexpr = desc_o.dtype
    BT: gl.constexpr = 64 * CONSUMERS
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BS, 16])
    layout_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_o, 2)
    rows_s: gl.constexpr = gl.SliceLayout(1, layout_s)
    rows_o: gl.constexpr = gl.SliceLayout(1, layout_o)
    four_d: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    i_program, n_programs = gl.program_id(0), gl.num_programs(0)
    n_rows = (T + BT - 1) // BT
    s_q, s_o = r_q.index(W), r_o.index(W)
    b_zero = gl.zeros([64, BS], gl.float32, layout_s)
    i_v = 0
    if W == CONSUMERS - 1:
        _turn("arrive", 0, CONSUMERS)  # the first turn is consumer 0's
    for i_round in range(rounds_of(i_program, n_programs, n_rows * n_heads)):
        i_row, i_head = tile_of(i_round, i_program, n_programs, n_rows, n_heads, n_group)
        n_blocks = blocks_of(i_row, T, S, BT, BS)
        o_row = i_row * BT + W * 64
        n_free = free_of(o_row, n_blocks, T, S, BS)
        o_last_key = S - T + o_row + gl.arange(0, 64, rows_s)
        b_m = gl.full([64], float("-inf"), gl.float32, rows_s)
        b_l = gl.zeros([64], gl.float32, rows_s)
        b_o = gl.zeros([64, D], gl.float32, layout_o)

        # The last block, with nothing to overlap it.
        mbarrier.wait(full_q.index(W), i_round & 1)
        mbarrier.wait(full_k.index(_slot(i_v, STAGES)), _parity(i_v, STAGES))
        # [64, D] @ [D, BS] -> [64, BS]
        b_s = warpgroup_mma(
            s_q, r_k.index(_slot(i_v, STAGES)).permute((1, 0)), b_zero, use_acc=False, is_async=True
        )
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        mbarrier.arrive(free_k.index(_slot(i_v, STAGES)), count=1)
        b_s = _mask(b_s, (n_blocks - 1) * BS, o_last_key, BS)
        b_pairs, b_m, b_l, _ = _softmax_step(b_s, b_m, b_l, scale2, True, dtype)
        i_k = i_v + 1
        mbarrier.wait(full_k.index(_slot(i_k, STAGES)), _parity(i_k, STAGES), pred=n_blocks > 1)

        for i_back in range(1, n_blocks - n_free):
            b_o, b_pairs, b_m, b_l, i_v = _step(
                W, True, s_q, r_k, r_v, full_k, full_v, free_k, free_v,
                b_o, b_pairs, b_m, b_l, i_v, (n_blocks - 1 - i_back) * BS, o_last_key,
                i_back + 1 < n_blocks, scale2, CONSUMERS, STAGES, BS, D,
            )  # fmt: skip
        for i_back in range(n_blocks - n_free, n_blocks):
            b_o, b_pairs, b_m, b_l, i_v = _step(
                W, False, s_q, r_k, r_v, full_k, full_v, free_k, free_v,
                b_o, b_pairs, b_m, b_l, i_v, (n_blocks - 1 - i_back) * BS, o_last_key,
                i_back + 1 < n_blocks, scale2, CONSUMERS, STAGES, BS, D,
            )  # fmt: skip

        mbarrier.arrive(free_q.index(W), count=1)
        mbarrier.wait(full_v.index(_slot(i_v, STAGES)), _parity(i_v, STAGES))
        b_p = _unpack(b_pairs, dtype, layout_p)
        # [64, BS] @ [BS, D] -> [64, D]
        b_o = warpgroup_mma(b_p, r_v.index(_slot(i_v, STAGES)), b_o, is_async=True)
        o_t = o_row + gl.arange(0, 64, rows_s)
        gl.store(p_lse + i_head.to(gl.int64) * T + o_t, b_m * scale2 + gl.log2(b_l), o_t < T)
        b_inverse = gl.convert_layout(1.0 / b_l, rows_o)
        b_o = warpgroup_mma_wait(0, deps=[b_o])
        mbarrier.arrive(free_v.index(_slot(i_v, STAGES)), count=1)
        i_v += 1
        tma.store_wait(0)  # the previous tile has left s_o
        s_o.store((b_o * b_inverse[:, None]).to(dtype))
        fence_async_shared()  # the accelerator sees what registers wrote; it clips rows beyond T
        tma.async_copy_shared_to_global(
            desc_o,
            [i_head // H, i_head % H, o_row, 0],
            s_o._reinterpret(dtype, [1, 1, 64, D], four_d),
        )
    tma.store_wait(0)


@jit
def _fill(
    desc, i_b, i_h, o_s, ring, full, free, i_slot,
    STAGES: gl.constexpr, BS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Copy one block of keys or values, once every consumer has released its slot."""
    four_d: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    i_stage = _slot(i_slot, STAGES)
    mbarrier.wait(free.index(i_stage), _parity(i_slot, STAGES) ^ 1)
    mbarrier.expect(full.index(i_stage), BS * D * 2)
    tma.async_copy_global_to_shared(
        desc, [i_b, i_h, o_s, 0], full.index(i_stage),
        ring.index(i_stage)._reinterpret(desc.dtype, [1, 1, BS, D], four_d),
    )  # fmt: skip


@jit
def _produce(
    desc_q, desc_k, desc_v, r_q, r_k, r_v,
    full_q, full_k, full_v, free_q, free_k, free_v,
    T, S, H, n_heads, n_group,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, BS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The producer: q0 k0 q1, then k1 v0, k2 v1 and so on, and the last v; zeros beyond T and S."""
    BT: gl.constexpr = 64 * CONSUMERS
    four_d: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    i_program, n_programs = gl.program_id(0), gl.num_programs(0)
    n_rows = (T + BT - 1) // BT
    i_v = 0
    for i_round in range(rounds_of(i_program, n_programs, n_rows * n_heads)):
        i_row, i_head = tile_of(i_round, i_program, n_programs, n_rows, n_heads, n_group)
        n_blocks = blocks_of(i_row, T, S, BT, BS)
        i_b, i_h = i_head // H, i_head % H
        for w in gl.static_range(CONSUMERS):
            mbarrier.wait(free_q.index(w), (i_round & 1) ^ 1)
            mbarrier.expect(full_q.index(w), 64 * D * 2)
            tma.async_copy_global_to_shared(
                desc_q, [i_b, i_h, i_row * BT + w * 64, 0], full_q.index(w),
                r_q.index(w)._reinterpret(desc_q.dtype, [1, 1, 64, D], four_d),
            )  # fmt: skip
            if w == 0:
                o_s = (n_blocks - 1) * BS
                _fill(desc_k, i_b, i_h, o_s, r_k, full_k, free_k, i_v, STAGES, BS, D)
        for i_back in range(1, n_blocks):
            o_s = (n_blocks - 1 - i_back) * BS
            _fill(desc_k, i_b, i_h, o_s, r_k, full_k, free_k, i_v + 1, STAGES, BS, D)
            _fill(desc_v, i_b, i_h, o_s + BS, r_v, full_v, free_v, i_v, STAGES, BS, D)
            i_v += 1
        _fill(desc_v, i_b, i_h, 0, r_v, full_v, free_v, i_v, STAGES, BS, D)
        i_v += 1


@jit(do_not_specialize=["T", "S", "H", "n_heads", "n_group"])
def _forward_kernel(
    desc_q, desc_k, desc_v, desc_o, p_lse, T, S, H, n_heads, n_group, scale2,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, BS: gl.constexpr, D: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = desc_q.dtype
    two_d: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    r_q = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, D], two_d)
    r_k = gl.allocate_shared_memory(dtype, [STAGES, BS, D], two_d)
    r_v = gl.allocate_shared_memory(dtype, [STAGES, BS, D], two_d)
    r_o = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, D], two_d)
    full_q = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], bar)
    free_q = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], bar)
    full_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    full_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    free_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    free_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for w in gl.static_range(CONSUMERS):
        mbarrier.init(full_q.index(w), count=1)
        mbarrier.init(free_q.index(w), count=1)
    for i_stage in gl.static_range(STAGES):
        mbarrier.init(full_k.index(i_stage), count=1)
        mbarrier.init(full_v.index(i_stage), count=1)
        mbarrier.init(free_k.index(i_stage), count=CONSUMERS)
        mbarrier.init(free_v.index(i_stage), count=CONSUMERS)
    fence_async_shared()
    # Compile-time constants stay constants only where they stand in the call itself.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    0, desc_o, p_lse, r_q, r_k, r_v, r_o,
                    full_q, full_k, full_v, free_q, free_k, free_v,
                    T, S, H, n_heads, n_group, scale2, CONSUMERS, STAGES, BS, D,
                )),
                (_consume, (
                    1, desc_o, p_lse, r_q, r_k, r_v, r_o,
                    full_q, full_k, full_v, free_q, free_k, free_v,
                    T, S, H, n_heads, n_group, scale2, CONSUMERS, STAGES, BS, D,
                )),
                (_produce, (
                    desc_q, desc_k, desc_v, r_q, r_k, r_v,
                    full_q, full_k, full_v, free_q, free_k, free_v,
                    T, S, H, n_heads, n_group, CONSUMERS, STAGES, BS, D,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3, "2 or 3 consumers")
        gl.warp_specialize(
            [
                (_consume, (
                    0, desc_o, p_lse, r_q, r_k, r_v, r_o,
                    full_q, full_k, full_v, free_q, free_k, free_v,
                    T, S, H, n_heads, n_group, scale2, CONSUMERS, STAGES, BS, D,
                )),
                (_consume, (
                    1, desc_o, p_lse, r_q, r_k, r_v, r_o,
                    full_q, full_k, full_v, free_q, free_k, free_v,
                    T, S, H, n_heads, n_group, scale2, CONSUMERS, STAGES, BS, D,
                )),
                (_consume, (
                    2, desc_o, p_lse, r_q, r_k, r_v, r_o,
                    full_q, full_k, full_v, free_q, free_k, free_v,
                    T, S, H, n_heads, n_group, scale2, CONSUMERS, STAGES, BS, D,
                )),
                (_produce, (
                    desc_q, desc_k, desc_v, r_q, r_k, r_v,
                    full_q, full_k, full_v, free_q, free_k, free_v,
                    T, S, H, n_heads, n_group, CONSUMERS, STAGES, BS, D,
                )),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the kernel cannot take these tensors, or None where it can. Needs no GPU."""
    if GLUON_MISSING is not None:
        return GLUON_MISSING
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in _DTYPES:
            return f"{name} is {x.dtype}; the kernel takes float16 and bfloat16"
        if x.dtype != q.dtype:
            return f"{name} is {x.dtype}, but q is {q.dtype}"
        if x.shape[-1] not in (64, 128):
            return f"{name} has heads of width {x.shape[-1]}; the kernel takes 64 and 128"
        if x.numel() == 0:
            continue
        if x.stride(-1) != 1:
            return f"the last stride of {name} is {x.stride(-1)}, not 1"
        for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True):
            if size > 1 and (stride == 0 or stride * x.element_size() % 16 != 0):
                return f"{name} has strides {x.stride()}; all but the last must be multiples of 8"
        if x.data_ptr() % 16 != 0:
            return f"{name} does not begin at a multiple of 16 bytes"
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        return f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together"
    if q.shape[2] > k.shape[2]:
        return f"q has more positions ({q.shape[2]}) than k ({k.shape[2]})"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_cuda:
            return f"{name} is on {x.device}; the kernel needs a GPU of compute capability 9.0"
        capability = torch.cuda.get_device_capability(x.device)
        if capability != (9, 0) or torch.version.hip is not None:
            return f"the GPU is of capability {capability[0]}.{capability[1]}; the kernel needs 9.0"
    return None


def programs_and_group(
    n_heads: int, n_queries: int, n_keys: int, width: int, multiprocessors: int, persistent: bool,
    consumers: int = CONSUMERS,
) -> tuple[int, int]:  # fmt: skip
    """How many programs run, and how many heads are worked on side by side.

    Args:
        n_heads: B * H.
        n_queries, n_keys, width: T, S, D.
        multiprocessors: of the device; each holds one program.
        persistent: one program a multiprocessor, which takes several tiles; otherwise one a tile.
        consumers: a tile has 64 queries for each.
    """
    n_tiles = n_heads * -(-n_queries // (ROWS * consumers))
    programs = min(n_tiles, multiprocessors) if persistent else n_tiles
    return programs, max(1, min(n_heads, _CACHE_BYTES // (4 * n_keys * width)))


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    persistent: bool = True,
    consumers: int = CONSUMERS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention and the base-2 logarithms of its sums.

    out[b,h,i] = sum_j softmax_j(scale * <q[b,h,i], k[b,h,j]>) v[b,h,j],   j <= S - T + i
    lse2[b,h,i] = log2 sum_j 2 ** (scale * log2(e) * <q[b,h,i], k[b,h,j]>)

    Args:
        q: (B, H, T, D) float16 | bfloat16, D 64 or 128, last stride 1, others multiples of 8.
        k, v: (B, H, S, D), S >= T, dtype and device of q; strides as for q.
        scale: multiplies the logits, dimensionless, > 0.
        persistent: one program a multiprocessor takes several tiles; otherwise one program a tile.
        consumers: warp groups of 64 query rows each: 2, or 3 where D is 64.
    Returns: out (B, H, T, D), dtype of q, a view of a contiguous (B, T, H, D); lse2 (B, H, T) fp32.
    Raises: RuntimeError with the reason where the kernel cannot run; ValueError for another scale
        or number of consumers.
    """
    reason = unsupported(q, k, v)
    if reason is not None:
        raise RuntimeError(f"the Gluon attention kernel cannot run: {reason}")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, not {scale}")
    n_batch, n_head, n_queries, width = q.shape
    if consumers not in ((2, 3) if width == 64 else (2,)):
        raise ValueError(f"heads of width {width} cannot have {consumers} consumers")
    n_keys = k.shape[2]
    out = q.new_empty(n_batch, n_queries, n_head, width).transpose(1, 2)  # (B, H, T, D)
    lse2 = q.new_empty(n_batch, n_head, n_queries, dtype=torch.float32)  # (B, H, T)
    if q.numel() == 0:
        return out, lse2
    n_heads = n_batch * n_head
    multiprocessors = _multiprocessors(q.device.index)
    programs, group = programs_and_group(
        n_heads, n_queries, n_keys, width, multiprocessors, persistent, consumers
    )
    with torch.cuda.device(q.device):
        _forward_kernel[(programs,)](
            _descriptor(q, ROWS), _descriptor(k, BS), _descriptor(v, BS), _descriptor(out, ROWS),
            lse2, n_queries, n_keys, n_head, n_heads, group, scale * _LOG2_E,
            **_constants(width, consumers), num_warps=4,
        )  # fmt: skip
    return out, lse2


def compile_for_sm90(width: int, dtype: torch.dtype, consumers: int = CONSUMERS) -> Any:
    """Compile the kernel for sm_90 with neither GPU nor driver; not under TRITON_INTERPRET.

    Args:
        width: D, 64 or 128.
        dtype: float16 or bfloat16.
        consumers: warp groups of 64 query rows each, 2 or 3.
    Returns: Triton's compiled kernel, with .asm["ptx"], .asm["cubin"] and .metadata.shared.
    """

    def block(rows: int) -> str:
        layout = gl.NVMMASharedLayout(128, 16, 4)
        return f"tensordesc<{_DTYPES[dtype]}[1, 1, {rows}, {width}],{layout!r}>"

    constants = _constants(width, consumers)
    signature = {"desc_q": block(ROWS), "desc_k": block(BS), "desc_v": block(BS)}
    signature |= {"desc_o": block(ROWS), "p_lse": "*fp32"}
    signature |= dict.fromkeys(("T", "S", "H", "n_heads", "n_group"), "i32") | {"scale2": "fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(list(signature).index("p_lse"),): [["tt.divisibility", 16]]}
    source = GluonASTSource(_forward_kernel, signature, constants, aligned)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 4})


def _constants(width: int, consumers: int) -> dict[str, int]:
    consumer_registers, producer_registers = _REGISTERS[consumers]
    return {
        "CONSUMERS": consumers,
        "STAGES": STAGES,
        "BS": BS,
        "D": width,
        "CONSUMER_REGISTERS": consumer_registers,
        "PRODUCER_REGISTERS": producer_registers,
    }


def _descriptor(x: torch.Tensor, rows: int) -> Any:
    """How the accelerator finds blocks of `rows` positions in x (B, H, T|S, D)."""
    # The stride of a dimension of size one says nothing and may be anything.
    strides = [a if size > 1 else x.shape[-1] for a, size in zip(x.stride(), x.shape, strict=True)]
    layout = gl.NVMMASharedLayout(128, 16, 4)
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, x.shape[-1]], layout)


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count
