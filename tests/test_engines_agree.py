"""The same text from Python, TorchScript and the native engine; what narrow weights cost."""

import math

import pytest
import torch
from test_export import KINDS, make_model

from nanogpt import GPT, native
from nanogpt.decoding import GumbelNoise, window_start
from nanogpt.errors import UsageError
from nanogpt.export import export_model
from nanogpt.tokenizer import CharTokenizer

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())
BLOCK = 64


@pytest.mark.parametrize(
    ("kind", "bias", "architecture"),
    [(kind, bias, {}) for kind in KINDS for bias in (False, True)]
    + [("char", False, {"rotary": True}), ("char", False, {"rotary": True, "qk_norm": True})],
)
def test_256_greedy_tokens_of_ten_prompts_are_the_models(tmp_path, kind, bias, architecture):
    model = make_model(kind, bias, **architecture)
    export_model(model, tmp_path / "model.pt")
    engine = native.open_file(tmp_path / "model.pt", threads=1)
    vocab_size = model.config.vocab_size
    written = set()
    for length in (1, 5, 20, 70):  # within the context of 32 and beyond it
        prompts = torch.randint(vocab_size, (10, length))
        want = model.generate(prompts, 256, temperature=0.0, engine="torch")
        for prompt, row in zip(prompts.tolist(), want.tolist(), strict=True):
            tokens, _ = engine.generate(prompt, 256, temperature=0.0, seed=0)
            assert prompt + list(tokens) == row
            written |= set(tokens)
    assert len(written) > 10, "a constant text would prove little"


@pytest.fixture(scope="module")
def shakespeare(data_folder):
    """A model of real text, and ids that it has not seen: near ties are rare in random weights."""
    text = (data_folder / "tinyshakespeare.txt").read_text(encoding="utf-8")
    tokenizer = CharTokenizer.from_text(text)
    torch.manual_seed(1)
    model = GPT(vocab_size=tokenizer.vocab_size, block_size=BLOCK, n_layer=3, n_head=4, n_embd=96)
    model.tokenizer = tokenizer
    ids = torch.tensor(tokenizer.encode(text))
    train, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        starts = torch.randint(len(train) - BLOCK - 1, (16, 1)) + torch.arange(BLOCK + 1)
        loss = model(train[starts[:, :-1]], train[starts[:, 1:]])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), held_out


def gap_of_draw(model, text, seed, row):
    """By how much the token that follows `text` won: the two best values of the draw."""
    end = len(text)
    with torch.inference_mode():
        window = torch.tensor([text[window_start(end, BLOCK) :]])
        logits = model.next_logits(window)[0].double()
        noise = GumbelNoise(seed, len(logits), 1, first_row=row).at(end)[0]
        best = (logits + noise).topk(2).values
    return float(best[0] - best[1])


@pytest.mark.slow
def test_a_hundred_prompts_of_real_text_are_continued_alike(shakespeare):
    model, held_out = shakespeare
    starts = torch.randint(len(held_out) - 20, (100, 1)) + torch.arange(20)
    ours, theirs = (
        model.generate(held_out[starts], 200, seed=5, engine=engine)
        for engine in ("native", "torch")
    )
    differing = (ours != theirs).any(1).nonzero()[:, 0].tolist()
    print(f"{100 - len(differing)} of 100 texts of 200 tokens are equal")
    assert len(differing) <= 1
    for row in differing:
        first = int((ours[row] != theirs[row]).nonzero()[0])
        assert gap_of_draw(model, ours[row, :first].tolist(), 5, row) < 1e-4


@pytest.mark.slow
def test_the_gap_of_a_draw_is_usually_no_near_tie(shakespeare):
    """The control of the test above: its limit would not excuse any difference."""
    model, held_out = shakespeare
    text = model.generate(held_out[None, :20], 100, seed=5, engine="torch")[0].tolist()
    gaps = [gap_of_draw(model, text[:end], 5, 0) for end in range(20, 120)]
    assert sum(gap < 1e-4 for gap in gaps) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["", "avx512_bf16", "scalar"])
def test_narrow_weights_cost_few_bits_a_byte_on_held_out_text(
    shakespeare, tmp_path, monkeypatch, isa
):
    """Limits: 0.002 bits a byte for bfloat16, 0.01 for int8."""
    model, held_out = shakespeare
    count = 20_000 // BLOCK if isa == "scalar" else (len(held_out) - 1) // BLOCK
    inputs = held_out[: count * BLOCK].view(count, BLOCK)
    targets = held_out[1 : count * BLOCK + 1].view(count, BLOCK)
    if isa:
        monkeypatch.setenv("NANOGPT_ISA", isa)
    bits = {}
    for quantize in ("none", "bf16", "int8"):
        path = tmp_path / f"{quantize}.pt"
        export_model(model, path, quantize=quantize, verify=False)
        try:
            engine = native.open_file(path)
        except UsageError as error:
            if "lacks those instructions" not in str(error):
                raise
            pytest.skip(str(error))
        logits = torch.stack([torch.from_numpy(engine.logits(row.numpy())) for row in inputs])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), targets.flatten())
        bits[quantize] = float(loss) / math.log(2)
    print({name: f"{value - bits['none']:+.5f}" for name, value in bits.items()})
    assert bits["bf16"] - bits["none"] < 0.002
    assert bits["int8"] - bits["none"] < 0.01
