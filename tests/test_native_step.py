"""The native engine's training step: its gradients are the model's, its optimizers are torch's."""

import copy

import numpy as np
import pytest
import torch

from nanogpt import GPT, native
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.errors import UsageError
from nanogpt.muon import Muon, orthogonalise
from nanogpt.native_step import NativeStep, choose_engine, unfit
from nanogpt.recipe import RECIPES, resolve, trapezoid_rate
from nanogpt.trainer import evaluate, make_muon, make_optimizer

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not native.available(), reason="the native engine is not built")

SHAPES = {
    "plain": {"vocab_size": 65, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32},
    "biases, odd sizes": {
        "vocab_size": 67, "block_size": 41, "n_layer": 2, "n_head": 3, "n_embd": 42, "bias": True,
    },
    "rotary": {
        "vocab_size": 30, "block_size": 24, "n_layer": 1, "n_head": 2, "n_embd": 20, "rotary": True,
    },
    "rotary and normed": {
        "vocab_size": 31, "block_size": 70, "n_layer": 2, "n_head": 2, "n_embd": 36,
        "rotary": True, "qk_norm": True,
    },
    "normed": {
        "vocab_size": 65, "block_size": 16, "n_layer": 1, "n_head": 1, "n_embd": 64,
        "qk_norm": True, "bias": True,
    },
    "several blocks of queries": {
        "vocab_size": 300, "block_size": 150, "n_layer": 1, "n_head": 2, "n_embd": 64,
    },
    "few tokens of a wide model": {
        "vocab_size": 40, "block_size": 5, "n_layer": 1, "n_head": 2, "n_embd": 400,
    },
}  # fmt: skip


def make_model(seed=0, **shape):
    """Weights far enough from GPT-2's small ones that every part of the gradient is seen."""
    torch.manual_seed(seed)
    model = GPT(**shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def windows_of(model, batch, positions=None, seed=0):
    positions = positions or model.config.block_size
    rng = np.random.default_rng(seed)
    return rng.integers(0, model.config.vocab_size, (batch, positions + 1))


def reference(model, windows, dtype=torch.float64):
    """The loss and every gradient by autograd, in float64 or under autocast."""
    copy = GPT(model.config)
    copy.load_state_dict(model.state_dict())
    copy.set_kernels("reference" if dtype == torch.float64 else "torch")
    tokens = torch.from_numpy(windows)
    if dtype == torch.float64:
        copy.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = copy(tokens[:, :-1], tokens[:, 1:])[1]
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in copy.named_parameters()}


def worst(model, exact):
    """The largest relative error of a parameter's gradient."""
    return max(
        float((p.grad.double() - exact[name].double()).norm() / exact[name].double().norm())
        for name, p in model.named_parameters()
    )


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16", "neon"])
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_autograd(name, isa, monkeypatch):
    monkeypatch.setenv("NANOGPT_ISA", isa)
    model = make_model(**SHAPES[name])
    windows = windows_of(model, 3)
    try:
        step = NativeStep(model, torch.float32, 2)
    except UsageError as error:
        pytest.skip(str(error))
    assert step.instruction_set == ("avx512" if isa == "avx512_bf16" else isa)
    loss = step.gradients(windows)
    exact_loss, exact = reference(model, windows)
    assert loss == pytest.approx(exact_loss, rel=1e-6)
    assert step.loss(windows) == loss
    assert worst(model, exact) < 5e-6
    norm = torch.cat([g.flatten() for g in exact.values()]).norm()
    assert step.gradient_norm() == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_is_as_exact_as_autocast(name):
    model = make_model(**SHAPES[name])
    if unfit(model.config, CPU, torch.bfloat16):
        pytest.skip("this CPU has no fast products of bfloat16")
    windows = windows_of(model, 3)
    _, exact = reference(model, windows)
    autocast_loss, autocast = reference(model, windows, torch.bfloat16)
    theirs = max(float((autocast[k] - v).norm() / v.norm()) for k, v in exact.items())
    loss = NativeStep(model, torch.bfloat16, 2).gradients(windows)
    assert loss == pytest.approx(autocast_loss, abs=0.02)
    assert worst(model, exact) < 2 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_threads(dtype):
    shape = SHAPES["biases, odd sizes"]
    if unfit(GPTConfig(**shape), CPU, dtype):
        pytest.skip("this CPU has no fast products of bfloat16")
    found = []
    for threads in (1, 2, 3):
        model = make_model(**shape)
        step = NativeStep(model, dtype, threads)
        loss = step.gradients(windows_of(model, 5))
        found.append((loss, step.gradient_norm(), [p.grad.clone() for p in model.parameters()]))
    for loss, norm, grads in found[1:]:
        assert (loss, norm) == found[0][:2]
        assert all(map(torch.equal, grads, found[0][2]))


def test_micro_batches_add_up_to_the_batch():
    model = make_model(**SHAPES["rotary and normed"])
    windows = windows_of(model, 5)
    step = NativeStep(model, torch.float32, 2)
    whole = step.gradients(windows)
    grads = [p.grad.clone() for p in model.parameters()]
    parts = [windows[:2], windows[2:4], windows[4:]]
    total = 0.0
    for i, part in enumerate(parts):
        total += step.gradients(part, scale=len(part) / 5, add=i > 0) * len(part) / 5
    assert total == pytest.approx(whole, rel=1e-6)
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-7)


def test_windows_may_be_shorter_than_the_context_and_positions_unused_have_no_gradient():
    model = make_model(**SHAPES["plain"])
    windows = windows_of(model, 2, positions=9)
    step = NativeStep(model, torch.float32, 1)
    step.gradients(windows_of(model, 2))  # leaves gradients everywhere
    loss = step.gradients(windows)
    exact_loss, exact = reference(model, windows)
    assert loss == pytest.approx(exact_loss, rel=1e-6)
    assert worst(model, exact) < 5e-6
    assert not model.transformer["wpe"].weight.grad[9:].any()


def test_a_vocabulary_whose_logits_come_in_several_pieces():
    model = make_model(vocab_size=70_001, block_size=130, n_layer=1, n_head=1, n_embd=4)
    windows = windows_of(model, 3)
    loss = NativeStep(model, torch.float32, 2).gradients(windows)
    exact_loss, exact = reference(model, windows)
    assert loss == pytest.approx(exact_loss, rel=1e-6)
    assert worst(model, exact) < 2e-5


def test_an_id_outside_the_vocabulary_is_refused_and_changes_nothing():
    model = make_model(**SHAPES["plain"])
    step = NativeStep(model, torch.float32, 1)
    step.gradients(windows_of(model, 2))
    before = [p.grad.clone() for p in model.parameters()]
    for bad in (-1, 65):
        windows = windows_of(model, 2)
        windows[1, 3] = bad
        with pytest.raises(UsageError, match=f"token {bad} is outside the vocabulary of 65"):
            step.gradients(windows)
    with pytest.raises(UsageError, match="do not fit the context of 32"):
        step.loss(np.zeros((1, 34), dtype=np.int64))
    with pytest.raises(UsageError, match=r"windows must be \(B, T \+ 1\) ids"):
        step.loss(np.zeros(4, dtype=np.int64))
    assert all(map(torch.equal, before, (p.grad for p in model.parameters())))


def test_arrays_that_cannot_be_shared_are_refused():
    shape = GPTConfig(**SHAPES["plain"])
    model = GPT(shape)
    arrays = {name: (p.detach().numpy(), torch.zeros_like(p).numpy())
              for name, p in model.named_parameters()}  # fmt: skip
    name = "transformer.wte.weight"

    def made(pair):
        return native.training_step(shape, {**arrays, name: pair}, bf16=False, threads=1)

    weight, grad = arrays[name]
    made((weight, grad))
    with pytest.raises(UsageError, match="must be a contiguous array of float32"):
        made((weight.astype(np.float64), grad))
    with pytest.raises(UsageError, match="must be a contiguous array of float32"):
        made((weight, np.asfortranarray(grad)))
    with pytest.raises(UsageError, match="has 64 numbers, not 2080"):
        made((weight, grad[:2]))
    with pytest.raises(Exception, match="2048 numbers, not 2080"):
        made((weight[:64], grad[:64]))


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "neon"])
@pytest.mark.parametrize("name", ["biases, odd sizes", "rotary", "normed"])
@pytest.mark.parametrize("make", [make_optimizer, make_muon])
def test_the_update_is_the_optimizers_own(make, name, isa, monkeypatch):
    monkeypatch.setenv("NANOGPT_ISA", isa)
    ours, theirs = make_model(**SHAPES[name]), make_model(**SHAPES[name])
    try:
        NativeStep(ours, torch.float32, 2)
    except UsageError as error:
        pytest.skip(str(error))
    step = NativeStep(ours, torch.float32, 2)
    mine = make(ours, 3e-3, 0.1, (0.9, 0.99))
    peer = make(theirs, 3e-3, 0.1, (0.9, 0.99))
    for i in range(4):
        step.gradients(windows_of(ours, 3, seed=i))
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.grad = 0.5 * own.grad.clone()
        step.update(mine, grad_scale=0.5)
        peer.step()
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=3e-6)
            other.data.copy_(own.data)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.state[own].keys() == peer.state[other].keys()
        for key, value in mine.state[own].items():
            torch.testing.assert_close(value, peer.state[other][key], rtol=1e-4, atol=1e-7)


def orthogonalise_in_bfloat16(matrix):
    """What `orthogonalise` does on a GPU."""
    x = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    x = (x / x.norm(dim=(-2, -1), keepdim=True)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if matrix.shape[-2] > matrix.shape[-1] else x).float()


@pytest.mark.parametrize("width", [20, 64, 260])
def test_muon_in_bfloat16_is_more_exact_than_torchs(width):
    model = make_model(vocab_size=9, block_size=8, n_layer=1, n_head=2, n_embd=width)
    if unfit(model.config, CPU, torch.bfloat16):
        pytest.skip("this CPU has no fast products of bfloat16")
    step = NativeStep(model, torch.bfloat16, 2)
    step.gradients(windows_of(model, 8))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_muon(model, 1e-3, 0.0, (0.9, 0.99))
    step.update(optimizer)
    compared = 0
    for group in optimizer.param_groups[:2]:
        for name, parameter in model.named_parameters():
            if not any(parameter is one for one in group["params"]):
                continue
            rows, cols = parameter.shape[0] // group["parts"], parameter.shape[1]
            moved = (before[name] - parameter.detach()).view(-1, rows, cols)
            ours = moved / (group["lr"] * max(1.0, rows / cols) ** 0.5)
            grad = parameter.grad.view_as(moved)
            exact = orthogonalise(grad)
            theirs = orthogonalise_in_bfloat16(grad)
            assert (ours - exact).norm() < (theirs - exact).norm()
            compared += 1
    assert compared == 4


def test_torch_knows_that_the_weights_have_changed():
    model = make_model(**SHAPES["plain"])
    step = NativeStep(model, torch.float32, 1)
    optimizer = make_optimizer(model, 1e-2, 0.1, (0.9, 0.99))
    tokens = torch.zeros((1, 3), dtype=torch.int64)
    first = model.generate(tokens, 20, temperature=0)
    versions = [p._version for p in model.parameters()]
    for i in range(20):
        step.gradients(windows_of(model, 4, seed=i))
        step.update(optimizer)
    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
    copy = GPT(model.config)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(model.generate(tokens, 20, temperature=0),
                       copy.generate(tokens, 20, temperature=0))  # fmt: skip
    assert not torch.equal(first, model.generate(tokens, 20, temperature=0))


def test_it_learns_what_torch_learns():
    shape = SHAPES["rotary and normed"]
    text = np.tile(np.arange(31), 60)
    losses = {}
    for engine in ("native", "torch"):
        model = make_model(**shape)
        optimizer = make_optimizer(model, 3e-3, 0.1, (0.9, 0.99))
        step = NativeStep(model, torch.float32, 2) if engine == "native" else None
        losses[engine] = []
        for i in range(25):
            starts = np.random.default_rng(i).integers(0, len(text) - 71, 4)
            windows = np.stack([text[s : s + 71] for s in starts])
            if step is not None:
                losses[engine].append(step.gradients(windows))
                step.update(optimizer)
                continue
            optimizer.zero_grad()
            tokens = torch.from_numpy(windows)
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
            loss.backward()
            optimizer.step()
            losses[engine].append(loss.item())
        whole = evaluate(model, text, device=CPU, native=step)
        assert whole == pytest.approx(evaluate(model, text, device=CPU), rel=1e-5)
    assert losses["native"] == pytest.approx(losses["torch"], rel=1e-3)
    assert losses["native"][-1] < losses["native"][0] - 1.5


def test_what_it_cannot_do_is_said():
    shape = GPTConfig(**SHAPES["plain"])
    assert unfit(shape, CPU, torch.float32) is None
    assert unfit(shape, CPU, torch.float16) == "it has no float16"
    assert unfit(shape, torch.device("cuda"), torch.float32) == "the device is cuda"
    assert unfit(shape, CPU, torch.float32, compiled=True) == "--compile is torch's"
    assert unfit(GPTConfig(n_embd=15, n_head=5), CPU, torch.float32) == "a width is odd"
    with pytest.raises(UsageError, match="cannot run: a width is odd"):
        NativeStep(GPT(n_embd=15, n_head=5), torch.float32, 1)


def test_the_engine_is_chosen_by_measurement_and_a_named_kernel_is_torchs():
    shape = GPTConfig(**SHAPES["plain"])
    assert choose_engine(shape, "auto", CPU, kernels="torch", compiled=False) is None
    engine, dtype, why = choose_engine(shape, "float32", CPU, kernels="auto", compiled=False)
    assert (engine, dtype, why) == ("native", torch.float32, "asked for")
    engine, dtype, why = choose_engine(shape, "auto", CPU, kernels="auto", compiled=False)
    assert dtype in (torch.float32, torch.bfloat16)
    assert "measured" in why or why == "the only one here"


# Dropout.


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["biases, odd sizes", "rotary and normed"])
def test_gradients_with_dropout_are_those_of_autograd_with_the_same_masks(
    name, recompute, monkeypatch
):
    model = make_model(**SHAPES[name], dropout=0.3)
    model.recompute = recompute
    windows = windows_of(model, 3)
    step = NativeStep(model, torch.float32, 2)
    loss = step.gradients(windows, dropout_seed=2**63 + 5)
    layers, width, block = (getattr(model.config, n) for n in ("n_layer", "n_embd", "block_size"))
    masks = step.dropout_masks().reshape(2 * layers + 1, 3, block, width)
    assert masks.mean() == pytest.approx(0.7, abs=0.01)
    assert set(np.unique(masks)) == {0, 1}
    left = iter(torch.from_numpy(masks / 0.7))
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, training: x * next(left))
    exact_loss, exact = reference(model, windows)
    assert next(left, None) is None
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    assert worst(model, exact) < 2e-5


def test_dropout_is_a_function_of_its_seed_and_of_nothing_else():
    shape = SHAPES["plain"]
    found = []
    for threads, seed in ((1, 7), (3, 7), (2, 8)):
        model = make_model(**shape, dropout=0.2)
        step = NativeStep(model, torch.float32, threads)
        loss = step.gradients(windows_of(model, 4), dropout_seed=seed)
        found.append((loss, step.dropout_masks(), model.token_weight.grad.clone()))
    (loss, masks, grad), (same, again, others), (_, different, _) = found
    assert loss == same
    assert np.array_equal(masks, again)
    assert torch.equal(grad, others)
    assert 0.6 < float((masks == different).mean()) < 0.75  # 0.8 * 0.8 + 0.2 * 0.2
    plain = make_model(**shape)
    without = NativeStep(plain, torch.float32, 1)
    assert step.loss(windows_of(plain, 4)) == without.loss(windows_of(plain, 4))
    assert without.dropout_masks().size == 0


# Muon and the recipe.


@pytest.mark.parametrize("size", [(8, 24), (24, 8), (16, 16), (3, 8, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(size):
    torch.manual_seed(0)
    matrix = torch.randn(size)
    found = orthogonalise(matrix)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3
    # The same directions: U V^T of its own decomposition is near.
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    cosine = (found * (u @ vh)).sum() / (found.norm() * (u @ vh).norm())
    assert float(cosine) > 0.97


def test_muon_has_the_blocks_matrices_and_adamw_the_rest():
    model = GPT(**SHAPES["biases, odd sizes"])
    groups = make_muon(model, 1e-3, 0.1, (0.9, 0.99)).param_groups
    names = {p: n for n, p in model.named_parameters()}
    parts = {g["parts"]: {names[p].split(".", 3)[3] for p in g["params"]}
             for g in groups if "parts" in g}  # fmt: skip
    assert parts == {
        3: {"attn.c_attn.weight"},
        1: {"attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"},
    }
    assert sum(len(g["params"]) for g in groups) == len(names)
    decayed = {names[p] for g in groups if "betas" in g and g["weight_decay"] for p in g["params"]}
    assert decayed == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_muon_lowers_a_quadratic_and_ignores_parameters_without_gradient():
    torch.manual_seed(0)
    goal, weight = torch.randn(6, 4), torch.nn.Parameter(torch.zeros(6, 4))
    unused = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([{"params": [weight, unused], "parts": 1, "lr": 0.05, "momentum": 0.9}])
    for _ in range(200):
        optimizer.zero_grad()
        (weight - goal).square().sum().backward()
        optimizer.step()
    assert float((weight.detach() - goal).norm()) < 0.2 * float(goal.norm())
    assert torch.equal(unused.detach(), torch.ones(2, 2))


def test_flags_win_over_the_recipe():
    speed = resolve(TrainConfig(recipe="speed"))
    assert (speed.rotary, speed.qk_norm, speed.block_size) == (True, True, 64)
    assert (speed.batch_size, speed.max_steps, speed.epochs) == (
        12,
        RECIPES["speed"].max_steps,
        None,
    )
    own = resolve(TrainConfig(recipe="speed", rotary=False, block_size=32, epochs=2, batch_size=5))
    assert (own.rotary, own.block_size, own.batch_size) == (False, 32, 5)
    assert (own.epochs, own.max_steps) == (2, None)
    assert resolve(TrainConfig(recipe="speed", preset="small")).batch_size == 3
    assert resolve(TrainConfig(recipe="speed", init="model.pth")).rotary is None
    standard = resolve(TrainConfig())
    assert (standard.batch_size, standard.rotary, standard.max_steps) == (64, None, None)
    assert resolve(speed) == speed


def test_the_trapezoid_rises_stays_and_falls_to_its_end():
    rates = [trapezoid_rate(s, 100, 4, 2.0, 0.0, 0.5) for s in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert set(rates[4:51]) == {2.0}
    assert rates[51:53] == pytest.approx([1.96, 1.92])
    assert rates[99] == pytest.approx(0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_takes_less_memory_and_gives_the_same(dtype):
    shape = {"vocab_size": 65, "block_size": 64, "n_layer": 5, "n_head": 2, "n_embd": 64}
    if unfit(GPTConfig(**shape), CPU, dtype):
        pytest.skip("this CPU has no fast products of bfloat16")
    found = []
    for recompute in (False, True):
        model = make_model(**shape, rotary=True)
        model.recompute = recompute
        step = NativeStep(model, dtype, 2)
        loss = step.gradients(windows_of(model, 6))
        found.append((loss, [p.grad for p in model.parameters()], step.workspace_bytes))
    (loss, grads, most), (again, others, less) = found
    assert loss == again
    assert all(map(torch.equal, grads, others))
    assert less < 0.6 * most


# What a review found.


def test_a_step_follows_the_optimizer_that_it_is_given():
    """Also after load_state_dict, which replaces the moments."""
    model = make_model(**SHAPES["plain"])
    step = NativeStep(model, torch.float32, 1)
    optimizer = make_optimizer(model, 1e-2, 0.1, (0.9, 0.99))
    step.gradients(windows_of(model, 2))
    step.update(optimizer)

    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = optimizer.state[model.token_weight]["exp_avg"].clone()
    step.gradients(windows_of(model, 2, seed=1))
    step.update(optimizer)
    state = optimizer.state[model.token_weight]
    assert float(state["step"]) == 2
    assert not torch.equal(before, state["exp_avg"])
    other = make_optimizer(model, 1e-2, 0.1, (0.9, 0.99))
    step.update(other)
    assert float(other.state[model.token_weight]["step"]) == 1


def test_gradients_that_were_taken_away_come_back_and_weights_that_moved_are_refused():
    model = make_model(**SHAPES["plain"])
    step = NativeStep(model, torch.float32, 1)
    step.gradients(windows_of(model, 2))
    grad = model.token_weight.grad.clone()
    for parameter in model.parameters():
        parameter.grad = None
    step.gradients(windows_of(model, 2))
    assert torch.equal(model.token_weight.grad, grad)
    model.token_weight.data = model.token_weight.data.clone()
    with pytest.raises(RuntimeError, match="have moved"):
        step.gradients(windows_of(model, 2))


def test_a_bad_moment_changes_no_weight():
    model = make_model(**SHAPES["plain"])
    step = NativeStep(model, torch.float32, 1)
    step.gradients(windows_of(model, 2))
    names = dict(model.named_parameters())
    moments = {n: (torch.zeros_like(p).numpy(), torch.zeros_like(p).numpy())
               for n, p in names.items()}  # fmt: skip
    last = list(names)[-1]
    moments[last] = (moments[last][0], moments[last][1][:3])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UsageError, match=r"the second moment of transformer\.ln_f"):
        step._step.adamw(moments, lr=1.0, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0, count=1)
    assert all(map(torch.equal, before, (p.detach() for p in model.parameters())))


def test_passes_of_changing_sizes_share_one_room():
    model = make_model(**SHAPES["plain"])
    step = NativeStep(model, torch.float32, 1)
    first = step.gradients(windows_of(model, 6))
    room = step.workspace_bytes
    exact = reference(model, windows_of(model, 2, positions=5))[1]
    step.gradients(windows_of(model, 2, positions=5))
    assert worst(model, exact) < 5e-6
    assert step.gradients(windows_of(model, 6)) == first
    assert step.workspace_bytes == room


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 33])
@pytest.mark.parametrize("positions", [1, 65])
def test_the_smallest_sizes(vocabulary, positions):
    model = make_model(
        vocab_size=vocabulary, block_size=66, n_layer=1, n_head=2, n_embd=4, bias=True
    )
    for batch in (1, 3):
        windows = windows_of(model, batch, positions)
        loss = NativeStep(model, torch.float32, 7).gradients(windows)
        exact_loss, exact = reference(model, windows)
        assert loss == pytest.approx(exact_loss, rel=1e-5, abs=1e-7)
        for name, parameter in model.named_parameters():
            want = exact[name] if exact[name] is not None else torch.zeros_like(parameter)
            torch.testing.assert_close(parameter.grad.double(), want, rtol=1e-3, atol=1e-5)


def test_shapes_that_are_none_are_refused():
    good = SHAPES["plain"]
    assert native._load()[0].TrainingStep.unfit(good, bf16=False) == ""
    for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
        with pytest.raises(UsageError, match=f"{name} must be 1 or more"):
            native._load()[0].TrainingStep.unfit({**good, name: 0}, bf16=False)
    with pytest.raises(UsageError, match="not a multiple"):
        native._load()[0].TrainingStep.unfit({**good, "n_head": 3}, bf16=False)


def test_where_the_engine_is_slow_torch_is_asked_too(monkeypatch):
    monkeypatch.setenv("NANOGPT_ISA", "scalar")
    shape = GPTConfig(vocab_size=65, block_size=64, n_layer=1, n_head=2, n_embd=128)
    engine, dtype, why = choose_engine(shape, "auto", CPU, kernels="auto", compiled=False)
    assert (engine, dtype) == ("torch", torch.float32)
    assert "as fast as native float32" in why


def test_with_init_the_recipes_batch_waits_for_the_models_context():
    config = TrainConfig(recipe="speed", init="model.pth", n_head=5)
    assert resolve(config).batch_size is None
    assert RECIPES["speed"].sequences(64) == 12
    assert RECIPES["standard"].sequences(64) == 64
