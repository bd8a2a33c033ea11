"""Malformed files of every kind that is read, each refused in exactly this sentence.

Readers raise the package's own error; commands end with its exit code and one line on standard
error. {path} stands for the file.
"""

import json
import struct
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from native_archives import TINY, archive, tensors_for
from native_outcomes import outcome_of
from native_programs import native_program
from safetensors.torch import save

from nanogpt import checkpoint, cli, metadata
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.errors import InputError, NanoGPTError, UsageError
from nanogpt.explore.records import read_records
from nanogpt.model import GPT
from nanogpt.reward_data import read_reward_data
from nanogpt.run_directory import RunDirectory
from nanogpt.terms import read_terms
from nanogpt.tokenizer import BPETokenizer, CharTokenizer, tokenizer_from_dict

Make = Callable[[Path], Any]


def bytes_of(raw: bytes) -> Make:
    return lambda path: path.write_bytes(raw)


def loop(path: Path) -> None:
    """A link that leads to itself."""
    path.symlink_to(path.name)


def folder(path: Path) -> None:
    path.mkdir()


def nothing(path: Path) -> None:
    """There is no such file."""


@dataclass(frozen=True)
class Kind:
    """A reader, the ending of its files, and for each malformed one how it is made and refused."""

    read: Callable[[Path], Any]
    suffix: str
    files: dict[str, tuple[Make, str]]
    error: type[NanoGPTError] = InputError


def model() -> GPT:
    torch.manual_seed(0)
    made = GPT(GPTConfig(vocab_size=3, block_size=2, n_layer=1, n_head=1, n_embd=2))
    made.tokenizer = CharTokenizer("ab")
    return made


def tensors_of(made: GPT) -> dict[str, torch.Tensor]:
    return {name: value for name, value in made.state_dict().items() if name != metadata.KEY}


def pickled(value: Any) -> Make:
    return lambda path: torch.save(value, path)


def told(change: Callable[[dict[str, Any]], Any], suffix: str = ".pth") -> Make:
    """A whole file whose metadata, sealed again, says something else."""

    def make(path: Path) -> None:
        made = model()
        content = made.describe()
        change(content)
        text = metadata.canonical_json(metadata.seal(content, tensors_of(made)))
        put(path, made, text)

    return make


def put(path: Path, made: GPT, text: bytes) -> None:
    if path.suffix == ".pth":
        extra = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        torch.save({**tensors_of(made), metadata.KEY: extra}, path)
    else:
        path.write_bytes(save(tensors_of(made), metadata={"nanogpt": text.decode()}))


def text_of(text: bytes) -> Make:
    return lambda path: put(path, model(), text)


def header(change: Callable[[dict[str, Any]], Any]) -> Make:
    """A .safetensors file whose header says something else."""

    def make(path: Path) -> None:
        checkpoint.save(model(), path)
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        fields = json.loads(raw[8 : 8 + size])
        change(fields)
        text = json.dumps(fields).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return make


def changed(change: Callable[[bytearray], Any]) -> Make:
    """A whole model file with other bytes."""

    def make(path: Path) -> None:
        checkpoint.save(model(), path)
        raw = bytearray(path.read_bytes())
        change(raw)
        path.write_bytes(raw)

    return make


def cut(raw: bytearray) -> None:
    del raw[len(raw) // 2 :]


def flip_last(raw: bytearray) -> None:
    raw[-1] ^= 1


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Make:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, content in entries.items():
                file.writestr(name, content)

    return make


_ARCHIVE: list[bytes] = []


def exported(change: Callable[[bytearray], Any]) -> Make:
    """An archive of nanogpt export with other bytes."""

    def make(path: Path) -> None:
        if not _ARCHIVE:
            _ARCHIVE.append(archive(tensors_for(TINY), TINY))
        raw = bytearray(_ARCHIVE[0])
        change(raw)
        path.write_bytes(raw)

    return make


def described(change: Callable[[dict[str, Any]], Any]) -> Make:
    return lambda path: path.write_bytes(archive(tensors_for(TINY), TINY, change=change))


def swap(old: bytes, new: bytes, count: int = -1) -> Callable[[bytearray], Any]:
    def change(raw: bytearray) -> None:
        assert old in raw
        raw[:] = raw.replace(old, new, count)

    return change


def directory(old: bytes, new: bytes) -> Callable[[bytearray], Any]:
    """Only in the central directory."""

    def change(raw: bytearray) -> None:
        at = raw.index(b"PK\1\2")
        raw[at:] = raw[at:].replace(old, new, 1)

    return change


def field(signature: bytes, offset: int, value: int, width: int) -> Callable[[bytearray], Any]:
    """A number in the first header with this signature."""

    def change(raw: bytearray) -> None:
        at = raw.index(signature) + offset
        raw[at : at + width] = value.to_bytes(width, "little")

    return change


def read_tokenizer(path: Path) -> Any:
    return tokenizer_from_dict(json.loads(path.read_bytes()))


def bpe(change: Callable[[dict[str, Any]], Any]) -> Make:
    def make(path: Path) -> None:
        description = BPETokenizer.train(iter(["the the"]), 259).to_dict()
        change(description["tokenizer"])
        path.write_text(json.dumps(description))

    return make


def read_config(path: Path) -> Any:
    return cli.parse("train", TrainConfig, ["--config", str(path)])


def load_engine(path: Path) -> None:
    found = outcome_of(path, "")
    if found.code:
        assert found.code == InputError.exit_code
        raise InputError(found.sentence)


def run_with(change: Callable[[Path], Any], of: str = "checkpoints/00000001") -> Make:
    """A run directory with one checkpoint, in which something has changed."""

    def make(path: Path) -> None:
        with RunDirectory(path, warn=print) as run:
            run.begin({"identity": {}}, {})
            run.save(1, model(), {"optimizer": {}}, {"tokens": 1}, model())
        change(path / of)

    return make


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        path = folder / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return make


def rewrite(name: str, raw: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(raw)


def tie(name: str) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return make


def flip(name: str) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[-1] ^= 1
        (folder / name).write_bytes(raw)

    return make


def read_run(path: Path) -> None:
    """A checkpoint that is passed over is told of, and training goes on with the one before."""
    said: list[str] = []
    with RunDirectory(path, warn=said.append) as run:
        run.read_identity()
        if run.newest() is None:
            raise InputError("; ".join(said))


DEEP = b"[" * 100_000
KINDS: dict[str, Kind] = {
    "model.pth": Kind(
        checkpoint.load,
        ".pth",
        {
            "missing": (nothing, "there is no model file {path}"),
            "folder": (folder, "{path} is not a file"),
            "link to itself": (loop, "the model file {path} is a link that leads nowhere"),
            "empty": (bytes_of(b""), "the model file {path} is empty"),
            "zero bytes": (
                bytes_of(bytes(1000)),
                "{path} cannot be read: it is damaged or not a file of tensors",
            ),
            "text": (
                bytes_of(b"hello\n"),
                "{path} cannot be read: it is damaged or not a file of tensors",
            ),
            "half of it": (
                changed(cut),
                "{path} cannot be read: it is damaged or not a file of tensors",
            ),
            "wrong byte in a tensor": (
                changed(lambda raw: swap(b"\x80\x3f\0\0\x80\x3f", b"\x80\x3e\0\0\x80\x3f", 1)(raw)),
                "{path} is damaged: its weights do not match its SHA-256",
            ),
            "a zip of something else": (
                zipped({"a.txt": b"1"}),
                "{path} cannot be read: it is damaged or not a file of tensors",
            ),
            "a list": (
                pickled([1, 2]),
                "{path} is not a model file of nanogpt: it holds more than weights",
            ),
            "numbers among the tensors": (
                pickled({"a": torch.ones(1), "b": 3}),
                "{path} is not a model file of nanogpt: it holds more than weights",
            ),
            "no metadata": (
                pickled({"a": torch.ones(1)}),
                "{path} holds weights without a configuration: make the GPT yourself "
                "and call load_state_dict",
            ),
            "metadata that is a table": (
                pickled({metadata.KEY: torch.ones(2, 2)}),
                "{path} is damaged: the metadata is not a one-dimensional tensor",
            ),
            "metadata that is no JSON": (
                text_of(b"{,}"),
                "{path} is damaged: the metadata is not JSON",
            ),
            "metadata that is a list": (
                text_of(b"[]"),
                "{path} is damaged: the metadata is not a JSON object",
            ),
            "metadata that is too deep": (
                text_of(DEEP),
                "{path} is damaged: the metadata is not JSON",
            ),
            "metadata that is not UTF-8": (
                text_of(b'{"\xff":1}'),
                "{path} is damaged: the metadata is not JSON",
            ),
            "metadata without sums": (
                text_of(b'{"config":{}}'),
                "{path} is damaged: its configuration has no vocab_size",
            ),
            "no configuration": (
                told(lambda m: m.pop("config")),
                "{path} is damaged: its metadata has no configuration",
            ),
            "an unknown field": (
                told(lambda m: m["config"].update(rope=True)),
                "{path} has a field in its configuration that is unknown: 'rope'",
            ),
            "a missing field": (
                told(lambda m: m["config"].pop("n_head")),
                "{path} is damaged: its configuration has no n_head",
            ),
            "a huge declared size": (
                told(lambda m: m["config"].update(n_embd=2**40)),
                "{path} is damaged: its weights do not fit its configuration",
            ),
            "a negative size": (
                told(lambda m: m["config"].update(n_layer=-1)),
                "{path} has no usable configuration: n_layer must be a positive whole "
                "number, not -1",
            ),
            "a size that is a text": (
                told(lambda m: m["config"].update(n_layer="1")),
                "{path} has no usable configuration: n_layer must be a positive whole "
                "number, not '1'",
            ),
            "dropout that is null": (
                told(lambda m: m["config"].update(dropout=None)),
                "{path} has no usable configuration: dropout must be at least 0 and "
                "below 1, not None",
            ),
            "bias that is a number": (
                told(lambda m: m["config"].update(bias=1)),
                "{path} has no usable configuration: bias must be true or false, not 1",
            ),
            "heads that do not divide": (
                told(lambda m: m["config"].update(n_head=3)),
                "{path} has no usable configuration: n_embd (2) is not a multiple of "
                "n_head (3): every head needs the same whole width",
            ),
            "an unknown tokenizer": (
                told(lambda m: m.update(tokenizer={"kind": "x"})),
                "{path} is damaged: the tokenizer's description is damaged or of an unknown kind",
            ),
            "a tokenizer of another size": (
                told(lambda m: m.update(tokenizer={"kind": "byte"})),
                "{path} is damaged: its tokenizer has 257 tokens, its model 3",
            ),
            "a temperature that is a text": (
                told(lambda m: m.update(calibration_temperature="x")),
                "{path} is damaged: the calibration temperature is 'x', not a number "
                "from 1e-6 to 1e6",
            ),
            "a negative temperature": (
                told(lambda m: m.update(calibration_temperature=-1)),
                "{path} is damaged: the calibration temperature is -1, not a number "
                "from 1e-6 to 1e6",
            ),
        },
    ),
    "model.safetensors": Kind(
        checkpoint.load,
        ".safetensors",
        {
            "empty": (bytes_of(b""), "the model file {path} is empty"),
            "half of it": (changed(cut), "{path} cannot be read: it is damaged or not safetensors"),
            "a huge header": (
                bytes_of(b"\xff" * 8 + b"{}"),
                "{path} cannot be read: it is damaged or not safetensors",
            ),
            "wrong byte in a tensor": (
                changed(flip_last),
                "{path} is damaged: its weights do not match its SHA-256",
            ),
            "bytes after it": (
                changed(lambda raw: raw.extend(b"more")),
                "{path} cannot be read: it is damaged or not safetensors",
            ),
            "no configuration": (
                header(lambda h: h.pop("__metadata__")),
                "{path} is not a model file of nanogpt: it has no configuration",
            ),
            "metadata that is no JSON": (
                header(lambda h: h["__metadata__"].update(nanogpt="{")),
                "{path} is damaged: the metadata is not JSON",
            ),
            "a tensor that overlaps": (
                header(lambda h: h["transformer.wpe.weight"].update(data_offsets=[0, 16])),
                "{path} cannot be read: it is damaged or not safetensors",
            ),
            "a huge declared shape": (
                header(lambda h: h["transformer.wpe.weight"].update(shape=[2**40, 2**40])),
                "{path} cannot be read: it is damaged or not safetensors",
            ),
            "an unknown dtype": (
                header(lambda h: h["transformer.wpe.weight"].update(dtype="F33")),
                "{path} cannot be read: it is damaged or not safetensors",
            ),
            "another digest": (
                header(
                    lambda h: h["__metadata__"].update(
                        nanogpt=h["__metadata__"]["nanogpt"].replace('"sha256":"', '"sha256":"0')
                    )
                ),
                "{path} is damaged: its metadata does not match its SHA-256",
            ),
        },
    ),
    "another ending": Kind(
        checkpoint.load,
        ".bin",
        {
            "text": (
                bytes_of(b"x"),
                "{path} is not a model file: its name ends in .pth or .safetensors",
            )
        },
    ),
    "engine.safetensors": Kind(
        load_engine,
        ".safetensors",
        {
            "folder": (folder, "{path} is not a file"),
            "link to itself": (
                loop,
                "the model file {path} cannot be opened: Too many levels of symbolic links",
            ),
            "missing": (nothing, "there is no model file {path}"),
            "empty": (bytes_of(b""), "the model file {path} is empty"),
            "half of it": (
                changed(cut),
                "{path} is damaged: its header is cut short or of an impossible length",
            ),
            "a huge header": (
                bytes_of(b"\xff" * 8 + b"{}"),
                "{path} is damaged: its header is cut short or of an impossible length",
            ),
            "wrong byte in a tensor": (
                changed(flip_last),
                "{path} is damaged: its weights do not match their SHA-256",
            ),
            "bytes after it": (
                changed(lambda raw: raw.extend(b"more")),
                "{path} is damaged: it has 4 bytes that belong to no tensor",
            ),
            "a tensor that overlaps": (
                header(lambda h: h["transformer.wpe.weight"].update(data_offsets=[0, 16])),
                "{path} is damaged: the tensor 'transformer.wpe.weight' overlaps "
                "another or leaves a gap",
            ),
            "a huge declared shape": (
                header(lambda h: h["transformer.wpe.weight"].update(shape=[2**40, 2**40])),
                "{path} is damaged: its header's entry of the tensor "
                "'transformer.wpe.weight' has a shape that does not fit its bytes",
            ),
        },
    ),
    "engine.pt": Kind(
        load_engine,
        ".pt",
        {
            "text": (
                bytes_of(b"hello\n"),
                "{path} is not a model file: neither an archive of nanogpt export nor .safetensors",
            ),
            "zero bytes": (
                bytes_of(bytes(1000)),
                "{path} is not a model file: neither an archive of nanogpt export nor .safetensors",
            ),
            "half of it": (
                exported(cut),
                "{path} is damaged: it does not end as an archive does, so it may be cut short",
            ),
            "an ordinary zip": (
                zipped({"a/b": b"1"}),
                "{path} is an ordinary TorchScript file or state dict, not one of "
                "nanogpt export: it has no extra/nanogpt.json",
            ),
            "a path out of the folder": (
                exported(directory(b"archive/version", b"../hive/version")),
                "{path} is damaged: its record '../hive/version' lies outside of the "
                "archive's folder",
            ),
            "another name in the directory": (
                exported(directory(b"archive/version", b"archive/versiom")),
                "{path} is damaged: its record 'archive/versiom' has another name in "
                "its own header",
            ),
            "one name twice": (
                exported(lambda raw: swap(b"archive/constants/1", b"archive/constants/2")(raw)),
                "{path} is damaged: its record 'archive/constants/2' is there twice",
            ),
            "a record over another": (
                exported(lambda raw: field(b"PK\1\2", 42, 1, 4)(raw)),
                "{path} is damaged: its record 'archive/extra/nanogpt.json' overlaps "
                "another or leaves a gap",
            ),
            "a compressed record": (
                exported(lambda raw: field(b"PK\1\2", 10, 12, 2)(raw)),
                "{path} is damaged: its record 'archive/extra/nanogpt.json' is packed "
                "in an unknown way",
            ),
            "deflate": (
                zipped({"archive/extra/nanogpt.json": b"{}" * 99}, zipfile.ZIP_DEFLATED),
                "{path} is damaged: its record extra/nanogpt.json is compressed",
            ),
            "a huge declared size": (
                exported(field(b"PK\1\2", 20, 2**32 - 2, 4)),
                "{path} is damaged: its record 'archive/extra/nanogpt.json' has two sizes",
            ),
            "a wrong check sum": (
                exported(flip_last),
                "{path} is damaged: what it says about its tensors does not match its check sum",
            ),
            "an index that is no JSON": (
                described(lambda index: b"{"),
                "{path} is damaged: its extra/nanogpt.json is not JSON at its byte 1",
            ),
            "an index that is too deep": (
                described(lambda index: b'{"a":' + DEEP),
                "{path} is damaged: its extra/nanogpt.json is nested deeper than 64 levels",
            ),
            "one member twice": (
                described(lambda index: b'{"a":1,"a":2}'),
                "{path} is damaged: its extra/nanogpt.json names 'a' twice",
            ),
            "a huge vocabulary": (
                described(lambda index: index["config"].update(vocab_size=2**62)),
                "{path} is damaged: vocab_size is 4611686018427387904, outside of 1 to 16777216",
            ),
        },
    ),
    "tokenizer": Kind(
        read_tokenizer,
        ".json",
        {
            "null": (
                bytes_of(b"null"),
                "the tokenizer's description is damaged or of an unknown kind",
            ),
            "an unknown kind": (
                bytes_of(b'{"kind":"words"}'),
                "the tokenizer's description is damaged or of an unknown kind",
            ),
            "characters that are a list": (
                bytes_of(b'{"kind":"char","characters":["a"]}'),
                "the tokenizer's description is damaged or of an unknown kind",
            ),
            "no characters": (
                bytes_of(b'{"kind":"char","characters":""}'),
                "a character vocabulary needs characters, each of them once",
            ),
            "a character twice": (
                bytes_of(b'{"kind":"char","characters":"aa"}'),
                "a character vocabulary needs characters, each of them once",
            ),
            "half a character": (
                bytes_of(b'{"kind":"char","characters":"\\ud800"}'),
                "U+D800 is half of a character and cannot be in a text",
            ),
            "fields that are null": (
                bytes_of(b'{"kind":"record","fields":null}'),
                "the record tokenizer is damaged",
            ),
            "a value twice": (
                bytes_of(b'{"kind":"record","fields":[["a",["x","x"]]]}'),
                "the values of the field 'a' cannot be told apart",
            ),
            "a field twice": (
                bytes_of(b'{"kind":"record","fields":[["a",[]],["a",[]]]}'),
                "two fields of a record have the same name",
            ),
            "a name with a separator": (
                bytes_of(b'{"kind":"record","fields":[["a\\u001f",[]]]}'),
                "the values of the field 'a\\x1f' cannot be told apart",
            ),
            "bpe of nothing": (
                bytes_of(b'{"kind":"bpe","tokenizer":{}}'),
                "the bpe tokenizer is damaged: Model missing.",
            ),
            "bpe with a prefix": (
                bpe(lambda t: t["model"].update(continuing_subword_prefix="##")),
                "the bpe tokenizer is damaged: it has a continuing_subword_prefix",
            ),
            "bpe with a merge into nothing": (
                bpe(lambda t: t["model"]["merges"].append(["the", "the"])),
                "the bpe tokenizer is damaged: two tokens merge into none",
            ),
            "bpe without the last token": (
                bpe(lambda t: t.update(added_tokens=[])),
                "the bpe tokenizer is damaged: its last token is not <|endoftext|>",
            ),
        },
    ),
    "rewards.txt": Kind(
        read_reward_data,
        ".txt",
        {
            "missing": (nothing, "there is no file {path}"),
            "folder": (folder, "cannot read {path}: Is a directory"),
            "link to itself": (loop, "cannot read {path}: Too many levels of symbolic links"),
            "empty": (bytes_of(b""), "{path} is empty: it holds no rewarded text"),
            "blank lines": (bytes_of(b"\n \n"), "{path} is empty: it holds no rewarded text"),
            "not UTF-8": (bytes_of(b"a|1\nb\xff|2\n"), "{path}, line 2: this is not UTF-8 text"),
            "no bar": (
                bytes_of(b"a|1\nb\n"),
                "{path}, line 2: there is no | before the reward: write text|reward",
            ),
            "no number": (
                bytes_of(b"a|good\n"),
                "{path}, line 1: the reward 'good' is not a number",
            ),
            "NaN": (bytes_of(b"a|nan\n"), "{path}, line 1: the reward must be finite, not nan"),
            "infinity": (
                bytes_of(b"a|1\nb|-inf\n"),
                "{path}, line 2: the reward must be finite, not -inf",
            ),
            "a number beyond all": (
                bytes_of(b"a|1e999\n"),
                "{path}, line 1: the reward must be finite, not 1e999",
            ),
            "no text": (bytes_of(b"|1\n"), "{path}, line 1: the text is empty"),
            "two bad lines": (
                bytes_of(b"a\nb\n"),
                "{path}, line 1: there is no | before the reward: write text|reward (2 "
                "bad lines in all)",
            ),
            "a very long number": (
                bytes_of(b"a|" + b"9" * 100_000 + b"x\n"),
                "{path}, line 1: the reward '9999999999999999999999999999999999999999' "
                "is not a number",
            ),
        },
    ),
    "rewards.jsonl": Kind(
        read_reward_data,
        ".jsonl",
        {
            "no JSON": (
                bytes_of(b"{\n"),
                "{path}, line 1: this is not JSON: Expecting property name enclosed in "
                "double quotes",
            ),
            "too deep": (bytes_of(DEEP), "{path}, line 1: this is not JSON: too large or too deep"),
            "a list": (
                bytes_of(b"[]\n"),
                "{path}, line 1: a JSON object is wanted, with text and reward",
            ),
            "no reward": (bytes_of(b'{"text":"a"}'), '{path}, line 1: there is no "reward"'),
            "NaN": (
                bytes_of(b'{"text":"a","reward":NaN}'),
                "{path}, line 1: the reward must be finite, not nan",
            ),
            "a reward that is true": (
                bytes_of(b'{"text":"a","reward":true}'),
                '{path}, line 1: "reward" must be a number, not true',
            ),
            "a text that is null": (
                bytes_of(b'{"text":null,"reward":1}'),
                "{path}, line 1: text must be a text, not null",
            ),
            "half a character": (
                bytes_of(b'{"text":"\\ud800","reward":1}'),
                "{path}, line 1: text holds half of a surrogate pair, which is no character",
            ),
            "text and prompt": (
                bytes_of(b'{"text":"a","prompt":"b","reward":1}'),
                "{path}, line 1: there are both text and prompt: give one text, or both parts",
            ),
            "a number of 5,000 digits": (
                bytes_of(b'{"text":"a","reward":' + b"9" * 5000 + b"}"),
                "{path}, line 1: this is not JSON: too large or too deep",
            ),
        },
    ),
    "rewards.csv": Kind(
        read_reward_data,
        ".csv",
        {
            "no reward": (bytes_of(b"text\na\n"), "{path}, line 1: there is no column reward"),
            "a column twice": (
                bytes_of(b"text,text,reward\n"),
                "{path}, line 1: the column 'text' stands there twice",
            ),
            "too many values": (
                bytes_of(b"text,reward\na,1,2\n"),
                "{path}, line 2: 3 columns, but the header has 2",
            ),
            "an open quote": (
                bytes_of(b'text,reward\n"a,1\n'),
                "{path}, line 2: this is not CSV: unexpected end of data",
            ),
            "a header alone": (
                bytes_of(b"text,reward\n"),
                "{path} is empty: it holds no rewarded text",
            ),
        },
    ),
    "table.csv": Kind(
        read_records,
        ".csv",
        {
            "missing": (nothing, "there is no file {path}"),
            "folder": (folder, "{path} is a folder: name a file in it"),
            "link to itself": (loop, "cannot read {path}: Too many levels of symbolic links"),
            "empty": (bytes_of(b""), "{path} is empty: it has no records"),
            "a header alone": (bytes_of(b"a,b\n"), "{path} holds a header and no records"),
            "zero bytes": (
                bytes_of(b"a,b\n1,\x002\n"),
                "{path}, line 2: this is not text: it holds a zero byte",
            ),
            "not UTF-8": (
                bytes_of(b"a,b\n1,2\n\xff,3\n"),
                "{path}, line 3: this is not UTF-8 text; save the file as UTF-8",
            ),
            "a name twice": (
                bytes_of(b"a,a\n1,x\n"),
                "{path}, line 1: two fields are called 'a': rename one of them",
            ),
            "an open quote": (
                bytes_of(b'a,b\n"1,2\n'),
                "{path}, line 2: a quotation mark is opened in this record and not "
                "closed within 16 MB",
            ),
            "rows of other lengths": (
                bytes_of(b"a,b\n1,2\n3\n4\n"),
                "{path}, line 3: 1 value where there are 2 fields (2 of 3 records are bad)",
            ),
            "too many fields": (
                bytes_of(b",".join(b"f%d" % i for i in range(2001)) + b"\n"),
                "{path}, line 1: 2,001 fields are more than 2,000",
            ),
            "a workbook": (
                zipped({"xl/workbook.xml": b""}),
                "{path} is an Excel workbook or a zip archive: export it as CSV (.csv) first",
            ),
            "half a UTF-16 character": (
                bytes_of("a,b\n1,2\n".encode("utf-16") + b"\0"),
                "{path}, line 3: this is not UTF-16 text; save the file as UTF-8",
            ),
            "a damaged gzip": (bytes_of(b"\x1f\x8b\x08\0broken"), "{path} is a damaged gzip file"),
        },
    ),
    "table.tsv": Kind(
        read_records,
        ".tsv",
        {
            "a carriage return in a row": (
                bytes_of(b"a\rb\tc\n1\t2\n"),
                "{path}, line 1: a carriage return stands outside quotes",
            ),
        },
    ),
    "table.jsonl": Kind(
        read_records,
        ".jsonl",
        {
            "no JSON": (
                bytes_of(b"{,}\n"),
                "{path}, line 1: this is not JSON: Expecting property name enclosed in "
                "double quotes (1 of 1 records are bad)",
            ),
            "too deep": (
                bytes_of(b'{"a":' + DEEP + b"\n"),
                "{path}, line 1: this is not JSON: it is nested too deep (1 of 1 records are bad)",
            ),
            "a number": (
                bytes_of(b"3\n"),
                "{path}, line 1: this is JSON, but not an object (1 of 1 records are bad)",
            ),
            "a key twice": (
                bytes_of(b'{"a":1,"a":2}\n'),
                "{path}, line 1: the key 'a' stands twice in one object (1 of 1 records are bad)",
            ),
            "two keys once flattened": (
                bytes_of(b'{"a":{"b":1},"a.b":2}\n'),
                "{path}, line 1: two values have the name 'a.b' once objects are "
                "flattened (1 of 1 records are bad)",
            ),
            "an array that is not closed": (
                bytes_of(b'[{"a":1}'),
                "{path}, line 1: a comma or ] is wanted in the array",
            ),
            "more after the array": (
                bytes_of(b'[{"a":1}] 2'),
                "{path}, line 1: there is more after the array has ended",
            ),
        },
    ),
    "config.yaml": Kind(
        read_config,
        ".yaml",
        {
            "missing": (nothing, "cannot read the configuration {path}: No such file or directory"),
            "folder": (folder, "cannot read the configuration {path}: Is a directory"),
            "link to itself": (
                loop,
                "cannot read the configuration {path}: Too many levels of symbolic links",
            ),
            "not UTF-8": (
                bytes_of(b"seed: \xff\n"),
                "cannot read the configuration {path}: it is not UTF-8 text",
            ),
            "zero bytes": (bytes_of(b"seed: \0\n"), "{path} is not valid YAML"),
            "no YAML": (bytes_of(b"seed: 1\na: [\n"), "{path} is not valid YAML (line 3)"),
            "a list": (
                bytes_of(b"- seed\n"),
                "{path} must hold 'flag: value' lines, one for each flag it sets",
            ),
            "a text": (
                bytes_of(b"hello"),
                "{path} must hold 'flag: value' lines, one for each flag it sets",
            ),
            "too deep": (bytes_of(b"[" * 5000), "{path} is not valid YAML"),
            "code": (
                bytes_of(b"seed: !!python/object/apply:os.getcwd []\n"),
                "{path} is not valid YAML (line 1)",
            ),
            "a day that is not there": (
                bytes_of(b"seed: 2001-13-45\n"),
                "{path} is not valid YAML",
            ),
            "a tag that does not fit": (bytes_of(b"seed: !!int x\n"), "{path} is not valid YAML"),
        },
    ),
    "config.yaml, flags": Kind(
        read_config,
        ".yaml",
        {
            "an unknown flag": (
                bytes_of(b"n-layers: 2\n"),
                "{path}: there is no flag 'n-layers'; the nearest is n-layer",
            ),
            "a text for a number": (
                bytes_of(b"n-layer: two\n"),
                "{path}: n-layer must be a whole number, not 'two'",
            ),
            "a list for a number": (
                bytes_of(b"n-layer: [1, 2]\n"),
                "{path}: n-layer must be a single value, not [1, 2]",
            ),
            "a number beyond all": (
                bytes_of(b"learning-rate: .inf\n"),
                "{path}: learning-rate must be finite, not 'inf'",
            ),
            "a huge number": (
                bytes_of(b"seed: 1" + b"0" * 400 + b"\n"),
                "{path}: seed must be a number of at most 63 bits",
            ),
        },
        UsageError,
    ),
    "run": Kind(
        read_run,
        "",
        {
            "a missing file": (
                run_with(lambda folder: (folder / "trainer.pt").unlink()),
                "passed over the checkpoint {path}/checkpoints/00000001: trainer.pt is missing",
            ),
            "no manifest": (
                run_with(lambda folder: (folder / "manifest.json").unlink()),
                "passed over the checkpoint {path}/checkpoints/00000001: manifest.json is missing",
            ),
            "a shorter file": (
                run_with(rewrite("state.json", b"{}")),
                "passed over the checkpoint {path}/checkpoints/00000001: "
                "state.json has 2 bytes instead of 28",
            ),
            "a flipped bit": (
                run_with(flip("model.safetensors")),
                "passed over the checkpoint {path}/checkpoints/00000001: "
                "model.safetensors does not match its SHA-256",
            ),
            "a link to itself": (
                run_with(tie("trainer.pt")),
                "passed over the checkpoint {path}/checkpoints/00000001: "
                "trainer.pt cannot be read: Too many levels of symbolic links",
            ),
            "a manifest that is no JSON": (
                run_with(rewrite("manifest.json", b"{")),
                "passed over the checkpoint {path}/checkpoints/00000001: its manifest is damaged",
            ),
            "a manifest that is too deep": (
                run_with(rewrite("manifest.json", DEEP)),
                "passed over the checkpoint {path}/checkpoints/00000001: its manifest is damaged",
            ),
            "a manifest of nothing": (
                run_with(manifest(lambda content: content["files"].clear())),
                "passed over the checkpoint {path}/checkpoints/00000001: "
                "its manifest does not name model.safetensors",
            ),
            "sizes that are texts": (
                run_with(manifest(lambda c: c["files"]["state.json"].update(bytes="many"))),
                "passed over the checkpoint {path}/checkpoints/00000001: its manifest is damaged",
            ),
            "a run.json that is no JSON": (
                run_with(rewrite("run.json", b"{"), of="."),
                "{path}/run.json is damaged: train with another --run-dir or --resume never",
            ),
            "a run.json that is too deep": (
                run_with(rewrite("run.json", DEEP), of="."),
                "{path}/run.json is damaged: train with another --run-dir or --resume never",
            ),
        },
    ),
    "terms": Kind(
        lambda path: read_terms(str(path), "--align-terms"),
        ".txt",
        {
            "missing": (
                nothing,
                "cannot read the terms of --align-terms {path}: No such file or directory",
            ),
            "link to itself": (
                loop,
                "cannot read the terms of --align-terms {path}: Too many levels of symbolic links",
            ),
            "empty": (bytes_of(b""), "{path} holds no terms, one a line"),
            "blank lines": (bytes_of(b" \n\t\n"), "{path} holds no terms, one a line"),
            "not UTF-8": (bytes_of(b"one\n\xe9\n"), "{path} is not UTF-8 text: bad byte at 4"),
        },
    ),
}


CASES = [(name, what) for name, kind in KINDS.items() for what in kind.files]


def made(name: str, what: str, folder: Path) -> tuple[Path, str]:
    """The malformed file and the sentence."""
    kind = KINDS[name]
    path = folder / f"file{kind.suffix}"
    make, sentence = kind.files[what]
    make(path)
    return path, sentence.replace("{path}", str(path))


@pytest.mark.parametrize(("name", "what"), CASES)
def test_a_malformed_file_is_refused_in_these_words(name: str, what: str, tmp_path: Path) -> None:
    path, sentence = made(name, what, tmp_path)
    with pytest.raises(NanoGPTError) as caught:
        KINDS[name].read(path)
    assert (type(caught.value), str(caught.value)) == (KINDS[name].error, sentence)


COMMANDS = {
    "model.pth": ("sample", "--device", "cpu", "--model"),
    "model.safetensors": ("calibrate", "--device", "cpu", "--text", "builtin", "--model"),
    "another ending": ("export", "--model"),
    "rewards.txt": ("advanced", "--device", "cpu", "--offline-data"),
    "rewards.jsonl": ("advanced", "--device", "cpu", "--offline-data"),
    "rewards.csv": ("advanced", "--device", "cpu", "--offline-data"),
    "table.csv": ("explore", "--device", "cpu", "--data"),
    "table.tsv": ("explore", "--device", "cpu", "--data"),
    "table.jsonl": ("explore", "--device", "cpu", "--data"),
    "config.yaml": ("train", "--config"),
    "config.yaml, flags": ("train", "--config"),
}


@pytest.mark.parametrize(("name", "what"), [case for case in CASES if case[0] in COMMANDS])
def test_a_command_says_so_in_one_line_and_ends(
    name: str,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # what a command writes by default
    path, sentence = made(name, what, tmp_path)
    command, *flags = COMMANDS[name]
    code = cli.main([command, *flags, str(path)])
    assert code == KINDS[name].error.exit_code
    assert capsys.readouterr().err == f"nanogpt {command}: {sentence}\n"


@pytest.mark.parametrize("what", KINDS["engine.pt"].files)
def test_the_generation_binary_says_so_in_one_line(what: str, tmp_path: Path) -> None:
    path, sentence = made("engine.pt", what, tmp_path)
    program = native_program("nanogpt-generate")
    done = subprocess.run([program, path], capture_output=True, text=True, check=False)
    assert done.returncode == InputError.exit_code
    assert done.stderr == f"nanogpt-generate: {sentence}\n"
    assert done.stdout == ""


def test_the_kinds_are_many_and_none_is_another(tmp_path: Path) -> None:
    assert len(CASES) >= 120
    contents = set()
    for number, (name, what) in enumerate(CASES):
        place = tmp_path / str(number)
        place.mkdir()
        path, _ = made(name, what, place)
        whole = path.is_dir() or path.is_symlink() or not path.exists()
        contents.add((name, what if whole else path.read_bytes()))
    assert len(contents) == len(CASES)
