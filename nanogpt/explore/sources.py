"""Files as lines of text, whatever they are packed or encoded in, and what is wrong in them."""

import contextlib
import gzip
import io
from collections.abc import Iterator
from typing import IO, cast

from nanogpt.errors import InputError

LONGEST_LINE_BYTES = 16 * 2**20
MOST_FIELDS = 2000
MOST_BAD = 0.1
_FOREIGN = {
    b"PK\x03\x04": "an Excel workbook or a zip archive",
    b"PAR1": "a Parquet file",
    b"%PDF": "a PDF document",
    b"SQLite format 3": "an SQLite database",
}
_BAD_SHOWN = 5
_HEAD_BYTES = 2**16
_SAMPLE_BYTES = 2**20
_SAMPLE_LINES = 1000


class BadLines:
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
        if self.count > MOST_BAD * (good + self.count):
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


class Source:
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
                if len(line) > LONGEST_LINE_BYTES:
                    raise InputError(
                        f"{self.name}, line {number:,}: the line is longer than "
                        f"{LONGEST_LINE_BYTES // 2**20} MB; a record must fit that"
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
        most = 1 + (LONGEST_LINE_BYTES if most_bytes is None else most_bytes)
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


def first_lines(lines: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """The first lines, taken from the iterator."""
    sample, size = [], 0
    for number, line in lines:
        sample.append((number, line))
        size += len(line)
        if size >= _SAMPLE_BYTES or len(sample) >= _SAMPLE_LINES:
            break
    return sample


def too_many_fields(name: str, line: int, fields: int) -> InputError:
    return InputError(f"{name}, line {line:,}: {fields:,} fields are more than {MOST_FIELDS:,}")
