"""The Triton kernels of cross-entropy against float64, interpreted where there is no GPU."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from exactness import DEVICE, DTYPES, assert_exact, outputs_and_gradients, poisoned_memory

from nanogpt.kernels import cross_entropy, linear_cross_entropy
from nanogpt.kernels import cross_entropy_triton as kernels

head = importlib.import_module("nanogpt.kernels.cross_entropy")  # whose name is the function's

VOCABULARIES = [2, 65, 128, 300]


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    """So that a small vocabulary takes several blocks."""
    monkeypatch.setattr(kernels, "_LONGEST_BLOCK", 128)


def random_rows(vocabulary, dtype, rows=9):
    logits = (3 * torch.randn(rows, vocabulary, device=DEVICE)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    targets[3] = -100
    return logits, targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("reuse", [False, True])
def test_loss_and_gradient_are_as_exact_as_torchs(vocabulary, dtype, reuse):
    logits, targets = random_rows(vocabulary, dtype)
    before = logits.clone()

    def loss(impl):
        # A product before it, whose memory may be reused.
        return lambda x: 7 * cross_entropy(x * 1, targets, reuse_logits=reuse, impl=impl)

    exact = outputs_and_gradients(loss("reference"), [logits], torch.float64)
    torchs = outputs_and_gradients(loss("torch"), [logits])
    with poisoned_memory():
        ours = outputs_and_gradients(loss("triton"), [logits])
    for got, peer, want in zip(ours, torchs, exact, strict=True):
        assert_exact(got, peer, want, floor=0.01)
    assert torch.equal(logits, before)
    assert not ours[1][3].any(), "an ignored row has a gradient"


def test_the_gradient_is_written_over_the_logits_only_where_the_caller_allows():
    logits, targets = random_rows(65, torch.float32)
    for reuse in (False, True):
        leaf = logits.clone().requires_grad_()
        made = leaf * 1
        cross_entropy(made, targets, reuse_logits=reuse, impl="triton").backward()
        assert torch.equal(made, logits) is not reuse


def test_reused_logits_give_their_gradient_once():
    logits, targets = random_rows(65, torch.float32)
    loss = cross_entropy(logits.requires_grad_() * 1, targets, reuse_logits=True, impl="triton")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_small_probabilities_keep_their_gradient_in_half_precision():
    """p / N alone would be below float16's smallest number; a scaled loss brings it back."""
    rows = 256
    logits = torch.zeros(rows, 4, dtype=torch.float16, device=DEVICE)
    logits[:, 1:] = -12.0
    targets = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf * 1, targets, reuse_logits=True, impl="triton")
    (loss * 65536).backward()
    want = torch.softmax(logits.double(), 1)[0, 1] * 65536 / rows
    assert leaf.grad[0, 1].item() == pytest.approx(want.item(), rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("chunk_rows", [None, 1, 4, 100])
def test_the_head_in_chunks_is_as_exact_as_torchs(dtype, impl, chunk_rows):
    vocabulary, rows = 65, 9
    _, targets = random_rows(vocabulary, dtype)
    hidden = torch.randn(rows, 16, device=DEVICE).to(dtype)
    weight = (torch.randn(vocabulary, 16, device=DEVICE) / 2).to(dtype)
    limit = None if chunk_rows is None else chunk_rows * vocabulary * hidden.element_size()

    def loss(name, chunk=None):
        return lambda h, w: 5 * linear_cross_entropy(h, w, targets, chunk_bytes=chunk, impl=name)

    exact = outputs_and_gradients(loss("reference"), [hidden, weight], torch.float64)
    torchs = outputs_and_gradients(loss("torch"), [hidden, weight])
    ours = outputs_and_gradients(loss(impl, limit), [hidden, weight])
    for got, peer, want in zip(ours, torchs, exact, strict=True):
        assert_exact(got, peer, want)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("chunk_rows", [None, 4])
@pytest.mark.parametrize("vocabulary", [64, 65, 300])
def test_rows_padded_for_tensor_cores_change_no_number(monkeypatch, impl, chunk_rows, vocabulary):
    _, targets = random_rows(vocabulary, torch.float32)
    targets[2] = -100
    hidden = torch.randn(9, 16, device=DEVICE)
    weight = torch.randn(vocabulary, 16, device=DEVICE) / 2
    limit = None if chunk_rows is None else chunk_rows * 512 * 4
    widths = []

    def loss(h, w):
        return 5 * linear_cross_entropy(h, w, targets, chunk_bytes=limit, impl=impl)

    plain = outputs_and_gradients(loss, [hidden, weight])
    length = -(-vocabulary // 64) * 64
    monkeypatch.setattr(head, "_row_length", lambda v, h: widths.append(length) or length)
    padded = outputs_and_gradients(loss, [hidden, weight])
    assert widths or (impl == "torch" and limit is None)
    for ours, want in zip(padded, plain, strict=True):
        assert ours.shape == want.shape
        assert torch.allclose(ours, want, rtol=1e-5, atol=1e-6)


def test_columns_beyond_the_vocabulary_are_not_read_and_become_zero():
    logits, targets = random_rows(65, torch.float32)
    wide = torch.full((9, 128), float("nan"), device=DEVICE)
    wide[:, :65] = logits
    factor = torch.ones((), device=DEVICE)
    losses = kernels.loss_and_gradient_in_place(wide, targets, factor, -100, 65)
    alone = kernels.loss_and_gradient_in_place(logits, targets, factor, -100, 65)
    assert torch.equal(losses, alone)
    assert torch.equal(wide[:, :65], logits)
    assert not wide[:, 65:].any()


def test_only_half_precision_on_a_gpu_is_padded():
    hidden = torch.empty(1, 1, dtype=torch.bfloat16)
    assert head._row_length(50_257, hidden) == 50_257
    on_gpu = SimpleNamespace(is_cuda=True, element_size=lambda: 2)
    assert head._row_length(50_257, on_gpu) == 50_304
    assert head._row_length(50_304, on_gpu) == 50_304
    on_gpu.element_size = lambda: 4
    assert head._row_length(50_257, on_gpu) == 50_257


def test_a_chunk_never_holds_more_logits_than_allowed(monkeypatch):
    seen = []
    real = kernels.loss_and_gradient_in_place

    def watched(logits, *rest):
        seen.append(logits.numel() * logits.element_size())
        return real(logits, *rest)

    monkeypatch.setattr(kernels, "loss_and_gradient_in_place", watched)
    hidden, weight = torch.randn(50, 8, device=DEVICE), torch.randn(30, 8, device=DEVICE)
    targets = torch.randint(30, (50,), device=DEVICE)
    limit = 7 * 30 * 4 + 11
    linear_cross_entropy(hidden, weight, targets, chunk_bytes=limit, impl="triton")
    assert sum(seen) == 50 * 30 * 4
    assert max(seen) == 7 * 30 * 4


@pytest.mark.parametrize("outside", [70, -1])
def test_a_target_outside_the_vocabulary_makes_the_loss_nan_and_reads_nothing(outside):
    logits, targets = random_rows(65, torch.float32)
    targets[0] = outside
    assert cross_entropy(logits, targets, impl="triton").isnan()


def test_ignored_rows_may_hold_anything_and_no_row_at_all_gives_nan():
    logits, targets = random_rows(65, torch.float32)
    logits[3] = float("nan")
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, targets, impl="triton")
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()
    assert cross_entropy(logits, torch.full_like(targets, -100), impl="triton").isnan()


def test_rows_of_minus_infinity_but_one_are_certain():
    logits = torch.full((2, 300), float("-inf"), device=DEVICE)
    logits[:, 200] = 5.0
    targets = torch.full((2,), 200, device=DEVICE)
    assert cross_entropy(logits, targets, impl="triton").item() == 0.0


def test_strided_logits_are_read():
    logits, targets = random_rows(65, torch.float32)
    wide = torch.zeros(9, 130, device=DEVICE)
    wide[:, ::2] = logits
    ours = cross_entropy(wide[:, ::2], targets, impl="triton")
    assert torch.allclose(ours, cross_entropy(logits, targets, impl="torch"))
    wide[:, :65] = logits
    ours = cross_entropy(wide[:, :65], targets, impl="triton")
    assert torch.allclose(ours, cross_entropy(logits, targets, impl="torch"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 4), torch.ones(5, 5), torch.zeros(3).long()), "must be (N, C)"),
        ((torch.ones(3, 4), torch.ones(5, 4), torch.zeros(2).long()), "targets (2,)"),
    ],
)
def test_a_wrong_argument_of_the_head_is_named(arguments, message):
    import re

    with pytest.raises(ValueError, match=re.escape(message)):
        linear_cross_entropy(*arguments)
    with pytest.raises(ValueError, match="chunk_bytes must be positive"):
        linear_cross_entropy(
            torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3).long(), chunk_bytes=0
        )


def test_the_head_reads_strided_targets():
    hidden, weight = torch.randn(6, 8, device=DEVICE), torch.randn(20, 8, device=DEVICE)
    targets = torch.randint(20, (6, 3), device=DEVICE)[:, 1]
    ours = linear_cross_entropy(hidden, weight, targets, impl="triton")
    assert torch.allclose(ours, linear_cross_entropy(hidden, weight, targets, impl="torch"))


def test_memory_that_another_step_saved_is_not_reused_unseen():
    """tanh's backward reads its output, which is the logits: torch says that they were changed."""
    z, targets = random_rows(65, torch.float32)
    loss = cross_entropy(torch.tanh(z.requires_grad_()), targets, reuse_logits=True, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rows_that_share_memory_are_not_written_over_each_other():
    row = torch.randn(1, 65, device=DEVICE, requires_grad=True)
    targets = torch.arange(4, device=DEVICE)
    grads = []
    for impl in ("triton", "reference"):
        row.grad = None
        loss = cross_entropy(row.expand(4, 65), targets, reuse_logits=True, impl=impl)
        loss.backward()
        grads.append((loss.detach(), row.grad))
    for ours, want in zip(*grads, strict=True):
        assert torch.allclose(ours, want, atol=1e-6)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("rows", [0, 5])
def test_where_no_row_counts_the_gradients_are_zero(impl, rows):
    hidden = torch.randn(rows, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(20, 8, device=DEVICE, requires_grad=True)
    targets = torch.full((rows,), -100, device=DEVICE)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_bytes=100, impl=impl)
    assert loss.isnan()
    loss.backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_the_head_in_chunks_keeps_float64():
    hidden = torch.randn(9, 16, dtype=torch.float64)
    weight = torch.randn(20, 16, dtype=torch.float64)
    targets = torch.randint(20, (9,))

    def loss(chunk):
        return lambda h, w: linear_cross_entropy(h, w, targets, chunk_bytes=chunk, impl="torch")

    whole = outputs_and_gradients(loss(None), [hidden, weight])
    for got, want in zip(outputs_and_gradients(loss(500), [hidden, weight]), whole, strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)


def test_a_target_outside_gives_a_gradient_of_nan_in_place_too():
    logits, targets = random_rows(65, torch.float32)
    targets[0] = 2**40
    leaf = logits.requires_grad_()
    cross_entropy(leaf * 1, targets, reuse_logits=True, impl="triton").backward()
    assert leaf.grad[0].isnan().all()
    assert leaf.grad[1:].isfinite().all()
