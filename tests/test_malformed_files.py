"""Every kind of malformed file that a command can be given, and the one sentence it answers with.

A row of the tables is a name, how the file is made, and the sentence; {path} is the file. A table
belongs to a reader: the commands that are given the file, and a good file which they accept.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from native_archives import INDEX, TINY, Zip, archive, payloads, rewritten, tensors_for

from nanogpt import GPT, checkpoint, cli, metadata, native
from nanogpt.config import TrainConfig
from nanogpt.data import prepare
from nanogpt.errors import InputError, UsageError
from nanogpt.reward_data import read_reward_data
from nanogpt.run_directory import RunDirectory
from nanogpt.tokenizer import BPETokenizer, CharTokenizer

Make = Callable[[Path], Path]
"""Writes a file into an empty folder and says where it is."""
Change = Callable[[dict[str, Any]], Any]
"""Damages a mapping, or gives another value for it."""


@dataclass(frozen=True)
class Kind:
    """One kind of malformed file.

    Attributes:
        sentence: all of what is said, with {path} for the file and {folder} for the one it is in.
        code: what the command ends with; 3 is an InputError and 2 a UsageError.
    """

    make: Make
    sentence: str
    code: int = 3


@dataclass(frozen=True)
class Reader:
    """What is given the files of a table.

    Attributes:
        good: files that are accepted, written by the same functions as the malformed ones.
        commands: arguments of each command that reads it; the files that these write stand in
            the folder {out}. "nanogpt-generate" is the binary, all others run in this process.
        function: the same from Python.
    """

    good: tuple[Make, ...]
    commands: tuple[str, ...]
    function: Callable[[Path], object] | None = None


# How files are made.


def written(name: str, content: str | bytes) -> Make:
    raw = content.encode() if isinstance(content, str) else content

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(raw)
        return path

    return make


def made(name: str, content: Callable[[], bytes]) -> Make:
    """Like `written`, where the content takes a moment to make."""
    return lambda folder: written(name, content())(folder)


def absent(name: str) -> Make:
    return lambda folder: folder / name


def folder_named(name: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).mkdir()
        return folder / name

    return make


def loop(name: str) -> Make:
    """A symbolic link that leads to itself."""

    def make(folder: Path) -> Path:
        (folder / name).symlink_to(name)
        return folder / name

    return make


def pipe(name: str) -> Make:
    def make(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    return make


def put(*keys: str, to: Any) -> Change:
    """A value, somewhere inside a mapping."""

    def change(value: dict[str, Any]) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return change


def drop(*keys: str) -> Change:
    def change(value: dict[str, Any]) -> None:
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return change


def flipped(raw: bytes, mark: bytes) -> bytes:
    """One bit of the first byte after `mark`."""
    at = raw.index(mark) + len(mark)
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
NOT_UTF8 = b"caf\xe9 and more\n"


# Model files.

WTE, NORM = "transformer.wte.weight", "transformer.ln_f.weight"


@functools.cache
def bpe_description() -> str:
    """A byte-pair tokenizer of 258 ids, as JSON."""
    return json.dumps(BPETokenizer.train(iter(["aa aa aa"]), 258).to_dict())


def bpe(change: Change) -> dict[str, Any]:
    description = json.loads(bpe_description())
    change(description["tokenizer"])
    return description


@functools.cache
def small_model() -> GPT:
    torch.manual_seed(0)
    model = GPT(vocab_size=5, block_size=8, n_layer=2, n_head=2, n_embd=8, bias=True)
    model.tokenizer = CharTokenizer("abé\n")
    return model.eval()


def state(
    content: Change | None = None,
    tensors: Change | None = None,
    seal: bool = True,
) -> tuple[dict[str, Any], bytes]:
    """Weights and the text of their metadata, both as changed, with check sums that are right.

    Args:
        seal: False where the metadata are those of the model before `tensors`.
    """
    weights: dict[str, Any] = {
        name: value.detach().clone() for name, value in small_model().named_parameters()
    }
    before = {name: value.clone() for name, value in weights.items()}
    if tensors is not None:
        tensors(weights)
    described = json.loads(json.dumps(small_model().describe()))
    if content is not None:
        content(described)
    sealed = {**described, "format": metadata.FORMAT}
    sealed["sha256"] = metadata.tensor_digest(weights if seal else before)
    sealed["metadata_sha256"] = hashlib.sha256(metadata.canonical_json(sealed)).hexdigest()
    return weights, metadata.canonical_json(sealed)


def pth_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def pth(
    content: Change | None = None,
    tensors: Change | None = None,
    text: bytes | None = None,
    seal: bool = True,
) -> Make:
    """A .pth whose parts are changed; `text` stands in place of the metadata."""

    def content_of() -> bytes:
        weights, own = state(content, tensors, seal)
        raw = bytearray(own if text is None else text)
        return pth_bytes({**weights, metadata.KEY: torch.frombuffer(raw, dtype=torch.uint8)})

    return made("m.pth", content_of)


def safetensors_bytes(
    content: Change | None = None, tensors: Change | None = None, seal: bool = True
) -> bytes:
    weights, text = state(content, tensors, seal)
    return safetensors.torch.save(weights, metadata={"nanogpt": text.decode()})


def safe(
    content: Change | None = None,
    tensors: Change | None = None,
    header: Change | None = None,
    text: Callable[[str], str] = lambda text: text,
    raw: Callable[[bytes], bytes] = lambda raw: raw,
    seal: bool = True,
) -> Make:
    """A .safetensors file whose parts are changed: its header as a mapping, as text, or bytes."""

    def content_of() -> bytes:
        whole = safetensors_bytes(content, tensors, seal)
        size = int.from_bytes(whole[:8], "little")
        described = json.loads(whole[8 : 8 + size])
        if header is not None:
            header(described)
        written = text(json.dumps(described)).encode()
        written += b" " * (-len(written) % 8)
        return raw(struct.pack("<Q", len(written)) + written + whole[8 + size :])

    return made("m.safetensors", content_of)


def bare(value: Any) -> Make:
    """What torch.save writes of anything."""
    return made("m.pth", lambda: pth_bytes(value()))


def weights_changed(weights: dict[str, Any]) -> None:
    weights[WTE][0, 0] += 1


def not_finite(weights: dict[str, Any]) -> None:
    weights[WTE][0, 0] = torch.nan


def sparse(weights: dict[str, Any]) -> None:
    weights[WTE] = weights[WTE].to_sparse()


def damaged_pth(change: Callable[[bytes], bytes]) -> Make:
    def content_of() -> bytes:
        weights, text = state()
        extra = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return change(pth_bytes({**weights, metadata.KEY: extra}))

    return made("m.pth", content_of)


MODELS = {
    "a model that is missing": Kind(absent("m.pth"), "there is no model file {path}"),
    "a model that is empty": Kind(written("m.pth", ""), "the model file {path} is empty"),
    "a folder in place of a model": Kind(folder_named("m.pth"), "{path} is not a file"),
    "a link that leads to itself": Kind(
        loop("m.pth"), "the model file {path} is a link that leads nowhere"
    ),
    "a pipe in place of a model": Kind(pipe("m.pth"), "{path} is not a file"),
    "a model with an unknown ending": Kind(
        written("m.onnx", "x"),
        "{path} is not a model file: the name of one ends in .pth or .safetensors",
    ),
    "a text called .pth": Kind(
        written("m.pth", "hello"), "{path} cannot be read: it is damaged or not a file of tensors"
    ),
    "a .pth cut short": Kind(
        damaged_pth(lambda raw: raw[: len(raw) // 2]),
        "{path} cannot be read: it is damaged or not a file of tensors",
    ),
    "a .pth with code in its pickle": Kind(
        bare(lambda: {"x": os.system}),
        "{path} cannot be read: it is damaged or not a file of tensors",
    ),
    "a .pth that is one tensor": Kind(
        bare(lambda: torch.ones(2)),
        "{path} is not a model file of nanogpt: it holds more than weights",
    ),
    "a .pth of another program": Kind(
        bare(lambda: {"model": {}, "iter_num": 3}),
        "{path} is not a model file of nanogpt: it holds more than weights",
    ),
    "a .pth of weights alone": Kind(
        bare(lambda: {"weight": torch.ones(2)}),
        "{path} holds weights without a configuration: make the GPT yourself and call "
        "load_state_dict",
    ),
    "a .pth whose names are numbers": Kind(
        pth(tensors=lambda weights: weights.update({1: torch.ones(2)}), seal=False),
        "{path} is damaged: it has a tensor called 1",
    ),
    "a .pth with other weights": Kind(
        pth(tensors=weights_changed, seal=False),
        "{path} is damaged: its weights do not match its SHA-256",
    ),
    "a .pth with a flipped letter in its metadata": Kind(
        damaged_pth(lambda raw: flipped(raw, b'"n_embd":')),
        "{path} is damaged: its metadata does not match its SHA-256",
    ),
    "a .pth with metadata of two dimensions": Kind(
        bare(lambda: {WTE: torch.ones(2), metadata.KEY: torch.ones(2, 2)}),
        "{path} is damaged: the metadata is not a one-dimensional tensor",
    ),
    "a .pth with metadata that are no JSON": Kind(
        pth(text=b"{1"), "{path} is damaged: the metadata is not JSON"
    ),
    "a .pth with metadata that are a list": Kind(
        pth(text=b"[]"), "{path} is damaged: the metadata is not a JSON object"
    ),
    "a .pth with metadata nested too deep": Kind(
        pth(text=DEEP), "{path} is damaged: the metadata is nested deeper than 64 levels"
    ),
    "a .pth with metadata nested somewhat too deep": Kind(
        pth(put("calibration", to=functools.reduce(lambda a, _: {"a": a}, range(64), {}))),
        "{path} is damaged: the metadata is nested deeper than 64 levels",
    ),
    "a .pth without a tensor": Kind(
        pth(tensors=drop(NORM)), "{path} is damaged: its weights do not fit its configuration"
    ),
    "a .pth with a tensor more": Kind(
        pth(tensors=put("more", to=torch.ones(3))),
        "{path} is damaged: its weights do not fit its configuration",
    ),
    "a .pth with a tensor of another name": Kind(
        pth(tensors=lambda w: w.update({"other": w.pop(NORM)})),
        "{path} is damaged: its weights do not fit its configuration",
    ),
    "a .pth with a turned tensor": Kind(
        pth(tensors=lambda w: w.update({WTE: w[WTE].T})),
        "{path} cannot be read: it is damaged or not a file of tensors",
    ),
    "a .pth of whole numbers": Kind(
        pth(tensors=lambda w: w.update({WTE: w[WTE].long()})),
        "{path} is damaged: transformer.wte.weight is not an array of floating point numbers",
    ),
    "a .pth with a tensor of a name in other letters": Kind(
        pth(tensors=put("naïve", to=torch.ones(3))),
        "{path} is damaged: it has a tensor called 'na\\xefve'",
    ),
    "a .pth with a sparse tensor": Kind(
        pth(tensors=sparse, seal=False),
        "{path} cannot be read: it is damaged or not a file of tensors",
    ),
    "a configuration of a billion layers": Kind(
        pth(put("config", "n_layer", to=10**9)),
        "{path} is damaged: its weights do not fit its configuration",
    ),
    "a configuration with heads that do not divide": Kind(
        pth(put("config", "n_head", to=3)),
        "{path} has no usable configuration: n_embd (8) is not a multiple of n_head (3): "
        "every head needs the same whole width",
    ),
    "a configuration that is a list": Kind(
        pth(put("config", to=[])), "{path} has no usable configuration: it is not a JSON object"
    ),
    "a configuration of a megabyte": Kind(
        pth(put("config", "n_embd", to="x" * 10**6)),
        "{path} has no usable configuration: n_embd must be a positive whole number, not "
        "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    ),
    "a configuration with an unknown field": Kind(
        pth(put("config", "surprise", to=1)),
        "{path} has no usable configuration: 'surprise' is not known",
    ),
    "a configuration with a fraction": Kind(
        pth(put("config", "n_embd", to=8.5)),
        "{path} has no usable configuration: n_embd must be a positive whole number, not 8.5",
    ),
    "a configuration with a text for a number": Kind(
        pth(put("config", "dropout", to="x")),
        "{path} has no usable configuration: dropout must be at least 0 and below 1, not 'x'",
    ),
    "a configuration with a text for yes or no": Kind(
        pth(put("config", "bias", to="yes")),
        "{path} has no usable configuration: bias must be true or false, not 'yes'",
    ),
    "a configuration with a number for yes or no": Kind(
        pth(put("config", "rotary", to=1)),
        "{path} has no usable configuration: rotary must be true or false, not 1",
    ),
    "a configuration whose rotary heads have an odd width": Kind(
        pth(lambda content: content["config"].update(rotary=True, n_head=8)),
        "{path} has no usable configuration: rotary positions turn pairs, but the heads' width "
        "(n_embd / n_head) is 1, which is odd",
    ),
    "a configuration of rotary positions beside learned ones": Kind(
        pth(put("config", "rotary", to=True)),
        "{path} is damaged: its weights do not fit its configuration",
    ),
    "a configuration that is null": Kind(
        pth(put("config", to=None)), "{path} has no usable configuration: it is not a JSON object"
    ),
    "a configuration that is missing": Kind(
        pth(drop("config")), "{path} has no usable configuration: there is none"
    ),
    "a calibration of zero": Kind(
        pth(put("calibration_temperature", to=0)),
        "{path} cannot be used: the calibration temperature is 0, not a number from 1e-6 to 1e6",
    ),
    "a calibration that is a text": Kind(
        pth(put("calibration", to="cold")),
        "{path} cannot be used: the record of the calibration is damaged",
    ),
    "a tokenizer of an unknown kind": Kind(
        pth(put("tokenizer", to={"kind": "morse"})),
        "{path} cannot be used: the tokenizer's description is damaged or of an unknown kind",
    ),
    "a tokenizer that is a number": Kind(
        pth(put("tokenizer", to=7)),
        "{path} cannot be used: the tokenizer's description is damaged or of an unknown kind",
    ),
    "a tokenizer with a character twice": Kind(
        pth(put("tokenizer", "characters", to="abca")),
        "{path} cannot be used: a character vocabulary needs characters, each of them once",
    ),
    "a tokenizer with half a character": Kind(
        pth(put("tokenizer", "characters", to="abc\ud800")),
        "{path} cannot be used: U+D800 is half of a character and cannot be in a text",
    ),
    "a tokenizer of another size": Kind(
        pth(put("tokenizer", "characters", to="ab")),
        "{path} is damaged: its tokenizer has 3 tokens, its weights have 5",
    ),
    "a tokenizer whose merges name unknown tokens": Kind(
        pth(put("tokenizer", to=bpe(put("model", "merges", to=[["zz", "qq"]])))),
        "{path} cannot be used: the bpe tokenizer is damaged: two tokens merge into none",
    ),
    "a tokenizer without its last token": Kind(
        pth(put("tokenizer", to=bpe(put("added_tokens", to=[])))),
        "{path} cannot be used: the bpe tokenizer is damaged: its last token is not <|endoftext|>",
    ),
    "a tokenizer whose parts are of no known type": Kind(
        pth(put("tokenizer", to=bpe(put("model", to={"type": "Morse"})))),
        "{path} cannot be used: the bpe tokenizer is damaged: its parts are unknown or "
        "do not fit together",
    ),
    "a tokenizer of records without fields": Kind(
        pth(put("tokenizer", to={"kind": "record", "fields": 3})),
        "{path} cannot be used: the record tokenizer is damaged",
    ),
    "a tokenizer of records with a value that is a number": Kind(
        pth(put("tokenizer", to={"kind": "record", "fields": [["a", [1]]]})),
        "{path} cannot be used: the record tokenizer is damaged",
    ),
    "a text called .safetensors": Kind(
        written("m.safetensors", "hello"), "{path} cannot be read: it is damaged or not safetensors"
    ),
    "a .safetensors file cut short": Kind(
        safe(raw=lambda raw: raw[:-1]), "{path} cannot be read: it is damaged or not safetensors"
    ),
    "a .safetensors file with bytes after its end": Kind(
        safe(raw=lambda raw: raw + b"\0"), "{path} cannot be read: it is damaged or not safetensors"
    ),
    "a .safetensors file with a huge header": Kind(
        safe(raw=lambda raw: struct.pack("<Q", 2**63) + raw[8:]),
        "{path} cannot be read: it is damaged or not safetensors",
    ),
    "a .safetensors file with a header of no length": Kind(
        safe(raw=lambda raw: bytes(8) + raw[8:]),
        "{path} cannot be read: it is damaged or not safetensors",
    ),
    "a .safetensors file with a deep header": Kind(
        written("m.safetensors", struct.pack("<Q", len(DEEP)) + DEEP),
        "{path} cannot be read: it is damaged or not safetensors",
    ),
    "a .safetensors file of another program": Kind(
        safe(header=drop("__metadata__")),
        "{path} is not a model file of nanogpt: it has no configuration",
    ),
    "a .safetensors file with other weights": Kind(
        safe(tensors=weights_changed, seal=False),
        "{path} is damaged: its weights do not match its SHA-256",
    ),
    "a .safetensors file with a flipped letter in its metadata": Kind(
        safe(raw=lambda raw: flipped(raw, b'\\"n_embd\\":')),
        "{path} is damaged: its metadata does not match its SHA-256",
    ),
    "a .safetensors file with deep metadata": Kind(
        safe(header=put("__metadata__", "nanogpt", to=DEEP.decode())),
        "{path} is damaged: the metadata is nested deeper than 64 levels",
    ),
    "a .safetensors file with metadata that are a list": Kind(
        safe(header=put("__metadata__", "nanogpt", to="[]")),
        "{path} is damaged: the metadata is not a JSON object",
    ),
    "a .safetensors file with a number for metadata": Kind(
        safe(header=put("__metadata__", "nanogpt", to=3)),
        "{path} cannot be read: it is damaged or not safetensors",
    ),
    "a .safetensors file with a tensor twice": Kind(
        safe(text=lambda text: text.replace("h.0.ln_1.bias", "h.0.ln_2.bias")),
        "{path} cannot be read: it is damaged or not safetensors",
    ),
    "a .safetensors file with a shape that overflows": Kind(
        safe(header=put(WTE, "shape", to=[2**62, 2**62])),
        "{path} cannot be read: it is damaged or not safetensors",
    ),
    "a .safetensors file with a turned shape": Kind(
        safe(header=put(WTE, "shape", to=[8, 5])),
        "{path} is damaged: its weights do not match its SHA-256",
    ),
    "a .safetensors file with another type": Kind(
        safe(header=put(WTE, "dtype", to="I32")),
        "{path} is damaged: transformer.wte.weight is not an array of floating point numbers",
    ),
    "a .safetensors file with an unknown type": Kind(
        safe(header=put(WTE, "dtype", to="Q4")),
        "{path} cannot be read: it is damaged or not safetensors",
    ),
    "a .safetensors file with offsets outside": Kind(
        safe(header=put(WTE, "data_offsets", to=[0, 2**40])),
        "{path} cannot be read: it is damaged or not safetensors",
    ),
}


# Exports of `nanogpt export`, for the native engine and the binary.

ALPHABET = CharTokenizer('ab"\\').to_dict()


def export_bytes(change: Change | None = None, tokenizer: Any = ALPHABET) -> bytes:
    return archive(tensors_for(TINY), TINY, tokenizer=tokenizer, change=change)


good_export_bytes = functools.cache(export_bytes)


def export(change: Callable[[bytes], bytes] = lambda raw: raw) -> Make:
    """An export whose bytes are changed."""
    return made("m.pt", lambda: change(good_export_bytes()))


def indexed(change: Change) -> Make:
    """An export whose index is changed, under a check sum that is right."""
    return made("m.pt", lambda: export_bytes(change))


def zipped(change: Callable[[Zip], None]) -> Make:
    """An export whose zip headers are changed, under a check sum that is right."""

    def make(folder: Path) -> Path:
        path = export()(folder)
        file = Zip(path)
        change(file)
        path.write_bytes(file.sealed())
        return path

    return make


def renamed(old: str, new: str) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        return rewritten(raw, lambda name, payload: (new if name == old else name, payload))

    return change


def one_place_for_two(file: Zip) -> None:
    first, second = file.tensors[:2]
    file.put(file.central[second] + 42, "L", file.local[first])


def one_name_for_two(file: Zip) -> None:
    first, second = [name for name in file.tensors if len(name) == len("constants/1")][:2]
    name = f"archive/{first}".encode()
    for start, names in ((file.central[second], 46), (file.local[second], 30)):
        file.put(start + names, f"{len(name)}s", name)


def a_gap(file: Zip) -> None:
    # The first record's header is no longer told of by the directory.
    file.put(file.central[file.tensors[1]] + 42, "L", file.local[file.tensors[1]] + 64)


def climbing(file: Zip) -> None:
    for start, names in ((file.central[INDEX], 46), (file.local[INDEX], 30)):
        file.put(start + names, "8s", b"../../..")


def flipped_weight(raw: bytes) -> bytes:
    at = payloads(raw)["constants/0"][0]
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


EXPORTS = {
    "an export that is missing": Kind(absent("m.pt"), "there is no model file {path}"),
    "an export that is empty": Kind(written("m.pt", ""), "the model file {path} is empty"),
    "a folder in place of an export": Kind(folder_named("m.pt"), "{path} is not a file"),
    "a text called .pt": Kind(
        written("m.pt", "hello"),
        "{path} is not a model file: neither an archive of nanogpt export nor .safetensors",
    ),
    "a checkpoint of torch called .pt": Kind(
        made("m.pt", lambda: pth_bytes({"model": {}, "iter_num": 3})),
        "{path} is an ordinary TorchScript file or state dict, not one of nanogpt "
        "export, which makes one of it: it has no extra/nanogpt.json",
    ),
    "an export cut in half": Kind(
        export(lambda raw: raw[: len(raw) // 2]),
        "{path} is damaged: it does not end as an archive does, so it may be cut short",
    ),
    "an export cut by a byte": Kind(
        export(lambda raw: raw[:-1]),
        "{path} is damaged: it does not end as an archive does, so it may be cut short",
    ),
    "an export with bytes after its end": Kind(
        export(lambda raw: raw + b"\0\0"),
        "{path} is damaged: it does not end as an archive does, so it may be cut short",
    ),
    "an export with a flipped weight": Kind(
        export(flipped_weight),
        "{path} is damaged: its record 'constants/0' (transformer.wte.weight) does not "
        "match its check sum",
    ),
    "an export with a flipped letter in its index": Kind(
        export(lambda raw: flipped(raw, b"\\\\a")),
        "{path} is damaged: what it says about its tensors does not match its check sum",
    ),
    "an export with the check sum of another": Kind(
        export(lambda raw: raw[:-8] + b"01234567"),
        "{path} is damaged: what it says about its tensors does not match its check sum",
    ),
    "an export without its check sum": Kind(
        export(lambda raw: raw[:-24] + b"\0\0"),
        "{path} is damaged: it does not end with its check sum",
    ),
    "an export without an index": Kind(
        export(renamed(INDEX, "extra/other.json")),
        "{path} is an ordinary TorchScript file or state dict, not one of nanogpt "
        "export, which makes one of it: it has no extra/nanogpt.json",
    ),
    "an export with a compressed record": Kind(
        export(lambda raw: rewritten(raw, compressed="constants/0")),
        "{path} is damaged: its record 'constants/0' is compressed, but a tensor's must not be",
    ),
    "an export with records out of line": Kind(
        export(lambda raw: rewritten(raw, aligned=False)),
        "{path} is damaged: its record 'constants/3' is not aligned to 64 bytes",
    ),
    "an export whose index lies above its folder": Kind(
        zipped(climbing),
        "{path} is damaged: its record 'archive/data.pkl' lies outside of the archive's folder",
    ),
    "an export whose record is called ../../": Kind(
        export(renamed("constants/0", "../../constants/0")),
        "{path} is damaged: its tensor 'transformer.wte.weight' is missing: there is no "
        "record 'constants/0'",
    ),
    "an export with two records of one name": Kind(
        zipped(one_name_for_two),
        "{path} is damaged: its record 'archive/constants/3' is there twice",
    ),
    "an export with two records in one place": Kind(
        zipped(one_place_for_two),
        "{path} is damaged: its record 'archive/constants/4' overlaps another or leaves a gap",
    ),
    "an export with a gap between records": Kind(
        zipped(a_gap),
        "{path} is damaged: its record 'archive/constants/4' overlaps another or leaves a gap",
    ),
    "an export with another 64-bit record": Kind(
        zipped(lambda file: file.put(file.end64, "4s", b"PK\6\5")),
        "{path} is damaged: its 64-bit end record is not where it has to be",
    ),
    "an export with a count of entries that is huge": Kind(
        zipped(lambda file: file.put(file.end64 + 24, "2Q", 2**40, 2**40)),
        "{path} is damaged: its end record does not agree with the 64-bit one",
    ),
    "an export with an encrypted record": Kind(
        zipped(
            lambda file: (
                file.put(file.central[INDEX] + 8, "H", 0x0809),
                file.put(file.local[INDEX] + 6, "H", 0x0809),
            )
        ),
        "{path} is damaged: its record 'archive/extra/nanogpt.json' has flags that torch "
        "does not set",
    ),
    "an index that is a list": Kind(
        indexed(lambda index: b"[]"),
        "{path} is damaged: its extra/nanogpt.json is not JSON at its byte 0",
    ),
    "an index nested too deep": Kind(
        indexed(lambda index: DEEP),
        "{path} is damaged: its extra/nanogpt.json is nested deeper than 64 levels",
    ),
    "an index of another format": Kind(
        indexed(put("format", to="nanogpt-torchscript-2")),
        "{path} has the format 'nanogpt-torchscript-2', but this version reads "
        "'nanogpt-torchscript-1'",
    ),
    "an index without a configuration": Kind(
        indexed(drop("config")), "{path} is damaged: its extra/nanogpt.json lacks 'config'"
    ),
    "an index with a billion layers": Kind(
        indexed(put("config", "n_layer", to=10**9)),
        "{path} is damaged: n_layer is 1000000000, outside of 1 to 4096",
    ),
    "an index with heads that do not divide": Kind(
        indexed(put("config", "n_head", to=3)),
        "{path} is damaged: n_embd (4) is not a multiple of n_head (3)",
    ),
    "an index without a tensor": Kind(
        indexed(drop("tensors", WTE)),
        "{path} is damaged: the tensor transformer.wte.weight is missing",
    ),
    "an index that names a record which is missing": Kind(
        indexed(put("tensors", WTE, "record", to="constants/999")),
        "{path} is damaged: its tensor 'transformer.wte.weight' is missing: there is no "
        "record 'constants/999'",
    ),
    "an index with a shape that does not fit": Kind(
        indexed(put("tensors", WTE, "shape", to=[4, 5])),
        "{path} is damaged: the tensor transformer.wte.weight has the shape (4, 5) "
        "instead of (5, 4)",
    ),
    "an index with a calibration that is a text": Kind(
        indexed(put("calibration_temperature", to="warm")),
        "{path} is damaged: its extra/nanogpt.json has a 'calibration_temperature' that is not "
        "a positive number",
    ),
    "an index with a bias that is a number": Kind(
        indexed(put("config", "bias", to=1)),
        "{path} is damaged: its extra/nanogpt.json's configuration has a 'bias' that is "
        "neither true nor false",
    ),
    "an index with a qk_norm that is a text": Kind(
        indexed(put("config", "qk_norm", to="yes")),
        "{path} is damaged: its extra/nanogpt.json's configuration has a 'qk_norm' that is "
        "neither true nor false",
    ),
    "an index with a size that is negative": Kind(
        indexed(put("tensors", WTE, "shape", to=[-5, 4])),
        "{path} is damaged: its extra/nanogpt.json's entry of the tensor "
        "'transformer.wte.weight' has a size in its 'shape' that is not a whole number in range",
    ),
    "an index with a type that is unknown": Kind(
        indexed(put("tensors", WTE, "dtype", to="float8")),
        "{path} is damaged: its tensor 'transformer.wte.weight' has the unknown dtype 'float8'",
    ),
}


# Rewarded texts.


def rewards(content: str | bytes, name: str = "r.txt") -> Make:
    return written(name, content)


REWARDS = {
    "rewards that are missing": Kind(absent("r.txt"), "there is no file {path}"),
    "a folder in place of rewards": Kind(
        folder_named("r.txt"), "cannot read {path}: Is a directory"
    ),
    "rewards that are empty": Kind(rewards(""), "{path} is empty: it holds no rewarded text"),
    "rewards of blank lines": Kind(
        rewards("\n \n\n"), "{path} is empty: it holds no rewarded text"
    ),
    "a reward without a bar": Kind(
        rewards("one|1\ntwo\nthree\n"),
        "{path}, line 2: there is no | before the reward: write text|reward (2 bad lines in all)",
    ),
    "a reward that is a word": Kind(
        rewards("one|1\ntwo|good\n"), "{path}, line 2: the reward 'good' is not a number"
    ),
    "a reward that is missing": Kind(
        rewards("one|1\ntwo|\n"), "{path}, line 2: the reward '' is not a number"
    ),
    "a reward that is nan": Kind(
        rewards("one|1\ntwo|nan\n"), "{path}, line 2: the reward must be finite, not nan"
    ),
    "a reward that is infinite": Kind(
        rewards("one|1\ntwo|-inf\n"), "{path}, line 2: the reward must be finite, not -inf"
    ),
    "a reward that is too large": Kind(
        rewards("one|1\ntwo|1e999\n"), "{path}, line 2: the reward must be finite, not 1e999"
    ),
    "a reward of no text": Kind(rewards("one|1\n|2\n"), "{path}, line 2: the text is empty"),
    "rewards that are not UTF-8": Kind(
        rewards(b"one|1\n" + NOT_UTF8), "{path}, line 2: this is not UTF-8 text"
    ),
    "rewards in UTF-16": Kind(
        rewards("one|1\n".encode("utf-16")), "{path}, line 1: this is not UTF-8 text"
    ),
    "a line that is not JSON": Kind(
        rewards('{"text": "a", "reward": 1}\n{"text"\n', "r.jsonl"),
        "{path}, line 2: this is not JSON: Expecting ':' delimiter",
    ),
    "a line that is a number": Kind(
        rewards("3\n", "r.jsonl"), "{path}, line 1: a JSON object is wanted, with text and reward"
    ),
    "a line nested too deep": Kind(
        rewards(DEEP, "r.jsonl"), "{path}, line 1: this is not JSON: too large or too deep"
    ),
    "a line without a reward": Kind(
        rewards('{"text": "a"}\n', "r.jsonl"), '{path}, line 1: there is no "reward"'
    ),
    "a line whose reward is a text": Kind(
        rewards('{"text": "a", "reward": "1"}\n', "r.jsonl"),
        '{path}, line 1: "reward" must be a number, not "1"',
    ),
    "a line whose reward is NaN": Kind(
        rewards('{"text": "a", "reward": NaN}\n', "r.jsonl"),
        "{path}, line 1: the reward must be finite, not nan",
    ),
    "a line whose text is a number": Kind(
        rewards('{"text": 1, "reward": 1}\n', "r.jsonl"),
        "{path}, line 1: text must be a text, not 1",
    ),
    "a line with a prompt and no completion": Kind(
        rewards('{"prompt": "a", "reward": 1}\n', "r.jsonl"),
        "{path}, line 1: there is neither text, nor prompt and completion",
    ),
    "a line with half a character": Kind(
        rewards('{"text": "\\ud800", "reward": 1}\n', "r.jsonl"),
        "{path}, line 1: text holds half of a surrogate pair, which is no character",
    ),
    "a header without a reward": Kind(
        rewards("text,value\na,1\n", "r.csv"), "{path}, line 1: there is no column reward"
    ),
    "a header with a column twice": Kind(
        rewards("text,reward,reward\na,1,2\n", "r.csv"),
        "{path}, line 1: the column 'reward' stands there twice",
    ),
    "a row that is too long": Kind(
        rewards("text,reward\na,1\nb,2,3\n", "r.csv"),
        "{path}, line 3: 3 columns, but the header has 2",
    ),
    "a quote in rewards that is never closed": Kind(
        rewards('text,reward\n"a,1\nb,2\n', "r.csv"),
        "{path}, line 2: this is not CSV: unexpected end of data",
    ),
    "rewards of a header alone": Kind(
        rewards("text,reward\n", "r.csv"), "{path} is empty: it holds no rewarded text"
    ),
}


# Tables and logs for explore.


def table(content: str | bytes, name: str = "t.csv") -> Make:
    return written(name, content)


def rows(n: int) -> str:
    """Two fields, of which one tells the other."""
    return "".join(f"{'odd' if i % 2 else 'even'},{i % 2}\n" for i in range(n))


TABLES = {
    "a table that is missing": Kind(absent("t.csv"), "there is no file {path}"),
    "a folder in place of a table": Kind(
        folder_named("t.csv"), "{path} is a folder: name a file in it"
    ),
    "a table that is empty": Kind(table(""), "{path} is empty: it has no records"),
    "a table of blank lines": Kind(table("\n\n  \n"), "{path} is empty: it has no records"),
    "a table of a header alone": Kind(table("a,b\n"), "{path} holds a header and no records"),
    "a table with a name twice": Kind(
        table("a,b,a\n1,2,3\n"), "{path}, line 1: two fields are called 'a': rename one of them"
    ),
    "a table with a ragged row": Kind(
        table("a,b\n1,2\n3\n4,5\n"),
        "{path}, line 3: 1 value where there are 2 fields (1 of 3 records are bad)",
    ),
    "a table with a quote that is never closed": Kind(
        table('a,b\n1,"2\n3,4\n'),
        "{path}, line 2: a quotation mark is opened in this record and not closed within 16 MB",
    ),
    "a table with a header that is never closed": Kind(
        table('"a,b\n1,2\n3,4\n'),
        "{path}, line 1: a quotation mark is opened in this record and not closed within 16 MB",
    ),
    "a table that is not UTF-8": Kind(
        table(b"a,b\n1,2\n" + NOT_UTF8),
        "{path}, line 3: this is not UTF-8 text; save the file as UTF-8",
    ),
    "a table with a zero byte": Kind(
        table(b"a,b\n1,\0002\n"), "{path}, line 2: this is not text: it holds a zero byte"
    ),
    "a table in half of UTF-16": Kind(
        table("a,b\n1,2\n".encode("utf-16")[:-1]),
        "{path}, line 2: this is not UTF-16 text; save the file as UTF-8",
    ),
    "a table that is a workbook": Kind(
        table(b"PK\3\4" + bytes(30)),
        "{path} is an Excel workbook or a zip archive: export it as CSV (.csv) first",
    ),
    "a table of too many fields": Kind(
        table(",".join(map(str, range(2001))) + "\n"),
        "{path}, line 1: 2,001 fields are more than 2,000",
    ),
    "a table in a damaged gzip": Kind(
        table(gzip.compress(rows(99).encode())[:-9], "t.csv.gz"), "{path} is a damaged gzip file"
    ),
    "a table of one row": Kind(
        table("a,b\n1,2\n"), "{path} holds 1 records: 10 are the least to learn from"
    ),
    "a log with a broken line": Kind(
        table('{"a": 1}\n{"a": \n{"a": 2}\n', "t.jsonl"),
        "{path}, line 2: this is not JSON: Expecting value (1 of 3 records are bad)",
    ),
    "a log of lines that are numbers": Kind(
        table("1\n2\n", "t.jsonl"),
        "{path}, line 1: this is JSON, but not an object (2 of 2 records are bad)",
    ),
    "a log nested too deep": Kind(
        table(DEEP, "t.jsonl"),
        "{path}, line 1: this is not JSON: it is nested too deep (1 of 1 records are bad)",
    ),
    "a log with a key twice": Kind(
        table('{"a": 1, "a": 2}\n', "t.jsonl"),
        "{path}, line 1: the key 'a' stands twice in one object (1 of 1 records are bad)",
    ),
    "an array that is cut short": Kind(
        table('[{"a": 1},\n{"a"', "t.json"),
        "{path}, line 2: this is not JSON: Expecting ':' delimiter",
    ),
    "an array without a comma": Kind(
        table('[{"a": 1}\n{"a": 2}]', "t.json"),
        "{path}, line 2: a comma or ] is wanted in the array",
    ),
    "an array with more after it": Kind(
        table('[{"a": 1}]\n[]', "t.json"), "{path}, line 2: there is more after the array has ended"
    ),
    "an array of nothing": Kind(table("[]", "t.json"), "{path} is empty: it has no records"),
    "an array nested too deep": Kind(
        table(b"[" + DEEP + b"]", "t.json"),
        "{path}, line 1: this is not JSON: it is nested too deep",
    ),
}


# Configurations, terms, texts.

BOMB = "\n- &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"- &{name} [{', '.join(10 * ['*' + before])}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""A list of lists of lists: nine lines, and a billion words where it is written out."""


def settings(content: str | bytes) -> Make:
    return written("c.yaml", content)


CONFIGURATIONS = {
    "a configuration file that is missing": Kind(
        absent("c.yaml"), "cannot read the configuration {path}: No such file or directory"
    ),
    "a folder in place of a configuration file": Kind(
        folder_named("c.yaml"), "cannot read the configuration {path}: Is a directory"
    ),
    "a configuration file that is a list": Kind(
        settings("- 1\n- 2\n"), "{path} must hold 'flag: value' lines, one for each flag it sets"
    ),
    "a configuration file that is a word": Kind(
        settings("hello\n"), "{path} must hold 'flag: value' lines, one for each flag it sets"
    ),
    "a configuration file with an unknown flag": Kind(
        settings("max-step: 1\n"),
        "{path}: there is no flag 'max-step'; the nearest is max-steps",
        2,
    ),
    "a configuration file with a word for a number": Kind(
        settings("n-embd: wide\n"), "{path}: n-embd must be a whole number, not 'wide'", 2
    ),
    "a configuration file with a number out of bounds": Kind(
        settings("max-steps: 0\n"), "{path}: max-steps must be at least 1, not '0'", 2
    ),
    "a configuration file with a list for a number": Kind(
        settings("n-embd: [1, 2]\n"), "{path}: n-embd must be a single value, not a list", 2
    ),
    "a configuration file with a number for yes or no": Kind(
        settings("bias: 3\n"), "{path}: bias must be true or false, not 3", 2
    ),
    "a configuration file with another choice": Kind(
        settings("tokenizer: words\n"),
        "{path}: tokenizer must be one of char, byte, bpe, not 'words'",
        2,
    ),
    "a configuration file with an open bracket": Kind(
        settings("max-steps: [1\n"), "{path} is not valid YAML (line 2)"
    ),
    "a configuration file with a tab": Kind(
        settings("a:\n\tb: 1\n"), "{path} is not valid YAML (line 2)"
    ),
    "a configuration file that makes objects": Kind(
        settings("seed: !!python/object/apply:os.getpid []\n"), "{path} is not valid YAML (line 1)"
    ),
    "a configuration file with a day that there is not": Kind(
        settings("seed: 2024-02-31\n"), "{path} holds a number or a date that is impossible"
    ),
    "a configuration file with a number of many digits": Kind(
        settings("seed: " + "9" * 5000 + "\n"), "{path} holds a number or a date that is impossible"
    ),
    "a configuration file nested too deep": Kind(
        settings("seed: " + "[" * 1000 + "\n"), "{path} is nested too deep for a configuration"
    ),
    "a configuration file that grows when it is read": Kind(
        settings(f"text: {BOMB}"), "{path} is not valid YAML without aliases (line 3)"
    ),
    "a configuration file with lists in a list": Kind(
        settings("text: [a, [b]]\n"),
        "{path}: text must be a list of single values, not of a list",
        2,
    ),
    "a configuration file with a list for yes or no": Kind(
        settings("bias: [yes]\n"), "{path}: bias must be true or false, not a list", 2
    ),
    "a configuration file with a flag twice": Kind(
        settings("seed: 1\nseed: 2\n"), "{path}: seed stands there twice"
    ),
    "a configuration file with yes for a number": Kind(
        settings("seed: yes\n"), "{path}: seed must be a single value, not true", 2
    ),
    "a configuration file with bytes for a path": Kind(
        settings("output: !!binary YQ==\n"),
        "{path}: output must be a single value, not binary data",
        2,
    ),
    "a configuration file with a mapping for paths": Kind(
        settings("text: {a: b}\n"),
        "{path}: text must be a list of single values, not of a mapping",
        2,
    ),
    "a configuration file with a zero byte": Kind(
        settings(b"seed: 1\0\n"), "{path} is not valid YAML"
    ),
    "a configuration file that is not UTF-8": Kind(
        settings(b"output: caf\xe9.pth\n"),
        "cannot read the configuration {path}: it is not UTF-8 text",
    ),
}

TERMS = {
    "terms that are missing": Kind(
        absent("w.txt"), "cannot read the terms of --reward-terms {path}: No such file or directory"
    ),
    "terms that are empty": Kind(written("w.txt", ""), "{path} holds no terms, one a line"),
    "terms of blank lines": Kind(written("w.txt", "\n \n"), "{path} holds no terms, one a line"),
    "terms that are not UTF-8": Kind(
        written("w.txt", b"a\ncaf\xe9\n"), "{path} is not UTF-8 text: bad byte at 5"
    ),
    "terms that the vocabulary lacks": Kind(
        written("w.txt", "ab\nq\n"),
        "the term 'q' cannot be written with the model's vocabulary, so it cannot be rewarded",
    ),
}


def text(content: str | bytes, name: str = "b.txt") -> Make:
    return written(name, content)


def gzip_damage(raw: Callable[[bytes], bytes]) -> Make:
    packed = gzip.compress(os.urandom(500).hex().encode(), mtime=0)
    return written("b.txt.gz", raw(packed))


def folder_without_text(folder: Path) -> Path:
    (folder / "b").mkdir()
    (folder / "b" / "x.bin").write_bytes(b"\0\1")
    return folder / "b"


TEXTS = {
    "a text that is missing": Kind(absent("b.txt"), "there is no file {path}"),
    "a text that is empty": Kind(text(""), "{path} is empty: there is no text in it"),
    "a text of a byte order mark alone": Kind(
        text(b"\xef\xbb\xbf"), "{path} is empty: there is no text in it"
    ),
    "a text that is not UTF-8": Kind(
        text(NOT_UTF8),
        "{path} is not UTF-8 text: bad byte at offset 3; --encoding-errors replace goes "
        "on with U+FFFD in its place",
    ),
    "a text that ends within a character": Kind(
        text("a text, é".encode()[:-1]),
        "{path} is not UTF-8 text: bad byte at offset 8; --encoding-errors replace goes "
        "on with U+FFFD in its place",
    ),
    "a folder without texts": Kind(folder_without_text, "the folder {path} holds no text files"),
    "a text that is no gzip": Kind(
        gzip_damage(lambda raw: b"hello"), "{path} is a damaged gzip file, or none at all"
    ),
    "a gzip that is cut short": Kind(
        gzip_damage(lambda raw: raw[:-20]), "{path} is a damaged gzip file: it is cut short"
    ),
    "a gzip with another check sum": Kind(
        gzip_damage(lambda raw: raw[:-8] + bytes(8)),
        "{path} is a damaged gzip file, or none at all",
    ),
    "a gzip with another block": Kind(
        gzip_damage(lambda raw: raw[:10] + b"\xff" + raw[11:]),
        "{path} is a damaged gzip file, or none at all",
    ),
    "an empty file called .gz": Kind(
        gzip_damage(lambda raw: b""), "{path} is empty: there is no text in it"
    ),
}

SHORT_TEXTS = {
    "a text that is too short": Kind(
        text("ab"),
        "the text is too short: 3 tokens are left for training, fewer than one block of 8; give "
        "more text or a smaller --block-size",
    )
}

PROMPTS = {
    "a prompt that is missing": Kind(
        absent("p.txt"), "cannot read the prompt {path}: No such file or directory"
    ),
    "a folder in place of a prompt": Kind(
        folder_named("p.txt"), "cannot read the prompt {path}: Is a directory"
    ),
    "a prompt that is not UTF-8": Kind(
        written("p.txt", b"ab\xe9"), "{path} is not UTF-8 text: bad byte at 2"
    ),
    "a prompt that the vocabulary lacks": Kind(
        written("p.txt", "abq"),
        "the character 'q' (U+0071) at position 2 is not in the model's vocabulary",
    ),
}


# Run directories.

SHAPE = "--n-layer 1 --n-head 1 --n-embd 8 --block-size 8 --device cpu --threads 1 --no-tensorboard"
TRAIN = f"train {SHAPE} --batch-size 2 --max-steps 2 --eval-interval 1 --sample-tokens 0"
REPEATED = "one and two and three and four and five\n" * 6


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and the run that was trained on it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(REPEATED)
    words = f"{TRAIN} --text {folder}/text.txt --run-dir {folder}/run --output {folder}/m.pth"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setenv("NANOGPT_CACHE", str(folder / "cache"))
        assert cli.main(words.split()) == 0
    return folder


RunChange = Callable[[Path], object]


def rewrite(name: str, content: str | bytes) -> RunChange:
    return lambda run: written(name, content)(run)


def resealed(change: Change) -> RunChange:
    """run.json changed, with the check sum that is right."""

    def damage(run: Path) -> None:
        content = json.loads((run / "run.json").read_bytes())
        del content["sha256"]
        change(content)
        digest = hashlib.sha256(metadata.canonical_json(content)).hexdigest()
        (run / "run.json").write_text(json.dumps({**content, "sha256": digest}))

    return damage


RUNS: dict[str, tuple[RunChange, str, int]] = {
    "a run.json that is empty": (
        rewrite("run.json", ""),
        "{path}/run.json is damaged: train with another --run-dir or --resume never",
        3,
    ),
    "a run.json that is no JSON": (
        rewrite("run.json", "{1"),
        "{path}/run.json is damaged: train with another --run-dir or --resume never",
        3,
    ),
    "a run.json that is a list": (
        rewrite("run.json", "[]"),
        "{path}/run.json is damaged: train with another --run-dir or --resume never",
        3,
    ),
    "a run.json nested too deep": (
        rewrite("run.json", DEEP),
        "{path}/run.json is damaged: train with another --run-dir or --resume never",
        3,
    ),
    "a run.json of another check sum": (
        rewrite("run.json", '{"identity": {}, "sha256": "0"}'),
        "{path}/run.json is damaged: train with another --run-dir or --resume never",
        3,
    ),
    "a run.json without what identifies it": (
        resealed(drop("identity")),
        "{path}/run.json is damaged: train with another --run-dir or --resume never",
        3,
    ),
    "a run.json of another configuration": (
        resealed(put("identity", "learning_rate", to=0.5)),
        "{path} holds the run of another configuration: its --learning-rate is 0.5, and "
        "here it is not set",
        2,
    ),
    "a run.json of another text": (
        resealed(put("identity", "text (SHA-256)", to="0" * 64)),
        "{path} holds the run of another configuration: its text differs",
        2,
    ),
    "a folder of somebody else": (
        lambda run: [(run / name).unlink() for name in ("run.json", "lock")],
        "--run-dir {path} is not a run directory but holds checkpoints: name another",
        2,
    ),
}


def in_checkpoint(name: str, change: Callable[[Path], object]) -> RunChange:
    """Damages a file of every checkpoint."""

    def damage(run: Path) -> None:
        for folder in (run / "checkpoints").iterdir():
            change(folder / name)

    return damage


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def remanifested(name: str, raw: bytes) -> RunChange:
    """Writes a file of every checkpoint, and its check sum into the manifest."""

    def damage(run: Path) -> None:
        for folder in (run / "checkpoints").iterdir():
            (folder / name).write_bytes(raw)
            manifest = json.loads((folder / "manifest.json").read_bytes())
            digest = hashlib.sha256(raw).hexdigest()
            manifest["files"][name] = {"bytes": len(raw), "sha256": digest}
            (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


MANIFEST = "manifest.json"

CHECKPOINTS: dict[str, tuple[RunChange, str]] = {
    "checkpoints without a manifest": (
        in_checkpoint(MANIFEST, Path.unlink),
        "manifest.json is missing",
    ),
    "checkpoints with a folder for a manifest": (
        in_checkpoint(MANIFEST, lambda path: (path.unlink(), path.mkdir())),
        "manifest.json cannot be read: Is a directory",
    ),
    "checkpoints with a manifest that is no JSON": (
        in_checkpoint(MANIFEST, lambda path: path.write_text("{1")),
        "its manifest is damaged",
    ),
    "checkpoints with a manifest that is a list": (
        in_checkpoint(MANIFEST, lambda path: path.write_text("[]")),
        "its manifest is damaged",
    ),
    "checkpoints with a manifest of no files": (
        in_checkpoint(MANIFEST, lambda path: path.write_text('{"files": {}}')),
        "its manifest lacks best.safetensors",
    ),
    "checkpoints with a manifest nested too deep": (
        in_checkpoint(MANIFEST, lambda path: path.write_bytes(DEEP)),
        "its manifest is damaged",
    ),
    "checkpoints without a model": (
        in_checkpoint("model.safetensors", Path.unlink),
        "model.safetensors is missing",
    ),
    "checkpoints with a model cut short": (
        in_checkpoint("trainer.pt", cut),
        "trainer.pt has {one_less} bytes instead of {size}",
    ),
    "checkpoints with a flipped byte": (
        in_checkpoint("best.safetensors", flip),
        "best.safetensors does not match its SHA-256",
    ),
    "checkpoints with a state that is no JSON": (
        remanifested("state.json", b"{1"),
        "its state is damaged",
    ),
    "checkpoints with a state that is a list": (
        remanifested("state.json", b"[]"),
        "its state is damaged",
    ),
    "checkpoints with a state nested too deep": (
        remanifested("state.json", DEEP),
        "its state is damaged",
    ),
}


# Who reads what.

WRITERS = {
    "a model with weights that are not finite": Kind(
        pth(tensors=not_finite), "{path} holds weights that are not finite, so it cannot write"
    ),
    "a model that holds no tokenizer": Kind(
        pth(put("tokenizer", to=None)), "{path} holds no tokenizer, so it cannot write text"
    ),
    "a model of no known ending": Kind(
        written("m.onnx", "x"),
        "{path} is not known to be a model file: its name ends in .pth, .safetensors or, "
        "of an export, .pt",
    ),
}
EXPORTED_TOKENIZERS = {
    "an export that holds no tokenizer": Kind(
        made("m.pt", lambda: export_bytes(tokenizer=None)),
        "{path} holds no tokenizer, so it cannot write text",
    ),
    "an export with a tokenizer of another size": Kind(
        made("m.pt", lambda: export_bytes(tokenizer=CharTokenizer("ab").to_dict())),
        "{path} is damaged: its tokenizer has 3 tokens, its weights have 5",
    ),
}

STRANGE_TOKENIZERS = {
    "an export with a tokenizer of an unknown kind": Kind(
        made("m.pt", lambda: export_bytes(tokenizer={"kind": "morse"})),
        "{path} cannot be used: the tokenizer's description is damaged or of an unknown kind",
    ),
    "an export with a tokenizer that is a list of characters": Kind(
        made("m.pt", lambda: export_bytes(tokenizer={"kind": "char", "characters": ["a"]})),
        "{path} cannot be used: the tokenizer's description is damaged or of an unknown kind",
    ),
}

OF_MODELS = Reader(
    (pth(), safe()),
    ("export --model {path} --format safetensors --output {out}/m.safetensors",),
    checkpoint.load,
)
OF_WRITERS = Reader(
    (pth(), safe()),
    (
        "sample --model {path} --max-new-tokens 1 --device cpu --threads 1",
        "sample --model {path} --max-new-tokens 1 --device cpu --threads 1 --engine torch",
    ),
)
WRITE = "sample --model {path} --max-new-tokens 1 --engine native --device cpu --threads 1"
GENERATE = "nanogpt-generate {path} --max-new-tokens 1 --threads 1"
OF_EXPORTS = Reader((export(),), (WRITE, GENERATE), native.open_file)
OF_TOKENIZERS = Reader((export(),), (WRITE, GENERATE))
OF_SAMPLES = Reader((export(),), (WRITE,))
OF_REWARDS = Reader(
    (rewards("one|1\ntwo|2\n" * 20), rewards("text,reward\n" + "a,1\nb,2\n" * 20, "r.csv")),
    (
        f"advanced {SHAPE.removesuffix('--no-tensorboard')} --batch-size 2 --offline-data {{path}} "
        f"--run-dir {{out}}/run --output {{out}}/m.pth",
    ),
    read_reward_data,
)
OF_TABLES = Reader(
    (table("a,b\n" + rows(40)),),
    (
        "explore --data {path} --run-dir {out}/run --output {out}/m.pth --device cpu --threads 1 "
        "--n-layer 1 --n-head 1 --n-embd 8",
    ),
)
OF_CONFIGURATIONS = Reader(
    (settings("seed: 3\nbias: true\n"),),
    (f"{TRAIN} --text {{good}} --config {{path}} --run-dir {{out}}/run --output {{out}}/m.pth",),
    lambda path: cli.parse("train", TrainConfig, ["--config", str(path)]),
)
OF_TERMS = Reader(
    (written("w.txt", "ab\nba\n"),),
    ("sample --model {good} --reward-terms {path} --max-new-tokens 1 --device cpu --threads 1",),
)
OF_TEXTS = Reader(
    (text(REPEATED), gzip_damage(lambda raw: raw)),
    (f"{TRAIN} --text {{path}} --run-dir {{out}}/run --output {{out}}/m.pth",),
    lambda path: prepare([str(path)]),
)
OF_PROMPTS = Reader(
    (written("p.txt", "ab"),),
    ("sample --model {good} --file {path} --max-new-tokens 1 --device cpu --threads 1",),
)
OF_SHORT_TEXTS = dataclasses.replace(OF_TEXTS, function=None)
TABLE_OF: dict[str, tuple[Reader, dict[str, Kind]]] = {
    "models": (OF_MODELS, MODELS),
    "models that write": (OF_WRITERS, WRITERS),
    "exports": (OF_EXPORTS, EXPORTS),
    "tokenizers of exports": (OF_TOKENIZERS, EXPORTED_TOKENIZERS),
    "tokenizers that sample reads": (OF_SAMPLES, STRANGE_TOKENIZERS),
    "rewards": (OF_REWARDS, REWARDS),
    "tables": (OF_TABLES, TABLES),
    "configurations": (OF_CONFIGURATIONS, CONFIGURATIONS),
    "terms": (OF_TERMS, TERMS),
    "texts": (OF_TEXTS, TEXTS),
    "texts to train on": (OF_SHORT_TEXTS, SHORT_TEXTS),
    "prompts": (OF_PROMPTS, PROMPTS),
}
KINDS = {
    name: (reader, kind) for reader, kinds in TABLE_OF.values() for name, kind in kinds.items()
}


@dataclass(frozen=True)
class Place:
    """Where a command runs: what it is given, and where it may write.

    Attributes:
        given: a folder for the malformed file.
        good: a model or a text that a command needs beside it.
    """

    root: Path
    given: Path
    run: Callable[..., Any]

    def ask(self, command: str, path: Path) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command."""
        good = self.root / "good" / ("text.txt" if "--text" in command else "m.pth")
        places = {"{path}": path, "{out}": self.root / "out", "{good}": good}
        words = []
        for word in command.split():
            for mark, place in places.items():
                word = word.replace(mark, str(place))
            words.append(word)
        if words[0] != native.PROGRAM:
            outcome = self.run(*words)
            return outcome.code, outcome.out, outcome.err
        binary = native.program()
        if binary is None:
            pytest.skip(f"no {native.PROGRAM}: `make build` builds it where there is a compiler")
        done = subprocess.run([binary, *words[1:]], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    def content(self) -> dict[str, str]:
        """Every file there is, but for cached tokens."""
        found = {}
        for path in self.root.rglob("*"):
            if path.relative_to(self.root).parts[0] != "token-cache":
                raw = path.read_bytes().hex() if path.is_file() else ""
                found[str(path)] = hashlib.sha256(raw.encode()).hexdigest()
        return found


@pytest.fixture
def place(tmp_path: Path, nanogpt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Place:
    for name in ("given", "good", "work"):
        (tmp_path / name).mkdir()
    pth()(tmp_path / "good")
    (tmp_path / "good" / "text.txt").write_text(REPEATED)
    monkeypatch.chdir(tmp_path / "work")
    return Place(tmp_path, tmp_path / "given", nanogpt)


def who_speaks(command: str) -> str:
    name = command.split()[0]
    return name if name == native.PROGRAM else f"nanogpt {name}"


def needs_engine(reader: Reader) -> None:
    if reader in (OF_EXPORTS, OF_TOKENIZERS, OF_SAMPLES) and not native.available():
        pytest.skip(f"native engine: {native.why_not()}")


@pytest.mark.parametrize("name", KINDS)
def test_a_malformed_file_is_refused_in_one_sentence(name: str, place: Place) -> None:
    reader, kind = KINDS[name]
    needs_engine(reader)
    path = kind.make(place.given)
    sentence = kind.sentence.replace("{path}", str(path))
    before = place.content()
    for command in reader.commands:
        outcome = place.ask(command, path)
        assert outcome == (kind.code, "", f"{who_speaks(command)}: {sentence}\n")
    assert place.content() == before, "something was written"
    if reader.function is not None:
        with pytest.raises(UsageError if kind.code == 2 else InputError) as caught:
            reader.function(path)
        assert str(caught.value) == sentence


@pytest.mark.parametrize("name", TABLE_OF)
def test_a_good_file_is_accepted_by_the_same_reader(name: str, place: Place) -> None:
    reader, _ = TABLE_OF[name]
    needs_engine(reader)
    for number, make in enumerate(reader.good):
        folder = place.given / str(number)
        folder.mkdir()
        path = make(folder)
        for command in reader.commands:
            code, _, err = place.ask(command, path)
            assert code == 0, err
            shutil.rmtree(place.root / "out", ignore_errors=True)
        if reader.function is not None:
            assert reader.function(path) is not None


@pytest.mark.parametrize("name", RUNS)
def test_a_malformed_run_directory_is_refused(name: str, place: Place, finished_run: Path) -> None:
    damage, sentence, code = RUNS[name]
    path = place.given / "run"
    shutil.copytree(finished_run / "run", path)
    damage(path)
    before = place.content()
    command = f"{TRAIN} --text {finished_run}/text.txt --run-dir {{path}} --output {{out}}/m.pth"
    outcome = place.ask(command, path)
    assert outcome == (code, "", f"nanogpt train: {sentence.replace('{path}', str(path))}\n")
    assert place.content() == before, "something was written"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_malformed_checkpoints_are_passed_over(
    name: str, tmp_path: Path, finished_run: Path
) -> None:
    damage, sentence = CHECKPOINTS[name]
    path = tmp_path / "run"
    shutil.copytree(finished_run / "run", path)
    said: list[str] = []
    with RunDirectory(path, said.append) as run:
        assert run.newest() is not None
        assert said == []
        found = [path / "checkpoints" / step for step in ("00000002", "00000001")]
        sizes = [(folder / "trainer.pt").stat().st_size for folder in found]
        damage(path)
        assert run.newest() is None
    for folder, size, told in zip(found, sizes, said, strict=True):
        wanted = sentence.replace("{size}", f"{size:,}").replace("{one_less}", f"{size - 1:,}")
        assert told == f"passed over the checkpoint {folder}: {wanted}"


SENTENCES = {
    **{name: kind.sentence for name, (_, kind) in KINDS.items()},
    **{name: sentence for name, (_, sentence, _) in RUNS.items()},
    **{name: sentence for name, (_, sentence) in CHECKPOINTS.items()},
}
# torch and safetensors do not tell in words why they cannot read a file.
SPOKEN_BY_FEW = {
    "{path} cannot be read: it is damaged or not a file of tensors",
    "{path} cannot be read: it is damaged or not safetensors",
}
# They name the flag, or what in the file does not fit the model.
WITHOUT_PATH = {
    "terms that the vocabulary lacks",
    "a prompt that the vocabulary lacks",
    "a text that is too short",
    *CHECKPOINTS,  # whose folders stand before the sentence
}


def test_there_are_many_kinds_and_all_are_in_the_tables() -> None:
    assert len(KINDS) == sum(len(kinds) for _, kinds in TABLE_OF.values()), (
        "two kinds have one name"
    )
    assert len(SENTENCES) == len(KINDS) + len(RUNS) + len(CHECKPOINTS)
    assert len(SENTENCES) >= 200
    assert len(set(SENTENCES.values())) >= 120


def test_sentences_tell_the_kinds_apart() -> None:
    """No sentence says so little that a case could pass for another case's reason."""
    for sentence, count in Counter(SENTENCES.values()).items():
        assert count <= 6 or sentence in SPOKEN_BY_FEW, (count, sentence)
    for name, sentence in SENTENCES.items():
        assert len(sentence) >= 20, name
        assert sentence.isprintable(), name
        assert ("{path}" in sentence) != (name in WITHOUT_PATH), name
        foreign = re.search(r"Error|Errno|Traceback|NoneType|__|object at|0x|argument", sentence)
        assert foreign is None, f"{name}: {foreign}"
