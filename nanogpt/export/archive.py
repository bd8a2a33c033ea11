"""The file `model.pt`: a zip that TorchScript and the native engine read, and its check sums.

    archive/data.pkl, archive/code/…     what torch's reader needs
    archive/extra/nanogpt.json           the index: what the file is, where each tensor lies
    archive/data/N                       tensors, stored uncompressed at multiples of 64 bytes

Every bit is covered by a CRC-32. The payload of a tensor has its sum in the index; everything
else (index, code, zip headers, padding) has one sum together, in the comment that ends the file:
`nanogpt-crc32:XXXXXXXX`, over every byte before the end-of-central-directory record, in file
order, without the payloads of the tensors that the index names. No times and no paths inside.
"""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from nanogpt import metadata
from nanogpt.errors import InputError

FORMAT = "nanogpt-torchscript-1"
TOP = "archive/"
INDEX = "extra/nanogpt.json"
ALIGNMENT = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_COMMENT = b"nanogpt-crc32:"
_END = struct.Struct("<4s4H2LH")
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_UTF8_NAMES = 0x800
_PADDING = 0x4246  # "FB": the extra field in which torch's own writer pads, too
# 1980-01-01, the first day that a zip knows.
_NO_TIME, _NO_DATE = 0, 0x21


@dataclass(frozen=True)
class Record:
    """One member of the zip.

    Attributes:
        name: relative to the top folder.
        payload: anything with a buffer.
        indexed: a tensor that the index names, so that the comment's sum leaves it out.
    """

    name: str
    payload: bytes | memoryview
    indexed: bool = False


def payload_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, row-major and little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def index_entry(record: str, tensor: torch.Tensor) -> dict[str, Any]:
    """What the index says of one tensor."""
    payload = payload_of(tensor)
    return {
        "record": record,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "bytes": len(payload),
        "crc32": f"{zlib.crc32(payload):08x}",
    }


def write(file: IO[bytes], records: Sequence[Record], *, limit: int = 2**32 - 1) -> None:
    """Write the zip and its comment.

    Args:
        file: open for writing, at its beginning.
        limit: sizes and offsets from here on are written in the zip64 form.
    """
    sum_of_rest, offset = 0, 0
    entries = []

    def put(raw: bytes | memoryview, counted: bool = True) -> None:
        nonlocal sum_of_rest, offset
        if counted:
            sum_of_rest = zlib.crc32(raw, sum_of_rest)
        file.write(raw)
        offset += len(raw)

    for record in records:
        name = (TOP + record.name).encode()
        size, crc, start = len(record.payload), zlib.crc32(record.payload), offset
        wide = _zip64(size, size) if size >= limit else b""
        # At least the four bytes of the field's own head, then up to the next multiple.
        bare = start + _LOCAL.size + len(name) + len(wide) + 4
        room = -bare % ALIGNMENT
        extra = wide + struct.pack("<2H", _PADDING, room) + b"\0" * room
        shown = 0xFFFFFFFF if wide else size
        version = 45 if wide or start >= limit else 20
        flags = (version, _UTF8_NAMES, 0, _NO_TIME, _NO_DATE, crc)
        put(_LOCAL.pack(b"PK\3\4", *flags, shown, shown, len(name), len(extra)) + name + extra)
        put(record.payload, counted=not record.indexed)
        entries.append((name, flags, size, start))

    directory = offset
    for name, flags, size, start in entries:
        wide_size, wide_start = size >= limit, start >= limit
        values = ([size, size] if wide_size else []) + ([start] if wide_start else [])
        extra = _zip64(*values) if values else b""
        shown = 0xFFFFFFFF if wide_size else size
        put(
            _CENTRAL.pack(
                b"PK\1\2", flags[0], *flags, shown, shown, len(name), len(extra), 0, 0, 0, 0,
                0xFFFFFFFF if wide_start else start,
            ) + name + extra
        )  # fmt: skip
    length, count = offset - directory, len(entries)
    if directory >= limit or count >= 0xFFFF:
        at = offset
        put(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, directory))
        put(struct.pack("<4sLQL", b"PK\6\7", 0, at, 1))
        count, directory = 0xFFFF, 0xFFFFFFFF
    comment = _COMMENT + f"{sum_of_rest:08x}".encode()
    file.write(_END.pack(b"PK\5\6", 0, 0, count, count, length, directory, len(comment)) + comment)


def _zip64(*values: int) -> bytes:
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)


@dataclass(frozen=True)
class Content:
    """A verified archive.

    Attributes:
        index: the object in nanogpt.json.
        tensors: by name, each a copy.
        records: payload of every record, by its name relative to the top folder.
    """

    index: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    records: dict[str, bytes]


def read(path: Path) -> Content:
    """Read an archive and check every byte of it.

    Raises: InputError where it is missing, foreign or damaged.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the archive {path}: {error.strerror}") from None
    return parse(path, raw)


def parse(path: Path, raw: bytes) -> Content:
    """`read` of bytes that are in memory; `path` stands in the sentences alone."""
    where, directory = _payloads(path, raw)
    if INDEX not in where:
        raise InputError(f"{path} is no export of nanogpt: it has no {INDEX}")
    start, size = where[INDEX]
    try:
        index = metadata.from_bytes(raw[start : start + size])
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if index.get("format") != FORMAT or not isinstance(index.get("tensors"), dict):
        raise InputError(f"{path} is no export of this version: its format is not {FORMAT!r}")
    named: dict[str, str] = {}
    tensors = {}
    for name, entry in index["tensors"].items():
        tensors[name] = _tensor(path, raw, where, name, entry)
        if named.setdefault(entry["record"], name) != name:
            raise InputError(f"{path} is damaged: two tensors share {entry['record']}")
    _check_rest(path, raw, sorted(where[record] for record in named))
    _check_end(path, raw, len(where), directory)
    records = {name: raw[start : start + size] for name, (start, size) in where.items()}
    return Content(index, tensors, records)


def _payloads(path: Path, raw: bytes) -> tuple[dict[str, tuple[int, int]], int]:
    """Offset and size of every stored member, and the offset of the directory."""
    where = {}
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as opened:
            members, directory = opened.infolist(), opened.start_dir
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error):
        raise InputError(f"{path} is no archive, or its directory is damaged") from None
    for member in members:
        head = raw[member.header_offset : member.header_offset + _LOCAL.size]
        if len(head) < _LOCAL.size or member.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{path} is damaged at {member.filename}")
        fields = _LOCAL.unpack(head)
        start = member.header_offset + _LOCAL.size + fields[-2] + fields[-1]
        if fields[0] != b"PK\3\4" or start + member.file_size > len(raw):
            raise InputError(f"{path} is damaged at {member.filename}")
        if not member.filename.startswith(TOP) or member.filename[len(TOP) :] in where:
            raise InputError(f"{path} is no export of nanogpt: it holds {member.filename!r}")
        where[member.filename[len(TOP) :]] = (start, member.file_size)
    return where, directory


def _tensor(
    path: Path, raw: bytes, where: Mapping[str, tuple[int, int]], name: str, entry: Any
) -> torch.Tensor:
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, size = where[entry["record"]]
        count = 1
        for extent in shape:
            if type(extent) is not int or extent < 0:
                raise ValueError
            count *= extent
        if not size == entry["bytes"] == count * dtype.itemsize or start % ALIGNMENT:
            raise ValueError
        expected = int(entry["crc32"], 16)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path} is damaged: its index and the record of {name} differ") from None
    payload = raw[start : start + size]
    if zlib.crc32(payload) != expected:
        raise InputError(f"{path} is damaged: {name} does not match its check sum")
    return torch.frombuffer(bytearray(payload), dtype=dtype).reshape(shape)


def _check_rest(path: Path, raw: bytes, left_out: Sequence[tuple[int, int]]) -> None:
    """The comment's sum, over all that no tensor's sum covers."""
    length = _END.size + len(_COMMENT) + 8
    end, comment = raw[-length:-8][: _END.size], raw[-8 - len(_COMMENT) :]
    stop = len(raw) - length
    if stop < 0 or not comment.startswith(_COMMENT) or not end.startswith(b"PK\5\6"):
        raise InputError(f"{path} is damaged: it does not end with its check sum")
    at, found = 0, 0
    for start, size in left_out:
        if start < at:
            raise InputError(f"{path} is damaged: two tensors overlap")
        found = zlib.crc32(raw[at:start], found)
        at = start + size
    found = zlib.crc32(raw[at:stop], found)
    if comment[len(_COMMENT) :] != f"{found:08x}".encode():
        raise InputError(f"{path} is damaged: it does not match its check sum")


def _check_end(path: Path, raw: bytes, count: int, directory: int) -> None:
    """The end record, which the comment's sum does not cover: every field has one right value."""
    stop = len(raw) - _END.size - len(_COMMENT) - 8
    locator = raw[stop - 20 : stop]
    narrow = (count, directory, stop - directory)
    wide = (0xFFFF, 0xFFFFFFFF, stop - 76 - directory)  # two records of 56 and 20 bytes before it
    shown, at, length = wide if locator.startswith(b"PK\6\7") else narrow
    expected = (b"PK\5\6", 0, 0, shown, shown, length, at, len(_COMMENT) + 8)
    if _END.unpack(raw[stop : stop + _END.size]) != expected:
        raise InputError(f"{path} is damaged in its last record")


def describe(
    model_description: Mapping[str, Any], quantize: str, tensors: Mapping[str, Any]
) -> bytes:
    """The index as canonical JSON.

    Args:
        model_description: of GPT.describe.
        tensors: name to `index_entry`.
    """
    content = {**model_description, "format": FORMAT, "quantize": quantize, "tensors": tensors}
    json.dumps(content, allow_nan=False)  # a calibration that is no number is a bug of ours
    return metadata.canonical_json(content)
