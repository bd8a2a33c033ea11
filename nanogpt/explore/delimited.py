"""Tables whose fields are separated by commas, semicolons, tabs or bars.

Records are framed here, so that each knows its line and a bad one spoils no other; the cells of
whole blocks are then taken apart by pyarrow.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.csv

from nanogpt.errors import InputError
from nanogpt.explore.records import Table, Value
from nanogpt.explore.sources import (
    LONGEST_LINE_BYTES,
    MOST_FIELDS,
    BadLines,
    Source,
    first_lines,
    too_many_fields,
)

_DELIMITERS = (b",", b";", b"\t", b"|")
_DELIMITER_NAMES = {b",": "commas", b";": "semicolons", b"\t": "tabs", b"|": "bars"}
_BLOCK_BYTES = 4 * 2**20

_NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+(?:[.,][0-9]*)?|[.,][0-9]+)(?:[eE][+-]?[0-9]+)?%?\s*")


@dataclass(frozen=True)
class Dialect:
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


def _frames(lines: Iterable[tuple[int, bytes]], dialect: Dialect) -> Iterator[_Frame]:
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
        elif size > LONGEST_LINE_BYTES:
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


def find_dialect(sample: Sequence[tuple[int, bytes]], preferred: bytes) -> Dialect:
    """The delimiter and the quote under which most records have as many fields as the first."""
    order = (preferred, *(one for one in _DELIMITERS if one != preferred))

    def merit(dialect: Dialect) -> tuple[bool, float]:
        return dialect.fields > 1, dialect.agreement

    def best(delimiter: bytes) -> Dialect:
        # Where quotes as letters explain the rows as well, they are letters.
        quotes = _possible_quotes(sample, delimiter)
        found = [_measure(sample, Dialect(delimiter, quote)) for quote in quotes]
        return max(found, key=lambda d: (*merit(d), d.fields > 1 and d.quote is None))

    return max(map(best, order), key=merit)


def _measure(sample: Sequence[tuple[int, bytes]], dialect: Dialect) -> Dialect:
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


def read_table(source: Source, bad: BadLines, format: str, header: bool | None) -> Table:
    lines = source.lines()
    sample = first_lines(lines)
    usual = b"\t" if format == "tsv" else b","
    dialect = find_dialect(sample, usual)
    frames = [frame for frame in _frames(sample, dialect) if frame.content.strip(b" ")]
    if not frames:
        return Table()
    first, *below = frames
    if not first.closed:
        raise _never_closed(source.name, first.line)
    if first.stray:
        raise InputError(
            f"{source.name}, line {first.line:,}: a carriage return stands outside quotes"
        )
    if first.fields > MOST_FIELDS:
        raise too_many_fields(source.name, first.line, first.fields)
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
    table = Table(names, has_header=header)
    _read_rows(itertools.chain(sample, lines), dialect, first, header, bad, table)
    return table


def _read_rows(
    lines: Iterable[tuple[int, bytes]],
    dialect: Dialect,
    first: _Frame,
    header: bool,
    bad: BadLines,
    table: Table,
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


def _cells(contents: Sequence[bytes], dialect: Dialect, width: int) -> list[list[Value]]:
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
    first: _Frame, cells: Sequence[Value], below: Sequence[_Frame], dialect: Dialect
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


def _names(source: Source, line: int, cells: Sequence[Value], header: bool) -> list[str]:
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
        f"{LONGEST_LINE_BYTES // 2**20} MB"
    )
