"""The fused operations against their definitions in float64, and their messages."""

import re
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import TRITON

from nanogpt import kernels
from nanogpt.kernels import causal_attention, cross_entropy, dispatch, gelu_ffn, layer_norm
from nanogpt.kernels.dispatch import unsupported

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_as_exact_as_torch(ours, torchs, exact):
    """|ours - exact| <= 2 |torch in the same dtype - exact| + tiny: the hardware sets the limit."""
    scale = exact.abs().max().item()
    tiny = 4 * torch.finfo(ours.dtype).eps * scale
    limit = 2 * (torchs.double() - exact).abs().max().item() + tiny
    assert (ours.double() - exact).abs().max().item() <= limit


def plain_attention(q, k, v):
    """Row by row in float64, with no mask to get wrong."""
    q, k, v = q.double(), k.double(), v.double()
    n_queries, n_keys = q.shape[2], k.shape[2]
    rows = []
    for i in range(n_queries):
        seen = n_keys - n_queries + i + 1
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, i], k[:, :, :seen]) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), v[:, :, :seen]))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("impl", ["torch", "reference", "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (1, 9), (5, 9), (17, 17), (7, 8)])
def test_attention_sees_keys_up_to_its_own(impl, dtype, n_queries, n_keys):
    q = torch.randn(2, 3, n_queries, 10, dtype=dtype)
    k, v = (torch.randn(2, 3, n_keys, 10, dtype=dtype) for _ in "kv")
    exact = plain_attention(q, k, v)
    torchs = causal_attention(q, k, v, impl="torch")
    assert_as_exact_as_torch(causal_attention(q, k, v, impl=impl), torchs, exact)


def test_attention_accepts_transposed_inputs_and_leaves_them_alone():
    q, k, v = (torch.randn(2, 6, 3, 8).transpose(1, 2) for _ in "qkv")
    before = [x.clone() for x in (q, k, v)]
    got = causal_attention(q, k, v)
    assert torch.allclose(got.double(), plain_attention(q, k, v), atol=1e-6)
    for x, old in zip((q, k, v), before, strict=True):
        assert torch.equal(x, old)


def test_attention_scale_replaces_the_default():
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in "qkv")
    for impl in ("torch", "reference"):
        got = causal_attention(q, k, v, scale=0.5, impl=impl)
        want = plain_attention(q * 0.5 * 8**0.5, k, v)
        assert torch.allclose(got.double(), want, atol=1e-6)


@pytest.mark.parametrize("n_queries", [9, 4])
def test_attention_gradients_agree_between_torch_and_the_reference(n_queries):
    inputs = [torch.randn(2, 2, t, 8, dtype=torch.float64) for t in (n_queries, 9, 9)]
    grads = []
    for impl in ("torch", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        causal_attention(*leaves, impl=impl).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("biased", [True, False])
def test_feed_forward_is_two_linear_maps_around_tanh_gelu(impl, biased):
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    w1, w2 = torch.randn(20, 8).double(), torch.randn(8, 20).double()
    b1, b2 = (torch.randn(20).double(), torch.randn(8).double()) if biased else (None, None)
    u = torch.einsum("btc,fc->btf", x, w1) + (b1 if biased else 0)
    act = u / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
    want = torch.einsum("btf,cf->btc", act, w2) + (b2 if biased else 0)
    assert torch.allclose(gelu_ffn(x, w1, b1, w2, b2, impl=impl), want, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_feed_forward_reference_is_as_exact_as_torch(dtype):
    x, w1, w2 = torch.randn(7, 16), torch.randn(33, 16) / 4, torch.randn(16, 33) / 6
    x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
    exact = gelu_ffn(x.double(), w1.double(), None, w2.double(), None, impl="reference")
    torchs = gelu_ffn(x, w1, None, w2, None, impl="torch")
    assert_as_exact_as_torch(gelu_ffn(x, w1, None, w2, None, impl="reference"), torchs, exact)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_cross_entropy_of_known_probabilities(impl):
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64).log()
    loss = cross_entropy(logits, torch.tensor([0, 2]), impl=impl)
    assert loss.item() == pytest.approx(-(torch.tensor([0.5, 0.8]).double().log().mean().item()))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_cross_entropy_leaves_out_ignored_rows_and_their_gradient(impl):
    logits = torch.randn(4, 6, requires_grad=True)
    targets = torch.tensor([1, -100, 5, -100])
    loss = cross_entropy(logits, targets, impl=impl)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[[0, 2]], targets[[0, 2]]).item())
    loss.backward()
    assert torch.equal(logits.grad[[1, 3]], torch.zeros(2, 6))
    assert (logits.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_cross_entropy_of_huge_half_precision_logits_is_finite(impl):
    logits = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    loss = cross_entropy(logits, torch.tensor([1]), impl=impl)
    assert loss.dtype == torch.float32
    assert loss.item() == 120000.0 - 2 * (60000 - logits[0, 0].item())


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_layer_norm_has_mean_zero_and_variance_one_before_the_weights(impl):
    x = torch.randn(5, 32, dtype=torch.float64) * 7 + 3
    y = layer_norm(x, torch.ones(32).double(), None, eps=0.0, impl=impl)
    assert torch.allclose(y.mean(-1), torch.zeros(5).double(), atol=1e-12)
    assert torch.allclose(y.square().mean(-1), torch.ones(5).double(), atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_layer_norm_with_a_residual_gives_the_sum_too(impl):
    x, residual, weight, bias = torch.randn(4, 8), torch.randn(4, 8), torch.rand(8), torch.rand(8)
    y, total = layer_norm(x, weight, bias, residual=residual, impl=impl)
    assert torch.equal(total, x + residual)
    assert torch.allclose(y, F.layer_norm(total, (8,), weight, bias), atol=1e-6)


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_a_named_implementation_that_cannot_run_says_why(monkeypatch):
    q = torch.randn(1, 1, 2, 4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "runs on a GPU" in unsupported("triton", "cpu")
    with pytest.raises(RuntimeError, match=r'attention: impl="triton" cannot run: .*on a GPU'):
        causal_attention(q, q, q, impl="triton")
    with pytest.raises(RuntimeError, match="cannot run"):
        kernels.describe("triton", "cpu")
    with pytest.raises(ValueError, match="impl must be one of"):
        causal_attention(q, q, q, impl="cudnn")
    assert kernels.describe("auto", "cpu").startswith("torch (auto")


def test_without_triton_its_implementation_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert unsupported("triton", "cpu") == "Triton is not installed (pip install triton)"


def test_auto_never_interprets_kernels_on_a_cpu():
    x = torch.randn(1, 1, 2, 4)
    assert dispatch.resolve("attention", "auto", x, x, x) == "torch"


@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_every_operation_refuses_what_its_kernels_cannot_read(operation):
    wide = torch.randn(2, 4, dtype=torch.float64)
    given = [wide[None, None]] * 3 if operation == "attention" else [wide] * 3
    given = [wide] * 5 if operation == "ffn" else given
    reason = dispatch.triton_kernels(operation).unsupported(*given)
    assert "float64" in reason


BAD_CALLS = {
    "q must be (B, H": lambda x: causal_attention(x[0], x, x),
    "q must be a floating": lambda x: causal_attention(x.long(), x, x),
    "k is torch.float64": lambda x: causal_attention(x, x.double(), x),
    "must have the same shape": lambda x: causal_attention(x, x, x[:, :, :2]),
    "differ in B, H or D": lambda x: causal_attention(x, x[..., :2], x[..., :2]),
    "q has more positions": lambda x: causal_attention(x, x[:, :, :2], x[:, :, :2]),
    "w1 (8, 5)": lambda x: gelu_ffn(x, torch.ones(8, 5), None, torch.ones(5, 8), None),
    "w2 (8, 4)": lambda x: gelu_ffn(x, torch.ones(8, 4), None, torch.ones(8, 4), None),
    "b1 (4,)": lambda x: gelu_ffn(x, torch.ones(8, 4), torch.ones(4), torch.ones(4, 8), None),
    "b2 (8,)": lambda x: gelu_ffn(x, torch.ones(8, 4), None, torch.ones(4, 8), torch.ones(8)),
    "logits must be (N, V)": lambda x: cross_entropy(x, torch.zeros(3).long()),
    "targets (2,)": lambda x: cross_entropy(x[0, 0], torch.zeros(2).long()),
    "targets must be int64": lambda x: cross_entropy(x[0, 0], torch.zeros(3)),
    "weight (3,)": lambda x: layer_norm(x, torch.ones(3), None),
    "bias (3,)": lambda x: layer_norm(x, torch.ones(4), torch.ones(3)),
    "weight is on meta": lambda x: layer_norm(x, torch.ones(4, device="meta"), None),
    "w2 is on meta": lambda x: gelu_ffn(
        x, torch.ones(8, 4), None, torch.ones(4, 8, device="meta"), None
    ),
    "targets is on meta": lambda x: cross_entropy(x[0, 0], torch.ones(3, device="meta").long()),
    "residual": lambda x: layer_norm(x, torch.ones(4), None, residual=x[0]),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_a_wrong_argument_is_named(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BAD_CALLS[message](torch.randn(1, 2, 3, 4))


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@pytest.mark.parametrize("outputs", [512, 513])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("cut", [True, False])
def test_the_thin_linear_map_is_as_exact_as_torchs(rows, outputs, biased, cut, monkeypatch):
    module = sys.modules["nanogpt.kernels.linear"]
    monkeypatch.setattr(module, "cuts_pay", lambda threads: cut)
    x, weight = torch.randn(rows, 1, 256), torch.randn(outputs, 256)
    bias = torch.randn(outputs) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.no_grad():
        got = kernels.linear(x, weight, bias)
    assert got.shape == (rows, 1, outputs)
    assert_as_exact_as_torch(got, F.linear(x, weight, bias), exact)


def test_the_linear_map_keeps_its_gradient():
    x, weight = torch.randn(1, 256, requires_grad=True), torch.randn(512, 256)
    kernels.linear(x, weight, None).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0)[None], atol=1e-4)


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_float32_products_use_tf32_only_where_torch_was_told_so():
    from nanogpt.kernels.launch_triton import dot_precision

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for word, picked in (("ieee", "tf32x3"), ("tf32", "tf32"), ("none", "tf32x3")):
            matmul.fp32_precision = word
            assert dot_precision() == picked
    finally:
        matmul.fp32_precision = before


def test_which_thin_product_runs_is_measured_once(monkeypatch):
    module = sys.modules["nanogpt.kernels.linear"]
    module.cuts_pay.cache_clear()
    x, weight = torch.randn(1, 512), torch.randn(512, 512)
    real, calls = module.in_parts, []
    monkeypatch.setattr(module, "in_parts", lambda *given: calls.append(1) or real(*given))
    state = torch.get_rng_state()
    with torch.no_grad():
        kernels.linear(x, weight, None)
        measured = len(calls)
        kernels.linear(x, weight, None)
    assert measured >= 36
    assert len(calls) <= measured + 1
    assert torch.equal(torch.get_rng_state(), state), "the measurement moved the generator"
