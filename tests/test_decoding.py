"""The draw, the filters and the loop of writing."""

import math

import pytest
import torch
from conftest import TRITON

from nanogpt import GPT
from nanogpt.cache import KVCache
from nanogpt.decoding import Filters, GraphedStep, GumbelNoise, StopText, philox, window_start
from nanogpt.tokenizer import CharTokenizer

BLOCK = 16


@pytest.fixture(scope="module")
def model() -> GPT:
    """Large random weights, so that its distributions are far from uniform."""
    torch.manual_seed(5)
    model = GPT(vocab_size=29, block_size=BLOCK, n_layer=2, n_head=2, n_embd=32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.eval()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_agrees_with_the_published_vectors(counter, key, words):
    """Known answers of Random123 1.14, kat_vectors, philox4x32 with 10 rounds."""
    got = philox([torch.tensor(c) for c in counter], key)
    assert [int(word) for word in got] == words


def test_noise_is_the_documented_function_of_its_arguments():
    seed = 0x0123456789ABCDEF
    noise = GumbelNoise(seed, 11, 3, first_row=4, stream=2)
    words = philox([torch.tensor(x) for x in (9 // 4, 70, 4 + 1, 2)], (0x89ABCDEF, 0x01234567))
    u = (int(words[9 % 4]) + 0.5) / 2**32
    for position in (70, 71, 3, 70):
        noise.at(position)
    assert noise.at(70)[1, 9].item() == pytest.approx(-math.log(-math.log(u)), rel=1e-15)
    assert noise.at(70).shape == (3, 11)


def test_noise_does_not_depend_on_how_positions_are_visited():
    forward, single = GumbelNoise(7, 29, 2), GumbelNoise(7, 29, 2)
    walked = [forward.at(position) for position in range(200)]
    for position in (199, 0, 64, 63, 150):
        assert torch.equal(walked[position], single.at(position))


def test_every_draw_follows_the_exact_distribution():
    """Chi-square of 40,000 draws against softmax, at a level passed by all but 1 in 10,000."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 0.3, -0.4, 1.7])
    probabilities = logits.double().softmax(0)
    draws, rows = 40_000, 500
    counts = torch.zeros(8)
    noise = GumbelNoise(11, 8, rows)
    for position in range(draws // rows):
        chosen = (logits.double() + noise.at(position)).argmax(-1)
        counts += torch.bincount(chosen, minlength=8)
    expected = probabilities * draws
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 29.88  # 0.9999 quantile of chi-square with 7 degrees of freedom


def test_sampling_frequencies_of_a_model_pass_a_chi_square_test(model):
    """First tokens of 20,000 single-token continuations at temperature 0.8 with top-k 12."""
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    kept = Filters(temperature=0.8, top_k=12).apply(model.next_logits(prompt).detach())
    probabilities = kept.softmax(-1)[0]
    options = {"temperature": 0.8, "top_k": 12, "seed": 3}
    out = model.generate(prompt.expand(20_000, -1), 1, **options)[:, -1]
    counts = torch.bincount(out, minlength=29)
    assert (counts[probabilities == 0] == 0).all()
    likely = probabilities * 20_000 >= 5
    expected = torch.cat([probabilities[likely], probabilities[~likely].sum()[None]]) * 20_000
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    used = expected > 0
    chi_square = ((observed - expected)[used] ** 2 / expected[used]).sum().item()
    assert int(likely.sum()) >= 5
    assert chi_square < 40  # above the 0.9999 quantile for up to 12 cells


def test_a_wrong_distribution_fails_the_chi_square_test():
    """The test above can fail: draws from a slightly different temperature do."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 0.3, -0.4, 1.7]).double()
    noise = GumbelNoise(11, 8, 40_000)
    counts = torch.bincount((logits / 1.1 + noise.at(0)).argmax(-1), minlength=8)
    expected = logits.softmax(0) * 40_000
    assert ((counts - expected) ** 2 / expected).sum().item() > 29.88


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("length", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 2])
def test_greedy_text_is_the_same_with_and_without_the_cache(model, batch, length):
    prompt = torch.randint(29, (batch, length))
    cached = model.generate(prompt, 3 * BLOCK, temperature=0.0)
    plain = model.generate(prompt, 3 * BLOCK, temperature=0.0, use_cache=False)
    assert torch.equal(cached, plain)
    assert torch.equal(cached[:, :length], prompt)
    assert cached.shape == (batch, length + 3 * BLOCK)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("length", [1, BLOCK, 3 * BLOCK + 2])
def test_every_architecture_writes_the_same_text_with_and_without_the_cache(
    length, rotary, qk_norm
):
    """Beyond the context too, where the window restarts at position 0 and keys are made anew."""
    torch.manual_seed(5)
    shape = {"vocab_size": 29, "block_size": BLOCK, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(**shape, rotary=rotary, qk_norm=qk_norm).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    prompt = torch.randint(29, (3, length))
    cached = model.generate(prompt, 3 * BLOCK, seed=4, engine="torch")
    plain = model.generate(prompt, 3 * BLOCK, seed=4, use_cache=False)
    assert torch.equal(cached, plain)
    assert len(cached.unique()) > 5, "a constant text would prove little"


def test_greedy_takes_the_likeliest_token_of_the_documented_window(model):
    """The loop written out once more, with nothing but forward."""
    text = torch.randint(29, (1, 5))
    got = model.generate(text, 40, temperature=0.0)
    for _ in range(40):
        n, start = text.shape[1], 0
        if n > BLOCK:
            start = 4 * math.ceil((n - BLOCK) / 4)
        logits = model(text[:, start:])[0][:, -1]
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, text)


@pytest.mark.parametrize(
    ("length", "block", "start"),
    [(1, 8, 0), (8, 8, 0), (9, 8, 2), (10, 8, 2), (11, 8, 4), (16, 8, 8), (4, 3, 1), (2, 1, 1)],
)
def test_the_window_restarts_by_a_quarter_of_the_context(length, block, start):
    assert window_start(length, block) == start
    assert 1 <= length - start <= block


@pytest.mark.parametrize("use_cache", [True, False])
def test_row_i_of_a_batch_equals_a_single_run_with_first_row_i(model, use_cache):
    prompt = torch.randint(29, (1, 6))
    options = {"seed": 99, "temperature": 1.3, "top_p": 0.95, "use_cache": use_cache}
    batch = model.generate(prompt.expand(8, -1), 50, **options)
    assert len({tuple(row.tolist()) for row in batch}) == 8
    for row in range(8):
        single = model.generate(prompt, 50, first_row=row, **options)
        assert torch.equal(batch[row : row + 1], single)


def test_the_same_seed_gives_the_same_text_and_another_gives_another(model):
    prompt = torch.randint(29, (1, 3))
    first, again, other = (model.generate(prompt, 30, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_a_seed_torchs_generator_decides(model):
    prompt = torch.randint(29, (1, 3))
    torch.manual_seed(4)
    first = model.generate(prompt, 30)
    assert not torch.equal(first, model.generate(prompt, 30))
    torch.manual_seed(4)
    assert torch.equal(first, model.generate(prompt, 30))


@pytest.mark.parametrize("use_cache", [True, False])
def test_details_give_the_models_probability_of_each_new_token(model, use_cache):
    prompt = torch.randint(29, (2, 4))
    options = {"temperature": 0.5, "top_k": 3, "seed": 1, "use_cache": use_cache}
    details = model.generate(prompt, 6, return_details=True, **options)
    assert details.token_probabilities.shape == (2, 6)
    assert details.lengths.tolist() == [6, 6]
    for t in range(6):
        exact = model(details.sequences[:, : 4 + t])[0][:, -1].double().softmax(-1)
        picked = exact.gather(1, details.sequences[:, 4 + t, None])[:, 0]
        assert torch.allclose(details.token_probabilities[:, t], picked, atol=1e-6)


def test_generating_leaves_the_training_mode_as_it_was(model):
    model.train()
    model.generate(torch.zeros(1, 1, dtype=torch.int64), 1)
    assert model.training
    model.eval()


def test_top_k_keeps_exactly_k_and_prefers_lower_ids_in_a_tie():
    x = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0]])
    kept = Filters(top_k=3).apply(x)
    assert kept.isfinite().tolist() == [[False, True, True, True, False]]
    assert Filters(top_k=9).apply(x).isfinite().all()


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    x = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).double().log()
    for p, kept in [
        (0.39, [1]),
        (0.41, [1, 2]),
        (0.69, [1, 2]),
        (0.71, [1, 2, 3]),
        (1, [0, 1, 2, 3]),
    ]:
        assert Filters(top_p=p).apply(x)[0].isfinite().nonzero()[:, 0].tolist() == kept


def test_min_p_is_relative_to_the_likeliest():
    x = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).double().log()
    assert Filters(min_p=0.31).apply(x)[0].isfinite().tolist() == [True, True, False, False]
    assert Filters(min_p=0.0).apply(x)[0].isfinite().all()


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    x, seen = torch.tensor([[2.0, -2.0, 2.0]]), torch.tensor([[True, True, False]])
    assert Filters(repetition_penalty=2.0).apply(x, seen).tolist() == [[1.0, -4.0, 2.0]]


def test_the_filters_act_in_the_documented_order():
    """Penalty before temperature, temperature before top-p: each alone would keep another set."""
    x = torch.tensor([[4.0, 3.0, 2.0, -5.0]])
    seen = torch.tensor([[True, False, False, False]])
    filters = Filters(temperature=2.0, top_k=3, top_p=0.6, repetition_penalty=4.0)
    kept = filters.apply(x, seen)
    # Penalised: 1, 3, 2; halved: .5, 1.5, 1; softmax: .186, .506, .307.
    assert kept[0].isfinite().tolist() == [False, True, True, False]
    assert kept[0, 1].item() == 1.5


def test_a_repetition_penalty_sees_the_prompt_and_the_new_tokens(model):
    prompt = torch.randint(29, (1, 6))
    out = model.generate(prompt, 20, temperature=0.0, repetition_penalty=1e9)[0].tolist()
    new = out[6:]
    assert len(set(new[: 29 - len(set(out[:6]))])) >= 15  # a token comes again only by necessity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"stop": "x"}, "stop needs the model's tokenizer"),
    ],
)
def test_an_option_out_of_range_is_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.zeros(1, 1, dtype=torch.int64), **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), "at least one token"),
        (torch.zeros(3, dtype=torch.int64), "must be \\(B, T\\) int64"),
        (torch.zeros(1, 3), "must be \\(B, T\\) int64"),
        (torch.tensor([[29]]), "29 is outside the vocabulary of 29"),
        (torch.tensor([[-1]]), "-1 is outside"),
    ],
)
def test_a_bad_prompt_is_refused(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model.generate(tokens, 1)


def test_no_new_tokens_give_the_prompt_back(model):
    prompt = torch.randint(29, (2, 3))
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_an_end_token_stops_its_row_and_fills_the_rest(model):
    prompt = torch.randint(29, (4, 3))
    free = model.generate(prompt, 40, seed=8, temperature=1.5)
    end = int(free[0, 3 + 10])  # some token that comes
    out = model.generate(prompt, 40, seed=8, temperature=1.5, eos_token_id=end)
    lengths = model.generate(
        prompt, 40, seed=8, temperature=1.5, eos_token_id=end, return_details=True
    ).lengths
    for row in range(4):
        new = free[row, 3:].tolist()
        stop = new.index(end) + 1 if end in new else 40
        assert lengths[row] == stop
        assert out[row, 3 : 3 + stop].tolist() == new[:stop]
        assert (out[row, 3 + stop :] == end).all()


def test_a_stop_text_ends_a_row_across_token_boundaries(model):
    tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyz .")
    model.tokenizer = tokenizer
    try:
        prompt = torch.randint(28, (1, 3))
        free = model.generate(prompt, 60, seed=8)
        text = tokenizer.decode(free[0, 3:].tolist())
        stop = text[20:23]
        details = model.generate(prompt, 60, seed=8, stop=stop, return_details=True)
        end = text.index(stop) + len(stop)
        written = details.sequences[0, 3 : 3 + int(details.lengths[0])].tolist()
        assert tokenizer.decode(written) == text[:end]
    finally:
        model.tokenizer = None


@pytest.mark.parametrize("pieces", [["one STOP two"], list("one STOP two"), ["one ST", "OP two"]])
def test_stop_text_gives_what_stands_before_it_in_any_pieces(pieces):
    watch = StopText(["STOP", "never"])
    out = "".join(watch.feed(piece) for piece in pieces)
    assert out == "one "
    assert watch.found
    assert watch.flush() == ""


def test_stop_text_holds_back_only_what_could_begin_a_stop():
    watch = StopText(["abab"])
    assert watch.feed("xxab") == "xx"
    assert watch.feed("a") == ""
    assert watch.feed("c") == "abac"
    assert watch.feed("ab") == ""
    assert watch.flush() == "ab"
    assert not watch.found


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"][:: 1 if TRITON else 2])
@pytest.mark.parametrize(
    ("length", "architecture"),
    [(1, {}), (5, {}), (15, {}), (16, {}), (40, {}), (15, {"rotary": True, "qk_norm": True})],
)
def test_a_step_that_counts_on_the_device_writes_the_same_tokens(impl, length, architecture):
    """The step of a CUDA graph, run kernel by kernel; the context of 16 is outgrown."""
    torch.manual_seed(1)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 20}
    model = GPT(**shape, **architecture).eval()
    prompt = torch.randint(20, (3, length))
    want = model.generate(prompt, 30, seed=3)
    got = model.set_kernels(impl).generate(prompt, 30, seed=3, use_graph=True)
    assert torch.equal(got, want)


def test_a_step_beyond_the_context_is_refused():
    model = GPT(n_layer=1, n_head=1, n_embd=16, block_size=4, vocab_size=9).eval()
    cache = KVCache(model.config, 1, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        model.next_logits(torch.zeros(1, 4, dtype=torch.int64), cache)
        with pytest.raises(ValueError, match="cache of 4 tokens is full"):
            GraphedStep(model, cache)(torch.zeros(1, 1, dtype=torch.int64))


def test_a_graph_that_cannot_be_captured_is_done_without(monkeypatch):
    model = GPT(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=9).eval()
    cache = KVCache(model.config, 1, dtype=torch.float32, device=torch.device("cpu"))

    def fails(self):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(GraphedStep, "_capture", fails)
    tokens = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        model.next_logits(tokens[:, :2], cache)
        step = GraphedStep(model, cache)
        step._plain = False
        with pytest.warns(UserWarning, match="without: operation not permitted when stream is ca"):
            logits = step(tokens[:, 2:])
        assert torch.allclose(logits, model.next_logits(tokens), atol=1e-5)
        assert step(tokens[:, :1]).isfinite().all()
