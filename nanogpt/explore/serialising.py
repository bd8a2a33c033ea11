"""A record as one text that loses nothing: what a model reads.

Separators cannot occur in escaped text, so it splits without looking back.
"""

import re
from collections.abc import Mapping

from nanogpt.explore.records import Value

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
