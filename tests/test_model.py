"""GPT against an independent plain implementation in float64, its counts and its state dict."""

import math

import pytest
import torch

from nanogpt import GPT, GPTConfig, checkpoint, metadata
from nanogpt.cache import KVCache
from nanogpt.config import PRESETS
from nanogpt.errors import InputError
from nanogpt.model import QK_GAIN, rotate, rotation_of, to_unit_rms

SHAPE = {"vocab_size": 31, "block_size": 12, "n_layer": 3, "n_head": 4, "n_embd": 24}


def plain_gpt(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """GPT-2 by its equations: einsum and float64, nothing of the package's operations."""
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    heads, eps = model.config.n_head, 1e-5

    def get(name):
        return weights.get("transformer." + name)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * get(name + ".weight")
        return y if get(name + ".bias") is None else y + get(name + ".bias")

    def linear(x, name):
        y = torch.einsum("btc,fc->btf", x, get(name + ".weight"))
        return y if get(name + ".bias") is None else y + get(name + ".bias")

    def prepared(z):  # (B, T, H, D)
        if model.config.qk_norm:
            z = z / (z.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        if model.config.rotary:
            width = z.shape[-1]
            turns = 10_000.0 ** -(2 * torch.arange(width // 2, dtype=torch.float64) / width)
            angles = torch.einsum("t,i->ti", torch.arange(z.shape[1]).double(), turns)
            turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, D/2)
            z = torch.complex(*z.chunk(2, -1)) * turn
            z = torch.cat([z.real, z.imag], -1)
        return z

    length = tokens.shape[1]
    x = get("wte.weight")[tokens]
    if not model.config.rotary:
        x = x + get("wpe.weight")[:length]
    for layer in range(model.config.n_layer):
        h = f"h.{layer}."
        q, k, v = linear(norm(x, h + "ln_1"), h + "attn.c_attn").chunk(3, -1)
        q, k, v = (z.unflatten(-1, (heads, -1)) for z in (q, k, v))  # (B, T, H, D)
        scores = torch.einsum("bihd,bjhd->bhij", prepared(q), prepared(k))
        scores = scores * (QK_GAIN if model.config.qk_norm else 1) / math.sqrt(q.shape[-1])
        future = torch.arange(length)[None, :] > torch.arange(length)[:, None]
        p = scores.masked_fill(future, -math.inf).softmax(-1)
        x = x + linear(torch.einsum("bhij,bjhd->bihd", p, v).flatten(-2), h + "attn.c_proj")
        u = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
        gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear(gelu, h + "mlp.c_proj")
    return torch.einsum("btc,vc->btv", norm(x, "ln_f"), get("wte.weight"))


def randomised(**shape) -> GPT:
    """A model whose every parameter matters: large weights, biases and norms away from 0 and 1."""
    model = GPT(**{**SHAPE, **shape}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    return model


ARCHITECTURES = [
    {"rotary": rotary, "qk_norm": qk_norm} for rotary in (False, True) for qk_norm in (False, True)
]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("length", [1, 5, 12])
def test_logits_equal_a_plain_implementation(impl, bias, architecture, length):
    model = randomised(bias=bias, **architecture).set_kernels(impl)
    tokens = torch.randint(31, (3, length))
    logits, loss = model(tokens)
    assert loss is None
    assert logits.shape == (3, length, 31)
    exact = plain_gpt(model, tokens)
    assert (logits.double() - exact).abs().max() <= 1e-5 * max(1, exact.abs().max())


def test_logits_at_initialisation_equal_a_plain_implementation_to_1e_5():
    model = GPT(vocab_size=65, block_size=64).eval()
    tokens = torch.randint(65, (2, 64))
    assert (model(tokens)[0].double() - plain_gpt(model, tokens)).abs().max() <= 1e-5


def test_loss_is_the_mean_over_targets_that_count():
    model = randomised()
    tokens, targets = torch.randint(31, (2, 12)), torch.randint(31, (2, 12))
    targets[0, 3:] = -100
    logits, loss = model(tokens, targets)
    logp = logits.double().log_softmax(-1)
    counted = [logp[b, t, targets[b, t]] for b in range(2) for t in range(12) if targets[b, t] >= 0]
    assert loss.item() == pytest.approx(-torch.stack(counted).mean().item(), abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("parts", [[12], [1] * 12, [5, 1, 4, 2]])
def test_a_cache_filled_in_any_steps_gives_the_same_logits(parts, architecture):
    model = randomised(bias=True, **architecture)
    tokens = torch.randint(31, (2, 12))
    cache = KVCache(model.config, 2, dtype=torch.float32, device=torch.device("cpu"))
    done = 0
    for part in parts:
        got = model.next_logits(tokens[:, done : done + part], cache)
        done += part
        assert cache.length == done
        assert torch.allclose(got, model(tokens[:, :done])[0][:, -1], atol=1e-4)


def test_a_text_longer_than_the_context_is_refused():
    model = GPT(**SHAPE)
    with pytest.raises(ValueError, match="13 tokens do not fit the context of 12"):
        model(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_counted_as_they_are(bias, architecture):
    model = GPT(**SHAPE, bias=bias, **architecture)
    assert model.config.n_parameters() == sum(p.numel() for p in model.parameters())


def test_the_gpt2_preset_has_gpt2s_published_size():
    config = GPTConfig(vocab_size=50257, **PRESETS["gpt2"])
    assert config.n_parameters() == 124_439_808
    assert config.flops_per_token() == 6 * 123_532_032 + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_shape(name):
    assert GPTConfig(**PRESETS[name]).n_parameters() > 0


def test_initialisation_is_gpt2s():
    model = GPT(vocab_size=4000, n_layer=8, n_embd=256, n_head=4, bias=True)
    state = dict(model.named_parameters())
    block = "transformer.h.3."
    assert state["transformer.wte.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state[block + "mlp.c_fc.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    for name in ("attn.c_proj.weight", "mlp.c_proj.weight"):
        assert state[block + name].std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert state[block + "attn.c_attn.bias"].abs().max() == 0
    assert (state[block + "ln_1.weight"] == 1).all()


def test_overfitting_one_batch_drives_the_loss_below_a_twentieth():
    model = GPT(vocab_size=65, block_size=32, n_layer=2, n_head=2, n_embd=64)
    tokens = torch.randint(65, (4, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_dropout_acts_in_training_only():
    model = GPT(**SHAPE, dropout=0.5)
    tokens = torch.randint(31, (1, 12))
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_reference_and_torch_give_the_same_loss_curve():
    """50 steps from the same start; float32 rounding grows with the steps but stays small."""
    curves = []
    for impl in ("torch", "reference"):
        torch.manual_seed(1)
        model = GPT(**SHAPE).set_kernels(impl)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(50):
            tokens = torch.randint(8, (4, 13)).cumsum(1) % 31
            _, loss = model(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert curves[0][-1] < curves[0][0] - 0.2


def test_a_bare_state_dict_loads_strictly():
    model = GPT(**SHAPE)
    bare = dict(model.named_parameters())
    other = GPT(**SHAPE)
    other.load_state_dict(bare)
    assert all(torch.equal(p, bare[n]) for n, p in other.named_parameters())


def test_weights_of_another_head_count_are_refused_though_every_shape_fits():
    state = GPT(**SHAPE).state_dict()
    with pytest.raises(InputError, match="n_head = 4, not 2"):
        GPT(**{**SHAPE, "n_head": 2}).load_state_dict(state)


def test_a_damaged_extra_state_is_refused():
    state = GPT(**SHAPE).state_dict()
    state["_extra_state"] = state["_extra_state"][:-3]
    with pytest.raises(InputError, match="not JSON"):
        GPT(**SHAPE).load_state_dict(state)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"n_embd": 30, "n_head": 4}, "not a multiple"),
        ({"n_layer": 0}, "n_layer must be a positive"),
        ({"vocab_size": 2.5}, "vocab_size must be a positive"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"rotary": 1}, "rotary must be true or false, not 1"),
        ({"qk_norm": "yes"}, "qk_norm must be true or false, not 'yes'"),
        ({"rotary": True, "n_embd": 12, "n_head": 4}, "width .* is 3, which is odd"),
        ({"rotary": True, "block_size": 2**20 + 1}, "block_size must be at most 1048576"),
    ],
)
def test_an_impossible_shape_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**shape)


def test_a_rotation_worked_out_by_hand():
    """D = 4: pair (0, 2) turns by the position, pair (1, 3) by a hundredth of it."""
    table = rotation_of(GPTConfig(n_embd=4, n_head=1, block_size=4, rotary=True))
    assert table.shape == (2, 4, 2)
    assert table.dtype == torch.float32
    got = rotate(torch.tensor([[1.0, 0.0, 0.0, 2.0]] * 4), table)
    for position, row in enumerate(got.tolist()):
        near, far = float(position), position / 100
        expected = [math.cos(near), -2 * math.sin(far), math.sin(near), 2 * math.cos(far)]
        assert row == pytest.approx(expected, abs=1e-6)
    assert got[0].tolist() == [1.0, 0.0, 0.0, 2.0]


def test_turned_queries_and_keys_see_their_distance_alone():
    table = rotation_of(GPTConfig(n_embd=16, n_head=1, block_size=64, rotary=True)).double()
    q, k = torch.randn(2, 16, dtype=torch.float64)
    scores = rotate(q.expand(64, 16), table) @ rotate(k.expand(64, 16), table).T  # (i, j)
    for distance in range(-63, 64):
        along = scores.diagonal(distance)
        assert (along - along[0]).abs().max() < 1e-5
    assert scores[:, 0].std() > 0.1, "distances differ"


def test_angles_keep_their_precision_at_the_end_of_a_long_context():
    table = rotation_of(GPTConfig(n_embd=2, n_head=1, block_size=100_001, rotary=True))
    want = [math.cos(100_000), math.sin(100_000)]
    assert table[:, -1, 0].tolist() == pytest.approx(want, abs=1e-7)


def test_normalised_rows_have_a_root_mean_square_of_one():
    x = torch.randn(3, 5, 8) * torch.tensor([0.05, 1.0, 1e3])[:, None, None]
    rms = to_unit_rms(x).square().mean(-1).sqrt()
    assert (rms - 1).abs().max() < 1e-2
    assert (rms[1:] - 1).abs().max() < 1e-4
    assert to_unit_rms(torch.zeros(2, 8)).abs().max() == 0
    assert torch.allclose(torch.nn.functional.cosine_similarity(to_unit_rms(x), x, -1), rms / rms)


def test_queries_and_keys_of_any_size_give_the_same_logits_with_qk_norm():
    model = randomised(qk_norm=True)
    tokens = torch.randint(31, (2, 12))
    before = model(tokens)[0]
    with torch.no_grad():
        for block in model.transformer["h"]:
            block.attn.c_attn.weight[: 2 * 24] *= 7
    assert torch.allclose(model(tokens)[0], before, atol=1e-3)
    with torch.no_grad():
        block.attn.c_attn.weight[2 * 24 :] *= 7
    assert not torch.allclose(model(tokens)[0], before, atol=1e-1)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_weight_learns_with_rotary_positions(qk_norm):
    model = randomised(rotary=True, qk_norm=qk_norm)
    tokens = torch.randint(31, (2, 13))
    model(tokens[:, :-1], tokens[:, 1:])[1].backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_a_rotary_model_has_no_position_weights_and_keeps_no_table():
    state = GPT(**SHAPE, rotary=True).state_dict()
    learned = GPT(**SHAPE).state_dict()
    assert learned.keys() - state.keys() == {"transformer.wpe.weight"}
    assert not state.keys() - learned.keys()


def test_a_cast_of_the_model_is_none_of_its_angles():
    model = randomised(rotary=True)
    table = model.rotation.table.clone()
    assert torch.equal(model.to(torch.bfloat16).float().rotation.table, table)
    assert model.to(torch.bfloat16)(torch.randint(31, (1, 12)))[0].dtype == torch.bfloat16
    assert model.rotation.table.dtype == torch.float32


def test_metadata_name_the_architecture_only_where_it_is_not_gpt2s():
    """So files of plain models are what they were, and files from before are of plain models."""
    plain, turned = GPT(**SHAPE), GPT(**SHAPE, rotary=True, qk_norm=True)
    assert not {"rotary", "qk_norm"} & plain.describe()["config"].keys()
    assert {"rotary": True, "qk_norm": True}.items() <= turned.describe()["config"].items()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_file_gives_back_the_architecture(tmp_path, suffix, architecture):
    model = randomised(**architecture)
    checkpoint.save(model, tmp_path / f"gpt{suffix}")
    again, _ = checkpoint.load(tmp_path / f"gpt{suffix}")
    assert again.config == model.config
    tokens = torch.randint(31, (1, 12))
    assert torch.equal(again(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("name", ["rotary", "qk_norm"])
def test_weights_of_another_architecture_are_refused(name):
    """qk_norm changes no tensor, and metadata that do not name it are of a model without it."""
    plain, other = GPT(**SHAPE), GPT(**SHAPE, **{name: True})
    with pytest.raises(InputError, match=f"{name} = False, not True"):
        other.load_state_dict(plain.state_dict())
    with pytest.raises(InputError, match=f"{name} = True, not False"):
        plain.load_state_dict(other.state_dict())


def test_metadata_with_the_options_off_are_those_of_a_plain_model():
    model = GPT(**SHAPE)
    content = model.describe()
    content["config"] |= {"rotary": False, "qk_norm": False}
    GPT(**SHAPE).load_state_dict(
        {**dict(model.named_parameters()), metadata.KEY: metadata.to_tensor(content)}
    )


@pytest.mark.parametrize("width", [16, 128, 768])
def test_the_quick_beginning_is_as_uncertain_at_every_width(width):
    torch.manual_seed(0)
    model = GPT(**SHAPE | {"n_embd": width, "vocab_size": 500, "rotary": True, "qk_norm": True})
    model.begin_quickly()
    tokens = torch.randint(500, (16, model.config.block_size + 1))
    logits, loss = model(tokens[:, :-1], tokens[:, 1:])
    own = logits.gather(2, tokens[:, :-1, None])
    assert float(own.detach().mean()) == pytest.approx(3.2, abs=0.35)
    assert math.log(500) < float(loss.detach()) < math.log(500) + 0.8
    blocks = model.transformer["h"]
    assert all(not block.attn.c_proj.weight.any() for block in blocks)
