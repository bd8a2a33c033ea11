"""A TorchScript archive is a program: only one that export could have written is run unasked.

The attacker here writes files with this project's own writer, so that every check sum is right.
"""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from nanogpt import GPT
from nanogpt.errors import UsageError
from nanogpt.export import archive, torchscript
from nanogpt.tokenizer import CharTokenizer

ROOT = Path(__file__).resolve().parent.parent
NAME, PLUGIN = "nanogpt-generate", "nanogpt_torchscript.so"
CODE = "code/__torch__/nanogpt/export/torchscript.py"
LISTS = (ROOT / "csrc" / "generate" / "torchscript_check.cpp").read_text(encoding="utf-8")
SHAPES = list(product(("none", "bf16", "int8"), (True, False), (1, 3)))
TURNED = {"rotary": True, "qk_norm": True}

# What the words of exports can name besides Python's own; each computes on its arguments alone.
OPERATORS = {
    "aten": "_set_item add arange cat copy_ cos count device dim div embedding eq floordiv format "
    "ge gelu gt index keys layer_norm linear list lt max mean min mul ne neg permute pow reshape "
    "rsqrt scaled_dot_product_attention select sin size slice sub to transpose unbind unsqueeze "
    "values view zeros",
    "prim": "RaiseException device dtype index layout max min",
}


def export(path, quantize="none", bias=True, n_layer=2, **shape):
    model = GPT(
        **{
            "vocab_size": 5,
            "block_size": 16,
            "n_layer": n_layer,
            "n_head": 2,
            "n_embd": 8,
            "bias": bias,
            **shape,
        }
    )
    model.tokenizer = CharTokenizer("abé\n")
    with path.open("wb") as file:
        torchscript.write(model, quantize, file)
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    torch.manual_seed(0)
    return export(tmp_path_factory.mktemp("own") / "own.pt")


def altered(own, out, change):
    """The archive with some records replaced, added or (None) left out, and every sum right."""
    content = archive.read(own)
    records = {**content.records, **{name: content.records.get(name) for name in change}}
    for name, new in change.items():
        records[name] = new(records[name]) if callable(new) else new
    named = {entry["record"] for entry in content.index["tensors"].values()}
    with out.open("wb") as file:
        archive.write(
            file,
            [archive.Record(n, raw, n in named) for n, raw in records.items() if raw is not None],
        )
    return out


def with_line(line):
    """The code with one more statement at the beginning of prefill."""

    def change(code):
        head = re.search(rb"  def prefill\(.*?-> Tensor:\n", code, re.S)
        return code[: head.end()] + b"    " + line.encode() + b"\n" + code[head.end() :]

    return {CODE: change}


@pytest.fixture(scope="session")
def runner():
    """Run the binary through libtorch: runner(MODEL, *flags) -> CompletedProcess."""
    folders = [Path(sys.executable).parent, ROOT / "build" / "native"]
    program = next((f / NAME for f in folders if (f / NAME).is_file()), None)
    libraries = [
        *(folder / PLUGIN for folder in folders),
        Path(sys.executable).parent.parent / "lib" / "nanogpt" / PLUGIN,
        ROOT / "build" / "torchscript" / PLUGIN,
    ]
    plugin = next((path for path in libraries if path.is_file()), None)
    if program is None or plugin is None:
        pytest.skip(
            "the binary and its plug-in: `make build` builds them where there is a compiler"
        )
    environment = {**os.environ, "NANOGPT_PLUGIN": str(plugin)}

    def run(model, *flags):
        return subprocess.run(
            [program, model, "--engine", "torchscript", "--max-new-tokens", "3", "--seed", "1",
             "--threads", "1", *map(str, flags)],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("quantize", "bias", "n_layer", "more"),
    [(*shape, {}) for shape in SHAPES]
    + [("none", True, 1, TURNED), ("int8", False, 3, TURNED)]
    + [("bf16", False, 1, {name: True}) for name in TURNED],
)
def test_every_export_runs_unasked(runner, tmp_path, quantize, bias, n_layer, more):
    path = export(tmp_path / "model.pt", quantize, bias, n_layer, **more)
    outcome = runner(path)
    assert outcome.returncode == 0, outcome.stderr
    tokens = torch.tensor([[0, 1, 2]])
    ours, trusted = torchscript.load(path), torchscript.load(path, trust=True)
    assert torch.equal(ours.prefill(tokens), trusted.prefill(tokens))


def test_wide_and_deep_exports_run_unasked(runner, tmp_path):
    """Numbers of one, two and four bytes in the pickle, and more than 256 things it remembers."""
    deep = export(tmp_path / "deep.pt", n_layer=40)
    wide = export(tmp_path / "wide.pt", n_layer=1, n_embd=264, block_size=300)
    for path in (deep, wide):
        assert runner(path).returncode == 0, path
        torchscript.load(path)


OUTSIDE = {
    "a file written": 'torch.save(tokens, "{}")',
    "a file made": 'tokens = torch.add(tokens, torch.to(torch.from_file("{}", True, 1), 4))',
    "the same, on a tensor": '(tokens).save("{}")',
    "the same, by getattr": 'getattr(tokens, "save")("{}")',
    "the same, in two texts": 'getattr(tokens, "sa" "ve")("{}")',
    "the same, escaped": 'getattr(tokens, "\\x73ave")("{}")',
}


@pytest.mark.parametrize("how", OUTSIDE)
def test_a_program_that_reaches_outside_is_refused_with_every_sum_right(runner, own, tmp_path, how):
    target = tmp_path / "touched"
    path = altered(own, tmp_path / "m.pt", with_line(OUTSIDE[how].format(target)))
    assert archive.read(path).index == archive.read(own).index
    refused = runner(path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "m.pt is a program that nanogpt export did not write" in refused.stderr
    assert refused.stderr.count("\n") == 1
    with pytest.raises(UsageError, match="nothing was run; trust=True runs"):
        torchscript.load(path)
    assert not target.exists()
    native = runner(path, "--engine", "native")
    assert native.returncode == 0, "the native engine runs no code"
    assert not target.exists()


@pytest.mark.parametrize("how", ["a file written", "a file made"])
def test_trust_runs_a_foreign_program(runner, own, tmp_path, how):
    """Which also shows that the refusals above are of programs that do what they say."""
    target = tmp_path / "touched"
    path = altered(own, tmp_path / "m.pt", with_line(OUTSIDE[how].format(target)))
    outcome = runner(path, "--trust")
    assert outcome.returncode == 0, outcome.stderr
    assert target.stat().st_size > 0
    target.unlink()
    torchscript.load(path, trust=True).prefill(torch.tensor([[0, 1]]))
    assert target.stat().st_size > 0


def test_trust_needs_an_archive_that_is_usable_otherwise(runner, own, tmp_path):
    target = tmp_path / "touched"
    line = with_line(OUTSIDE["a file written"].format(target))
    path = altered(own, tmp_path / "m.pt", line)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"torch.save") + 3] ^= 1
    path.write_bytes(raw)
    outcome = runner(path, "--trust")
    assert outcome.returncode == 3
    assert "does not match its check sum" in outcome.stderr
    foreign = altered(own, tmp_path / "no-index.pt", {**line, archive.INDEX: None})
    assert runner(foreign, "--trust").returncode == 3
    assert not target.exists()


def test_trust_belongs_to_torchscript(runner, own):
    outcome = runner(own, "--engine", "native", "--trust")
    assert outcome.returncode == 2
    assert "--trust belongs to --engine torchscript" in outcome.stderr


def _moved(pickled):
    """The first weight, 5 by 8 at the start of its record, said to begin 7 numbers later."""
    at = pickled.index(b"(K\x05K\x08t") - 1
    return pickled[:at] + b"\x07" + pickled[at + 1 :]


CHANGES = {
    "a record more": {"data/900": b"12345678"},
    "debug records, which torch unpickles": {CODE + ".debug_pkl": b"\x80\x02)."},
    "a record in another case": {"DATA.PKL": b"\x80\x02)."},
    "code more": {"code/__torch__/other.py": b"class Norm(Module):\n"},
    "constants": {"constants.pkl": b"\x80\x02K\x01\x85."},
    "another version": {".data/version": b"99999\n"},
    "another byte order": {"byteorder": b"big"},
    "no container": {"code/__torch__/torch/nn/modules/container.py": None},
    "a tensor beyond its record": {
        "data.pkl": lambda raw: raw.replace(b"K\x05K\x08", b"K\x06K\x08", 1)
    },
    "a tensor moved in its record": {"data.pkl": _moved},
    "another class": {"data.pkl": lambda raw: raw.replace(b"Transformer", b"Transformed", 1)},
    "a loop": with_line("while True:\n      pass"),
    "a print": with_line('print("x")'),
    "a comment": with_line("# x"),
    "a backslash": with_line('out = "\\\\"'),
    "an apostrophe": with_line("out = 'tanh'"),
    "a text of its own": with_line('out = "/etc/passwd"'),
    "a text without an end": with_line('out = "tanh'),
    "two texts that become one": with_line('out = "tanh"\n      "tanh"'),
    "bytes beyond ASCII": with_line("é = 1"),
    "a number with letters": with_line("out = 0x10"),
    "a method that loading calls": {
        CODE: lambda raw: raw.replace(b"def reset(", b"def __setstate__(", 1)
    },
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_is_not_an_export_s_is_refused_by_both(runner, own, tmp_path, what):
    path = altered(own, tmp_path / "m.pt", CHANGES[what])
    assert path.read_bytes() != own.read_bytes()
    outcome = runner(path)
    assert outcome.returncode == 2, outcome.stderr
    assert "is a program that nanogpt export did not write, because it" in outcome.stderr
    with pytest.raises(UsageError, match="does not write for its configuration"):
        torchscript.load(path)


def test_a_changed_order_of_its_own_words_is_refused_in_python_alone(runner, own, tmp_path):
    """What the binary's check does not establish: which of these operators are called on what."""
    path = altered(own, tmp_path / "m.pt", with_line("tokens = torch.mul(tokens, 0)"))
    assert runner(path).returncode == 0
    with pytest.raises(UsageError):
        torchscript.load(path)


def test_a_value_of_another_kind_than_declared_ends_in_words(runner, own, tmp_path):
    change = {CODE: lambda raw: raw.replace(b"  length : int\n", b"  length : Tensor\n", 1)}
    outcome = runner(altered(own, tmp_path / "m.pt", change))
    assert outcome.returncode in (1, 3), outcome.stderr
    assert "torch" in outcome.stderr


def sayable():
    """Words and texts of the exporter's code in every form, without the digits that end words."""
    words, texts = set(), set()
    for (quantize, bias, n_layer), more in product(SHAPES, ({}, TURNED)):
        shape = {"n_layer": n_layer, "n_head": 2, "n_embd": 8, "bias": bias, **more}
        model = GPT(vocab_size=5, block_size=16, **shape)
        members, _ = torchscript._scripted_archive(
            model.config, torchscript.weights_of(model, quantize)
        )
        for name, raw in torchscript._canonical(members).items():
            if name.startswith("code/"):
                pieces = raw.decode("ascii").split('"')
                texts |= {text for text in pieces[1::2] if not text.isdigit()}
                words |= set(re.findall(r"\w+", " ".join(pieces[::2])))
    numbers = re.compile(r"\d+e?")  # an exponent begins with a sign
    words = {word for word in words if not numbers.fullmatch(word)}
    return {re.sub(r"\d+$", "", word) for word in words}, texts


def declared(name):
    block = re.search(rf"{name}\[\] = {{\n(.*?)}};", LISTS, re.S)[1]
    return re.findall(r'"((?:[^"\\]|\\.)*)"', block)


def test_the_binary_s_words_are_those_of_the_exporter():
    words, texts = sayable()
    assert set(declared("kWords")) == words
    assert set(declared("kTexts")) == texts
    for name in ("kWords", "kTexts"):
        assert declared(name) == sorted(declared(name)), "they are looked up by halves"


def operators(words):
    """What code that is made of these words can call, of all that torch registers here."""
    said = set()
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        parts = {re.sub(r"\d+$", "", part) for part in (space, *name.split("."))}
        if parts <= {*words, "aten"}:  # which code calls torch
            said.add(f"{space}::{name}")
    return said


def test_every_operator_that_the_words_can_name_is_known():
    """None has an effect beyond its arguments."""
    words = set(declared("kWords"))
    known = {f"{space}::{name}" for space, names in OPERATORS.items() for name in names.split()}
    assert operators(words) <= known
    assert {"aten::linear", "prim::RaiseException"} <= operators(words)
    assert operators({*words, "save", "from_file"}) - known == {"aten::save", "aten::from_file"}


def test_the_numbers_of_an_export_with_wrong_shapes_are_refused(own, tmp_path):
    """A configuration that does not belong to the tensors never reaches torch."""
    content = archive.read(own)
    for field, value in (("n_layer", 10**9), ("n_head", 3), ("n_embd", 16), ("vocab_size", 7)):
        index = json.loads(content.records[archive.INDEX])
        index["config"][field] = value
        text = torchscript.archive.metadata.canonical_json(index)
        path = altered(own, tmp_path / f"{field}.pt", {archive.INDEX: text})
        with pytest.raises(UsageError, match="does not write for its configuration"):
            torchscript.load(path)
