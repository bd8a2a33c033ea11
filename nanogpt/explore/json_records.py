"""JSON objects, one a line or in one array, as records."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from nanogpt.errors import InputError
from nanogpt.explore.records import BadLine, Table, Value
from nanogpt.explore.sources import MOST_FIELDS, BadLines, Source, too_many_fields

_LARGEST_ARRAY_BYTES = 128 * 2**20
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


class _Number(str):
    """A number, NaN or Infinity, in the digits of its file."""

    __slots__ = ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys must all differ."""
    made = dict(pairs)
    if len(made) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise BadLine(f"the key {key!r} stands twice in one object")
    return made


_JSON = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_Number, parse_float=_Number, parse_constant=_Number
)


def read_json(source: Source, bad: BadLines, format: str, header: bool | None) -> Table:
    table = Table()
    not_numbers = 0
    for line, value in _json_values(source, bad):
        try:
            if isinstance(value, Exception):
                raise value
            if not isinstance(value, dict):
                raise BadLine("this is JSON, but not an object")
            record: dict[str, Value] = {}
            not_numbers += _flatten(value, "", record)
            table.add(line, record)
        except (ValueError, RecursionError) as error:
            bad.add(line, _json_fault(error))
        if len(table.columns) > MOST_FIELDS:
            raise too_many_fields(source.name, line, len(table.columns))
    if not_numbers:
        table.notes.append(f"NaN is read as missing ({not_numbers:,} of them)")
    return table


def _json_values(source: Source, bad: BadLines) -> Iterator[tuple[int, Any]]:
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


def _is_array(source: Source) -> bool:
    """Whether the first thing in the file is a bracket."""
    with source.raw_lines() as lines:
        for line in lines:
            if line.strip():
                return line.lstrip().startswith(b"[")
    return False


def _array_values(source: Source) -> Iterator[tuple[int, Any]]:
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
    if isinstance(error, BadLine):
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
            raise BadLine(f"two values have the name {name!r} once objects are flattened")
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
