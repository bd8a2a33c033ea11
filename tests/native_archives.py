"""Archives as the native engine reads them, written with as little as possible: for its tests.

The real writer is `nanogpt export`; here the TorchScript around the tensors does nothing, so that
tests can choose every field and break every rule.
"""

import io
import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanogpt.config import GPTConfig
from nanogpt.metadata import canonical_json

INDEX = "extra/nanogpt.json"
END_BYTES, COMMENT_BYTES = 22, 22
TINY = GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=2, n_embd=4)


def tensors_for(
    config: GPTConfig, quantize: str = "none", seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random weights of a GPT in the precision that `quantize` names."""
    random = torch.Generator().manual_seed(seed)
    width = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (config.vocab_size, width)}
    if not config.rotary:
        shapes["transformer.wpe.weight"] = (config.block_size, width)

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        if config.bias:
            shapes[f"{name}.bias"] = shape[:1]

    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        add(f"{block}.ln_1", width)
        add(f"{block}.attn.c_attn", 3 * width, width)
        add(f"{block}.attn.c_proj", width, width)
        add(f"{block}.ln_2", width)
        add(f"{block}.mlp.c_fc", 4 * width, width)
        add(f"{block}.mlp.c_proj", width, 4 * width)
    add("transformer.ln_f", width)

    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=random)
        if len(shape) == 2 and quantize == "bf16":
            value = value.bfloat16()
        elif len(shape) == 2 and quantize == "int8" and name != "transformer.wpe.weight":
            scale = value.abs().amax(1) / 127
            tensors[f"{name}.scale"] = scale
            value = (value / scale[:, None]).round().to(torch.int8)
        tensors[name] = value
    return tensors


class _Holder(nn.Module):
    """Uses every tensor, so that freezing keeps each as a constant of its own."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for i, value in enumerate(tensors.values()):
            self.register_buffer(f"t{i}", value)
        self.count = len(tensors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.count):
            x = x + (x * getattr(self, f"t{i}")).sum()
        return x


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Little-endian and row-major, as in the file."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def torchscript(
    tensors: Mapping[str, torch.Tensor], extra: dict[str, bytes] | None = None
) -> bytes:
    """An ordinary TorchScript archive that holds the tensors as constants."""
    return _saved(_frozen(tensors), extra or {})


def _frozen(tensors: Mapping[str, torch.Tensor]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit announces its end
        return torch.jit.freeze(torch.jit.trace(_Holder(tensors).eval(), torch.zeros(1)))


def _saved(module: Any, extra: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module, buffer, _extra_files=extra)
    return buffer.getvalue()


def payloads(raw: bytes) -> dict[str, tuple[int, int]]:
    """Offset and size of every record's bytes in a zip file, by its name without the top folder."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        for entry in file.infolist():
            header = entry.header_offset
            names = int.from_bytes(raw[header + 26 : header + 28], "little")
            extra = int.from_bytes(raw[header + 28 : header + 30], "little")
            name = entry.filename.partition("/")[2]
            found[name] = (header + 30 + names + extra, entry.compress_size)
    return found


def index_of(
    raw: bytes,
    tensors: Mapping[str, torch.Tensor],
    config: GPTConfig,
    quantize: str = "none",
    tokenizer: Any = None,
    calibration_temperature: float | None = None,
) -> dict[str, Any]:
    """nanogpt.json for an archive: each tensor finds the record that has its bytes."""
    records: dict[bytes, list[str]] = {}
    for name, (offset, size) in payloads(raw).items():
        if name.startswith(("constants/", "data/")):
            records.setdefault(raw[offset : offset + size], []).append(name)
    entries = {}
    for name, tensor in tensors.items():
        content = raw_bytes(tensor)
        entries[name] = {
            "record": records[content].pop(),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "bytes": len(content),
            "crc32": f"{zlib.crc32(content):08x}",
        }
    return {
        "format": "nanogpt-torchscript-1",
        "config": {name: getattr(config, name) for name in GPTConfig.__dataclass_fields__},
        "tokenizer": tokenizer,
        "calibration_temperature": calibration_temperature,
        "quantize": quantize,
        "tensors": entries,
    }


def without_comment(raw: bytes) -> bytes:
    """The archive as it was before `sealed`."""
    if not raw[-COMMENT_BYTES:].startswith(b"nanogpt-crc32:"):
        return raw
    return raw[: -COMMENT_BYTES - 2] + b"\0\0"


def sealed(raw: bytes, tensors: Iterable[str], layout: bytes | None = None) -> bytes:
    """The archive with the comment that covers all but the named records.

    Args:
        layout: an undamaged archive whose records lie in the same places, where `raw`'s directory
            cannot be read.
    """
    raw = without_comment(raw)
    end = len(raw) - END_BYTES
    places = payloads(without_comment(raw if layout is None else layout))
    total, at = 0, 0
    for offset, size in sorted(places[name] for name in set(tensors)):
        total = zlib.crc32(raw[at:offset], total)
        at = offset + size
    total = zlib.crc32(raw[at:end], total)
    comment = f"nanogpt-crc32:{total:08x}".encode()
    return raw[:-2] + len(comment).to_bytes(2, "little") + comment


def archive(
    tensors: Mapping[str, torch.Tensor],
    config: GPTConfig,
    quantize: str = "none",
    tokenizer: Any = None,
    calibration_temperature: float | None = None,
    change: Callable[[dict[str, Any]], Any] | None = None,
) -> bytes:
    """A whole model.pt; `change` may damage the index, by what it does to it or what it returns.

    What it returns is the text of nanogpt.json as bytes, or None for the changed index.
    """
    module = _frozen(tensors)
    index = index_of(
        _saved(module, {}), tensors, config, quantize, tokenizer, calibration_temperature
    )
    records = [entry["record"] for entry in index["tensors"].values()]
    text = change(index) if change is not None else None
    raw = _saved(module, {"nanogpt.json": canonical_json(index) if text is None else text})
    return sealed(raw, records)


def rewritten(
    raw: bytes,
    change: Callable[[str, bytes], tuple[str, bytes]] = lambda name, payload: (name, payload),
    compressed: str = "",
    aligned: bool = True,
) -> bytes:
    """The archive written again by Python's zipfile, member for member, with a fresh comment.

    Args:
        change: gives each record's new name and bytes.
        compressed: the record that is.
        aligned: whether payloads begin at multiples of 64 bytes.
    """
    where = payloads(without_comment(raw))
    index = json.loads(raw[where[INDEX][0] : sum(where[INDEX])])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in where:
            with zipfile.ZipFile(io.BytesIO(raw)) as original:
                new, payload = change(name, original.read(f"archive/{name}"))
            entry = zipfile.ZipInfo(f"archive/{new}")
            wide = 20 if len(payload) > zipfile.ZIP64_LIMIT else 0
            start = buffer.tell() + 30 + len(entry.filename.encode()) + wide + 4
            room = -start % 64 if aligned else (-start + 4) % 64
            entry.extra = struct.pack("<2H", 0x4246, room) + b"Z" * room
            if new == compressed:
                entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, payload)
    raw = buffer.getvalue()
    names = {entry["record"] for entry in index["tensors"].values()} & payloads(raw).keys()
    return sealed(raw, names)


class Zip:
    """An archive whose headers can be changed field by field; the comment is renewed."""

    def __init__(self, path: Path) -> None:
        self.good = path.read_bytes()
        self.raw = bytearray(without_comment(self.good))
        self.end = len(self.raw) - END_BYTES
        self.end64 = self.end - 76
        assert self.raw[self.end64 : self.end64 + 4] == b"PK\6\6"
        self.places = payloads(bytes(self.raw))
        index = json.loads(self.good[self.places[INDEX][0] : sum(self.places[INDEX])])
        self.tensors = [entry["record"] for entry in index["tensors"].values()]
        self.central, self.local = {}, {}
        at = int.from_bytes(self.raw[self.end + 16 : self.end + 20], "little")
        for name in self.places:
            sizes = struct.unpack_from("<3H", self.raw, at + 28)
            self.central[name] = at
            self.local[name] = int.from_bytes(self.raw[at + 42 : at + 46], "little")
            at += 46 + sum(sizes)

    def put(self, at: int, layout: str, *values: Any) -> None:
        struct.pack_into("<" + layout, self.raw, at, *values)

    def sealed(self) -> bytes:
        return sealed(bytes(self.raw), self.tensors, layout=self.good)


def write_archive(path: Path, config: GPTConfig = TINY, quantize: str = "none", **how: Any) -> Path:
    """Writes `archive` of random weights."""
    path.write_bytes(archive(tensors_for(config, quantize), config, quantize, **how))
    return path
