"""The kernels inside a model: loss curves, torch.compile, autocast, accumulation, two processes."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from exactness import DEVICE

from nanogpt import GPT
from nanogpt.checkpoint import save
from nanogpt.kernels import (
    OPERATIONS,
    causal_attention,
    choice,
    cross_entropy,
    gelu_ffn,
    layer_norm,
    linear_cross_entropy,
)
from nanogpt.kernels.choice import Workload
from nanogpt.tokenizer import CharTokenizer

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 40}
pytestmark = pytest.mark.filterwarnings("ignore:.*GradScaler")


def make_model(impl, seed=0, **options):
    torch.manual_seed(seed)
    return GPT(**SHAPE, **options).set_kernels(impl).to(DEVICE)


def batches(count, rows=2):
    """Windows of a text with something to learn: multiples, one after the other."""
    text = torch.tensor([ord(c) % 40 for n in range(400) for c in f"{n} is {7 * n};"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        starts = torch.randint(len(text) - 17, (rows,), generator=generator)
        yield torch.stack([text[s : s + 17] for s in starts]).to(DEVICE)


def loss_curve(model, steps=50, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for window in batches(steps):
        _, loss = model(window[:, :-1], window[:, 1:], return_logits=False, **options)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_fifty_steps_give_the_same_losses_by_every_implementation():
    """Float32 rounding grows along a run: the limit is what a change of one ulp does to torch's."""
    torchs = loss_curve(make_model("torch"))
    nudged = make_model("torch")
    with torch.no_grad():
        for parameter in nudged.parameters():
            parameter.mul_(1 + torch.finfo(torch.float32).eps)
    explained = (loss_curve(nudged) - torchs).abs().max().item()
    limit = 10 * explained + 1e-6
    assert limit < 0.01, "the comparison would show nothing"
    assert torchs[-5:].mean() < torchs[:5].mean() - 0.5, "nothing was learnt"
    for impl in ("triton", "reference"):
        difference = (loss_curve(make_model(impl)) - torchs).abs().max().item()
        assert difference <= limit, (impl, difference, limit)


def test_the_loss_in_chunks_gives_the_same_curve():
    whole = loss_curve(make_model("torch"), 8)
    for impl in ("torch", "triton"):
        in_chunks = loss_curve(make_model(impl), 8, chunk_bytes=40 * 4 * 10)
        assert (in_chunks - whole).abs().max() < 1e-3


@pytest.mark.parametrize("bias", [True, False])
def test_logits_and_loss_agree_with_and_without_returned_logits(bias):
    model = make_model("triton", bias=bias)
    window = next(batches(1))
    logits, loss = model(window[:, :-1], window[:, 1:])
    nothing, alone = model(window[:, :-1], window[:, 1:], return_logits=False)
    assert nothing is None
    assert torch.allclose(loss, alone, atol=1e-6)
    want, _ = make_model("reference", bias=bias)(window[:, :-1])
    assert torch.allclose(logits, want, atol=1e-5)
    with pytest.raises(ValueError, match="needs targets"):
        model(window[:, :-1], return_logits=False)


@pytest.mark.skipif(not shutil.which("g++") and DEVICE == "cpu", reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_takes_the_whole_model_in_one_graph():
    torch._dynamo.reset()
    plain, model = make_model("triton"), make_model("triton")
    compiled = torch.compile(model, fullgraph=True)
    for window in batches(2):
        for returns in (False, True):
            _, want = plain(window[:, :-1], window[:, 1:], return_logits=returns)
            _, loss = compiled(window[:, :-1], window[:, 1:], return_logits=returns)
            assert torch.allclose(loss, want, atol=1e-5)
            want.backward()
            loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5), name


def opaque_calls():
    """Every operator that torch.compile sees as one node, with arguments."""
    q = torch.randn(2, 4, 3, 16, device=DEVICE).transpose(1, 2)
    lse, length = torch.randn(2, 3, 4, device=DEVICE), torch.tensor([3], dtype=torch.int32).to(q)
    one, x, number = q[:, :, :1], torch.randn(5, 32, device=DEVICE), torch.rand(5, device=DEVICE)
    w1, w2 = torch.randn(48, 32, device=DEVICE), torch.randn(32, 48, device=DEVICE)
    u, weight = torch.randn(5, 48, device=DEVICE), torch.rand(32, device=DEVICE)
    targets, factor = torch.arange(5, device=DEVICE), torch.tensor(0.2, device=DEVICE)
    return {
        "attention_forward": (q, q, q, 0.3),
        "attention_backward": (q, q, q, q, lse, q, 0.3, False),
        "attention_decode": (one, q, q, 0.3, length.int()),
        "ffn_forward_up": (x, w1, None, True, True),
        "ffn_backward_hidden": (x, w2, u, True, True),
        "ffn_multiply": (u, w2, None, False, True),
        "layer_norm_forward": (x, x, weight, None, 1e-5, torch.float16),
        "layer_norm_backward": (
            x, weight, number, number, x, x, torch.float16, torch.float32, True,
        ),
        "cross_entropy_forward": (x, targets, -100),
        "cross_entropy_in_place": (x, targets, factor, -100, x.shape[1] - 1),
        "cross_entropy_backward": (x, targets, number, factor, -100),
        "cross_entropy_scale": (x, factor),
    }  # fmt: skip


@pytest.mark.parametrize("name", opaque_calls())
def test_what_torch_compile_is_told_of_an_operator_is_true(name):
    from nanogpt.kernels.dispatch import triton_kernels

    for operation in OPERATIONS:
        triton_kernels(operation)
    arguments = opaque_calls()[name]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.nanogpt, name).default, arguments, test_utils=checks)


def test_no_operator_is_left_out_of_that_check():
    from nanogpt.kernels.dispatch import triton_kernels

    for operation in OPERATIONS:
        triton_kernels(operation)
    known = {
        schema.name.removeprefix("nanogpt::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("nanogpt::")
    }
    assert known == set(opaque_calls())


def test_accumulated_micro_batches_give_the_gradient_of_the_batch():
    whole, parts = make_model("triton"), make_model("triton")
    window = next(batches(1))
    whole(window[:, :-1], window[:, 1:], return_logits=False)[1].backward()
    for part in window.split(1):
        (parts(part[:, :-1], part[:, 1:], return_logits=False)[1] / 2).backward()
    for ours, want in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours.grad, want.grad, atol=1e-5)


def test_autocast_makes_products_in_half_precision_and_gradients_in_float32():
    """In an autocast region on a CPU the interpreter sees float16 only where it is told to."""
    with torch.autocast(DEVICE, dtype=torch.float16):
        x = torch.randn(3, 32, device=DEVICE, requires_grad=True)
        w1 = torch.randn(64, 32, device=DEVICE, requires_grad=True)
        w2 = torch.randn(32, 64, device=DEVICE, requires_grad=True)
        out = gelu_ffn(x, w1, None, w2, None, impl="triton")
        y = layer_norm(x, torch.ones(32, device=DEVICE), None, impl="triton")
    assert out.dtype == y.dtype == torch.float16
    out.float().sum().backward()
    assert w1.grad.dtype == w2.grad.dtype == x.grad.dtype == torch.float32
    model = make_model("triton")
    window = next(batches(1))
    with torch.autocast(DEVICE, dtype=torch.float16):
        _, half = model(window[:, :-1], window[:, 1:], return_logits=False)
    half.backward()
    _, full = make_model("torch")(window[:, :-1], window[:, 1:])
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), abs=0.02)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def _one_of_two(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    model = make_model("triton")
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    part = next(batches(1)).split(1)[rank]
    parallel(part[:, :-1], part[:, 1:], return_logits=False)[1].backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], f"{folder}/gradients")
    torch.distributed.barrier()
    # Not by way of destructors: gloo's may wait for a thread that waits for the interpreter.
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_average_the_gradients_of_their_halves(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    ours = torch.load(tmp_path / "gradients", weights_only=True)
    whole, window = make_model("triton"), next(batches(1))
    whole(window[:, :-1], window[:, 1:], return_logits=False)[1].backward()
    for gradient, parameter in zip(ours, whole.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad.cpu(), atol=1e-5)


def test_writing_gives_the_same_tokens_by_every_implementation():
    prompt = torch.tensor([[3, 1, 4, 1, 5]], device=DEVICE)
    outs = [make_model(impl).generate(prompt, 30, seed=5).tolist() for impl in ("torch", "triton")]
    assert outs[0] == outs[1]


def test_kernels_are_set_for_each_operation():
    model = make_model(dict.fromkeys(OPERATIONS, "torch") | {"ffn": "triton"})
    block = model.transformer["h"][0]
    assert (block.mlp.impl, block.attn.impl, block.ln_1.impl, model.impl) == (
        "triton", "torch", "torch", "torch",
    )  # fmt: skip


WORK = Workload(2, 16, 2, 16, 40, torch.float32)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_faster_implementation_is_measured_and_named(operation, monkeypatch):
    device = torch.device(DEVICE)
    for seconds, winner, words in (([1.0, 2.0], "triton", "2.00"), ([2.0, 1.0], "torch", "0.50")):
        clock = iter(seconds)
        monkeypatch.setattr(choice, "_median_seconds", lambda *_, clock=clock: next(clock))
        picked, line = choice.measure(operation, device, WORK)
        assert picked == winner
        assert words in line


def test_an_inexact_or_failing_kernel_is_never_chosen(monkeypatch):
    device = torch.device(DEVICE)
    real = causal_attention

    def off(q, k, v, *, impl):
        return real(q, k, v, impl=impl) * (1.01 if impl == "triton" else 1.0)

    monkeypatch.setattr(choice, "causal_attention", off)
    assert choice.measure("attention", device, WORK) == (
        "torch", "torch (Triton's result is not as exact)",
    )  # fmt: skip

    def broken(q, k, v, *, impl):
        if impl == "triton":
            raise RuntimeError("no such instruction\nand more")
        return real(q, k, v, impl=impl)

    monkeypatch.setattr(choice, "causal_attention", broken)
    picked, line = choice.measure("attention", device, WORK)
    assert picked == "torch"
    assert "RuntimeError: no such instruction" in line


def test_too_little_memory_to_compare_leaves_torch(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(choice, "results", full)
    picked, line = choice.measure("ffn", torch.device(DEVICE), WORK)
    assert picked == "torch"
    assert "too little memory" in line


def test_what_a_run_chose_first_is_chosen_anew_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    earlier = dict.fromkeys(OPERATIONS, "triton")
    picked, line = choice.choose("auto", torch.device("cpu"), WORK, earlier)
    assert picked == dict.fromkeys(OPERATIONS, "torch")
    assert "cannot run here; now torch" in line


def test_a_shape_that_the_kernels_refuse_is_the_users_mistake(nanogpt, text_file, tmp_path):
    common = ["train", "--text", text_file, "--n-embd", 320, "--n-head", 1, "--kernels", "triton"]
    common += ["--output", tmp_path / "gpt.pth", "--run-dir", tmp_path / "run"]
    outcome = nanogpt(*common)
    assert outcome.code == 2
    assert "320 wide; the kernels take up to 256; use auto" in outcome.err
    model = GPT(vocab_size=9, block_size=8, n_layer=1, n_head=1, n_embd=320)
    model.tokenizer = CharTokenizer("abcdefgh")
    save(model, tmp_path / "wide.pth")
    outcome = nanogpt("sample", "--model", tmp_path / "wide.pth", "--kernels", "triton")
    assert outcome.code == 2
    assert "--kernels triton: attention" in outcome.err


def test_evaluation_makes_no_gradient_of_the_head(monkeypatch):
    model, window = make_model("triton"), next(batches(1))
    calls = []
    monkeypatch.setattr(torch, "mm", lambda *_, **__: calls.append(1))
    with torch.inference_mode():
        _, loss = model(window[:, :-1], window[:, 1:], return_logits=False)
    assert loss.isfinite()
    assert not calls


def _calls_of_one_input():
    w = torch.randn(32, 32, device=DEVICE) / 6
    up, down = torch.randn(48, 32, device=DEVICE) / 6, torch.randn(32, 48, device=DEVICE) / 6
    ids = torch.arange(4, device=DEVICE)
    return {
        "attention": lambda x, impl: causal_attention(x, x, x, impl=impl),
        "ffn": lambda x, impl: gelu_ffn(x, up, None, down, None, impl=impl),
        "layer_norm": lambda x, impl: layer_norm(x, w[0], None, impl=impl),
        "cross_entropy": lambda x, impl: cross_entropy(x, ids, impl=impl),
        "linear_cross_entropy": lambda x, impl: linear_cross_entropy(
            x, w, ids, chunk_bytes=300, impl=impl
        ),
    }


@pytest.mark.parametrize("name", _calls_of_one_input())
def test_a_second_derivative_is_refused_and_not_dropped(name):
    """A gradient penalty: the gradient's own gradient, from an upstream that needs none."""
    shape = (1, 2, 4, 16) if name == "attention" else (4, 32)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        _calls_of_one_input()[name](x, "triton").sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", ["attention", "ffn", "layer_norm"])
def test_results_may_be_added_to_in_place_and_gradients_accumulate(name):
    call = _calls_of_one_input()[name]
    shape = (1, 2, 4, 16) if name == "attention" else (2, 4, 32)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    out = call(x, "triton")
    out += 1.0
    for _ in range(2):
        call(x, "triton").square().sum().backward()
    ours, x.grad = x.grad, None
    call(x, "reference").square().sum().backward()
    assert torch.allclose(ours, 2 * x.grad, rtol=1e-4, atol=1e-4)


def test_what_a_run_chose_first_is_kept():
    earlier = dict.fromkeys(OPERATIONS, "torch")
    picked, line = choice.choose("auto", torch.device("cpu"), WORK, earlier)
    assert picked == earlier
    assert "as this run began" in line
    assert choice.choose("auto", torch.device("cpu"), replace(WORK, batch=1))[0] == earlier


def test_training_says_what_was_picked_and_stores_it(nanogpt, text_file, tmp_path):
    common = ["train", "--text", text_file, "--max-steps", 2, "--n-embd", 16, "--n-layer", 1]
    common += ["--n-head", 1, "--block-size", 8, "--batch-size", 2, "--device", "cpu"]
    common += ["--output", tmp_path / "gpt.pth", "--run-dir", tmp_path / "run"]
    outcome = nanogpt(*common, "--sample-tokens", 0)
    assert outcome.code == 0, outcome.err
    # The native engine's steps go through no kernel of these.
    by_torch = "steps: torch" in outcome.err
    assert ("kernels: torch (auto: the Triton kernels are for a GPU)" in outcome.err) is by_torch
    assert by_torch or "steps: native engine" in outcome.err
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["kernels"] == dict.fromkeys(OPERATIONS, "torch")


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for a CPU")
def test_training_runs_through_the_kernels_where_they_are_asked_for(nanogpt, text_file, tmp_path):
    common = ["train", "--text", text_file, "--max-steps", 2, "--n-embd", 16, "--n-layer", 1]
    common += ["--n-head", 1, "--block-size", 8, "--batch-size", 2, "--kernels", "triton"]
    common += ["--output", tmp_path / "gpt.pth", "--run-dir", tmp_path / "run"]
    outcome = nanogpt(*common, "--sample-tokens", 3, "--val-fraction", "0.02")
    assert outcome.code == 0, outcome.err
    assert "kernels: triton (asked for)" in outcome.err
