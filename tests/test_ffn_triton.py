"""The Triton feed-forward in Triton's interpreter against the definition in float64."""

import os

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from nanogpt.kernels import ffn_triton, gelu_ffn, launch_triton
from nanogpt.kernels.launch_triton import Target

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "w1", "b1", "w2", "b2")
GENERATIONS = (80, 90)


@pytest.fixture(params=GENERATIONS)
def generation(request, monkeypatch):
    """Through pointers (80) and through descriptors (90), which the interpreter knows too."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launch_triton, "compile_for", Target(request.param, 4))
    return request.param


@pytest.fixture(params=["cuBLAS", "Triton"])
def plain_products(request, monkeypatch):
    monkeypatch.setattr(ffn_triton, "picks_triton", lambda *_: request.param == "Triton")
    return request.param


def made(n_rows, n_in, n_hidden, dtype=torch.float32, biased=True, scale=1.0):
    """Arguments and a gradient of the result, all rounded to dtype."""
    arguments = [
        torch.randn(n_rows, n_in) * scale,
        torch.randn(n_hidden, n_in) / n_in**0.5,
        torch.randn(n_hidden) if biased else None,
        torch.randn(n_in, n_hidden) / n_hidden**0.5,
        torch.randn(n_in) if biased else None,
    ]
    arguments = [None if a is None else a.to(DEVICE, dtype) for a in arguments]
    return arguments, torch.randn(n_rows, n_in).to(DEVICE, dtype)


def results(arguments, gradient, impl, **options):
    """The result and the gradient of every argument, in the order of NAMES."""
    leaves = [None if a is None else a.detach().requires_grad_() for a in arguments]
    out = gelu_ffn(*leaves, impl=impl, **options)
    out.backward(gradient.view(out.shape))
    return [out.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def assert_as_exact_as_torch(arguments, gradient, **options):
    """|ours - fp64| <= 2 |torch in the same dtype - fp64| + tiny, for the result and gradients."""
    wide = [None if a is None else a.double() for a in arguments]
    ours = results(arguments, gradient, "triton", **options)
    torchs = results(arguments, gradient, "torch")
    exact = results(wide, gradient.double(), "reference")
    for name, a, b, c in zip(("out", *NAMES), ours, torchs, exact, strict=True):
        assert (a is None) == (c is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert a.shape == c.shape
            assert a.isfinite().all(), name
            tiny = 4 * torch.finfo(a.dtype).eps * c.abs().max().item() if a.numel() else 0
            limit = 2 * (b.double() - c).abs().max().item() + tiny if a.numel() else 0
            error = (a.double() - c).abs().max().item() if a.numel() else 0
            assert error <= limit, f"{name}: {error} > {limit}"


SHAPES = [(1, 16, 48), (7, 33, 100), (130, 24, 48), (34, 64, 100), (130, 16, 256)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_result_and_every_gradient_are_as_exact_as_torchs(generation, plain_products, shape, dtype):
    assert_as_exact_as_torch(*made(*shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_large_problem_takes_the_large_tile_and_is_as_exact(generation, monkeypatch, dtype):
    monkeypatch.setattr(launch_triton, "compile_for", Target(generation, 1))
    monkeypatch.setattr(ffn_triton, "picks_triton", lambda *_: True)
    assert_as_exact_as_torch(*made(136, 64, 272, dtype))


def test_biases_may_be_missing(generation):
    assert_as_exact_as_torch(*made(7, 16, 48, biased=False))
    (x, w1, _, w2, b2), gradient = made(7, 16, 48)
    assert_as_exact_as_torch([x, w1, None, w2, b2], gradient)


def test_recomputing_gives_the_same_numbers(generation):
    arguments, gradient = made(7, 16, 48)
    kept = results(arguments, gradient, "triton")
    again = results(arguments, gradient, "triton", recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("impl", ["torch", "reference", "triton"])
def test_recomputing_saves_the_hidden_layer(impl):
    arguments, _ = made(7, 16, 48)
    sizes = {}
    for recompute in (False, True):
        saved = []
        leaves = [a.detach().requires_grad_() for a in arguments]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            gelu_ffn(*leaves, impl=impl, recompute=recompute)
        sizes[recompute] = sizes.get(recompute, 0) + sum(saved)
    assert sizes[False] - sizes[True] >= 7 * 48


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_recomputing_without_triton_gives_the_same_numbers(impl):
    arguments, gradient = made(7, 16, 48)
    kept = results(arguments, gradient, impl)
    again = results(arguments, gradient, impl, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("cut", [lambda x: x[:, :16], lambda x: x[:, 8:24], lambda x: x[::2, 1:17]])
def test_strided_inputs_give_what_dense_ones_give(generation, cut):
    (x, *weights), gradient = made(14, 32, 48)
    x = cut(x)
    weights = [weights[0][:, :16], weights[1], weights[2][:16], weights[3][:16]]
    gradient = gradient[: len(x), :16]
    dense = [a.contiguous() for a in (x, *weights)]
    ours = results([x, *weights], gradient.contiguous(), "triton")
    assert_as_exact_as_torch([x, *weights], gradient.contiguous())
    for a, b in zip(ours, results(dense, gradient.contiguous(), "triton"), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_transposed_and_expanded_arguments_are_right(generation):
    (x, w1, b1, w2, b2), gradient = made(16, 16, 48)
    w1, w2 = w1.t().contiguous().t(), w2.t().contiguous().t()
    assert_as_exact_as_torch([x.t(), w1, b1, w2, b2], gradient.t())
    assert_as_exact_as_torch([x[:1].expand(16, 16), w1, b1, w2, b2], gradient[:1].expand(16, 16))


def test_any_leading_dimensions_are_kept(generation):
    (x, *weights), gradient = made(24, 16, 48)
    flat = results([x, *weights], gradient, "triton")
    for shape in ((2, 3, 4, 16), (24, 1, 16)):
        deep = results([x.view(shape), *weights], gradient, "triton")
        assert deep[0].shape == deep[1].shape == shape
        for a, b in zip(deep, flat, strict=True):
            assert torch.equal(a.flatten(), b.flatten())
    assert gelu_ffn(x[0], *weights, impl="triton").shape == (16,)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e4), (torch.float16, 300)])
def test_huge_preactivations_are_finite_and_right(generation, dtype, size):
    (x, w1, b1, w2, b2), gradient = made(7, 16, 48, dtype)
    b1 = torch.linspace(-size, size, 48).to(DEVICE, dtype)
    assert_as_exact_as_torch([x, w1, b1, w2, b2], gradient)


@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's, on the way to the right limit
def test_the_largest_numbers_do_not_become_nan(generation):
    (x, w1, _, w2, _), gradient = made(7, 16, 48)
    b1 = torch.tensor([-3e38, 3e38, -1e20, 1e20, -20, 20]).repeat(8).to(DEVICE)
    _, h = ffn_triton.forward_up(x, w1, b1, True, True)
    assert torch.allclose(h, F.relu(x @ w1.t() + b1))
    du, _, _ = ffn_triton.backward_hidden(gradient, w2, b1.expand(7, 48).contiguous(), True, True)
    assert torch.allclose(du, (gradient @ w2) * (b1 > 0), atol=1e-5)


def test_a_nan_is_seen(generation):
    arguments, gradient = made(7, 16, 48)
    arguments[0][3, 2] = float("nan")
    out, dx, dw1, *_ = results(arguments, gradient, "triton")
    assert out[3].isnan().all()
    assert dx[3].isnan().all()
    assert dw1[:, 2].isnan().all()
    assert out[[0, 1, 2, 4, 5, 6]].isfinite().all()


def test_inputs_are_left_alone_and_two_backwards_agree(generation, plain_products):
    arguments, gradient = made(70, 16, 48)
    before = [a.clone() for a in (*arguments, gradient)]
    leaves = [a.detach().requires_grad_() for a in arguments]
    out = gelu_ffn(*leaves, impl="triton")
    first = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
    second = torch.autograd.grad(out, leaves, gradient)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((*arguments, gradient), before, strict=True))


def test_nothing_is_read_that_was_not_written(generation, plain_products):
    arguments, gradient = made(7, 24, 100)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert_as_exact_as_torch(arguments, gradient)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("wanted", NAMES)
def test_a_gradient_wanted_alone_is_the_same(generation, wanted):
    arguments, gradient = made(7, 16, 48)
    every = dict(zip(NAMES, results(arguments, gradient, "triton")[1:], strict=True))
    leaves = dict(zip(NAMES, (a.detach() for a in arguments), strict=True))
    leaves[wanted].requires_grad_()
    gelu_ffn(*leaves.values(), impl="triton").backward(gradient)
    assert torch.equal(leaves[wanted].grad, every[wanted])
    assert [name for name in NAMES if leaves[name].grad is not None] == [wanted]


def test_without_gradients_the_preactivation_is_not_kept(monkeypatch):
    asked = []
    original = ffn_triton.forward_up
    monkeypatch.setattr(
        ffn_triton, "forward_up", lambda *args: asked.append(args[3]) or original(*args)
    )
    arguments, _ = made(7, 16, 48)
    leaves = [a.requires_grad_() for a in arguments]
    with torch.no_grad():
        gelu_ffn(*leaves, impl="triton")
    gelu_ffn(*leaves, impl="triton")
    assert asked == [False, True]


@pytest.mark.parametrize("recompute", [False, True])
def test_no_rows_give_no_rows_and_zero_gradients(generation, plain_products, recompute):
    arguments, gradient = made(0, 16, 48)
    out, dx, *others = results(arguments, gradient, "triton", recompute=recompute)
    assert out.shape == dx.shape == (0, 16)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in others)


def test_autocast_casts_everything_and_gradients_come_back_in_float32():
    arguments, gradient = made(7, 16, 48)
    leaves = [a.detach().requires_grad_() for a in arguments]
    with torch.autocast(DEVICE, torch.float16):
        out = gelu_ffn(*leaves, impl="triton")
    assert out.dtype == torch.float16
    out.backward(gradient.half())
    rounded = [a.half() for a in arguments]
    expected = results(rounded, gradient.half(), "triton")
    assert torch.equal(out, expected[0])
    for leaf, want in zip(leaves, expected[1:], strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, want.float())


def test_arguments_that_cannot_run_are_named():
    arguments, _ = made(7, 16, 48)
    assert ffn_triton.unsupported(*arguments) is None
    mixed = [arguments[0], arguments[1].half(), *arguments[2:]]
    assert "w1 is torch.float16, x torch.float32" in ffn_triton.unsupported(*mixed)
    with torch.autocast(DEVICE, torch.float16):
        assert ffn_triton.unsupported(*mixed) is None
    assert "float64" in ffn_triton.unsupported(*(a.double() for a in arguments))
    with pytest.raises(RuntimeError, match="outside autocast"):
        gelu_ffn(*mixed, impl="triton")


def test_a_second_derivative_is_refused_rather_than_wrong():
    arguments, gradient = made(7, 16, 48)
    x = arguments[0].requires_grad_()
    out = gelu_ffn(*arguments, impl="triton")
    (dx,) = torch.autograd.grad(out, x, gradient.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_product_goes_to_triton_where_it_was_measured_faster(monkeypatch):
    cuda, shape = torch.device("cuda", 0), (64, 16, 48, torch.float16)
    assert not ffn_triton.picks_triton("out", *shape, cuda)
    monkeypatch.setattr(ffn_triton, "_device_name", lambda _: "GPU")
    entries = {("GPU", "out", *shape): (1.0, 2.0), ("GPU", "dx", *shape): (2.0, 1.0)}
    monkeypatch.setattr(ffn_triton, "MEASURED", entries)
    assert ffn_triton.picks_triton("out", *shape, cuda)
    assert not ffn_triton.picks_triton("dx", *shape, cuda)
    assert not ffn_triton.picks_triton("dw1", *shape, cuda)


def test_every_kind_has_a_tile_for_every_size_class():
    for kind in ("up", "dhidden", "plain"):
        for size in (2, 4):
            for capability in (80, 86, 90, 100, 120):
                target = Target(capability, 132)
                shapes = ((1, 64), (256, 256), (65536, 3072))
                cuts = [ffn_triton.tile(kind, target, size, *shape, True) for shape in shapes]
                assert cuts[0].rows < cuts[1].rows <= cuts[2].rows
                assert ffn_triton.tile(kind, target, size, 7, 7, False).inner <= 32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own doing
def test_a_compiled_graph_sees_the_launchers_as_single_operations():
    arguments, gradient = made(7, 16, 48)
    expected = results(arguments, gradient, "triton")
    leaves = [a.detach().requires_grad_() for a in arguments]
    compiled = torch.compile(
        lambda *args: gelu_ffn(*args, impl="triton"), backend="aot_eager", fullgraph=True
    )
    out = compiled(*leaves)
    out.backward(gradient)
    for a, b in zip([out, *(leaf.grad for leaf in leaves)], expected, strict=True):
        assert torch.equal(a, b)


def test_a_strided_bias_is_read():
    x, w1, w2 = torch.randn(5, 16), torch.randn(32, 16), torch.randn(16, 32)
    b1 = torch.randn(32, 2)[:, 0]
    ours = gelu_ffn(x, w1, b1, w2, None, impl="triton")
    assert torch.allclose(ours, gelu_ffn(x, w1, b1, w2, None, impl="torch"), atol=1e-4)
