"""Files of records, whichever of the formats they are in.

a cell of a table    empty and unquoted: missing; "" in quotes: empty
a key of an object   absent, null or NaN: missing; numbers and booleans are their JSON text
"""

import gzip
import re
import zlib
from pathlib import Path

from nanogpt.errors import InputError, UsageError
from nanogpt.explore.delimited import find_dialect, read_table
from nanogpt.explore.json_records import read_json
from nanogpt.explore.records import TEXT_FIELD, Records, Table
from nanogpt.explore.sources import MOST_BAD, BadLines, Source, first_lines

FORMATS = ("csv", "tsv", "jsonl", "txt")
BAD_LINES = ("skip", "fill", "error")
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
    source = Source(str(path))
    bad = BadLines(source.name, bad_lines)
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


def _format_by_name(name: str) -> str | None:
    """The format that the ending tells, a .gz left aside."""
    path = Path(name)
    if path.suffix.lower() == ".gz":
        path = path.with_suffix("")
    return _SUFFIXES.get(path.suffix.lower())


def _format_by_content(source: Source) -> str:
    """The format that the first lines are best explained by."""
    sample = first_lines(source.lines())
    first = next((line.strip() for _, line in sample if line.strip()), b"")
    if first.startswith(b"{"):
        return "jsonl"
    if re.match(rb"\[\s*(\{|$)", first):
        return "jsonl"
    dialect = find_dialect(sample, b",")
    if dialect.fields > 1 and dialect.agreement >= 1 - MOST_BAD and len(sample) > 1:
        return "tsv" if dialect.delimiter == b"\t" else "csv"
    return "txt"


def _read_text(source: Source, bad: BadLines, format: str, header: bool | None) -> Table:
    table = Table([TEXT_FIELD])
    for number, line in source.lines():
        if line.strip():
            text = line.removesuffix(b"\n").removesuffix(b"\r").decode()
            table.extend([number], [[text]])
    return table


_READERS = {"csv": read_table, "tsv": read_table, "jsonl": read_json, "txt": _read_text}
