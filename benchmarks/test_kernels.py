"""The fused operations beside torch's, on whatever device is here: what `auto` runs, and, on a
GPU, the Triton kernels by name. `benchmarks/gpu.py` measures them at full size."""

import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nanogpt import kernels
from nanogpt.measuring import median_seconds

pytestmark = [  # torch.compile's own imports and advice
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
OURS = ("auto", "triton") if DEVICE == "cuda" else ("auto",)
LARGE = 16 if DEVICE == "cuda" else 1
PASSES = ("forward", "both")


def tensors(*shapes):
    return tuple(torch.randn(s, device=DEVICE, dtype=DTYPE).requires_grad_() for s in shapes)


def compiled(function):
    """torch.compile of a function, by name; nothing where there is no C++ compiler."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return {}
    torch._dynamo.reset()
    return {"compile": torch.compile(function, dynamic=False)}


def trained(function, leaves, upstream):
    """Forward and backward."""
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, leaves, upstream)


def measure(benchmark, record, ceilings, which, kernel, shape, ours, peers, leaves, *, floors):
    """Rows of one pass.

    Args:
        ours: implementation, leaves -> outputs.
        peers: name -> leaves -> outputs.
        floors: pass -> {"flops": …} or {"nbytes": …}.
    """
    functions = {impl: partial(ours, impl) for impl in OURS} | peers
    with torch.no_grad():
        outputs = functions["auto"](*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.randn_like(x) for x in outputs]
    run = {
        name: partial(function, *leaves)
        if which == "forward"
        else partial(trained, function, leaves, upstream)
        for name, function in functions.items()
    }
    times = median_seconds(run, rounds=7, device=DEVICE)
    benchmark.pedantic(run["auto"], rounds=3)
    amount = floors[which]
    for impl in OURS:
        seconds = times[impl]
        if "flops" in amount:
            floor = amount["flops"] / ceilings["matmul_flops"]
            extra = {"tflops": amount["flops"] / seconds * 1e-12}
        else:
            floor = amount["nbytes"] / ceilings["copy_bytes_per_second"]
            extra = {"bytes_per_second": amount["nbytes"] / seconds}
        record(
            "kernels",
            {"kernel": kernel, "pass": which, **shape, "ours": impl},
            str(DTYPE).removeprefix("torch."),
            seconds,
            {name: times[name] for name in peers},
            floor,
            **(extra if DEVICE == "cuda" else {}),
        )


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(("heads", "length", "width"), [(6, 256, 64), (4, 512, 32)])
def test_attention(benchmark, record, ceilings, which, heads, length, width):
    """Beside the unfused composition and torch's fused operator."""
    batch = 4 * LARGE
    leaves = tensors(*[(batch, heads, length, width)] * 3)
    hidden = torch.ones(length, length, dtype=torch.bool, device=DEVICE).triu(1)

    def unfused(q, k, v):
        scores = q @ k.transpose(-2, -1) * width**-0.5
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v

    peers = {
        "unfused": unfused,
        "sdpa": partial(F.scaled_dot_product_attention, is_causal=True),
        **compiled(unfused),
    }
    flops = 2 * batch * heads * length * length * width
    measure(
        benchmark,
        record,
        ceilings,
        which,
        "attention",
        {"B": batch, "H": heads, "T": length, "D": width},
        lambda impl, q, k, v: kernels.causal_attention(q, k, v, impl=impl),
        peers,
        leaves,
        floors={"forward": {"flops": flops}, "both": {"flops": 3.5 * flops}},
    )


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(("rows", "width"), [(768, 128), (1024, 384)])
def test_ffn(benchmark, record, ceilings, which, rows, width):
    """Beside the composition of torch's operators."""
    rows, inner = rows * LARGE, 4 * width
    leaves = tensors((rows, width), (inner, width), (inner,), (width, inner), (width,))

    def eager(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)

    flops = 4 * rows * width * inner
    measure(
        benchmark,
        record,
        ceilings,
        which,
        "ffn",
        {"M": rows, "C": width, "F": inner},
        lambda impl, *given: kernels.gelu_ffn(*given, impl=impl),
        {"torch": eager, **compiled(eager)},
        leaves,
        floors={"forward": {"flops": flops}, "both": {"flops": 3 * flops}},
    )


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(("rows", "classes"), [(131072, 65), (1024, 16384)])
def test_cross_entropy(benchmark, record, ceilings, which, rows, classes):
    """Beside torch's operator on float32 logits."""
    rows = rows * LARGE
    leaves = tensors((rows, classes))
    targets = torch.randint(classes, (rows,), device=DEVICE)

    def eager(logits):
        return F.cross_entropy(logits.float(), targets)

    nbytes = rows * classes * DTYPE.itemsize
    measure(
        benchmark,
        record,
        ceilings,
        which,
        "cross_entropy",
        {"N": rows, "V": classes},
        lambda impl, logits: kernels.cross_entropy(logits, targets, impl=impl),
        {"torch": eager, **compiled(eager)},
        leaves,
        floors={"forward": {"nbytes": nbytes}, "both": {"nbytes": 2 * nbytes}},
    )


@pytest.mark.parametrize("which", PASSES)
def test_linear_cross_entropy(benchmark, record, ceilings, which):
    """The output head and the loss in one, beside one after the other."""
    rows, width, classes = 512 * LARGE, 128, 8192
    leaves = tensors((rows, width), (classes, width))
    targets = torch.randint(classes, (rows,), device=DEVICE)

    def eager(hidden, weight):
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    flops = 2 * rows * width * classes
    measure(
        benchmark,
        record,
        ceilings,
        which,
        "linear_cross_entropy",
        {"N": rows, "C": width, "V": classes},
        lambda impl, h, w: kernels.linear_cross_entropy(h, w, targets, impl=impl),
        {"torch": eager, **compiled(eager)},
        leaves,
        floors={"forward": {"flops": flops}, "both": {"flops": 3 * flops}},
    )


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("width", [384, 1600])
def test_layer_norm(benchmark, record, ceilings, which, residual, width):
    """Beside torch's operator, after torch's addition where there is a residual."""
    rows = 2**23 // width * LARGE // 256 * 256  # larger than the caches
    leaves = tensors((rows, width), (width,), (width,), *[(rows, width)] * residual)

    def eager(x, weight, bias, *added):
        total = x + added[0] if added else x
        y = F.layer_norm(total, weight.shape, weight, bias)
        return (y, total) if added else y

    def ours(impl, x, weight, bias, *added):
        if added:
            return kernels.layer_norm(x, weight, bias, residual=added[0], impl=impl)
        return kernels.layer_norm(x, weight, bias, impl=impl)

    matrix = rows * width * DTYPE.itemsize
    forward, backward = (4, 4) if residual else (2, 3)  # passes over a matrix
    measure(
        benchmark,
        record,
        ceilings,
        which,
        "layer_norm",
        {"rows": rows, "C": width, "residual": residual},
        ours,
        {"torch": eager, **compiled(eager)},
        leaves,
        floors={
            "forward": {"nbytes": forward * matrix},
            "both": {"nbytes": (forward + backward) * matrix},
        },
    )
