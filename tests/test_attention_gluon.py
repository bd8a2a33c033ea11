"""The Gluon attention kernel, as far as it can be tested where no GPU is.

Gluon has no interpreter. So the kernel itself is only compiled, for sm_90, and what the compiler
made of it is read. Its arithmetic is tested on an emulation in torch that walks over the same
blocks: the loop bounds, the schedule and the number of unmasked blocks are the kernel's own
functions, everything else is written a second time. Its barriers are tested on a simulation of the
same waits and arrivals in random order. Neither shows that the kernel computes the same: that takes
a GPU, where the last test of this file runs.
"""

import contextlib
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.kernels.attention import reference

triton = pytest.importorskip("triton")
gluon = pytest.importorskip("nanogpt.kernels.attention_gluon")
needs_gluon = pytest.mark.skipif(gluon.GLUON_MISSING is not None, reason=str(gluon.GLUON_MISSING))

SHARED_MEMORY_BYTES = 232_448  # what one program of an H100 can have
VARIANTS = [  # width, dtype, consumers
    (64, "float16", 2),
    (64, "bfloat16", 2),
    (128, "float16", 2),
    (128, "bfloat16", 2),
    (64, "float16", 3),
    (64, "bfloat16", 3),
]
_COMPILE = """
import json, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from nanogpt.kernels import attention_gluon as gluon

def run(tool, *arguments):
    command = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr

with tempfile.TemporaryDirectory() as folder:
    ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
    for width, dtype, consumers in json.loads(sys.argv[1]):
        kernel = gluon.compile_for_sm90(width, getattr(torch, dtype), consumers)
        ptx.write_text(kernel.asm["ptx"])
        report = run("ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", cubin)
        sass = run("nvdisasm", "-c", cubin)
        print(json.dumps([kernel.asm["ptx"], kernel.metadata.shared, report, sass]))
"""


# What the compiler makes of it.


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, int], list[Any]]:
    """PTX, bytes of shared memory, report of ptxas and machine code of every variant."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-c", _COMPILE, json.dumps(VARIANTS)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return dict(zip(VARIANTS, map(json.loads, run.stdout.splitlines()), strict=True))


@needs_gluon
@pytest.mark.parametrize(("width", "dtype", "consumers"), VARIANTS)
def test_it_compiles_for_hopper_without_spills_or_serialized_products(
    width: int, dtype: str, consumers: int, compiled: dict[tuple[int, str, int], list[Any]]
) -> None:
    ptx, shared, report, sass = compiled[width, dtype, consumers]
    assert "0 bytes spill stores, 0 bytes spill loads" in report
    assert "serialized" not in report
    assert shared <= SHARED_MEMORY_BYTES
    registers = gluon._REGISTERS[consumers]
    assert f"setmaxnreg.inc.sync.aligned.u32 \t{registers[0]};" in ptx
    assert f"setmaxnreg.dec.sync.aligned.u32 \t{registers[1]};" in ptx
    assert "cp.async.bulk.tensor.4d.shared" in ptx
    assert "cp.async.bulk.tensor.4d.global" in ptx
    kind = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    scores = f"wgmma.mma_async.sync.aligned.m64n128k16.f32.{kind}.{kind}"
    values = f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{kind}.{kind}"
    # Every consumer: a first block, a masked step, an unmasked step, a last product.
    expected = Counter({scores: consumers * 3 * width // 16})
    expected[values] += consumers * 3 * gluon.BS // 16
    assert {text: ptx.count(text) for text in expected} == dict(expected)
    # Turns are taken and handed over in the masked and in the unmasked step, and once to begin.
    assert ptx.count("bar.arrive") == 2 * consumers + 1
    assert set(re.findall(r"bar\.arrive (\d+), 256", ptx)) == {str(8 + w) for w in range(consumers)}
    # In every step all exponentials stand before the wait for the product that they overlap.
    words = re.findall(r"MUFU\.EX2|DEPBAR\.LE gsb0, 0x[01]|STL|LDL", sass)
    assert "STL" not in words
    assert "LDL" not in words
    steps = " ".join(words).split("DEPBAR.LE gsb0, 0x1")[1:]
    assert len(steps) == 2 * consumers
    for step in steps:
        overlapped = step.split("DEPBAR.LE gsb0, 0x0")[0]
        assert overlapped.count("EX2") >= gluon.ROWS * gluon.BS // 128


# What it refuses.


def _tensors(width: int = 64, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    """q, k and v as the model makes them: views of one (B, T, 3, H, D)."""
    together = torch.zeros(2, 40, 3, 4, width, dtype=dtype)
    return [x.transpose(1, 2) for x in together.unbind(2)]


@needs_gluon
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_cpu_only_the_device_is_refused_for_the_views_that_the_model_makes(
    width: int, dtype: torch.dtype
) -> None:
    reason = gluon.unsupported(*_tensors(width, dtype))
    assert reason == "q is on cpu; the kernel needs a GPU of compute capability 9.0"


@needs_gluon
def test_a_dimension_of_size_one_may_have_any_stride() -> None:
    q = torch.zeros(1, 4, 1, 64, dtype=torch.float16).as_strided((1, 4, 1, 64), (3, 64, 5, 1))
    assert "is on cpu" in str(gluon.unsupported(q, q, q))


@needs_gluon
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q.float(), k, v), "q is torch.float32"),
        (lambda q, k, v: (q, k.bfloat16(), v), "k is torch.bfloat16, but q is torch.float16"),
        (lambda q, k, v: (q[..., :32], k, v), "q has heads of width 32"),
        (lambda q, k, v: (q, k, v.mT.contiguous().mT), "the last stride of v is"),
        (lambda q, k, v: (q, k[:1].expand(2, -1, -1, -1), v), "multiples of 8"),
        (lambda q, k, v: (_shifted(q, 0, 68), k, v), "multiples of 8"),
        (lambda q, k, v: (q, _shifted(k, 4, 64), v), "k does not begin at a multiple of 16 bytes"),
    ],
)
def test_what_the_copy_engine_cannot_address_is_refused_with_a_reason(
    change: Callable[..., tuple[torch.Tensor, ...]], words: str
) -> None:
    assert words in str(gluon.unsupported(*change(*_tensors())))


def _shifted(x: torch.Tensor, offset: int, row: int) -> torch.Tensor:
    """A tensor of x's shape whose rows are `row` elements apart and begin at `offset`."""
    rows = math.prod(x.shape[:-1])
    flat = torch.zeros(rows * row + offset, dtype=x.dtype)[offset:]
    return flat[: rows * row].view(*x.shape[:-1], row)[..., : x.shape[-1]]


@needs_gluon
def test_forward_raises_with_the_reason_where_the_kernel_cannot_run() -> None:
    with pytest.raises(RuntimeError, match="cannot run: q is on cpu"):
        gluon.forward(*_tensors(), 0.125)


@needs_gluon
def test_a_scale_or_a_number_of_consumers_that_the_kernel_does_not_know_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gluon, "unsupported", lambda *_: None)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale must be positive"):
            gluon.forward(*_tensors(), scale)
    with pytest.raises(ValueError, match="width 128 cannot have 3 consumers"):
        gluon.forward(*_tensors(128), 0.125, consumers=3)


@needs_gluon
def test_the_launcher_hands_over_views_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[dict[str, Any]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*values: object, num_warps: int, **constants: object) -> None:
                names = [parameter.name for parameter in kernel.params]
                arguments = dict(zip(names, values, strict=False)) | constants
                assert list(arguments) == names
                launches.append(arguments | {"grid": grid, "num_warps": num_warps})

            return launch

    kernel = gluon._forward_kernel
    monkeypatch.setattr(gluon, "_forward_kernel", Recorder())
    monkeypatch.setattr(gluon, "unsupported", lambda *_: None)
    monkeypatch.setattr(gluon, "_multiprocessors", lambda _: 3)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    q, k, v = _tensors()
    q = q[:, :, :30]
    out, lse2 = gluon.forward(q, k, v, 0.125)
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()
    assert lse2.shape == q.shape[:3]
    (launch,) = launches
    assert (launch["grid"], launch["num_warps"]) == ((3,), 4)
    assert [launch[name] for name in ("T", "S", "H", "n_heads", "n_group")] == [30, 40, 4, 8, 8]
    assert launch["scale2"] == pytest.approx(0.125 / math.log(2))
    assert launch["p_lse"] is lse2
    for name, x, rows in (("q", q, 64), ("k", k, 128), ("v", v, 128), ("o", out, 64)):
        descriptor = launch[f"desc_{name}"]
        assert descriptor.base is x
        assert (descriptor.shape, descriptor.strides) == (list(x.shape), list(x.stride()))
        assert descriptor.block_shape == [1, 1, rows, 64]


@needs_gluon
def test_nothing_is_launched_for_no_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon, "unsupported", lambda *_: None)
    q, k, v = _tensors()
    out, lse2 = gluon.forward(q[:, :, :0], k, v, 0.125)
    assert out.shape == (2, 4, 0, 64)
    assert lse2.shape == (2, 4, 0)


@needs_gluon
def test_shapes_that_would_leave_a_warp_waiting_are_refused() -> None:
    q, k, v = _tensors()
    assert "q has more positions (40) than k (39)" in str(
        gluon.unsupported(q, k[:, :, :39], v[:, :, :39])
    )
    assert "do not fit together" in str(gluon.unsupported(q, k, v[:, :, :39]))
    assert "do not fit together" in str(gluon.unsupported(q[:, :2], k, v))


def test_without_gluon_the_module_still_says_why_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    spec = importlib.util.spec_from_file_location("without_gluon", Path(str(gluon.__file__)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert str(module.unsupported(*_tensors())).startswith("this Triton has no Gluon")


# The schedule: the kernel's own functions, run as Python.


def _bound(name: str) -> Callable[..., int]:
    return getattr(gluon, name).fn


def _tiles(programs: int, n_rows: int, n_heads: int, group: int) -> Iterator[list[tuple[int, int]]]:
    """For every program its tiles (row, head), in order."""
    for i_program in range(programs):
        rounds = _bound("rounds_of")(i_program, programs, n_rows * n_heads)
        yield [
            gluon.tile_of.fn(i_round, i_program, programs, n_rows, n_heads, group)
            for i_round in range(rounds)
        ]


@needs_gluon
@pytest.mark.parametrize("programs", [1, 2, 7, 132, 1000])
@pytest.mark.parametrize(
    ("n_rows", "n_heads", "group"), [(1, 1, 1), (8, 96, 96), (64, 12, 5), (3, 7, 2), (16, 4, 1)]
)
def test_every_tile_of_every_head_is_taken_once(
    programs: int, n_rows: int, n_heads: int, group: int
) -> None:
    programs = min(programs, n_rows * n_heads)
    taken = Counter(tile for tiles in _tiles(programs, n_rows, n_heads, group) for tile in tiles)
    assert taken == Counter((row, head) for row in range(n_rows) for head in range(n_heads))


@needs_gluon
def test_the_heaviest_rows_of_a_group_of_heads_come_first() -> None:
    n_rows, n_heads, group = 4, 6, 4
    programs = n_rows * n_heads  # one tile each: the hardware starts programs in order
    order = [tiles[0] for tiles in _tiles(programs, n_rows, n_heads, group)]
    # One full round, dealt forwards.
    assert order[:6] == [(3, 0), (3, 1), (3, 2), (3, 3), (2, 0), (2, 1)]
    assert order[16:20] == [(3, 4), (3, 5), (2, 4), (2, 5)]
    rows = [row for row, _ in order]
    assert rows[:16] == sorted(rows[:16], reverse=True)
    assert rows[16:] == sorted(rows[16:], reverse=True)


@needs_gluon
def test_programs_that_stay_get_equal_work_at_the_shape_of_gpt2() -> None:
    n_rows, n_heads = 8, 96  # T = 1024, B * H = 8 * 12
    work = [sum(row + 1 for row, _ in tiles) for tiles in _tiles(132, n_rows, n_heads, n_heads)]
    assert sum(work) == n_heads * 36
    assert max(work) <= 1.1 * sum(work) / len(work)


@needs_gluon
def test_heads_are_grouped_by_what_the_cache_holds() -> None:
    assert gluon.programs_and_group(96, 1024, 1024, 64, 132, True) == (132, 96)
    assert gluon.programs_and_group(96, 1024, 1024, 64, 132, False) == (768, 96)
    assert gluon.programs_and_group(64, 8192, 8192, 128, 132, True) == (132, 8)
    assert gluon.programs_and_group(96, 1024, 1024, 64, 132, False, 3) == (576, 96)
    assert gluon.programs_and_group(2, 1, 1_000_000, 128, 132, True) == (2, 1)


# The arithmetic, on an emulation.


def _emulate(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rows: int, consumers: int,
    keys: int, programs: int = 3,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The kernel's algorithm in torch, with tiles of rows * consumers queries and `keys` keys."""
    n_batch, n_head, n_queries, width = q.shape
    n_keys, tile, heads = k.shape[2], rows * consumers, n_batch * n_head
    n_rows = -(-n_queries // tile)
    scale2 = scale * gluon._LOG2_E
    out = torch.full((n_batch, n_head, n_queries, width), float("nan"), dtype=q.dtype)
    lse2 = torch.full((n_batch, n_head, n_queries), float("nan"))

    def block(x: torch.Tensor, head: int, first: int, size: int) -> torch.Tensor:
        """What the copy engine brings: zeros beyond the end."""
        assert first >= 0
        piece = x[head // n_head, head % n_head, first : first + size]
        return torch.cat([piece, piece.new_zeros(size - len(piece), width)])

    for tiles in _tiles(min(programs, n_rows * heads), n_rows, heads, max(1, heads - 1)):
        for i_row, head in tiles:
            n_blocks = _bound("blocks_of")(i_row, n_queries, n_keys, tile, keys)
            for w in range(consumers):
                first_row = i_row * tile + w * rows
                n_free = _bound("free_of")(first_row, n_blocks, n_queries, n_keys, keys)
                last_key = n_keys - n_queries + first_row + torch.arange(rows)
                b_q = block(q, head, first_row, rows).float()
                b_m = torch.full((rows,), float("-inf"))
                b_l, b_o = torch.zeros(rows), torch.zeros(rows, width)
                for i_back in range(n_blocks):
                    first_key = (n_blocks - 1 - i_back) * keys
                    b_s = b_q @ block(k, head, first_key, keys).float().T
                    masked = i_back < max(1, n_blocks - n_free)
                    if masked:
                        o_s = first_key + torch.arange(keys)
                        hidden = o_s[None, :] > last_key[:, None]
                        b_s = b_s.masked_fill(hidden, float("-inf"))
                    b_m_new = torch.maximum(b_m, b_s.amax(1))
                    b_top = b_m_new * scale2
                    if masked:
                        b_top = torch.where(b_m_new == float("-inf"), 0.0, b_top)
                    b_p = torch.exp2(b_s * scale2 - b_top[:, None])
                    b_alpha = torch.exp2(b_m * scale2 - b_top)
                    b_l, b_m = b_l * b_alpha + b_p.sum(1), b_m_new
                    b_v = block(v, head, first_key, keys).float()
                    b_o = b_o * b_alpha[:, None] + b_p.to(q.dtype).float() @ b_v
                live = min(rows, max(0, n_queries - first_row))  # stores are clipped
                place = (head // n_head, head % n_head, slice(first_row, first_row + live))
                out[place] = (b_o / b_l[:, None])[:live].to(q.dtype)
                lse2[place] = (b_m * scale2 + b_l.log2())[:live]
    return out, lse2


def _expected_lse2(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    scores = scale * q.double() @ k.double().mT
    visible = torch.ones_like(scores, dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return scores.masked_fill(~visible, float("-inf")).logsumexp(-1) * gluon._LOG2_E


@needs_gluon
@pytest.mark.parametrize(
    ("n_queries", "n_keys"),
    [(1, 1), (1, 37), (5, 5), (16, 16), (17, 17), (33, 47), (48, 48), (40, 41), (7, 64), (31, 95)],
)
@pytest.mark.parametrize(("rows", "consumers", "keys"), [(4, 2, 8), (4, 3, 8), (8, 2, 8)])
def test_the_emulated_blocks_give_attention_and_the_sums_of_its_rows(
    n_queries: int, n_keys: int, rows: int, consumers: int, keys: int
) -> None:
    q = torch.randn(2, 3, n_queries, 16)
    k, v = torch.randn(2, 2, 3, n_keys, 16)
    out, lse2 = _emulate(q, k, v, 0.3, rows, consumers, keys)
    torch.testing.assert_close(
        out.double(), reference(q.double(), k.double(), v.double(), 0.3), atol=2e-6, rtol=2e-6
    )
    torch.testing.assert_close(lse2.double(), _expected_lse2(q, k, 0.3), atol=2e-6, rtol=2e-6)


@needs_gluon
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_emulated_tiles_of_the_kernel_are_as_exact_as_torch(dtype: torch.dtype) -> None:
    q = torch.randn(1, 2, 201, 64).to(dtype)
    k, v = torch.randn(2, 1, 2, 333, 64).to(dtype)
    exact = reference(q.double(), k.double(), v.double(), 0.125)
    out, lse2 = _emulate(q, k, v, 0.125, gluon.ROWS, gluon.CONSUMERS, gluon.BS)
    # One rounding of probabilities and one of the result, against torch's one of the result.
    rounding = (exact.to(dtype).double() - exact).abs().max()
    assert (out.double() - exact).abs().max() <= 2 * rounding
    torch.testing.assert_close(lse2.double(), _expected_lse2(q, k, 0.125), atol=1e-5, rtol=1e-5)


@needs_gluon
def test_no_block_is_loaded_that_no_query_sees() -> None:
    blocks_of, free_of = _bound("blocks_of"), _bound("free_of")
    for n_queries, n_keys in [(1024, 1024), (1000, 1000), (100, 1000), (1, 129), (257, 300)]:
        for i_row in range(-(-n_queries // 128)):
            last_query = min(n_queries, (i_row + 1) * 128) - 1
            last_key = n_keys - n_queries + last_query
            n_blocks = blocks_of(i_row, n_queries, n_keys, 128, 128)
            assert (n_blocks - 1) * 128 <= last_key < n_blocks * 128
            for first_row in (i_row * 128, i_row * 128 + 64):
                n_free = free_of(first_row, n_blocks, n_queries, n_keys, 128)
                assert 0 <= n_free < n_blocks
                assert n_free * 128 <= n_keys - n_queries + first_row + 1


# The barriers, on a simulation.


class _Barrier:
    """A memory barrier: a phase ends after `count` arrivals; a wait names the phase's parity."""

    def __init__(self, count: int) -> None:
        self.count, self.pending, self.phase = count, count, 0

    def arrive(self) -> None:
        self.pending -= 1
        assert self.pending >= 0
        if self.pending == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def passed(self, parity: int) -> bool:
        return self.phase % 2 != parity


class _Machine:
    """Rings and barriers of one program, and what lies in every slot."""

    def __init__(self, consumers: int, stages: int) -> None:
        self.consumers, self.stages = consumers, stages
        self.full = {(r, i): _Barrier(1) for r in "kv" for i in range(stages)}
        self.free = {(r, i): _Barrier(consumers) for r in "kv" for i in range(stages)}
        self.full |= {("q", w): _Barrier(1) for w in range(consumers)}
        self.free |= {("q", w): _Barrier(1) for w in range(consumers)}
        self.slots: dict[tuple[str, int], object] = {}
        self.readers: Counter[tuple[str, int]] = Counter()
        self.copies: list[tuple[tuple[str, int], object]] = []
        self.turns = [0] * consumers  # arrivals at the barrier of every consumer's turn
        self.seen: list[list[tuple[int, int]]] = [[] for _ in range(consumers)]

    def copy_lands(self, i_copy: int) -> None:
        """Some copy arrives, in any order."""
        slot, content = self.copies.pop(i_copy)
        assert self.readers[slot] == 0, "a slot was overwritten while it was read"
        self.slots[slot] = content
        self.full[slot].arrive()

    def produce(self, tiles: list[int]) -> Iterator[Callable[[], bool]]:
        number = 0
        for i_round, n_blocks in enumerate(tiles):
            for w in range(self.consumers):
                yield from self._fill("q", w, i_round & 1 ^ 1, i_round)
                if w == 0:
                    yield from self._fill_block("k", number, (i_round, n_blocks - 1))
            for i_back in range(1, n_blocks):
                yield from self._fill_block("k", number + 1, (i_round, n_blocks - 1 - i_back))
                yield from self._fill_block("v", number, (i_round, n_blocks - i_back))
                number += 1
            yield from self._fill_block("v", number, (i_round, 0))
            number += 1

    def _fill_block(self, ring: str, number: int, content: object) -> Iterator[Callable[[], bool]]:
        yield from self._fill(ring, number % self.stages, number // self.stages & 1 ^ 1, content)

    def _fill(
        self, ring: str, i: int, parity: int, content: object
    ) -> Iterator[Callable[[], bool]]:
        yield lambda: self.free[ring, i].passed(parity)
        assert self.readers[ring, i] == 0
        self.copies.append(((ring, i), content))

    def consume(self, w: int, tiles: list[int]) -> Iterator[Callable[[], bool]]:
        number = 0
        following = (w + 1) % self.consumers
        if w == self.consumers - 1:
            self.turns[0] += 1
        for i_round, n_blocks in enumerate(tiles):
            yield lambda i=i_round: self.full["q", w].passed(i & 1)  # type: ignore[misc]
            assert self.slots["q", w] == i_round
            self.readers["q", w] += 1
            yield self._is_full("k", number)
            self._read("k", number, (i_round, n_blocks - 1))
            yield lambda: True
            self._release("k", number)
            if n_blocks > 1:
                yield self._is_full("k", number + 1)
            for i_back in range(1, n_blocks):
                yield lambda: self.turns[w] > 0
                assert self.turns[w] == 1, "two turns were handed over at once"
                self.turns[w] -= 1
                self._read("k", number + 1, (i_round, n_blocks - 1 - i_back))
                yield self._is_full("v", number)
                self._read("v", number, (i_round, n_blocks - i_back))
                self.seen[w].append((i_round, n_blocks - i_back))
                self.turns[following] += 1
                yield lambda: True
                self._release("k", number + 1)
                yield lambda: True
                if i_back + 1 < n_blocks:
                    yield self._is_full("k", number + 2)
                self._release("v", number)
                number += 1
            self.readers["q", w] -= 1
            self.free["q", w].arrive()
            yield self._is_full("v", number)
            self._read("v", number, (i_round, 0))
            self.seen[w].append((i_round, 0))
            yield lambda: True
            self._release("v", number)
            number += 1

    def _is_full(self, ring: str, number: int) -> Callable[[], bool]:
        parity = number // self.stages & 1
        return lambda: self.full[ring, number % self.stages].passed(parity)

    def _read(self, ring: str, number: int, content: object) -> None:
        slot = ring, number % self.stages
        assert self.slots[slot] == content
        self.readers[slot] += 1

    def _release(self, ring: str, number: int) -> None:
        slot = ring, number % self.stages
        self.readers[slot] -= 1
        self.free[slot].arrive()


@pytest.mark.parametrize("consumers", [2, 3])
@pytest.mark.parametrize("stages", [2, 4])
def test_the_simulated_barriers_neither_block_nor_let_a_slot_be_overwritten(
    consumers: int, stages: int
) -> None:
    for seed in range(60):
        chance = random.Random(seed)
        tiles = [chance.choice([1, 1, 2, 3, 4, 7]) for _ in range(chance.randint(1, 6))]
        machine = _Machine(consumers, stages)
        threads = [machine.produce(tiles)]
        threads += [machine.consume(w, tiles) for w in range(consumers)]
        waiting = [lambda: True for _ in threads]
        # A thread that is drawn rarely is a slow one.
        speeds = [chance.choice([1, 1, 20]) for _ in range(consumers + 2)]
        running = set(range(len(threads)))
        while running:
            able = [i for i in running if waiting[i]()]
            if machine.copies:
                able.append(len(threads))
            assert able, f"all wait for each other: seed {seed}, tiles {tiles}"
            (i,) = chance.choices(able, [speeds[i] for i in able])
            if i == len(threads):
                machine.copy_lands(chance.randrange(len(machine.copies)))
                continue
            try:
                waiting[i] = next(threads[i])
            except StopIteration:
                running.remove(i)
        every = [(r, block) for r, n in enumerate(tiles) for block in reversed(range(n))]
        assert machine.seen == [every] * consumers


# On a GPU that has what it needs.


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize(("width", "consumers"), [(64, 2), (64, 3), (128, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n_queries", "n_keys"),
    [(1, 1), (1, 300), (64, 64), (128, 128), (129, 129), (200, 457), (1024, 1024), (2111, 2111)],
)
def test_on_hopper_it_agrees_with_the_definition(
    n_queries: int,
    n_keys: int,
    dtype: torch.dtype,
    width: int,
    consumers: int,
    persistent: bool,
) -> None:
    together = torch.randn(2, n_keys, 3, 5, width, device="cuda", dtype=dtype)
    q, k, v = (x.transpose(1, 2) for x in together.unbind(2))
    q = q[:, :, :n_queries]
    before = together.clone()
    scale = width**-0.5
    exact = reference(q.double(), k.double(), v.double(), scale)
    theirs = reference(q, k, v, scale)
    out, lse2 = gluon.forward(q, k, v, scale, persistent=persistent, consumers=consumers)
    assert out.shape == q.shape
    tolerance = 2 * (theirs.double() - exact).abs().max() + 1e-5
    assert (out.double() - exact).abs().max() <= tolerance
    torch.testing.assert_close(lse2.double(), _expected_lse2(q, k, scale), atol=1e-3, rtol=1e-4)
    assert torch.equal(together, before)
