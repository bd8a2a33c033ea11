"""Malformed files of every kind that is read, each refused in exactly this sentence.

Readers raise the package's own error; commands end with its exit code and one line on standard
error. {path} stands for the file.
"""

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from native_archives import TINY, archive, sealed, tensors_for, without_comment
from native_outcomes import outcome_of
from safetensors.torch import save

from nanogpt import checkpoint, cli, metadata
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.errors import InputError, NanoGPTError, UsageError
from nanogpt.explore.records import read_records
from nanogpt.model import GPT
from nanogpt.reward_data import read_reward_data
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
    """A reader, the ending of its files, and how each is malformed: what is done and what is said."""

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


def saved(suffix: str) -> bytes:
    path = Path(os.environ["PYTEST_MALFORMED"]) / f"saved{suffix}"
    checkpoint.save(model(), path)
    return path.read_bytes()


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


DEEP = b"[" * 100_000
KINDS: dict[str, Kind] = {}
