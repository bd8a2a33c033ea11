"""The Triton kernels of attention against float64, interpreted where there is no GPU."""

import itertools

import pytest
import torch
from exactness import (
    DEVICE,
    DTYPES,
    TARGETS,
    assert_exact,
    compiled_for,
    outputs_and_gradients,
    poisoned_memory,
)

from nanogpt.kernels import attention_triton as kernels
from nanogpt.kernels import causal_attention
from nanogpt.kernels.launch_triton import aligned

SHAPES = [  # T, S, D
    (1, 1, 16), (5, 9, 10), (17, 17, 32), (40, 73, 64), (7, 8, 80), (33, 33, 256), (1, 300, 64),
    (3, 70, 200),
]  # fmt: skip
# Several tiles of the half-precision tables each way; float32's tiles are smaller.
LARGE = [(130, 130, 64), (100, 257, 128), (129, 300, 24)]
CASES = [(shape, dtype) for dtype in DTYPES for shape in SHAPES]
CASES += [(shape, dtype) for dtype in DTYPES if dtype.itemsize == 2 for shape in LARGE]


def random_inputs(n_queries, n_keys, width, dtype=torch.float32, batch=2, heads=2):
    heads = 1 if n_keys > 128 else heads
    q = torch.randn(batch, heads, n_queries, width, device=DEVICE)
    k, v = (torch.randn(batch, heads, n_keys, width, device=DEVICE) for _ in "kv")
    return [x.to(dtype) for x in (q, k, v)]


def run(impl, inputs, dtype=None):
    return outputs_and_gradients(lambda *x: causal_attention(*x, impl=impl), inputs, dtype)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_output_and_gradients_are_as_exact_as_torchs(shape, dtype, target, deterministic):
    inputs = random_inputs(*shape, dtype)
    before = [x.clone() for x in inputs]
    exact, torchs = run("reference", inputs, torch.float64), run("torch", inputs)
    with compiled_for(target):
        if deterministic:
            with poisoned_memory():
                ours, again = run("triton", inputs), run("triton", inputs)
            assert all(map(torch.equal, ours, again)), "two runs differ"
        else:
            ours = run("triton", inputs)
    for got, peer, want in zip(ours, torchs, exact, strict=True):
        assert got.dtype == dtype
        assert_exact(got, peer, want, floor=4.0)
    assert all(map(torch.equal, inputs, before)), "an input was written"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 300, 64), (1, 65, 10), (1, 513, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_query_is_split_over_the_keys_and_joined(shape, dtype, target):
    q, k, v = random_inputs(*shape, dtype)
    exact = causal_attention(q.double(), k.double(), v.double(), impl="reference")
    with torch.no_grad(), compiled_for(target), poisoned_memory():
        ours = causal_attention(q, k, v, impl="triton")
    assert_exact(ours, causal_attention(q, k, v, impl="torch"), exact)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_decoding_counts_only_as_many_keys_as_the_device_says(length):
    q, k, v = random_inputs(1, 200, 32)
    k[:, :, length:], v[:, :, length:] = float("nan"), float("nan")
    number = torch.tensor([length], dtype=torch.int32, device=DEVICE)
    ours = kernels.decode(q, k, v, 0.2, number)
    want = causal_attention(q, k[:, :, :length], v[:, :, :length], scale=0.2, impl="reference")
    assert torch.allclose(ours, want, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", ["views of qkv", "last dimension strided", "expanded"])
def test_any_strides_are_read(layout, target):
    qkv = torch.randn(2, 33, 3, 4, 16, device=DEVICE)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if layout == "last dimension strided":
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
        assert q.stride(-1) != 1
    elif layout == "expanded":
        q, k, v = (x[:, :1].expand(2, 4, 33, 16) for x in (q, k, v))
    with compiled_for(target):
        ours = run("triton", [q, k, v])
    for got, want in zip(ours, run("reference", [q, k, v], torch.float64), strict=True):
        assert torch.allclose(got.double(), want, atol=1e-5)


def test_the_gradient_of_an_expanded_sum_is_read():
    inputs = [x.requires_grad_() for x in random_inputs(9, 9, 16)]
    causal_attention(*inputs, impl="triton").sum().backward()
    ours = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad = None
    causal_attention(*inputs, impl="reference").sum().backward()
    for got, x in zip(ours, inputs, strict=True):
        assert torch.allclose(got, x.grad, atol=1e-5)


def test_the_scale_and_huge_scores_are_handled():
    q, k, v = random_inputs(20, 20, 16)
    ours = causal_attention(100 * q, k, v, scale=3.0, impl="triton")
    want = causal_attention(100 * q.double(), k.double(), v.double(), scale=3.0, impl="reference")
    assert torch.allclose(ours.double(), want, atol=1e-3)
    assert ours.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)])
def test_nothing_in_gives_nothing_out(shape):
    q = torch.randn(shape, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(*shape[:2], 3, shape[3], device=DEVICE, requires_grad=True) for _ in "kv")
    out = causal_attention(q, k, v, impl="triton")
    assert out.shape == shape
    out.sum().backward()
    assert k.grad.shape == k.shape
    assert not k.grad.any()


def test_the_log_sum_exp_is_in_base_two():
    q, k, v = random_inputs(3, 8, 16)
    _, lse = kernels.forward(q, k, v, 0.25)
    scores = 0.25 * q.double() @ k.double().transpose(2, 3)
    for i in range(3):
        want = scores[:, :, i, : 5 + i + 1].logsumexp(-1) / torch.log(torch.tensor(2.0))
        assert torch.allclose(lse[:, :, i].double(), want, atol=1e-5)


@pytest.mark.parametrize(("n_tiles", "n_heads", "group"), [(5, 7, 2), (1, 3, 4), (3, 8, 8)])
def test_every_tile_of_every_head_runs_once_the_heaviest_of_a_group_first(n_tiles, n_heads, group):
    import triton
    import triton.language as tl

    if DEVICE == "cuda":
        pytest.skip("the schedule is read through the interpreter")

    @triton.jit
    def schedule(p_rank, p_head, n_tiles, n_heads, GROUP: tl.constexpr):
        rank, head = kernels._schedule(tl.program_id(0), n_tiles, n_heads, GROUP)
        tl.store(p_rank + tl.program_id(0), rank)
        tl.store(p_head + tl.program_id(0), head)

    rank, head = (torch.full((n_tiles * n_heads,), -1, dtype=torch.int32) for _ in "ab")
    schedule[(n_tiles * n_heads,)](rank, head, n_tiles, n_heads, GROUP=group)
    order = list(zip(head.tolist(), rank.tolist(), strict=True))
    assert sorted(order) == list(itertools.product(range(n_heads), range(n_tiles)))
    for first in range(0, n_heads, group):
        ranks = [r for h, r in order if first <= h < first + group]
        assert ranks == sorted(ranks)


def test_rows_are_copied_only_where_they_begin_anywhere():
    x = torch.randn(2, 3, 4, 32)
    assert aligned(x) is x
    assert aligned(x.transpose(1, 2)).data_ptr() == x.data_ptr()
    odd = torch.randn(2, 3, 4, 10)
    copy = aligned(odd)
    assert copy.stride(2) == 16
    assert torch.equal(copy, odd)


def test_heads_that_are_too_wide_are_refused_in_words():
    q = torch.randn(1, 1, 2, 300, device=DEVICE)
    with pytest.raises(RuntimeError, match="300 wide; the kernels take up to 256"):
        causal_attention(q, q, q, impl="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="a device computes bfloat16 rightly")
def test_the_interpreters_wrong_bfloat16_is_refused():
    q = torch.randn(1, 1, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="interpreter computes wrongly"):
        causal_attention(q, q, q, impl="triton")


@pytest.mark.parametrize("mistake", ["a constant", "the mask", "one key too many"])
def test_the_rule_catches_a_kernel_with_a_mistake(mistake, monkeypatch):
    """A wrong constant stands in the kernel; wrong masks are imitated by the keys it is given."""
    q, k, v = random_inputs(20, 20, 16)
    exact = causal_attention(q.double(), k.double(), v.double(), impl="reference")
    torchs = causal_attention(q, k, v, impl="torch")
    if mistake == "a constant":
        monkeypatch.setattr(kernels, "LOG2_E", 1.0)
    elif mistake == "the mask":  # each query sees every key, and its past twice
        k, v = torch.cat([k, k], 2), torch.cat([v, v], 2)
    else:
        k, v = torch.cat([k[:, :, :1], k], 2), torch.cat([v[:, :, :1], v], 2)
    with pytest.raises(AssertionError, match="above"):
        assert_exact(causal_attention(q, k, v, impl="triton"), torchs, exact)


def test_the_gluon_tier_runs_only_where_it_was_measured(monkeypatch):
    from nanogpt.kernels import attention_gluon

    q, k, v = random_inputs(4, 4, 64)
    assert set() == kernels.GLUON
    assert not kernels._picks_gluon(q, k, v, 0.1)
    marked = torch.zeros(1), torch.ones(1)
    monkeypatch.setattr(attention_gluon, "forward", lambda *_: marked)
    assert kernels.forward(q, k, v, 0.1) is not marked
    monkeypatch.setattr(kernels, "_picks_gluon", lambda *_: True)
    assert kernels.forward(q, k, v, 0.1) is marked
