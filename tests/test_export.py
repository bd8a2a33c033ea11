"""Exports: they compute what the model does, no bit is uncovered, a bad one leaves nothing."""

import copy
import importlib.util
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import types
import warnings
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt import GPT, checkpoint, load
from nanogpt.decoding import window_start
from nanogpt.errors import InputError, NanoGPTError, UsageError
from nanogpt.export import archive, command, export_model, gguf, hf, torchscript, verify
from nanogpt.export.quantize import (
    SCALE,
    dequantized,
    dequantized_model,
    rows_to_int8,
    weights_of,
)
from nanogpt.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, CharTokenizer

TEXT = "Hello, wörld! 日本 naïve — €uro 😀\n\t'tis 12 o'clock: the quick brown fox jumps.\n" * 3
KINDS = ("char", "byte", "bpe")
QUANTIZATIONS = ("none", "bf16", "int8")
TRANSFORMERS = importlib.util.find_spec("transformers") is not None
LLAMA = importlib.util.find_spec("llama_cpp") is not None


def make_tokenizer(kind):
    if kind == "char":
        return CharTokenizer.from_text(TEXT)
    return ByteTokenizer() if kind == "byte" else BPETokenizer.train(iter([TEXT]), 290)


def make_model(kind="char", bias=True, **shape):
    """A random model whose greedy text is no constant: larger weights, norms that are not ones."""
    tokenizer = make_tokenizer(kind)
    shape = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, **shape}
    torch.manual_seed(7)
    model = GPT(vocab_size=tokenizer.vocab_size, bias=bias, **shape)
    model.tokenizer = tokenizer
    model.calibration_temperature = 1.25
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        # The tied head likes the token that it has just read; positions are what makes it change.
        if model.config.rotary:
            model.token_weight.div_(8)
        else:
            model.transformer["wpe"].weight.mul_(4)
    return model.eval()


def write(model, path, quantize="none"):
    with path.open("wb") as file:
        torchscript.write(model, quantize, file)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Archives of the same model, by quantization."""
    folder, model = tmp_path_factory.mktemp("exported"), make_model()
    return model, {q: write(model, folder / f"{q}.pt", q) for q in QUANTIZATIONS}


@pytest.fixture
def model_path(tmp_path):
    checkpoint.save(make_model(), tmp_path / "gpt.pth")
    return tmp_path / "gpt.pth"


def greedy(module, prompts, new, block_size):
    """(B, T + new) as a program without nanogpt would write, by prefill and decode."""
    text, read_from = prompts, -1
    with torch.inference_mode():
        for end in range(prompts.shape[1], prompts.shape[1] + new):
            start = window_start(end, block_size)
            if start != read_from:
                read_from = start
                logits = module.prefill(text[:, start:end])
            else:
                logits = module.decode(text[:, end - 1 : end])
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
    return text


# TorchScript: what it computes


@pytest.mark.parametrize(
    ("kind", "bias", "architecture"),
    [(kind, bias, {}) for kind in KINDS for bias in (False, True)]
    + [("char", False, {"rotary": True}), ("byte", True, {"rotary": True, "qk_norm": True})],
)
def test_256_greedy_tokens_of_ten_prompts_are_the_models(tmp_path, kind, bias, architecture):
    model = make_model(kind, bias, **architecture)
    module = torchscript.load(write(model, tmp_path / "model.pt"))
    vocab_size, block = model.config.vocab_size, model.config.block_size
    prompts = torch.randint(vocab_size, (10, 5), generator=torch.Generator().manual_seed(1))
    want = model.generate(prompts, 256, temperature=0.0)
    assert torch.equal(greedy(module, prompts, 256, block), want)
    assert len(want[:, 5:].unique()) > 10, "a constant text would prove little"
    longer = torch.randint(vocab_size, (1, 3 * block), generator=torch.Generator().manual_seed(2))
    assert torch.equal(
        greedy(module, longer, 20, block), model.generate(longer, 20, temperature=0.0)
    )


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_logits_are_those_of_the_stored_weights(exported, quantize):
    model, paths = exported
    module = torchscript.load(paths[quantize])
    plain = dequantized_model(model, quantize)
    tokens = torch.randint(model.config.vocab_size, (3, 32))
    with torch.inference_mode():
        want, _ = plain(tokens)
        assert (module(tokens) - want).abs().max() < 1e-5 * want.abs().max()
        one_by_one = [module.prefill(tokens[:, :20])]
        one_by_one += [module.decode(tokens[:, at : at + 1]) for at in range(20, 32)]
        got = torch.stack(one_by_one, 1)
    assert (got - want[:, 19:]).abs().max() < 1e-5 * want.abs().max()
    if quantize != "none":
        assert (want - model(tokens)[0]).abs().max() > 1e-4, "quantization changes something"


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize(
    "architecture", [{"rotary": True}, {"qk_norm": True}, {"rotary": True, "qk_norm": True}]
)
def test_every_architecture_is_exported_verified_and_its_own_again(
    tmp_path, quantize, architecture
):
    """Verified by all engines, written again byte for byte, and without a record more."""
    model, path = make_model(**architecture), tmp_path / "model.pt"
    report = export_model(model, path, quantize=quantize)
    assert report.verified
    assert all(row.holds for row in report.agreements)
    torchscript.load(path)
    content = archive.read(path)
    assert architecture.items() <= content.index["config"].items()
    assert ("transformer.wpe.weight" in content.tensors) == ("rotary" not in architecture)
    assert not [name for name in content.records if name.startswith("constants/")]


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({"rotary": True}, "the model has rotary, which GPT-2 has not"),
        ({"rotary": True, "qk_norm": True}, "the model has rotary and qk_norm, which"),
    ],
)
def test_gpt2s_formats_refuse_what_gpt2_has_not(nanogpt, tmp_path, format, architecture, words):
    checkpoint.save(make_model(**architecture), tmp_path / "gpt.pth")
    outcome = nanogpt("export", "--model", tmp_path / "gpt.pth", "--format", format,
                      "--output", tmp_path / "out")  # fmt: skip
    assert (outcome.code, outcome.err.count("\n")) == (3, 1)
    assert words in outcome.err
    assert f"{format} holds GPT-2's architecture alone" in outcome.err
    assert os.listdir(tmp_path) == ["gpt.pth"]


def test_the_cache_takes_any_batch_and_forward_leaves_it_alone(exported):
    model, paths = exported
    module = torchscript.load(paths["none"])
    tokens = torch.randint(model.config.vocab_size, (4, 9))
    with torch.inference_mode():
        want, _ = model(tokens)
        for rows in (1, 4, 2):
            module.prefill(tokens[:rows, :7])
            module(tokens)
            got = module.decode(tokens[:rows, 7:8])
            assert torch.allclose(got, want[:rows, 7], atol=1e-5)
        module.reset()
        got = [module.decode(tokens[:3, at : at + 1]) for at in range(9)]  # from nothing
        assert torch.allclose(torch.stack(got, 1), want[:3], atol=1e-5)


def test_what_cannot_be_computed_is_refused_in_words(exported):
    model, paths = exported
    module = torchscript.load(paths["none"])
    last, block = model.config.vocab_size - 1, model.config.block_size
    ones = torch.ones(1, block, dtype=torch.int64)
    with torch.inference_mode():
        module.prefill(ones)
        cases = [
            (lambda: module(torch.cat([ones, ones], 1)), "64 tokens do not fit the context of 32"),
            (lambda: module.decode(ones[:, :1]), "33 tokens do not fit the context of 32"),
            (lambda: module.prefill(ones * (last + 1)), "outside the vocabulary"),
            (lambda: module.prefill(-ones), "outside the vocabulary"),
            (lambda: module.prefill(ones[0]), "at least one row"),
            (lambda: module.prefill(ones[:, :0]), "at least one row"),
        ]
        for call, message in cases:
            with pytest.raises(torch.jit.Error, match=message):
                call()
        module.prefill(ones[:, :3].expand(2, 3))
        with pytest.raises(torch.jit.Error, match="one token a row, not 2"):
            module.decode(ones[:, :2].expand(2, 2))
        with pytest.raises(torch.jit.Error, match="2 rows of the last prefill, not 1"):
            module.decode(ones[:, :1])


def test_a_process_without_nanogpt_runs_it_with_no_warning_but_deprecation(exported):
    model, paths = exported
    tokens = torch.arange(6)[None]
    program = f"""
import sys, warnings
sys.modules["nanogpt"] = None  # importing it raises
import torch
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    module = torch.jit.load({str(paths["none"])!r})
    tokens = torch.arange(6)[None]
    out = module(tokens), module.prefill(tokens[:, :5]), module.decode(tokens[:, 5:])
kinds = (DeprecationWarning, FutureWarning)
assert not [w for w in seen if not issubclass(w.category, kinds)], seen
assert "nanogpt.model" not in sys.modules
print(float(out[0].sum()), float(out[1].sum()), float(out[2].sum()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = model(tokens)[0].detach()
    want = [logits.sum(), logits[0, 4].sum(), logits[0, 5].sum()]
    assert [float(x) for x in done.stdout.split()] == pytest.approx(
        [float(x) for x in want], abs=1e-3
    )


# TorchScript: the file


def test_the_archive_holds_plain_operators_and_neither_paths_nor_times(exported):
    _, paths = exported
    raw = paths["int8"].read_bytes()
    for trace in (os.getcwd(), os.path.dirname(torch.__file__), '/torchscript.py"', ".debug_pkl"):
        assert trace.encode() not in raw, trace
    with zipfile.ZipFile(paths["int8"]) as opened:
        assert {entry.date_time for entry in opened.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert opened.testzip() is None
        code = b"".join(opened.read(n) for n in opened.namelist() if "/code/" in n).decode()
    assert set(re.findall(r"\bops\.(\w+)", code)) == {"prim"}
    assert "___torch_mangle" not in code


def test_equal_models_are_equal_files_whatever_was_exported_before(exported, tmp_path):
    model, paths = exported
    write(make_model("byte", bias=False, n_layer=3), tmp_path / "between.pt", "int8")
    for quantize, path in paths.items():
        again = write(copy.deepcopy(model), tmp_path / f"{quantize}.pt", quantize)
        assert again.read_bytes() == path.read_bytes()
    checkpoint.save(model, tmp_path / "gpt.pth")
    command = [sys.executable, "-m", "nanogpt.export", "--model", "gpt.pth", "--output", "x.pt"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, "--no-verify"], check=True, cwd=tmp_path, env=env)
    assert (tmp_path / "x.pt").read_bytes() == paths["none"].read_bytes()


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_every_record_is_what_the_index_says_and_holds_the_weights(exported, quantize):
    model, paths = exported
    content = archive.read(paths[quantize])
    index, want = content.index, weights_of(model, quantize)
    assert {**model.describe(), "quantize": quantize}.items() <= index.items()
    assert set(index["tensors"]) == set(want) == set(content.tensors)
    module = torchscript.load(paths[quantize])
    loaded = {re.sub("_scale$", SCALE, n): t for n, t in module.named_buffers()}
    del loaded["keys"], loaded["values"]
    assert set(loaded) == set(want)
    narrow = {"none": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[quantize]
    for name, tensor in want.items():
        entry = index["tensors"][name]
        keeps = tensor.dim() == 1 or (quantize == "int8" and "wpe" in name)
        assert tensor.dtype == (torch.float32 if keeps else narrow), name
        assert entry["dtype"] == str(tensor.dtype).removeprefix("torch.")
        assert entry["shape"] == list(tensor.shape)
        assert entry["bytes"] == len(content.records[entry["record"]])
        assert entry["crc32"] == f"{zlib.crc32(content.records[entry['record']]):08x}"
        assert torch.equal(content.tensors[name], tensor)
        assert loaded[name].dtype == tensor.dtype, "it stays quantized in libtorch"
        assert torch.equal(loaded[name], tensor)
    assert len({entry["record"] for entry in index["tensors"].values()}) == len(want)
    # All numbers of the file are in the index: nothing was folded into other constants.
    stored = sum(len(raw) for name, raw in content.records.items() if name.startswith("data/"))
    assert stored == sum(entry["bytes"] for entry in index["tensors"].values())


def test_the_comment_is_the_sum_of_all_but_the_tensors(exported):
    """Computed once more from the specification, with no code of the writer."""
    _, paths = exported
    raw = paths["bf16"].read_bytes()
    index = archive.read(paths["bf16"]).index
    with zipfile.ZipFile(paths["bf16"]) as opened:
        comment = opened.comment
        rest = bytearray(raw[: raw.rindex(b"PK\5\6")])
        spans = []
        for entry in index["tensors"].values():
            member = opened.getinfo("archive/" + entry["record"])
            assert member.compress_type == zipfile.ZIP_STORED
            name_bytes, extra_bytes = struct.unpack_from("<2H", raw, member.header_offset + 26)
            start = member.header_offset + 30 + name_bytes + extra_bytes
            assert start % 64 == 0
            spans.append((start, start + entry["bytes"]))
        for start, stop in sorted(spans, reverse=True):
            del rest[start:stop]
    assert comment == f"nanogpt-crc32:{zlib.crc32(rest):08x}".encode()


def test_no_changed_bit_is_read_silently(exported, tmp_path):
    _, paths = exported
    whole, path = paths["int8"].read_bytes(), tmp_path / "damaged.pt"
    rng = random.Random(0)
    places = [rng.randrange(8 * len(whole)) for _ in range(300)]
    places += range(8 * (len(whole) - 200), 8 * len(whole), 3)  # directory and end record
    places += range(0, 8 * 128, 7)  # the first header
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged\.pt"):
            archive.read(path)


def test_a_cut_or_longer_archive_is_refused(exported, tmp_path):
    _, paths = exported
    whole, path = paths["none"].read_bytes(), tmp_path / "cut.pt"
    for size in (0, 1, 21, 22, 60, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.pt"):
            archive.read(path)
    for longer in (whole + b"x", b"x" + whole):
        path.write_bytes(longer)
        with pytest.raises(InputError, match=r"cut\.pt"):
            archive.read(path)
    with pytest.raises(InputError, match=r"nowhere\.pt"):
        archive.read(tmp_path / "nowhere.pt")


def test_a_foreign_archive_is_refused(tmp_path):
    module = torch.nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), tmp_path / "foreign.pt")
    with pytest.raises(InputError, match=r"foreign\.pt"):
        archive.read(tmp_path / "foreign.pt")


def test_the_zip64_form_is_read_by_all(exported, tmp_path, monkeypatch):
    """What a file above 4 GB would look like, with the limit lowered."""
    model, paths = exported
    wide, plain = archive.write, paths["none"]
    for limit in (100, 70_000):
        monkeypatch.setattr(
            archive, "write", lambda file, records, limit=limit: wide(file, records, limit=limit)
        )
        path = write(model, tmp_path / "wide.pt")
        assert b"PK\6\6" in path.read_bytes()
        assert archive.read(path).index == archive.read(plain).index
        tokens = torch.arange(5)[None]
        # Not the form that an export of this size has.
        wide_module = torchscript.load(path, trust=True)
        assert torch.equal(wide_module(tokens), torchscript.load(plain, trust=True)(tokens))
        with zipfile.ZipFile(path) as opened:
            assert opened.testzip() is None


# Quantization


def test_int8_moves_no_weight_by_more_than_half_its_rows_step():
    torch.manual_seed(1)
    weight = torch.randn(40, 70) * torch.logspace(-6, 3, 40)[:, None]
    weight[3] = 0
    weight[4, 0] = 1e-45  # its scale is zero in float32
    weight[4, 1:] = 0
    steps, scale = rows_to_int8(weight)
    assert steps.dtype == torch.int8
    assert int(steps.min()) >= -127
    again = steps.double() * scale.double()[:, None]
    bound = (scale.double() / 2 * (1 + 1e-5))[:, None].expand_as(weight).clone()
    bound[4] = 1e-44
    assert ((again - weight.double()).abs() <= bound).all()
    used = [i for i in range(40) if i not in (3, 4)]
    assert (steps[used].abs().amax(1) == 127).all(), "every row uses its whole range"
    assert not steps[3].any()


def test_bf16_is_torchs_rounding_and_vectors_stay(exported):
    model, _ = exported
    weights = weights_of(model, "bf16")
    for name, parameter in model.named_parameters():
        dtype = torch.bfloat16 if parameter.dim() == 2 else torch.float32
        assert torch.equal(weights[name], parameter.detach().to(dtype))
    plain = dequantized(weights)
    assert all(weight.dtype == torch.float32 for weight in plain.values())


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.token_weight[0, 0] = float("nan")
    for format in command.OUTPUTS:
        with pytest.raises(InputError, match=r"wte\.weight hold numbers that are not finite"):
            export_model(model, tmp_path / command.OUTPUTS[format], format=format)
    assert list(tmp_path.iterdir()) == []


# The command and its verification


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_the_command_writes_what_reads_back_and_says_how_far_apart_the_engines_are(
    nanogpt, model_path, tmp_path, quantize
):
    out = tmp_path / "deep" / "model.pt"
    outcome = nanogpt(
        "export", "--model", model_path, "--output", out, "--quantize", quantize, "--json"
    )
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert (report["format"], report["quantize"], report["verified"]) == (
        "torchscript",
        quantize,
        True,
    )
    assert report["bytes"] == out.stat().st_size
    row = report["agreements"][0]
    assert row["pair"] == "eager / torchscript"
    assert row["largest"] <= 1e-5 * row["scale"]
    assert row["same_choices"] == row["choices"] > 60
    assert "eager / torchscript: logits differ by at most" in outcome.err
    assert "tolerance 1.0e-04" in outcome.err
    assert os.listdir(out.parent) == ["model.pt"]
    assert archive.read(out).index["quantize"] == quantize
    assert (out.stat().st_mode & 0o777) == (model_path.stat().st_mode & 0o777)


def test_without_names_the_files_are_gpt_pth_and_model_pt(
    nanogpt, model_path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert nanogpt("export", "--no-verify").code == 0
    assert archive.read(tmp_path / "model.pt").index["calibration_temperature"] == 1.25


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_an_archive_that_computes_something_else_is_not_left(
    nanogpt, model_path, tmp_path, monkeypatch, quantize
):
    real = weights_of

    def slightly_off(model, quantize):
        weights = real(model, quantize)
        name = "transformer.h.1.ln_2.weight"
        weights[name] = weights[name] * 1.01
        return weights

    monkeypatch.setattr(torchscript, "weights_of", slightly_off)
    (tmp_path / "model.pt").write_text("old")
    before = sorted(os.listdir(tmp_path))
    outcome = nanogpt(
        "export", "--model", model_path, "--output", tmp_path / "model.pt", "--quantize", quantize
    )
    assert outcome.code == 1
    assert "nothing was written, because eager / torchscript" in outcome.err
    assert outcome.err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "model.pt").read_text() == "old"


def test_an_archive_with_another_tokenizer_or_calibration_is_not_left(tmp_path, monkeypatch):
    real, model = torchscript.write, make_model()

    def another(model, quantize, file):
        changed = copy.copy(model)
        change(changed)
        real(changed, quantize, file)

    monkeypatch.setattr(torchscript, "write", another)
    characters = model.tokenizer.characters
    for name, value in (
        ("calibration_temperature", 3.0),
        ("tokenizer", CharTokenizer([*characters[:-1], "Ω"])),
    ):

        def change(changed, name=name, value=value):
            setattr(changed, name, value)

        with pytest.raises(NanoGPTError, match="the index does not describe the model"):
            export_model(model, tmp_path / "model.pt")
        assert os.listdir(tmp_path) == []


class FakeNative:
    """The native engine's interface over the plain model; `error` is added to its logits."""

    def __init__(self, error):
        self.error = error

    def Engine(self, path):
        content = archive.read(Path(path))
        model = GPT(**content.index["config"]).eval()
        model.load_state_dict(dequantized(content.tensors))
        eager = verify.Eager(model)
        error = self.error

        class Engine:
            def logits(self, tokens):
                assert tokens.dtype == np.int64
                return eager.logits(torch.from_numpy(tokens)).numpy() + error

            def prefill(self, tokens):
                return eager.prefill(torch.from_numpy(tokens)).numpy() + error

            def decode(self, token):
                return eager.decode(token).numpy() + error

        return Engine()


@pytest.mark.parametrize(
    ("quantize", "error", "holds"),
    [
        ("none", 0.0, True),
        ("none", 0.003, False),
        ("none", float("nan"), False),
        ("bf16", 0.003, True),
        ("bf16", 1.0, False),
        ("int8", 0.003, True),
        ("int8", 1.0, False),
    ],
)
def test_the_native_engine_is_held_to_its_tolerance(tmp_path, monkeypatch, quantize, error, holds):
    monkeypatch.setitem(sys.modules, "nanogpt._C", FakeNative(error))
    out = tmp_path / "model.pt"
    if not holds:
        with pytest.raises(NanoGPTError, match="eager / native: logits differ"):
            export_model(make_model(), out, quantize=quantize)
        assert os.listdir(tmp_path) == []
        return
    report = export_model(make_model(), out, quantize=quantize)
    pairs = [row.pair for row in report.agreements]
    assert pairs == ["eager / torchscript", "eager / native", "torchscript / native"]
    assert report.note is None
    assert report.agreements[1].largest == pytest.approx(error, abs=1e-5)


def test_a_native_engine_that_is_not_built_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nanogpt._C", None)
    report = export_model(make_model(), tmp_path / "model.pt")
    assert report.note == "the native engine is not built here, so it was not compared"
    assert len(report.agreements) == 1


def test_a_native_engine_that_cannot_read_the_file_leaves_none(tmp_path, monkeypatch):
    def refuse(path):
        raise RuntimeError("record 3 is damaged\nand more")

    monkeypatch.setitem(sys.modules, "nanogpt._C", types.SimpleNamespace(Engine=refuse))
    with pytest.raises(NanoGPTError, match="cannot be read back: record 3 is damaged"):
        export_model(make_model(), tmp_path / "model.pt")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("block", [1, 2, 5, 32])
def test_the_texts_of_verification_stand_at_both_ends_of_the_context(kind, block):
    model = make_model(kind or "char", block_size=block)
    if kind is None:
        model.tokenizer = None
    texts = verify.texts(model)
    lengths = [len(text) for text in texts]
    assert lengths[0] == 1
    assert lengths[1] == min(8, block)
    assert lengths[-1] == max(1, block - 1) + 3
    assert min(int(t.min()) for t in texts) >= 0
    assert max(int(t.max()) for t in texts) < model.config.vocab_size
    assert all(torch.equal(a, b) for a, b in zip(texts, verify.texts(model), strict=True))


def test_every_shape_is_exported_and_verified(tmp_path):
    for i, shape in enumerate(
        [{"block_size": 1}, {"block_size": 2, "n_head": 1}, {"n_layer": 1, "n_embd": 6}]
    ):
        for quantize in QUANTIZATIONS:
            model = make_model("char", bias=bool(i % 2), **shape)
            model.tokenizer = model.calibration_temperature = None
            report = export_model(model, tmp_path / "model.pt", quantize=quantize)
            assert report.agreements[0].holds
    assert archive.read(tmp_path / "model.pt").index["tokenizer"] is None


BAD = {
    "a missing model": (["--model", "nowhere.pth"], 3, "there is no model file"),
    "a model that is text": (["--model", "text.pth"], 3, "text.pth"),
    "hf in int8": (["--format", "hf", "--quantize", "int8"], 2, "--quantize int8 is for"),
    "safetensors in bf16": (
        ["--format", "safetensors", "--quantize", "bf16"],
        2,
        "--quantize bf16 is for torchscript and gguf",
    ),
    "the model as output": (
        ["--format", "hf", "--output", "gpt.pth"],
        2,
        "gpt.pth",
    ),
    "another format's ending": (["--output", "x.gguf"], 2, "ends as gguf does"),
    "an ending that sample does not know": (["--output", "x.bin"], 2, "by its ending .pt"),
    "an ending of no model file": (
        ["--format", "safetensors", "--output", "x.bin"],
        2,
        ".pth or .safetensors",
    ),
    "a folder for a file": (["--output", "folder"], 2, "is a folder"),
    "a file for a folder": (["--format", "hf", "--output", "text.pth"], 2, "text.pth"),
    "a folder in use": (["--format", "hf", "--output", "folder"], 2, "notes.txt"),
    "an unwritable output": (["--output", "/proc/model.pt"], 2, "cannot be written"),
    "an unknown format": (["--format", "onnx"], 2, "--format must be one of"),
    "an unknown quantization": (["--quantize", "int4"], 2, "--quantize must be one of"),
}


def tree_of(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_its_code_and_touches_nothing(
    nanogpt, model_path, tmp_path, monkeypatch, case
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    before = tree_of(tmp_path)
    arguments, code, message = BAD[case]
    outcome = nanogpt("export", *arguments)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""
    assert tree_of(tmp_path) == before


def test_the_model_is_never_its_own_output(nanogpt, tmp_path):
    checkpoint.save(make_model(), tmp_path / "gpt.safetensors")
    os.symlink("gpt.safetensors", tmp_path / "same.safetensors")
    for name in ("gpt.safetensors", "same.safetensors"):
        outcome = nanogpt("export", "--model", tmp_path / "gpt.safetensors", "--format",
                          "safetensors", "--output", tmp_path / name)  # fmt: skip
        assert outcome.code == 2
        assert "is the --model itself" in outcome.err


def test_an_hf_folder_never_replaces_the_model_or_what_is_no_export(nanogpt, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    checkpoint.save(make_model(), folder / "model.safetensors")
    checkpoint.save(make_model(), tmp_path / "gpt.pth")
    before = tree_of(tmp_path)
    flags = ("--format", "hf", "--output", folder)
    outcome = nanogpt("export", "--model", tmp_path / "gpt.pth", *flags)
    assert outcome.code == 2
    assert "lacks config.json" in outcome.err
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text("{}")
        before[folder / name] = b"{}"
    outcome = nanogpt("export", "--model", folder / "model.safetensors", *flags)
    assert outcome.code == 2
    assert "the --model lies in it" in outcome.err
    assert tree_of(tmp_path) == before


def test_an_error_between_the_two_renames_leaves_the_earlier_folder(tmp_path, monkeypatch):
    folder, rename = tmp_path / "gpt2", os.rename
    export_model(make_model("byte"), folder, format="hf")
    before = tree_of(tmp_path)

    def second_fails(source, target):
        if Path(target) == folder and Path(source).name == folder.name:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        export_model(make_model(), folder, format="hf")
    assert tree_of(tmp_path) == before


def test_a_pipe_or_a_device_is_never_replaced(nanogpt, model_path, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for format in ("torchscript", "gguf"):
        outcome = nanogpt("export", "--model", model_path, "--format", format,
                          "--output", tmp_path / "pipe")  # fmt: skip
        assert outcome.code == 2
        assert "is a device or a pipe" in outcome.err
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_into_a_folder_that_is_not_there_and_a_long_name_are_written(tmp_path):
    os.symlink("later/real.pt", tmp_path / "model.pt")
    export_model(make_model(), tmp_path / "model.pt", verify=False)
    archive.read(tmp_path / "later" / "real.pt")
    export_model(make_model(), tmp_path / ("n" * 252 + ".pt"), verify=False)


def test_a_full_disk_leaves_the_old_file(nanogpt, model_path, tmp_path, monkeypatch):
    (tmp_path / "model.pt").write_text("old")
    before = sorted(os.listdir(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive, "write", full)
    outcome = nanogpt("export", "--model", model_path, "--output", tmp_path / "model.pt")
    assert outcome.code == 1
    assert "the disk is full" in outcome.err
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "model.pt").read_text() == "old"


def test_a_disk_that_fills_up_under_gguf_is_called_full(nanogpt, model_path, tmp_path, monkeypatch):
    package = pytest.importorskip("gguf")

    def short(self):  # as numpy's tofile ends
        raise OSError("4096 requested and 3648 written")

    monkeypatch.setattr(package.GGUFWriter, "write_tensors_to_file", short)
    outcome = nanogpt("export", "--model", model_path, "--format", "gguf", "--output",
                      tmp_path / "model.gguf")  # fmt: skip
    assert outcome.code == 1
    assert "the disk is full" in outcome.err
    assert not (tmp_path / "model.gguf").exists()


def test_terminated_in_the_middle_it_cleans_up_and_ends_with_143(model_path, tmp_path):
    program = f"""
import sys, time
from nanogpt.export import torchscript
real = torchscript.write
def slow(*arguments):
    real(*arguments)
    print("written", flush=True)
    time.sleep(60)
torchscript.write = slow
from nanogpt.cli import main
sys.exit(main(["export", "--model", {str(model_path)!r}, "--output", {str(tmp_path / "m.pt")!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    process.stdout.close()
    assert os.listdir(tmp_path) == ["gpt.pth"]


def test_an_output_that_is_a_link_stays_one(tmp_path):
    (tmp_path / "store").mkdir()
    os.symlink("store/real.pt", tmp_path / "model.pt")
    export_model(make_model(), tmp_path / "model.pt", verify=False)
    assert (tmp_path / "model.pt").is_symlink()
    archive.read(tmp_path / "store" / "real.pt")
    assert os.listdir(tmp_path / "store") == ["real.pt"]


def test_the_python_interface_refuses_words_it_does_not_know(tmp_path):
    with pytest.raises(UsageError, match="onnx"):
        export_model(make_model(), tmp_path / "model.pt", format="onnx")
    with pytest.raises(UsageError, match="int4"):
        export_model(make_model(), tmp_path / "model.pt", quantize="int4")


# The other formats


def test_safetensors_is_the_model_file_itself(nanogpt, model_path, tmp_path):
    outcome = nanogpt("export", "--model", model_path, "--format", "safetensors",
                      "--output", tmp_path / "out.safetensors")  # fmt: skip
    assert outcome.code == 0, outcome.err
    checkpoint.save(load(model_path)[0], tmp_path / "saved.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (
        tmp_path / "saved.safetensors"
    ).read_bytes()


def strings(rng, kind, count):
    alphabet = sorted(set(TEXT))
    if kind != "char":
        alphabet += ["ß", "\u0301", "½", "²", "\u3000", "\xa0", "Ж", "𝕏", "\u200d", "<|endof"]
    for _ in range(count):
        yield "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 40)))


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_faces_tokenizer_gives_the_same_ids(kind):
    from tokenizers import Tokenizer as Backend

    ours = make_tokenizer(kind)
    theirs = Backend.from_str(json.dumps(hf.tokenizer_json(ours)))
    assert theirs.token_to_id(END_OF_TEXT) == ours.end_of_text_id
    assert theirs.get_vocab_size() == ours.vocab_size
    for text in strings(random.Random(3), kind, 500):
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text), text
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("bias", [False, True])
def test_the_hf_folder_replaces_an_earlier_one_and_holds_gpt2s_layout(tmp_path, bias):
    import safetensors.torch

    model, folder = make_model(bias=bias), tmp_path / "gpt2"
    export_model(make_model("byte"), folder, format="hf")
    export_model(model, folder, format="hf")
    assert sorted(os.listdir(folder)) == sorted(hf.FILES)
    assert os.listdir(tmp_path) == ["gpt2"]
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    ours = dict(model.named_parameters())
    fc = "transformer.h.1.mlp.c_fc"
    assert torch.equal(tensors[f"{fc}.weight"], ours[f"{fc}.weight"].t())
    assert tensors[f"{fc}.bias"].shape == (128,)
    assert bool(tensors[f"{fc}.bias"].any()) == bias
    config = json.loads((folder / "config.json").read_text())
    assert (config["n_embd"], config["activation_function"]) == (32, "gelu_new")


@pytest.mark.skipif(not TRANSFORMERS, reason="needs transformers")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_folder_and_computes_the_same(tmp_path, kind, bias):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    model, folder = make_model(kind, bias), tmp_path / "gpt2"
    export_model(model, folder, format="hf")
    theirs, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.randint(model.config.vocab_size, (2, 32))
    with torch.inference_mode():
        assert (theirs.eval()(tokens).logits - model(tokens)[0]).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "the fox , o'clock . jumps"[: 30 if kind != "char" else 7]
    ids = tokenizer(text)["input_ids"]
    assert ids == model.tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def bpe(text, tokens, merges):
    """Byte-level BPE from its definition: always the pair of lowest rank, leftmost first."""
    from nanogpt.tokenizer import byte_symbols

    symbols = byte_symbols()
    parts = [symbols[value] for value in text.encode()]
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    while True:
        pairs = list(pairwise(parts))
        best = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate([*pairs, None]))
        if best[0] == len(ranks):
            return [tokens.index(part) for part in parts]
        at = best[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_the_gguf_vocabulary_gives_the_same_ids_by_byte_pairs(kind):
    tokenizer = make_tokenizer(kind)
    tokens, merges = gguf.vocabulary(tokenizer)
    assert len(tokens) == len(set(tokens)) == tokenizer.vocab_size
    for text in strings(random.Random(4), kind, 200):
        assert bpe(text, tokens, merges) == tokenizer.encode(text), text


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_holds_the_weights_and_the_vocabulary(tmp_path, kind, quantize, bias):
    package = pytest.importorskip("gguf")
    model, path = make_model(kind, bias), tmp_path / "model.gguf"
    export_model(model, path, format="gguf", quantize=quantize)
    export_model(model, tmp_path / "again.gguf", format="gguf", quantize=quantize)
    assert path.read_bytes() == (tmp_path / "again.gguf").read_bytes()
    reader = package.GGUFReader(path)
    field = {name: reader.get_field(name).contents() for name in reader.fields}
    assert field["general.architecture"] == "gpt2"
    assert field["gpt2.context_length"] == 32
    assert field["gpt2.block_count"] == field["gpt2.attention.head_count"] == 2
    assert field["tokenizer.ggml.eos_token_id"] == model.tokenizer.end_of_text_id
    assert len(field["tokenizer.ggml.tokens"]) == model.config.vocab_size
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 + 2 + 2 * 12
    ours = model.transformer["h"][1].mlp.c_fc.weight.detach()
    theirs = tensors["blk.1.ffn_up.weight"]
    assert theirs.tensor_type.name == {"none": "F32", "bf16": "BF16", "int8": "Q8_0"}[quantize]
    plain = package.quants.dequantize(theirs.data, theirs.tensor_type)
    within = {"none": 0, "bf16": 2.0**-8, "int8": 1 / 127}[quantize] * float(ours.abs().max())
    assert np.abs(plain - ours.numpy()).max() <= within
    assert tensors["position_embd.weight"].tensor_type.name == "F32"
    bias_there = np.asarray(tensors["blk.0.attn_qkv.bias"].data)
    assert bool(bias_there.any()) == bias


def test_a_gguf_file_that_came_out_wrong_is_not_left(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    real = gguf.write

    def wrong(model, quantize, path):
        real(model, quantize, path)
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(gguf, "write", wrong)
    with pytest.raises(NanoGPTError, match="differs from the model in"):
        export_model(make_model(), tmp_path / "model.gguf", format="gguf")
    assert os.listdir(tmp_path) == []


def test_what_gguf_cannot_hold_is_refused_in_words(nanogpt, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    checkpoint.save(make_model(n_embd=24), tmp_path / "narrow.pth")
    bare = make_model()
    bare.tokenizer = None
    checkpoint.save(bare, tmp_path / "bare.pth")
    out = ("--format", "gguf", "--output", tmp_path / "model.gguf")
    outcome = nanogpt("export", "--model", tmp_path / "narrow.pth", *out, "--quantize", "int8")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "24 is no multiple" in outcome.err
    outcome = nanogpt("export", "--model", tmp_path / "bare.pth", *out)
    assert (outcome.code, outcome.err.count("\n")) == (3, 1)
    assert "no tokenizer" in outcome.err
    monkeypatch.setitem(sys.modules, "gguf", None)
    outcome = nanogpt("export", "--model", tmp_path / "narrow.pth", *out)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "pip install gguf" in outcome.err
    assert not (tmp_path / "model.gguf").exists()


class Llama:
    """llama.cpp's C interface, as far as it is needed: ids of a text, logits of a prompt."""

    def __init__(self, path):
        import llama_cpp.llama_cpp as c

        self.c = c
        self.model = c.llama_model_load_from_file(
            str(path).encode(), c.llama_model_default_params()
        )
        assert self.model, "llama.cpp refuses the file"
        self.vocab = c.llama_model_get_vocab(self.model)
        parameters = c.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch = 256, 256
        parameters.type_k = parameters.type_v = 0  # float32
        parameters.flash_attn_type = 0
        self.context = c.llama_init_from_model(self.model, parameters)

    def encode(self, text):
        raw = text.encode()
        ids = (self.c.llama_token * (len(raw) + 8))()
        count = self.c.llama_tokenize(self.vocab, raw, len(raw), ids, len(raw) + 8, True, False)
        return list(ids[:count])

    def logits(self, ids):
        batch = self.c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert self.c.llama_decode(self.context, batch) == 0
        size = (self.c.llama_vocab_n_tokens(self.vocab),)
        rows = [self.c.llama_get_logits_ith(self.context, i) for i in range(len(ids))]
        return torch.from_numpy(np.array([np.ctypeslib.as_array(r, shape=size) for r in rows]))


@pytest.mark.skipif(not LLAMA, reason="needs llama-cpp-python")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_same_ids_and_logits(tmp_path, kind, quantize):
    model = make_model(kind, bias=quantize == "none")
    export_model(model, tmp_path / "model.gguf", format="gguf", quantize=quantize)
    llama = Llama(tmp_path / "model.gguf")
    for text in strings(random.Random(5), kind, 500):
        if "<|endof" not in text:
            assert llama.encode(text) == model.tokenizer.encode(text), text
    ids = torch.randint(model.config.vocab_size - 1, (30,))
    with torch.inference_mode():
        want = model(ids[None])[0][0]
    got = llama.logits(ids.tolist())
    # Its GELU is a table in float16; Q8_0 and BF16 round activations too.
    within = {"none": 2e-3, "bf16": 0.03, "int8": 0.1}[quantize] * float(want.abs().max())
    assert (got - want).abs().max() < within
    if quantize == "none":
        gap = want.topk(2).values
        clear = gap[:, 0] - gap[:, 1] > 2 * within
        assert int(clear.sum()) > 15
        assert torch.equal(got.argmax(-1)[clear], want.argmax(-1)[clear])
