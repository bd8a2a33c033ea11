"""Records of tables, logs and texts: files read as text, and a serialisation that loses nothing.

A value is text exactly as it is written, or None where it is missing: leading zeros, spaces and the
word "None" stay what they are, and an empty text is not a missing one.

    a cell of a table    empty and unquoted: missing; "" in quotes: empty
    a key of an object   absent, null or NaN: missing; numbers and booleans are their JSON text
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.csv

from nanogpt.errors import InputError, UsageError

Value = str | None

FORMATS = ("csv", "tsv", "jsonl", "txt")
BAD_LINES = ("skip", "fill", "error")
TEXT_FIELD = "text"

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".text": "txt",
    ".log": "txt",
}
_FOREIGN = {
    b"PK\x03\x04": "an Excel workbook or a zip archive",
    b"PAR1": "a Parquet file",
    b"%PDF": "a PDF document",
    b"SQLite format 3": "an SQLite database",
}
_DELIMITERS = (b",", b";", b"\t", b"|")
_DELIMITER_NAMES = {b",": "commas", b";": "semicolons", b"\t": "tabs", b"|": "bars"}
_LONGEST_LINE_BYTES = 16 * 2**20
_LARGEST_ARRAY_BYTES = 128 * 2**20
_MOST_FIELDS = 2000
_MOST_BAD = 0.1
_BAD_SHOWN = 5
_HEAD_BYTES = 2**16
_SAMPLE_BYTES = 2**20
_SAMPLE_LINES = 1000
_BLOCK_BYTES = 4 * 2**20
# Values of a field are shared in memory while no more than these differ.
_MOST_SHARED = 10_000

_NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+(?:[.,][0-9]*)?|[.,][0-9]+)(?:[eE][+-]?[0-9]+)?%?\s*")
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


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
        table = _Table()
        for number, row in enumerate(rows, 1):
            try:
                table.add(number, {str(key): _scalar_text(value) for key, value in row.items()})
            except (TypeError, _BadLine) as error:
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
            for start in range(0, len(values), _HEAD_BYTES):
                part = values[start : start + _HEAD_BYTES]
                sizes = [-1 if value is None else len(value) for value in part]
                digest.update(np.array(sizes, np.int64).tobytes())
                joined = "".join(value for value in part if value is not None)
                digest.update(joined.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def read_records(
    path: str | Path,
    format: str | None = None,
    *,
    header: bool | None = None,
    bad_lines: str = "skip",
) -> Records:
    """The records of a file, in its order.

    Tables (RFC 4180) may be separated by commas, semicolons, tabs or bars and quoted with " or ';
    which of them is found out. The first row names the fields; where it looks like data the fields
    are called column_1 and so on, as is a field whose name is empty. A blank line is no record,
    except in a table of one field, where it is a missing value.
    JSON holds an object a line, or one array of objects; objects inside objects become fields
    `a.b`, lists their JSON text. A text holds a record a line, blank ones left out.
    UTF-8, UTF-16 with its mark, gzip, and line ends LF, CRLF and CR are understood.

    Args:
        path: a file.
        format: "csv" | "tsv" | "jsonl" | "txt"; None goes by the ending of the name, and by the
            content where the ending is unknown, which a note then says.
        header: whether the first row of a table names the fields; None finds out.
        bad_lines: what to do with a row of too few or too many values, or a line that is not a JSON
            object: "skip" leaves it out and says so in a note; "fill" completes a row of too few
            values with missing ones and leaves out the others; "error" refuses the file.
    Raises: UsageError for another `format` or `bad_lines`; InputError naming the file and the line:
        nothing there, no records, not text, not UTF-8, a line of more than 16 MB, a name that
        stands twice in the header, more than a tenth of the lines bad.
    """
    if format is not None and format not in FORMATS:
        raise UsageError(f"the format is one of {', '.join(FORMATS)}, not {format!r}")
    if bad_lines not in BAD_LINES:
        raise UsageError(f"bad_lines is one of {', '.join(BAD_LINES)}, not {bad_lines!r}")
    source = _Source(str(path))
    bad = _BadLines(source.name, bad_lines)
    try:
        if format is None:
            format = _format_by_name(source.name)
        if format is None:
            format = _format_by_content(source)
            source.notes.append(
                f"{source.name} has no ending that is known: it was read as {format}"
            )
        table = _READERS[format](source, bad, format, header)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InputError(f"{source.name} is a damaged gzip file") from None
    except FileNotFoundError:
        raise InputError(f"there is no file {source.name}") from None
    except IsADirectoryError:
        raise InputError(f"{source.name} is a folder: name a file in it") from None
    except OSError as error:
        raise InputError(f"cannot read {source.name}: {error.strerror or error}") from None
    bad.judge(len(table))
    if not len(table):
        what = (
            "holds a header and no records" if table.has_header else "is empty: it has no records"
        )
        raise InputError(f"{source.name} {what}")
    return table.records(source.name, format, (*source.notes, *table.notes, *bad.notes()))


class _BadLine(ValueError):
    """What is wrong with a line, in words."""


class _Table:
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
                    raise _BadLine(
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


class _BadLines:
    """Lines that are no records: how many, and which came first."""

    def __init__(self, name: str, policy: str) -> None:
        self.name = name
        self.policy = policy
        self.count = 0
        self.filled = 0
        self.first: list[tuple[int, str]] = []
        self.first_filled: list[int] = []

    def add(self, line: int, reason: str) -> None:
        if self.policy == "error":
            raise InputError(f"{self.name}, line {line:,}: {reason}")
        self.count += 1
        if len(self.first) < _BAD_SHOWN:
            self.first.append((line, reason))

    def fill(self, line: int) -> None:
        self.filled += 1
        if len(self.first_filled) < _BAD_SHOWN:
            self.first_filled.append(line)

    def judge(self, good: int) -> None:
        """Refuse a file of which too much is bad."""
        if self.count > _MOST_BAD * (good + self.count):
            line, reason = self.first[0]
            raise InputError(
                f"{self.name}, line {line:,}: {reason} "
                f"({self.count:,} of {good + self.count:,} records are bad)"
            )

    def notes(self) -> Iterator[str]:
        if self.count:
            where = "; ".join(f"line {line:,}: {reason}" for line, reason in self.first)
            more = "; …" if self.count > len(self.first) else ""
            what = "1 bad line was" if self.count == 1 else f"{self.count:,} bad lines were"
            yield f"{what} left out ({where}{more})"
        if self.filled:
            where = ", ".join(f"{line:,}" for line in self.first_filled)
            more = ", …" if self.filled > len(self.first_filled) else ""
            what = "1 short row was" if self.filled == 1 else f"{self.filled:,} short rows were"
            yield f"{what} completed with missing values (line {where}{more})"


class _Source:
    """A file as lines of UTF-8 text, whatever it is packed or encoded in."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.notes: list[str] = []

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Line numbers from 1, and lines with their ends; checked to be UTF-8 text."""
        with self.raw_lines() as lines:
            for number, line in enumerate(lines, 1):
                if b"\0" in line:
                    raise InputError(
                        f"{self.name}, line {number:,}: this is not text: it holds a zero byte"
                    )
                if len(line) > _LONGEST_LINE_BYTES:
                    raise InputError(
                        f"{self.name}, line {number:,}: the line is longer than "
                        f"{_LONGEST_LINE_BYTES // 2**20} MB; a record must fit that"
                    )
                yield number, line

    def text(self, most_bytes: int) -> str:
        """All of the file, if it is no larger than that once decoded."""
        parts, size = [], 0
        with self.raw_lines(most_bytes) as lines:
            for line in lines:
                size += len(line)
                if size > most_bytes:
                    raise InputError(
                        f"{self.name}: an array of more than {most_bytes // 2**20} MB does not "
                        f"fit: write one object a line instead (.jsonl)"
                    )
                parts.append(line)
        raw = b"".join(parts)
        if b"\0" in raw:
            raise InputError(f"{self.name}: this is not text: it holds a zero byte")
        return raw.decode()

    @contextlib.contextmanager
    def raw_lines(self, most_bytes: int | None = None) -> Iterator[Iterator[bytes]]:
        """Lines as UTF-8, the rest of one that is longer than allowed as the next."""
        most = 1 + (_LONGEST_LINE_BYTES if most_bytes is None else most_bytes)
        with self._open() as file:
            head = file.read(_HEAD_BYTES)
            file.seek(0)
            for magic, what in _FOREIGN.items():
                if head.startswith(magic):
                    raise InputError(f"{self.name} is {what}: export it as CSV (.csv) first")
            utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
            shown = head.decode("utf-16", "ignore") if utf16 else head.decode("latin-1")
            old_ends = "\r" in shown and "\n" not in shown
            if not utf16 and not old_ends:
                yield self._utf8_lines(file, head, most)
                return
            encoding = "utf-16" if utf16 else "utf-8-sig"
            # surrogateescape brings what is not UTF-8 to the line on which it stands.
            errors = "strict" if utf16 else "surrogateescape"
            newline = None if old_ends else "\n"
            with io.TextIOWrapper(file, encoding, errors, newline) as wrapped:
                yield self._wrapped_lines(wrapped, most)

    def _open(self) -> IO[bytes]:
        with open(self.name, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return cast(IO[bytes], gzip.open(self.name)) if packed else open(self.name, "rb")

    def _utf8_lines(self, file: IO[bytes], head: bytes, most: int) -> Iterator[bytes]:
        line = file.readline(most).removeprefix(b"\xef\xbb\xbf")
        number = 1
        while line:
            # Where a line was cut short, so may its last character be.
            if not line.isascii() and len(line) < most and not _is_utf8(line):
                raise self._not_text(number, "UTF-8", b"\0" in head)
            yield line
            line = file.readline(most)
            number += 1

    def _wrapped_lines(self, wrapped: io.TextIOWrapper, most: int) -> Iterator[bytes]:
        number = 1
        try:
            while line := wrapped.readline(most):
                yield line.encode()
                number += 1
        except UnicodeEncodeError:
            raise self._not_text(number, "UTF-8", False) from None
        except UnicodeDecodeError:
            raise self._not_text(number, "UTF-16", False) from None

    def _not_text(self, line: int, encoding: str, binary: bool) -> InputError:
        what = "text: it holds zero bytes" if binary else f"{encoding} text; save the file as UTF-8"
        return InputError(f"{self.name}, line {line:,}: this is not {what}")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _format_by_name(name: str) -> str | None:
    """The format that the ending tells, a .gz left aside."""
    path = Path(name)
    if path.suffix.lower() == ".gz":
        path = path.with_suffix("")
    return _SUFFIXES.get(path.suffix.lower())


def _format_by_content(source: _Source) -> str:
    """The format that the first lines are best explained by."""
    sample = _sample(source.lines())
    first = next((line.strip() for _, line in sample if line.strip()), b"")
    if first.startswith(b"{"):
        return "jsonl"
    if re.match(rb"\[\s*(\{|$)", first):
        return "jsonl"
    dialect = _find_dialect(sample, b",")
    if dialect.fields > 1 and dialect.agreement >= 1 - _MOST_BAD and len(sample) > 1:
        return "tsv" if dialect.delimiter == b"\t" else "csv"
    return "txt"


def _sample(lines: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """The first lines, taken from the iterator."""
    sample, size = [], 0
    for number, line in lines:
        sample.append((number, line))
        size += len(line)
        if size >= _SAMPLE_BYTES or len(sample) >= _SAMPLE_LINES:
            break
    return sample


# Tables. Records are framed here, so that each knows its line and a bad one spoils no other; the
# cells of whole blocks are then taken apart by pyarrow.


@dataclass(frozen=True)
class _Dialect:
    delimiter: bytes
    quote: bytes | None
    fields: int = 0  # of the first record
    agreement: float = 0.0  # share of the records seen that have as many


class _Frame(NamedTuple):
    """A record of a table, not yet taken apart.

    line: where it begins. content: its bytes, without the last line end. fields: how many; quoted:
    how many of them are quoted. stray: a carriage return stands outside quotes. closed: its last
    quote is.
    """

    line: int
    content: bytes
    fields: int
    quoted: int
    stray: bool
    closed: bool


def _frames(lines: Iterable[tuple[int, bytes]], dialect: _Dialect) -> Iterator[_Frame]:
    """The records of lines; one whose quote is never closed comes last and not closed."""
    delimiter, quote = dialect.delimiter, dialect.quote
    pieces: list[bytes] = []
    begins = fields = quoted = size = 0
    stray = is_open = False
    for number, line in lines:
        content = line.removesuffix(b"\n").removesuffix(b"\r")
        if not is_open:
            if quote is None or quote not in content:
                yield _Frame(
                    number, content, content.count(delimiter) + 1, 0, b"\r" in content, True
                )
                continue
            pieces, begins, fields, quoted, size, stray = [], number, 1, 0, 0, False
        delimiters, quotes, cr, is_open = _scan(content, delimiter, quote or b"", is_open)
        fields, quoted, stray = fields + delimiters, quoted + quotes, stray or cr
        pieces.append(line if is_open else content)
        size += len(line)
        if not is_open:
            yield _Frame(begins, b"".join(pieces), fields, quoted, stray, True)
        elif size > _LONGEST_LINE_BYTES:
            break
    if is_open:
        yield _Frame(begins, b"".join(pieces), fields, quoted, stray, False)


def _scan(
    content: bytes, delimiter: bytes, quote: bytes, is_open: bool
) -> tuple[int, int, bool, bool]:
    """Delimiters, quotes opened and stray carriage returns of a line, and whether a quote is open
    at its end. A quote is one only where a field begins."""
    at = delimiters = quotes = 0
    stray = False
    if not is_open and content.startswith(quote):
        at, quotes, is_open = 1, 1, True
    while True:
        while is_open:
            at = content.find(quote, at) + 1
            if not at:
                return delimiters, quotes, stray, True
            if content.startswith(quote, at):
                at += 1
            else:
                is_open = False
        end = content.find(delimiter, at)
        stray = stray or content.find(b"\r", at, None if end < 0 else end) >= 0
        if end < 0:
            return delimiters, quotes, stray, False
        delimiters, at = delimiters + 1, end + 1
        if content.startswith(quote, at):
            at, quotes, is_open = at + 1, quotes + 1, True


def _find_dialect(sample: Sequence[tuple[int, bytes]], preferred: bytes) -> _Dialect:
    """The delimiter and the quote under which most records have as many fields as the first."""
    order = (preferred, *(one for one in _DELIMITERS if one != preferred))

    def merit(dialect: _Dialect) -> tuple[bool, float]:
        return dialect.fields > 1, dialect.agreement

    def best(delimiter: bytes) -> _Dialect:
        # Where quotes as letters explain the rows as well, they are letters.
        quotes = _possible_quotes(sample, delimiter)
        found = [_measure(sample, _Dialect(delimiter, quote)) for quote in quotes]
        return max(found, key=lambda d: (*merit(d), d.fields > 1 and d.quote is None))

    return max(map(best, order), key=merit)


def _measure(sample: Sequence[tuple[int, bytes]], dialect: _Dialect) -> _Dialect:
    frames = [frame for frame in _frames(sample, dialect) if frame.content.strip(b" ")]
    if not frames:
        return dialect
    fields = frames[0].fields
    # What an open quote swallows are lines that do not agree.
    lost = 0 if frames[-1].closed else frames[-1].content.count(b"\n")
    agreeing = sum(frame.closed and frame.fields == fields for frame in frames)
    return replace(dialect, fields=fields, agreement=agreeing / (len(frames) + lost))


def _possible_quotes(
    sample: Sequence[tuple[int, bytes]], delimiter: bytes
) -> tuple[bytes | None, ...]:
    """Quotes that the lines speak for: " unless fields are wrapped in ' alone, none where most
    fields that begin with " do not end with it."""
    begun, wrapped = _quote_marks(sample, delimiter, b'"')
    if begun:
        return (b'"', None) if begun > 1 and 2 * wrapped < begun else (b'"',)
    _, single = _quote_marks(sample, delimiter, b"'")
    filled = sum(bool(line.strip()) for _, line in sample)
    return (b"'",) if single and single >= filled - 1 else (b'"',)


def _quote_marks(
    sample: Sequence[tuple[int, bytes]], delimiter: bytes, quote: bytes
) -> tuple[int, int]:
    """Fields that begin with a quote, and those of them that also end with it."""
    d, q = re.escape(delimiter), re.escape(quote)
    within = rb"[^" + q + rb"]*(?:" + q + q + rb"[^" + q + rb"]*)*"
    ends = rb"(" + q + rb"(?=" + d + rb"|\r?\n|\r?\Z))?"
    field = re.compile(rb"(?:^|(?<=" + d + rb"))" + q + within + ends, re.MULTILINE)
    found = field.findall(b"".join(line for _, line in sample))
    return len(found), sum(bool(end) for end in found)


def _read_table(source: _Source, bad: _BadLines, format: str, header: bool | None) -> _Table:
    lines = source.lines()
    sample = _sample(lines)
    usual = b"\t" if format == "tsv" else b","
    dialect = _find_dialect(sample, usual)
    frames = [frame for frame in _frames(sample, dialect) if frame.content.strip(b" ")]
    if not frames:
        return _Table()
    first, *below = frames
    if not first.closed:
        raise _never_closed(source.name, first.line)
    if first.stray:
        raise InputError(
            f"{source.name}, line {first.line:,}: a carriage return stands outside quotes"
        )
    if first.fields > _MOST_FIELDS:
        raise _too_many_fields(source.name, first.line, first.fields)
    cells = [column[0] for column in _cells([first.content], dialect, first.fields)]
    if header is None:
        good = [f for f in below if f.closed and not f.stray and f.fields == first.fields]
        header = not _is_data(first, cells, good, dialect)
        if not header:
            source.notes.append(
                f"line {first.line:,} looks like data, so the fields are called column_1 and so "
                f"on: add a row of names if that is wrong"
            )
    names = _names(source, first.line, cells if header else [None] * len(cells), header)
    if first.fields == 1:
        source.notes.append("one field was found")
    elif dialect.delimiter != usual:
        source.notes.append(f"fields are separated by {_DELIMITER_NAMES[dialect.delimiter]}")
    if dialect.quote == b"'":
        source.notes.append("fields are quoted with '")
    elif dialect.quote is None:
        source.notes.append('quotation marks (") are part of the values')
    table = _Table(names, has_header=header)
    _read_rows(itertools.chain(sample, lines), dialect, first, header, bad, table)
    return table


def _read_rows(
    lines: Iterable[tuple[int, bytes]],
    dialect: _Dialect,
    first: _Frame,
    header: bool,
    bad: _BadLines,
    table: _Table,
) -> None:
    """All rows into the table, block by block."""
    width = first.fields
    numbers: list[int] = []
    contents: list[bytes] = []
    size = blank = 0
    for frame in _frames(lines, dialect):
        line, content = frame.line, frame.content
        if line < first.line or (line == first.line and header):
            continue
        if not frame.closed:
            raise _never_closed(bad.name, line)
        if width > 1 and not content.strip(b" "):
            continue
        if frame.stray:
            bad.add(line, "a carriage return stands outside quotes")
            continue
        if header and content == first.content and frame.quoted < width and width > 1:
            bad.add(line, "the header stands there again")
            continue
        if frame.fields != width:
            if bad.policy != "fill" or frame.fields > width:
                values = "1 value" if frame.fields == 1 else f"{frame.fields:,} values"
                bad.add(line, f"{values} where there are {width:,} fields")
                continue
            content += dialect.delimiter * (width - frame.fields)
            bad.fill(line)
        blank += not content
        numbers.append(line)
        contents.append(content)
        size += len(content)
        if size >= _BLOCK_BYTES:
            table.extend(numbers, _cells(contents, dialect, width))
            numbers, contents, size = [], [], 0
    if contents:
        table.extend(numbers, _cells(contents, dialect, width))
    if blank:
        what = "1 blank line is" if blank == 1 else f"{blank:,} blank lines are"
        table.notes.append(f"{what} read as missing")


def _cells(contents: Sequence[bytes], dialect: _Dialect, width: int) -> list[list[Value]]:
    """Columns of values of well-formed records."""
    # A record of our own comes first, because pyarrow drops a byte order mark there.
    own = b"x" + dialect.delimiter * (width - 1)
    block = b"\n".join((own, *contents, b""))
    names = [f"f{place}" for place in range(width)]
    table = pyarrow.csv.read_csv(
        pa.BufferReader(block),
        read_options=pyarrow.csv.ReadOptions(
            use_threads=False, block_size=len(block) + 1, column_names=names
        ),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=dialect.delimiter.decode(),
            quote_char=dialect.quote.decode() if dialect.quote else False,
            double_quote=True,
            newlines_in_values=True,
            ignore_empty_lines=False,
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            check_utf8=False,
            column_types={name: pa.string() for name in names},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    if table.num_rows != len(contents) + 1:
        raise AssertionError(f"{len(contents)} records were framed, {table.num_rows - 1} read")
    return [column.to_numpy()[1:].tolist() for column in table.columns]


def _is_data(
    first: _Frame, cells: Sequence[Value], below: Sequence[_Frame], dialect: _Dialect
) -> bool:
    """Whether the first row is a record like those below it.

    It is where all its cells are numbers over numbers, or where its words stand again in their own
    columns; not where it alone is all in quotes, where it comes again as a whole, and where its
    cells count the columns.
    """
    width = first.fields
    if not below or any(frame.content == first.content for frame in below):
        return False
    if first.quoted == width and any(frame.quoted < width for frame in below):
        return False
    columns = _cells([frame.content for frame in below], dialect, width)
    numbers = words = repeated = 0
    for cell, column in zip(cells, columns, strict=True):
        if not cell:
            continue
        values = [value for value in column if value]
        numeric = sum(_NUMBER.fullmatch(value) is not None for value in values)
        if _NUMBER.fullmatch(cell) and 2 * numeric > len(values):
            numbers += 1
        else:
            words += 1
            repeated += cell in values
    if not words:
        counted = [cell for cell in cells if cell]
        counts = any(
            counted == [str(start + place) for place in range(len(counted))] for start in (0, 1)
        )
        return numbers > 0 and not (counts and len(counted) >= 3)
    if width == 1:
        return False
    return repeated > 0 if numbers else repeated == words


def _names(source: _Source, line: int, cells: Sequence[Value], header: bool) -> list[str]:
    """The names of the fields; those without one are called by their place."""
    given = Counter(cell for cell in cells if cell)
    twice = next((name for name, count in given.items() if count > 1), None)
    if twice is not None:
        raise InputError(
            f"{source.name}, line {line:,}: two fields are called {twice!r}: rename one of them"
        )
    names, made = [], []
    for place, cell in enumerate(cells, 1):
        name = cell or f"column_{place}"
        while not cell and name in given:
            name += "_"
        names.append(name)
        if not cell:
            made.append(name)
    if made and header:
        what = f"the field without a name is called {made[0]}"
        if len(made) > 1:
            what = f"the {len(made):,} fields without a name are called {', '.join(made[:5])}"
            what += " and so on" if len(made) > 5 else ""
        source.notes.append(what)
    return names


def _never_closed(name: str, line: int) -> InputError:
    return InputError(
        f"{name}, line {line:,}: a quotation mark is opened in this record and not closed within "
        f"{_LONGEST_LINE_BYTES // 2**20} MB"
    )


def _too_many_fields(name: str, line: int, fields: int) -> InputError:
    return InputError(f"{name}, line {line:,}: {fields:,} fields are more than {_MOST_FIELDS:,}")


class _Number(str):
    """A number, NaN or Infinity, in the digits of its file."""

    __slots__ = ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys must all differ."""
    made = dict(pairs)
    if len(made) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _BadLine(f"the key {key!r} stands twice in one object")
    return made


_JSON = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_Number, parse_float=_Number, parse_constant=_Number
)


def _read_json(source: _Source, bad: _BadLines, format: str, header: bool | None) -> _Table:
    table = _Table()
    not_numbers = 0
    for line, value in _json_values(source, bad):
        try:
            if isinstance(value, Exception):
                raise value
            if not isinstance(value, dict):
                raise _BadLine("this is JSON, but not an object")
            record: dict[str, Value] = {}
            not_numbers += _flatten(value, "", record)
            table.add(line, record)
        except (ValueError, RecursionError) as error:
            bad.add(line, _json_fault(error))
        if len(table.columns) > _MOST_FIELDS:
            raise _too_many_fields(source.name, line, len(table.columns))
    if not_numbers:
        table.notes.append(f"NaN is read as missing ({not_numbers:,} of them)")
    return table


def _json_values(source: _Source, bad: _BadLines) -> Iterator[tuple[int, Any]]:
    """Values and their lines; the exception in place of one that cannot be read."""
    lines = source.lines()
    if _is_array(source):
        yield from _array_values(source)
        return
    for number, line in lines:
        if line.strip():
            try:
                yield number, _JSON.decode(line.decode())
            except (ValueError, RecursionError) as error:
                yield number, error


def _is_array(source: _Source) -> bool:
    """Whether the first thing in the file is a bracket."""
    with source.raw_lines() as lines:
        for line in lines:
            if line.strip():
                return line.lstrip().startswith(b"[")
    return False


def _array_values(source: _Source) -> Iterator[tuple[int, Any]]:
    """Elements of the array that the file is."""
    text = source.text(_LARGEST_ARRAY_BYTES)
    line, counted = 1, 0

    def skip(at: int) -> int:
        nonlocal line, counted
        at = _JSON_SPACE.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        return at

    at = skip(0) + 1  # past the bracket
    at = skip(at)
    wanted = text[at : at + 1] != "]"
    while wanted:
        try:
            value, at = _JSON.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            # Nothing tells where the next element begins.
            at = error.pos if isinstance(error, json.JSONDecodeError) else at
            place = text.count("\n", 0, at) + 1
            raise InputError(f"{source.name}, line {place:,}: {_json_fault(error)}") from None
        yield line, value
        at = skip(at)
        mark = text[at : at + 1]
        if mark not in (",", "]"):
            raise InputError(f"{source.name}, line {line:,}: a comma or ] is wanted in the array")
        wanted = mark == ","
        if wanted:
            at = skip(at + 1)
    if skip(at + 1) < len(text):
        raise InputError(f"{source.name}, line {line:,}: there is more after the array has ended")


def _json_fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, _BadLine):
        return str(error)
    what = error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deep"
    return f"this is not JSON: {what}"


def _flatten(value: Mapping[str, Any], prefix: str, record: dict[str, Value]) -> int:
    """Put an object's fields into the record; how many of them are NaN."""
    not_numbers = 0
    for key, item in value.items():
        name = prefix + key
        if isinstance(item, dict) and item:
            not_numbers += _flatten(item, f"{name}.", record)
            continue
        if name in record:
            raise _BadLine(f"two values have the name {name!r} once objects are flattened")
        if isinstance(item, _Number) and item == "NaN":
            not_numbers += 1
            item = None
        record[name] = item if item is None else _json_text(item, nested=False)
    return not_numbers


def _json_text(value: Any, nested: bool = True) -> str:
    """A value as it stands in JSON; a text that is not nested stands without quotes."""
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if nested else value
    if isinstance(value, list):
        return f"[{', '.join(map(_json_text, value))}]"
    if isinstance(value, dict):
        pairs = (f"{_json_text(key)}: {_json_text(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    return json.dumps(value)


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


def _read_text(source: _Source, bad: _BadLines, format: str, header: bool | None) -> _Table:
    table = _Table([TEXT_FIELD])
    for number, line in source.lines():
        if line.strip():
            text = line.removesuffix(b"\n").removesuffix(b"\r").decode()
            table.extend([number], [[text]])
    return table


_READERS = {"csv": _read_table, "tsv": _read_table, "jsonl": _read_json, "txt": _read_text}


# What a model reads. Separators cannot occur in escaped text, so it splits without looking back.

FIELD_END = "\x1e"  # RS, after every field
NAME_END = "\x1f"  # US, between a name and its value
MISSING = "\x1a"  # SUB alone: the value is missing
_ESCAPE = "\x10"  # DLE before a letter: one of the four
_ESCAPED = {ord(mark): _ESCAPE + chr(ord(mark) + 0x40) for mark in "\x10\x1a\x1e\x1f"}
_UNESCAPED = {escape[1]: chr(mark) for mark, escape in _ESCAPED.items()}
_MARKS = re.compile("[\x10\x1a\x1e\x1f]")


def serialise(record: Mapping[str, Value]) -> str:
    """A record as one text, from which `parse` makes the same record again.

    Every field is its name, US (0x1F), its value and RS (0x1E). A missing value is SUB (0x1A)
    alone. Where one of these three or DLE (0x10) occurs in a name or a value, DLE and the letter
    0x40 above it stand in its place, as in caret notation: RS is DLE ^.
    """
    return "".join(
        f"{escape(name)}{NAME_END}{MISSING if value is None else escape(value)}{FIELD_END}"
        for name, value in record.items()
    )


def parse(text: str) -> dict[str, Value]:
    """The record that `serialise` made into a text, its fields in the same order.

    Raises: ValueError for a text that `serialise` makes of no record.
    """
    record: dict[str, Value] = {}
    *pairs, rest = text.split(FIELD_END)
    if rest:
        raise ValueError("the last field has no end")
    for pair in pairs:
        name, *values = pair.split(NAME_END)
        if len(values) != 1:
            raise ValueError(f"a field is one name and one value, not {len(values)} values")
        name = unescape(name)
        if name in record:
            raise ValueError(f"the field {name!r} stands there twice")
        record[name] = None if values[0] == MISSING else unescape(values[0])
    return record


def escape(text: str) -> str:
    """Text without DLE, SUB, RS and US, for one field of a serialised record."""
    return text.translate(_ESCAPED) if _MARKS.search(text) else text


def unescape(text: str) -> str:
    """What `escape` was given. Raises: ValueError where it never returns such a text."""
    if not _MARKS.search(text):
        return text
    first, *parts = text.split(_ESCAPE)
    if _MARKS.search(text.replace(_ESCAPE, "")):
        raise ValueError("a control character stands there unescaped")
    if any(part[:1] not in _UNESCAPED for part in parts):
        raise ValueError("an escape is followed by none of its letters")
    return first + "".join(_UNESCAPED[part[0]] + part[1:] for part in parts)


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
    for start in range(0, len(records), _HEAD_BYTES):
        part = [map(cell, column[start : start + _HEAD_BYTES]) for column in records.columns]
        rows = (",".join(row) for row in zip(*part, strict=True))
        file.write("".join(f"{row}\r\n" for row in rows).encode())
