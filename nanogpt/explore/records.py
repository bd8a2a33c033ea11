"""Records of tables, logs and texts, field by field, and writing them as a table.

A value is text exactly as it is written, or None where it is missing: leading zeros, spaces and the
word "None" stay what they are, and an empty text is not a missing one.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import IO, Any, overload

import numpy as np

Value = str | None
TEXT_FIELD = "text"

# Values of a field are shared in memory while no more than these differ.
_MOST_SHARED = 10_000
_PART = 2**16  # records that are worked on at once


class Records(Sequence[dict[str, Value]]):
    """Records with the same fields, kept field by field.

    Attributes:
        name: the file as the user named it.
        format: "csv" | "tsv" | "jsonl" | "txt"; an array of JSON objects is "jsonl".
        names: the fields, F of them, all different; a text has the one field "text".
        columns: F lists of n values, each text or None.
        lines: (n,) int64, the line on which each record begins in its file, from 1.
        notes: sentences for the user on how the file was read.
    Two of them are equal where names and values are.
    """

    def __init__(
        self,
        name: str,
        format: str,
        names: Iterable[str],
        columns: Iterable[list[Value]],
        lines: Sequence[int] | np.ndarray,
        notes: Iterable[str] = (),
    ) -> None:
        """Raises: ValueError where names repeat or lengths differ."""
        self.name = name
        self.format = format
        self.names = tuple(names)
        self.columns = tuple(columns)
        self.lines = np.asarray(lines, dtype=np.int64)
        self.notes = tuple(notes)
        if len(set(self.names)) != len(self.names):
            raise ValueError("two fields have one name")
        if len(self.columns) != len(self.names):
            raise ValueError(f"{len(self.columns)} columns for {len(self.names)} names")
        if any(len(column) != len(self.lines) for column in self.columns):
            raise ValueError(f"every column must hold {len(self.lines)} values")

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Mapping[str, Value | int | float | bool]],
        name: str = "records",
    ) -> "Records":
        """Records of mappings, with every key that occurs as a field, in the order met.

        Numbers and booleans become their JSON text, nan becomes missing, as absent keys are; lines
        count the rows from 1.

        Raises: TypeError for another value; ValueError for text with half of a surrogate pair.
        """
        table = Table()
        for number, row in enumerate(rows, 1):
            try:
                table.add(number, {str(key): _scalar_text(value) for key, value in row.items()})
            except (TypeError, BadLine) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"row {number:,} of {name}: {error}") from None
        return table.records(name, "jsonl", ())

    def column(self, name: str) -> list[Value]:
        """The values of a field. Raises: KeyError where there is none of that name."""
        try:
            return self.columns[self.names.index(name)]
        except ValueError:
            raise KeyError(name) from None

    def take(self, rows: Sequence[int] | np.ndarray) -> "Records":
        """Some of the records, in the order given; `rows` holds their 0-based numbers."""
        chosen = np.asarray(rows, dtype=np.int64)
        places = chosen.tolist()
        columns = [[column[place] for place in places] for column in self.columns]
        return Records(self.name, self.format, self.names, columns, self.lines[chosen], self.notes)

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, at: int) -> dict[str, Value]: ...
    @overload
    def __getitem__(self, at: slice) -> "Records": ...
    def __getitem__(self, at: int | slice) -> "dict[str, Value] | Records":
        if isinstance(at, slice):
            return self.take(np.arange(len(self))[at])
        if not -len(self) <= at < len(self):
            raise IndexError(f"there is no record {at} among {len(self)}")
        return {name: column[at] for name, column in zip(self.names, self.columns, strict=True)}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Records):
            return NotImplemented
        return self.names == other.names and self.columns == other.columns

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Records({self.name!r}: {len(self):,} records of {len(self.names):,} fields)"

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and values, in hexadecimal; the file's name and format count not."""
        digest = hashlib.sha256()
        digest.update(np.array([len(self), len(self.names)], np.int64).tobytes())
        for values in (self.names, *self.columns):
            for start in range(0, len(values), _PART):
                part = values[start : start + _PART]
                sizes = [-1 if value is None else len(value) for value in part]
                digest.update(np.array(sizes, np.int64).tobytes())
                joined = "".join(value for value in part if value is not None)
                digest.update(joined.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


class BadLine(ValueError):
    """What is wrong with a line, in words."""


class Table:
    """Fields that grow record by record, or block by block."""

    def __init__(self, names: Sequence[str] = (), has_header: bool = False) -> None:
        self.columns: dict[str, list[Value]] = {name: [] for name in names}
        self.shared: dict[str, dict[str, str]] = {name: {} for name in names}
        self.lines: list[int] = []
        self.has_header = has_header
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, line: int, record: Mapping[str, Value]) -> None:
        """One record; fields it brings are missing in all before, fields it lacks are in it."""
        for name, value in record.items():
            for text in (name, value):
                if text is not None and not text.isascii() and _has_surrogate(text):
                    raise BadLine(
                        f"{_shown(name)} holds half of a surrogate pair, which is no character"
                    )
        for name in record.keys() - self.columns.keys():
            self.shared[name] = {}
        for name, value in record.items():
            column = self.columns.get(name)
            if column is None:
                column = self.columns[name] = [None] * len(self.lines)
            column.append(self._shared(name, value))
        self.lines.append(line)
        if len(record) < len(self.columns):
            for column in self.columns.values():
                if len(column) < len(self.lines):
                    column.append(None)

    def extend(self, lines: list[int], columns: Sequence[Sequence[Value]]) -> None:
        """Records of a block, one column for every field."""
        self.lines += lines
        for (name, column), values in zip(self.columns.items(), columns, strict=True):
            if len(self.shared[name]) < _MOST_SHARED:
                column.extend(self._shared(name, value) for value in values)
            else:
                column.extend(values)

    def records(self, name: str, format: str, notes: Iterable[str]) -> Records:
        return Records(name, format, self.columns, self.columns.values(), self.lines, notes)

    def _shared(self, name: str, value: Value) -> Value:
        memory = self.shared[name]
        if value is None or len(memory) >= _MOST_SHARED:
            return value
        return memory.setdefault(value, value)


def _scalar_text(value: Any) -> Value:
    """Text of a value in a mapping."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise TypeError(f"a value is text, a number, a boolean or None, not {type(value).__name__}")


def _shown(name: str) -> str:
    """A field's name for a message: one printable line, whatever the name holds."""
    text = ascii(name)[1:-1]
    return text if len(text) <= 60 else f"{text[:60]}…"


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def write_csv(records: Records, file: IO[bytes]) -> None:
    """Write records as RFC 4180 in UTF-8: commas, CRLF, quotes where they are needed.

    A missing value is an empty cell, an empty text "" in quotes, and all names are quoted, so that
    `read_records` makes the same records of the file; only a field with an empty name comes back
    with a name of its own.
    """

    def cell(value: Value) -> str:
        if value is None:
            return ""
        if value and not needs_quotes(value):
            return value
        return quoted(value)

    def quoted(value: str) -> str:
        return '"' + value.replace('"', '""') + '"'

    needs_quotes = re.compile('[",\r\n]|^[ \ufeff]').search
    file.write((",".join(map(quoted, records.names)) + "\r\n").encode())
    for start in range(0, len(records), _PART):
        part = [map(cell, column[start : start + _PART]) for column in records.columns]
        rows = (",".join(row) for row in zip(*part, strict=True))
        file.write("".join(f"{row}\r\n" for row in rows).encode())
