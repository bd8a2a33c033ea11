"""Writes unicode_tables.h: which characters are letters, numbers and white space.

python csrc/engine/make_unicode_tables.py > csrc/engine/unicode_tables.h

GPT-2's pre-tokenisation rests on \\p{L}, \\p{N} and \\s. What they hold depends on the version of
Unicode inside the library `tokenizers`, which is not Python's; so the library itself is asked about
every code point. Which characters Python prints as they are (repr) comes from Python.
"""

import sys
import unicodedata
from collections.abc import Iterator

from tokenizers import pre_tokenizers

OTHER, LETTER, NUMBER, SPACE = range(4)
SURROGATES = range(0xD800, 0xE000)
CODE_POINTS = [code for code in range(sys.maxunicode + 1) if code not in SURROGATES]

HEADER = """\
// Made by make_unicode_tables.py from tokenizers and Python; do not edit.
// clang-format off
#pragma once

#include <cstdint>

namespace nanogpt {

"""


def character_classes() -> list[int]:
    """The class of every code point, as the library's pre-tokenizer treats it.

    All code points in order are one text. But for a space at its beginning a piece of it holds
    characters of one class only, so asking about each piece's last character is enough.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str

    def class_of(character: str) -> int:
        for before, kind in (("a", LETTER), ("1", NUMBER), ("!", OTHER)):
            if len(split(before + character)) == 1:
                return kind
        return SPACE

    classes = [OTHER] * (sys.maxunicode + 1)
    text = "".join(map(chr, CODE_POINTS))
    for _, (start, end) in split(text):
        kind = class_of(text[end - 1])
        for character in text[start:end]:
            classes[ord(character)] = class_of(character) if character == " " else kind
    return classes


def first_code_points(values: list[int]) -> Iterator[tuple[int, int]]:
    """Every code point at which the value changes, with the value from there on."""
    last = None
    for code in CODE_POINTS:
        if values[code] != last:
            yield code, values[code]
        last = values[code]


def array(name: str, numbers: list[int]) -> str:
    """A C++ array of 32-bit numbers, a dozen a line."""
    lines = (
        ",".join(f"{number:#x}" for number in numbers[at : at + 12])
        for at in range(0, len(numbers), 12)
    )
    body = ",\n".join(lines)
    return f"inline constexpr uint32_t {name}[] = {{\n{body}}};\n"


def class_table() -> str:
    """Where the class changes: code point * 4 + class."""
    changes = first_code_points(character_classes())
    return (
        "// From which code point on (in the upper bits) characters are other (0), letters (1),\n"
        "// numbers (2) or white space (3).\n"
    ) + array("kCharacterClasses", [code * 4 + kind for code, kind in changes])


def printable_table() -> str:
    """Where str.isprintable changes, first to False at 0."""
    values = [int(chr(code).isprintable()) for code in range(sys.maxunicode + 1)]
    changes = [code for code, _ in first_code_points(values)]
    return (
        f"// Unicode {unicodedata.unidata_version}, Python's: characters that repr escapes begin at"
        " the even\n// places, those that it prints at the odd ones.\n"
    ) + array("kPrintable", changes)


def main() -> None:
    end = "\n}  // namespace nanogpt\n"
    print(HEADER + class_table() + "\n" + printable_table() + end, end="")


if __name__ == "__main__":
    main()
