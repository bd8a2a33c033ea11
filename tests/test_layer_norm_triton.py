"""The Triton kernels of layer norm against float64, interpreted where there is no GPU."""

import itertools

import pytest
import torch
from exactness import DEVICE, DTYPES, assert_exact, outputs_and_gradients, poisoned_memory

from nanogpt.kernels import layer_norm
from nanogpt.kernels import layer_norm_triton as kernels

WIDTHS = [1, 5, 64, 100, 768]


def run(impl, x, weight, bias, residual, dtype=None):
    def call(x, weight, bias, residual):
        return layer_norm(x, weight, bias, residual=residual, impl=impl)

    return outputs_and_gradients(call, [x, weight, bias, residual], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("biased", "added"), list(itertools.product([True, False], repeat=2)))
def test_output_sum_and_gradients_are_as_exact_as_torchs(width, dtype, biased, added):
    x, residual = (torch.randn(3, 7, width, device=DEVICE).to(dtype) for _ in "xr")
    weight, bias = (torch.randn(width, device=DEVICE).to(dtype) for _ in "wb")
    given = x, weight, bias if biased else None, residual if added else None
    before = [None if t is None else t.clone() for t in given]
    exact, torchs = run("reference", *given, torch.float64), run("torch", *given)
    with poisoned_memory():
        ours, again = run("triton", *given), run("triton", *given)
    assert all(map(torch.equal, ours, again)), "two runs differ"
    for got, peer, want in zip(ours, torchs, exact, strict=True):
        assert got.dtype == dtype
        assert_exact(got, peer, want)
    for t, old in zip(given, before, strict=True):
        assert t is None or torch.equal(t, old)


def test_a_half_precision_branch_is_added_to_a_float32_residual():
    x = torch.randn(5, 64, device=DEVICE, dtype=torch.float16, requires_grad=True)
    residual = torch.randn(5, 64, device=DEVICE, requires_grad=True)
    y, total = layer_norm(x, torch.ones(64, device=DEVICE), None, residual=residual, impl="triton")
    assert total.dtype == torch.float32
    assert torch.equal(total, residual + x.float())
    (y.float().square().sum() + total.square().sum()).backward()
    assert x.grad.dtype == torch.float16
    assert residual.grad.dtype == torch.float32
    assert torch.allclose(x.grad.float(), residual.grad, atol=1e-2)


@pytest.mark.parametrize("used", ["y", "sum"])
def test_only_one_of_the_two_results_may_be_used(used):
    grads = []
    for impl in ("triton", "reference"):
        torch.manual_seed(3)
        x, residual = (torch.randn(4, 32, device=DEVICE, requires_grad=True) for _ in "xr")
        y, total = layer_norm(x, torch.ones(32, device=DEVICE), None, residual=residual, impl=impl)
        (y if used == "y" else total).square().sum().backward()
        grads.append((x.grad, residual.grad))
    for ours, want in zip(*grads, strict=True):
        assert torch.allclose(ours, want, atol=1e-5)


def test_strided_rows_and_no_rows_are_read():
    x = torch.randn(32, 6, device=DEVICE).t()
    weight = torch.rand(32, device=DEVICE)
    ours = layer_norm(x, weight, None, impl="triton")
    assert torch.allclose(ours, layer_norm(x, weight, None, impl="torch"), atol=1e-6)
    nothing = torch.randn(0, 32, device=DEVICE, requires_grad=True)
    weight.requires_grad_()
    layer_norm(nothing, weight, None, impl="triton").sum().backward()
    assert nothing.grad.shape == (0, 32)
    assert not weight.grad.any()


def test_rows_that_are_too_long_are_refused_in_words():
    x = torch.randn(1, kernels.WIDEST + 1, device=DEVICE)
    with pytest.raises(RuntimeError, match="longer than the 8192"):
        layer_norm(x, x[0], None, impl="triton")


def test_constant_rows_stay_finite():
    x = torch.full((2, 48), 3.0, device=DEVICE, requires_grad=True)
    y = layer_norm(x, torch.ones(48, device=DEVICE), None, impl="triton")
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert x.grad.isfinite().all()


def test_strided_and_expanded_parameters_are_read():
    x = torch.randn(5, 48, device=DEVICE)
    strided = torch.randn(48, 2, device=DEVICE)[:, 0]
    for weight, bias in ((strided, strided), (torch.rand(1, device=DEVICE).expand(48), None)):
        ours = layer_norm(x, weight, bias, impl="triton")
        assert torch.allclose(ours, layer_norm(x, weight, bias, impl="torch"), atol=1e-5)


def test_branch_and_residual_accumulate_their_own_gradients():
    """Both gradients are one sum; as two views of one memory they would be added to twice."""
    x, residual = (torch.randn(4, 6, 32, device=DEVICE, requires_grad=True) for _ in "xr")
    weight = torch.rand(32, device=DEVICE)

    def step(impl):
        y, total = layer_norm(x, weight, None, residual=residual, impl=impl)
        (y.square().sum() + total.sum()).backward()

    step("triton")
    step("triton")
    ours, x.grad, residual.grad = (x.grad, residual.grad), None, None
    step("reference")
    for got, want in zip(ours, (x.grad, residual.grad), strict=True):
        assert torch.allclose(got, 2 * want, atol=1e-4)
