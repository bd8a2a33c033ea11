"""The native engine behind nanogpt.native, GPT.generate and sample: torch's numbers, torch's text,
and what happens where it is not built."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_programs import native_program

from nanogpt import GPT, checkpoint, decoding, native
from nanogpt.config import GPTConfig
from nanogpt.decoding import Filters, GumbelNoise
from nanogpt.errors import InputError, UsageError
from nanogpt.export import export_model
from nanogpt.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    StreamDecoder,
    UnknownCharacterError,
)

LETTERS = "abcdefghijklmnopqrstuvwxy\n "
# What needs the engine; the rest of this file tests what happens without it.
built = pytest.mark.skipif(not native.available(), reason=f"native engine: {native.why_not()}")


def small_model(bias=False, **shape):
    """Random weights that write varied text: blocks that outweigh the token's own embedding."""
    defaults = {"vocab_size": 28, "block_size": 16, "n_layer": 2, "n_head": 3, "n_embd": 36}
    torch.manual_seed(3)
    model = GPT(GPTConfig(**{**defaults, **shape}, bias=bias)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif parameter.dim() == 2:
                parameter.mul_(10)
    if model.config.vocab_size == 28:
        model.tokenizer = CharTokenizer(LETTERS)
    return model


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def compiled():
    """The module itself."""
    return importlib.import_module("nanogpt._C")


def logits_of(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens]))[0][0].numpy()


TURNED = {"rotary": True, "qk_norm": True}
ARCHITECTURES = [{}, {"rotary": True}, {"qk_norm": True}, TURNED]


@built
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_torch_in_every_way_of_reading(bias, architecture):
    model = small_model(bias, **architecture)
    engine = native.engine_for(model)
    tokens = torch.randint(28, (16,)).tolist()
    want = logits_of(model, tokens)
    close = {"rtol": 0, "atol": 2e-6 * np.abs(want).max()}
    at_once = engine.logits(tokens)
    assert at_once.shape == (16, 28)
    assert at_once.dtype == np.float32
    np.testing.assert_allclose(at_once, want, **close)
    np.testing.assert_allclose(engine.prefill(tokens[:5]), want[4], **close)
    for t in range(5, 16):
        np.testing.assert_allclose(engine.decode(tokens[t]), want[t], **close)
    assert engine.length == 16
    engine.reset()
    assert engine.length == 0


@built
def test_results_are_arrays_of_their_own(model):
    engine = native.engine_for(model)
    first = engine.prefill([1, 2])
    kept = first.copy()
    engine.decode(3)
    np.testing.assert_array_equal(first, kept)


@built
def test_it_says_what_it_is(model):
    model.calibration_temperature = 1.5
    engine = native.engine_for(model, threads=2)
    assert engine.config == {
        "vocab_size": 28, "block_size": 16, "n_layer": 2, "n_head": 3, "n_embd": 36, "bias": False,
        "rotary": False, "qk_norm": False,
    }  # fmt: skip
    assert engine.threads == 2
    assert engine.quantization == "none"
    assert engine.calibration_temperature == 1.5
    assert engine.tokenizer is None
    assert engine.instruction_set in native.describe()


SETTINGS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "all filters": {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.01},
    "penalty": {"repetition_penalty": 1.4},
    "greedy with penalty": {"temperature": 0.0, "repetition_penalty": 1.4},
    "a seed of 64 bits": {"seed": 2**64 - 3},
    "another row": {"first_row": 7},
}


@built
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", SETTINGS)
def test_the_same_seed_gives_the_text_of_torch_beyond_the_context(case, bias):
    model = small_model(bias)
    options = {"seed": 11, **SETTINGS[case]}
    for length in (1, 16, 40):
        tokens = torch.randint(28, (3, length))
        ours = model.generate(tokens, 40, engine="native", **options)
        if options.get("temperature") != 0.0:  # greedy texts may run in circles
            assert len(ours[:, length:].unique()) > 5, "a text of one letter compares nothing"
        assert torch.equal(ours, model.generate(tokens, 40, engine="torch", **options))
        assert ours.shape == (3, length + 40)


@built
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_writes_the_text_of_torch_beyond_the_context(architecture):
    model = small_model(True, **architecture)
    for length in (1, 14, 16, 40):
        tokens = torch.randint(28, (3, length))
        ours, theirs = (
            model.generate(tokens, 40, seed=11, engine=engine) for engine in ("native", "torch")
        )
        assert len(ours[:, length:].unique()) > 5, "a text of one letter compares nothing"
        assert torch.equal(ours, theirs)


@built
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_of_several_blocks_is_read_as_torch_reads_it(architecture):
    model = small_model(block_size=300, **architecture)
    tokens = torch.randint(28, (300,)).tolist()
    want = logits_of(model, tokens)
    engine = native.engine_for(model)
    close = {"rtol": 0, "atol": 5e-6 * np.abs(want).max()}
    np.testing.assert_allclose(engine.logits(tokens), want, **close)
    np.testing.assert_allclose(engine.prefill(tokens[:290]), want[289], **close)
    np.testing.assert_allclose(engine.decode(tokens[290]), want[290], **close)


@built
def test_details_stops_and_ends_are_those_of_torch(model):
    tokens = torch.randint(28, (4, 3))
    free = model.generate(tokens, 40, seed=2)
    stop = model.tokenizer.decode(free[0, 12:14].tolist())
    for options in ({"stop": stop}, {"eos_token_id": int(free[1, 9])}, {}):
        ours, theirs = (
            model.generate(tokens, 40, seed=2, engine=engine, return_details=True, **options)
            for engine in ("native", "torch")
        )
        assert torch.equal(ours.sequences, theirs.sequences)
        assert torch.equal(ours.lengths, theirs.lengths)
        assert (ours.lengths < 40).any() == bool(options)
        torch.testing.assert_close(
            ours.token_probabilities, theirs.token_probabilities, rtol=0, atol=1e-6
        )
    assert model.generate(tokens, 0, engine="native").shape == (4, 3)


@built
def test_probabilities_are_at_the_calibration_temperature(model):
    model.calibration_temperature = 2.5
    tokens = torch.randint(28, (1, 3))
    ours, theirs = (
        model.generate(tokens, 20, seed=2, engine=engine, return_details=True)
        for engine in ("native", "torch")
    )
    torch.testing.assert_close(
        ours.token_probabilities, theirs.token_probabilities, rtol=0, atol=1e-6
    )
    model.calibration_temperature = None
    plain = model.generate(tokens, 20, seed=2, engine="native", return_details=True)
    assert (plain.token_probabilities - ours.token_probabilities).abs().max() > 1e-3


@built
def test_a_model_in_training_is_sampled_as_in_evaluation(model):
    wild = GPT(GPTConfig(**{**model.describe()["config"], "dropout": 0.5}))
    wild.load_state_dict(model.state_dict())
    tokens = torch.randint(28, (1, 3))
    want = model.generate(tokens, 20, seed=1)
    assert torch.equal(wild.train().generate(tokens, 20, seed=1, engine="native"), want)
    assert wild.training


@built
def test_without_a_seed_torchs_generator_gives_one(model):
    tokens = torch.randint(28, (1, 3))
    texts = []
    for engine in ("native", "torch", "native"):
        torch.manual_seed(5)
        texts.append(model.generate(tokens, 30, engine=engine))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    assert not torch.equal(model.generate(tokens, 30, engine="native"), texts[0])


@built
def test_weights_are_shared_and_a_change_of_them_is_seen(model):
    tokens = [1, 2, 3]
    engine = native.engine_for(model)
    assert native.engine_for(model) is engine
    before = engine.prefill(tokens)
    with torch.no_grad():
        model.token_weight.mul_(0.5)
    assert native.engine_for(model) is not engine
    want = logits_of(model, tokens)[-1]
    assert np.abs(want - before).max() > 0.1
    np.testing.assert_allclose(native.engine_for(model).prefill(tokens), want, atol=1e-5)
    # Nothing was copied: the first engine computes with the changed weights too.
    np.testing.assert_allclose(engine.prefill(tokens), want, atol=1e-5)


@built
def test_weights_outlive_the_model(compiled):
    model = small_model()
    want = logits_of(model, [4, 5])
    engine = native.engine_for(model)
    del model
    torch.randn(10_000)
    np.testing.assert_allclose(engine.logits([4, 5]), want, atol=1e-5)


def narrow(model, kind):
    """Weights as export quantizes them, as arrays, with their dtypes; and the numbers they mean."""
    arrays, dtypes, meant = {}, {}, {}
    for name, tensor in model.state_dict().items():
        if name == "_extra_state":
            continue
        if tensor.dim() != 2 or (kind == "int8" and "wpe" in name):
            arrays[name], meant[name] = tensor.numpy(), tensor
        elif kind == "bfloat16":
            half = tensor.to(torch.bfloat16)
            arrays[name], dtypes[name] = half.view(torch.int16).numpy(), "bfloat16"
            meant[name] = half.float()
        else:
            scale = tensor.abs().amax(1) / 127
            whole = (tensor / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
            arrays[name], arrays[name + ".scale"] = whole.numpy(), scale.numpy()
            meant[name] = whole * scale[:, None]
    return arrays, dtypes, meant


@built
@pytest.mark.parametrize(("kind", "word"), [("bfloat16", "bf16"), ("int8", "int8")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_narrow_weights_mean_what_export_says(compiled, kind, word, architecture):
    model = small_model(True, **architecture)
    arrays, dtypes, meant = narrow(model, kind)
    engine = compiled.Engine.from_tensors(model.describe()["config"], arrays, dtypes=dtypes)
    assert engine.quantization == word
    model.load_state_dict(meant)
    tokens = torch.randint(28, (16,)).tolist()
    want = logits_of(model, tokens)
    # Activations are rounded as well: to 2^-9 each at the most.
    assert np.abs(engine.logits(tokens) - want).max() < 0.03 * np.abs(want).max()


def arrays_of(model):
    return {
        name: tensor.numpy()
        for name, tensor in model.state_dict().items()
        if name != "_extra_state"
    }


WTE = "transformer.wte.weight"
MISFITS = {
    "a tensor is missing": (lambda c, t: t.pop(WTE), InputError, WTE),
    "a wrong shape": (lambda c, t: t.update({WTE: t[WTE][:-1]}), InputError, WTE),
    "a transposed view": (lambda c, t: t.update({WTE: t[WTE].T.copy().T}), UsageError, "contig"),
    "another dtype": (lambda c, t: t.update({WTE: t[WTE].astype("f8")}), UsageError, "dtype"),
    "halves with no dtype": (
        lambda c, t: t.update({WTE: t[WTE].astype("u2")}),
        UsageError,
        "bfloa",
    ),
    "no array": (lambda c, t: t.update({WTE: [1, 2]}), UsageError, "not an array"),
    "heads that do not divide": (lambda c, t: c.update(n_head=5), InputError, "head"),
    "a negative size": (lambda c, t: c.update(n_layer=-1), InputError, "n_layer"),
    "a huge size": (lambda c, t: c.update(block_size=2**62), InputError, "block_size"),
    "a size that is a word": (lambda c, t: c.update(n_embd="x"), InputError, "n_embd"),
    "no size": (lambda c, t: c.pop("n_embd"), InputError, "n_embd"),
    "biases that are not there": (lambda c, t: c.update(bias=True), InputError, "bias"),
    "positions that are not learned": (lambda c, t: c.update(rotary=True), InputError, "wpe"),
    "rotary heads of an odd width": (
        lambda c, t: c.update(rotary=True, n_head=4),
        InputError,
        "is 9, which is odd",
    ),
    "rotary positions without end": (
        lambda c, t: c.update(rotary=True, n_head=2, block_size=2**21),
        InputError,
        "block_size",
    ),
}


@built
@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_are_refused_in_words(model, compiled, case):
    change, error, words = MISFITS[case]
    config, tensors = model.describe()["config"], arrays_of(model)
    compiled.Engine.from_tensors(config, tensors)
    change(config, tensors)
    with pytest.raises(error, match=words):
        compiled.Engine.from_tensors(config, tensors)


def engine_of(compiled, model, kind, *, changes=(), threads=1):
    """An engine for weights of a kind, after changes of (name, index, value)."""
    arrays, dtypes = (arrays_of(model), {}) if kind == "float32" else narrow(model, kind)[:2]
    for name, index, value in changes:
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value
    return compiled.Engine.from_tensors(
        model.describe()["config"], arrays, dtypes=dtypes, threads=threads
    )


@built
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_head_may_be_as_wide_as_the_model(compiled, kind):
    model = small_model(n_head=1, n_embd=1536, n_layer=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.div_(8)
    engine = engine_of(compiled, model, kind)
    model.load_state_dict(narrow(model, kind)[2])
    tokens = torch.randint(28, (12,)).tolist()
    want = logits_of(model, tokens)
    assert np.abs(engine.logits(tokens) - want).max() < 0.03 * np.abs(want).max()


SETS = ["scalar", "avx2", "avx512", "avx512_bf16", "neon"]


@built
@pytest.mark.parametrize("set_of_instructions", SETS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_what_is_no_number_in_the_weights_is_none_in_the_logits(
    compiled, monkeypatch, kind, set_of_instructions
):
    monkeypatch.setenv("NANOGPT_ISA", set_of_instructions)
    try:
        compiled.instruction_set()
    except UsageError:
        pytest.skip(f"this CPU lacks {set_of_instructions}")
    model = small_model(True, block_size=32)
    tokens = torch.randint(28, (20,)).tolist()
    layer = "transformer.h.0."
    of_ones = np.uint32(0x7FFFFFFF).view(np.float32)  # rounds up to -0 if it is not looked at
    # A query's and a key's number, and what is norm's or GELU's.
    for name, index in (("attn.c_attn", 5), ("attn.c_attn", 41), ("ln_1", 3), ("mlp.c_fc", 3)):
        for value in (np.nan, of_ones, np.inf):
            engine = engine_of(
                compiled, model, kind, changes=[(f"{layer}{name}.bias", index, value)]
            )
            assert not np.isfinite(engine.prefill(tokens)).any(), (name, value, "a block of tokens")
            assert not np.isfinite(engine.prefill(tokens[:9])).any(), (name, value, "a few tokens")
            engine.prefill(tokens[:1])
            assert not np.isfinite(engine.decode(tokens[1])).any(), (name, value, "one token")


@built
@pytest.mark.parametrize("tokens", [1, 9, 20])
def test_int8_weights_of_minus_128_do_not_overflow_a_sum(compiled, tokens):
    model = small_model(True, n_embd=192, n_layer=1, block_size=32)
    arrays, dtypes, meant = narrow(model, "int8")
    for name, whole, scale in (("c_fc", 0, torch.ones(768)), ("c_proj", -128, torch.rand(192))):
        name = f"transformer.h.0.mlp.{name}.weight"
        arrays[name] = np.full_like(arrays[name], whole)
        arrays[name + ".scale"] = scale.numpy()
        meant[name] = torch.full_like(meant[name], whole) * scale[:, None]
    meant["transformer.h.0.mlp.c_fc.bias"].fill_(3)  # shared with `arrays`
    engine = compiled.Engine.from_tensors(model.describe()["config"], arrays, dtypes=dtypes)
    model.load_state_dict(meant)
    ids = torch.randint(28, (tokens,)).tolist()
    want = logits_of(model, ids)
    assert np.abs(engine.logits(ids) - want).max() < 0.03 * np.abs(want).max()


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork")
def test_the_child_of_a_fork_computes_and_forgets_an_engine():
    # torch's own threads do not live through a fork, so it is left out.
    code = (
        "import os, signal\n"
        "import numpy as np\n"
        "from nanogpt import _C\n"
        "sizes = dict(vocab_size=5, block_size=8, n_layer=1, n_head=1, n_embd=8)\n"
        "shapes = {'wte': (5, 8), 'wpe': (8, 8), 'ln_f': (8,), 'h.0.ln_1': (8,),\n"
        "    'h.0.ln_2': (8,),\n"
        "    'h.0.attn.c_attn': (24, 8), 'h.0.attn.c_proj': (8, 8), 'h.0.mlp.c_fc': (32, 8),\n"
        "    'h.0.mlp.c_proj': (8, 32)}\n"
        "random = np.random.default_rng(1)\n"
        "e = _C.Engine.from_tensors(sizes, {f'transformer.{k}.weight': random.normal(size=s)\n"
        "    .astype('f4') for k, s in shapes.items()}, threads=3)\n"
        "want = e.prefill([1, 2])\n"
        "for use in (True, False):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        signal.alarm(20)\n"
        "        if use: assert (e.prefill([1, 2]) == want).all()\n"
        "        del e\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, ('used' if use else 'forgotten')\n"
        "assert (e.prefill([1, 2]) == want).all()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@built
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_more_threads_than_the_system_gives_are_refused_in_words():
    code = (
        "import resource\n"
        "from nanogpt import GPT, native\n"
        "m = GPT(vocab_size=9, block_size=8, n_layer=1, n_head=1, n_embd=8)\n"
        "native.engine_for(m, 1)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)\n"
        "try:\n"
        "    native.engine_for(m, 1000)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
        "print(native.engine_for(m, 2).prefill([1]).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "UsageError this system gives" in done.stdout
    assert done.stdout.endswith("(9,)\n")


@built
def test_threads_that_generate_with_one_model_do_not_disturb_each_other(model):
    tokens = torch.tensor([[1, 2], [3, 4]])
    options = {"engine": "native", "stop": "no such text"}
    want = [model.generate(tokens, 100, seed=seed, **options) for seed in range(4)]
    got, errors = {}, []

    def write(seed):
        try:
            got[seed] = [model.generate(tokens, 100, seed=seed, **options) for _ in range(3)]
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(text, want[seed]) for seed in range(4) for text in got[seed])


@built
def test_numbers_of_rows_and_seeds_are_read_alike_by_both_engines(model):
    tokens = torch.tensor([[1, 2], [3, 4]])
    for engine in ("native", "torch"):
        for bad in (-1, 2**32 - 1, 2**32):
            with pytest.raises(ValueError, match="first_row"):
                model.generate(tokens, 5, seed=1, first_row=bad, engine=engine)
    for options in ({"first_row": 2**32 - 2}, {"seed": np.int64(-4)}, {"seed": 2**70 + 5}):
        options = {"seed": 1, **options}
        ours, theirs = (
            model.generate(tokens, 20, engine=engine, **options) for engine in ("native", "torch")
        )
        assert torch.equal(ours, theirs), options


@built
def test_tokens_that_cannot_be_are_refused(model):
    engine = native.engine_for(model)
    for bad in ([0, 28], [-1], np.array([2**32], dtype=np.int64), np.array([2**63], np.uint64)):
        with pytest.raises(UsageError, match="outside the vocabulary of 28"):
            engine.logits(bad)
    for bad in ([1.5], np.zeros(2), [[1, 2]], "ab", [None]):
        with pytest.raises(ValueError, match="tokens must"):
            engine.prefill(bad)
    for read in (engine.logits, engine.prefill):
        with pytest.raises(UsageError, match="at least one token"):
            read([])
        with pytest.raises(UsageError, match="16"):
            read([1] * 17)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        engine.decode(28)
    engine.prefill([1] * 16)
    with pytest.raises(UsageError, match="16"):
        engine.decode(1)
    with pytest.raises(UsageError, match="temperature"):
        engine.generate([1], 5, seed=1, temperature=-1.0)
    with pytest.raises(UsageError, match="threads"):
        native.engine_for(model, threads=-1)


@built
def test_a_stream_cannot_go_on_in_a_context_that_is_no_longer_its_own(model):
    engine = native.engine_for(model)
    want = engine.generate([1, 2], 8, seed=3)[0]
    for use in (lambda: engine.prefill([4]), lambda: engine.reset(),
                lambda: engine.stream([5], 3, seed=1)):  # fmt: skip
        stream = engine.stream([1, 2], 8, seed=3)
        assert [next(stream)[0] for _ in range(3)] == want[:3]
        use()
        with pytest.raises(RuntimeError, match="used for something else"):
            next(stream)
    assert [token for token, _ in engine.stream([1, 2], 8, seed=3)] == want


@built
def test_a_stream_ends_before_the_end_token_and_stays_ended(model):
    engine = native.engine_for(model)
    free, _ = engine.generate([1, 2], 30, seed=3)
    eos = free[10]
    stream = engine.stream([1, 2], 30, seed=3, eos=eos, probabilities=True)
    pieces = list(stream)
    assert [token for token, _ in pieces] == free[: free.index(eos)]
    assert all(0 < probability <= 1 for _, probability in pieces)
    assert list(stream) == []
    assert engine.generate([1, 2], 30, seed=3, eos=99)[0] == free


@built
def test_threads_of_python_take_turns_and_do_not_wait_for_the_gil():
    model = small_model(block_size=256, n_embd=192)
    engine = native.engine_for(model)
    want = [engine.generate([1], 150, seed=seed)[0] for seed in range(4)]
    got = {}

    def write(seed):
        got[seed] = [engine.generate([1], 150, seed=seed)[0] for _ in range(2)]

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    turns = 0
    while any(thread.is_alive() for thread in threads):
        turns += 1
        time.sleep(0.001)
    assert turns > 10, "this thread ran while the others computed"
    assert got == {seed: [want[seed]] * 2 for seed in range(4)}


@built
def test_control_c_ends_a_long_text(tmp_path):
    code = (
        "import signal\n"
        "from nanogpt import GPT, native\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "m = GPT(vocab_size=99, block_size=64, n_layer=1, n_head=1, n_embd=16)\n"
        "e = native.engine_for(m)\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    e.generate([1], 10**9, seed=1)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', len(e.generate([1], 5, seed=1)[0]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    try:
        assert process.communicate(timeout=60)[0] == "interrupted 5\n"
    finally:
        process.kill()


TOKENIZERS = {
    "char": lambda: CharTokenizer("abcé漢😀 \n"),
    "byte": ByteTokenizer,
    "bpe": lambda: BPETokenizer.train(iter(["the cat sat on the mat, don't you 漢字 " * 40]), 300),
}


@built
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokenizer_of_a_file_is_pythons(compiled, kind):
    ours = TOKENIZERS[kind]()
    theirs = compiled.Tokenizer.from_json(json.dumps(ours.to_dict()))
    assert theirs.vocab_size == ours.vocab_size
    assert theirs.end_of_text_id == ours.end_of_text_id
    for text in ("", "abc", "a\n b", "é漢😀 a"):
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.encode(text.encode()) == ids
        assert theirs.decode(ids) == ours.decode(ids) == text
    for id in range(ours.vocab_size):
        assert theirs.bytes_of(id) == ours.token_bytes[id]
    with pytest.raises(UnknownCharacterError) as half:
        theirs.encode("a\ud800")
    assert (half.value.character, half.value.position) == ("\ud800", 1)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        theirs.decode([ours.vocab_size])
    with pytest.raises(TypeError):
        theirs.encode(7)


@built
def test_a_tokenizer_that_is_damaged_or_of_another_size_is_refused(model, compiled):
    with pytest.raises(InputError):
        compiled.Tokenizer.from_json("{")
    engine = compiled.Engine.from_tensors(
        model.describe()["config"], arrays_of(model), tokenizer_json='{"kind":"byte"}'
    )
    with pytest.raises(InputError, match=r"257 ids, the model 28"):
        _ = engine.tokenizer
    with pytest.raises(InputError, match="'x'"):
        compiled.Tokenizer.from_json('{"kind":"char","characters":"abc"}').encode("ax")


@built
@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from([b"a", "é".encode(), "漢".encode()[:2], b"\xff", b"\xf0\x9f", b" "]))
)
def test_text_grows_by_whole_characters_as_in_python(pieces):
    module = importlib.import_module("nanogpt._C")
    tokenizer, ours = ByteTokenizer(), module.Utf8Stream()
    theirs = StreamDecoder(tokenizer)
    for piece in pieces:
        assert ours.feed(piece) == "".join(theirs.feed(byte) for byte in piece)
    assert ours.flush() == theirs.flush()


@built
@settings(deadline=None, max_examples=200)
@given(st.lists(st.text("aabé", max_size=4), max_size=3), st.lists(st.text("abé", max_size=5)))
def test_stop_texts_are_found_as_in_python(stops, pieces):
    module = importlib.import_module("nanogpt._C")
    ours, theirs = module.StopText(stops), decoding.StopText(stops)
    for piece in pieces:
        assert ours.feed(piece) == theirs.feed(piece)
        assert ours.found == theirs.found
    assert ours.flush() == theirs.flush()


@built
@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    st.none() | st.integers(1, 70), st.none() | st.floats(0.01, 1.0),
    st.none() | st.floats(0.0, 1.0), st.sampled_from([0.6, 1.0, 1.5]), st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 2), st.integers(0, 2**20), st.booleans(),
)  # fmt: skip
def test_a_draw_is_pythons(numbers, size, temperature, top_k, top_p, min_p, penalty, seed, row,
                           position, ties):  # fmt: skip
    module = importlib.import_module("nanogpt._C")
    random = np.random.default_rng(numbers)
    logits = random.normal(size=size).astype(np.float32) * 3
    if ties:
        logits = np.round(logits)
    seen = random.integers(0, size, 5)
    filters = Filters(temperature, top_k, top_p, min_p, penalty)
    marked = torch.zeros(1, size, dtype=torch.bool)
    marked[0, seen] = True
    kept = filters.apply(torch.from_numpy(logits)[None], marked)
    if temperature > 0:
        kept = kept + GumbelNoise(seed, size, 1, first_row=row).at(position)
    sampler = module.Sampler(size, **vars(filters), seed=seed, row=row)
    sampler.see(seen)
    chosen = sampler.next(logits, position)
    # Python's sums run in another order, which can move the edge of top_p by a last bit.
    assert chosen == int(kept.argmax()) or top_p is not None
    if top_p is None or top_p > 0.999:
        assert chosen == int(kept.argmax())


@built
def test_the_words_of_a_draw_are_philoxs(compiled):
    """Known answers of Random123 for Philox4x32-10."""
    ones = [0xFFFFFFFF] * 4
    assert compiled.philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert compiled.philox(ones, ones[:2]) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.fixture
def model_path(tmp_path, model):
    checkpoint.save(model, tmp_path / "gpt.pth")
    return tmp_path / "gpt.pth"


WRITING = {
    "text": ("--prompt", "abc"),
    "a new document": (),
    "samples": ("--prompt", "q", "--num-samples", 3),
    "json": ("--prompt", "abc", "--num-samples", 2, "--json"),
    "filters": ("--prompt", "abc", "--temperature", 0.8, "--top-k", 9, "--top-p", 0.9),
    "greedy": ("--prompt", "abc", "--temperature", 0, "--repetition-penalty", 1.3),
    "stop": ("--prompt", "a", "--stop", "a", "--stop", "fb"),
    "no end": ("--prompt", "a", "--no-ignore-eos", "--max-new-tokens", 300),
    "nothing": ("--prompt", "abc", "--max-new-tokens", 0),
}


@built
@pytest.mark.parametrize("case", WRITING)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_sample_prints_the_same_with_both_engines(nanogpt, tmp_path, model, case, suffix):
    checkpoint.save(model, tmp_path / f"gpt{suffix}")
    command = ("sample", "--model", tmp_path / f"gpt{suffix}", "--seed", 4, *WRITING[case])
    ours = nanogpt(*command, "--engine", "native")
    theirs = nanogpt(*command, "--engine", "torch")
    assert ours.code == theirs.code == 0
    if "--json" not in command:
        assert ours.out == theirs.out
        return
    ours, theirs = json.loads(ours.out), json.loads(theirs.out)
    assert ours.keys() == theirs.keys()
    for one, other in zip(ours.pop("samples"), theirs.pop("samples"), strict=True):
        assert one.pop("token_probs") == pytest.approx(other.pop("token_probs"), abs=1e-6)
        assert one == other
    assert ours == theirs


@built
def test_sample_picks_the_native_engine_on_a_cpu(nanogpt, model_path, monkeypatch):
    used = []
    monkeypatch.setattr(
        native, "engine_for", lambda model, threads: used.append(threads) or _refuse(threads)
    )
    assert nanogpt("sample", "--model", model_path, "--device", "cpu", "--threads", 1).code == 3
    assert used == [1]
    for flags in (["--engine", "torch"], ["--kernels", "reference"]):
        used.clear()
        assert nanogpt("sample", "--model", model_path, "--device", "cpu", *flags).code == 0
        assert used == []


def _refuse(threads):
    raise InputError(f"asked for {threads} threads")


@built
def test_chat_is_the_same_with_both_engines(model_path):
    def chat(engine):
        return subprocess.run(
            [sys.executable, "-m", "nanogpt.sample", "--model", model_path, "--chat", "--seed", "1",
             "--max-new-tokens", "40", "--engine", engine],
            input="abc\n/reset\ndef\nghi\n", capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    assert chat("native") == chat("torch") != ""


@built
@pytest.mark.parametrize("quantize", ["none", "bf16", "int8"])
def test_sample_writes_from_an_export(nanogpt, tmp_path, model, model_path, quantize):
    target = tmp_path / "model.pt"
    export_model(model, target, quantize=quantize)
    engine = native.open_file(target)
    assert engine.quantization == quantize
    assert engine.tokenizer.encode("abc") == model.tokenizer.encode("abc")
    del engine  # it maps the file, which changes below
    outcome = nanogpt("sample", "--model", target, "--prompt", "abc", "--seed", 4)
    assert outcome.code == 0
    assert outcome.out.startswith("abc")
    assert 150 < len(outcome.out) <= len("abc") + 200 + 1  # the special token has no letters
    if quantize == "none":
        assert outcome.out == nanogpt("sample", "--model", model_path, "--prompt", "abc",
                                      "--seed", 4, "--engine", "torch").out  # fmt: skip
    raw = bytearray(target.read_bytes())
    raw[len(raw) // 2] ^= 1
    target.write_bytes(raw)
    outcome = nanogpt("sample", "--model", target, "--prompt", "abc")
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err.count("\n") == 1


IMPOSSIBLE = {
    "an export for torch": (["--model", "model.pt", "--engine", "torch"], "model.pt is an export"),
    "named kernels": (["--engine", "native", "--kernels", "torch"], "--kernels torch"),
    "an export with kernels": (["--model", "model.pt", "--kernels", "torch"], "--kernels torch"),
}


@built
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_the_engine_cannot_do_is_a_mistake_of_the_flags(nanogpt, model_path, case):
    flags, words = IMPOSSIBLE[case]
    outcome = nanogpt("sample", "--model", model_path, *flags)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


@built
def test_a_missing_export_is_an_input_that_is_missing(nanogpt, tmp_path):
    outcome = nanogpt("sample", "--model", tmp_path / "no.pt")
    assert outcome.code == 3
    assert "no.pt" in outcome.err


@built
def test_an_instruction_set_that_is_not_here_is_named(nanogpt, model_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_ISA", "mmx")
    outcome = nanogpt("sample", "--model", model_path, "--engine", "native")
    assert outcome.code == 2
    assert "NANOGPT_ISA=mmx" in outcome.err
    doctor = nanogpt("doctor")
    assert doctor.code == 0
    assert "no   native engine" in doctor.out
    monkeypatch.setenv("NANOGPT_ISA", "scalar")
    assert "scalar" in next(line for line in nanogpt("doctor").out.splitlines() if "native" in line)


@pytest.fixture
def absent(monkeypatch):
    """The module cannot be imported, as where no compiler was."""
    monkeypatch.setitem(sys.modules, "nanogpt._C", None)
    native._load.cache_clear()
    yield monkeypatch
    native._load.cache_clear()


def test_without_the_engine_it_is_said_why_and_what_adds_it(absent):
    assert not native.available()
    absent.setattr(native, "compiler", lambda: None)
    native._load.cache_clear()
    assert "no C++ compiler" in native.why_not()
    absent.setattr(native, "compiler", lambda: "/usr/bin/c++")
    native._load.cache_clear()
    assert "pip install" in native.why_not()


def test_without_the_engine_auto_is_torch_and_native_is_refused(absent, nanogpt, model_path, model):
    command = ("sample", "--model", model_path, "--prompt", "abc", "--seed", 3)
    want = nanogpt(*command, "--engine", "torch").out
    assert nanogpt(*command).out == want
    refused = nanogpt(*command, "--engine", "native")
    assert (refused.code, refused.out) == (2, "")
    assert "--engine native: it was not built" in refused.err
    export = nanogpt("sample", "--model", model_path.with_suffix(".pt"))
    assert export.code == 2
    assert "it was not built" in export.err

    tokens = torch.randint(28, (1, 3))
    want = model.generate(tokens, 9, seed=1)
    assert torch.equal(model.generate(tokens, 9, seed=1, engine="auto"), want)
    with pytest.raises(RuntimeError, match="it was not built"):
        model.generate(tokens, 9, engine="native")
    with pytest.raises(RuntimeError, match="it was not built"):
        native.open_file(model_path)


def test_without_the_engine_doctor_says_what_it_would_give(absent, nanogpt):
    absent.setattr(native, "program", lambda: None)
    absent.setattr(native, "plugin", lambda: None)
    outcome = nanogpt("doctor")
    assert outcome.code == 0
    lines = {line.split(":")[0]: line for line in outcome.out.splitlines()}
    for name in ("native engine", "nanogpt-generate", "TorchScript plug-in"):
        assert "would give" in lines[f"no   {name}"]
    assert "pip install" in lines["no   native engine"]
    assert "make build" in lines["no   TorchScript plug-in"]


def test_an_engine_of_another_version_is_not_used(absent):
    old = type(sys)("nanogpt._C")
    old.__version__ = "0.0.9"
    absent.setitem(sys.modules, "nanogpt._C", old)
    native._load.cache_clear()
    assert "built for version 0.0.9" in native.why_not()


def test_a_library_that_does_not_load_is_a_reason_not_a_crash(absent):
    def broken(name):
        raise ImportError("libstdc++.so.6: version not found")

    absent.setattr(native.importlib, "import_module", broken)
    native._load.cache_clear()
    assert "does not load (libstdc++.so.6: version not found)" in native.why_not()


def test_an_engine_that_does_not_exist_is_a_mistake(model):
    tokens = torch.randint(28, (1, 3))
    with pytest.raises(ValueError, match="engine must be auto, torch or native, not 'fast'"):
        model.generate(tokens, 3, engine="fast")
    for options in ({"use_cache": False}, {"use_graph": True}):
        with pytest.raises(ValueError, match="of engine='torch'"):
            model.generate(tokens, 3, engine="native", **options)


@built
def test_a_model_that_the_engine_cannot_share_is_named(model):
    half = model.to(torch.bfloat16)
    assert "bfloat16" in native.unfit(half)
    with pytest.raises(RuntimeError, match="bfloat16"):
        native.engine_for(half)
    tokens = torch.randint(28, (1, 3))
    with pytest.raises(RuntimeError, match="bfloat16"):
        half.generate(tokens, 3, engine="native")
    assert half.generate(tokens, 3, engine="auto").shape == (1, 6)


@built
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_is_allocated_for_a_token(tmp_path, threads):
    path = tmp_path / "model.pt"
    export_model(small_model(), path, verify=False)
    program = native_program("allocation_check")
    done = subprocess.run([program, path, str(threads)], capture_output=True, text=True, check=True)
    of_tokens, of_loading = map(int, done.stdout.split(" of "))
    assert of_tokens == 0
    assert of_loading > 10, "the count counts"


@built
@pytest.mark.parametrize("threads", [1025, 40_000])
def test_more_threads_than_any_machine_needs_are_refused(model, threads):
    with pytest.raises(UsageError, match=f"threads must be from 0 to 1024, not {threads}"):
        native.engine_for(model, threads)
