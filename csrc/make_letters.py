"""Write engine/letters.cpp from this Python's Unicode tables: python csrc/make_letters.py

The tables are part of the repository, so that the engine is built without Python; run this again
for a newer Unicode.
"""

import sys
import unicodedata
from pathlib import Path


def word_ranges() -> list[tuple[int, int]]:
    """First and last code point of every run that `\\w` matches."""
    ranges: list[tuple[int, int]] = []
    for code in range(sys.maxunicode + 1):
        if chr(code).isalnum() or chr(code) == "_":
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1] = (ranges[-1][0], code)
            else:
                ranges.append((code, code))
    return ranges


def fold_runs() -> list[tuple[int, int, int, int]]:
    """(first, last, stride, delta): code points first, first + stride, … last fold to code + delta.

    Only foldings to one character; the code points of a run come in ascending order.
    """
    runs: list[tuple[int, int, int, int]] = []
    for code in range(sys.maxunicode + 1):
        folded = chr(code).casefold()
        if len(folded) != 1 or ord(folded) == code:
            continue
        delta = ord(folded) - code
        if runs:
            first, last, stride, last_delta = runs[-1]
            step = code - last
            if delta == last_delta and step <= 2 and (first == last or step == stride):
                runs[-1] = (first, code, step, delta)
                continue
        runs.append((code, code, 1, delta))
    return runs


def rows(items: list[str], per_row: int) -> str:
    """Table entries, a few on a line."""
    lines = [", ".join(items[i : i + per_row]) for i in range(0, len(items), per_row)]
    return "".join(f"    {line},\n" for line in lines)


def source() -> str:
    """The text of letters.cpp."""
    words = [f"{{0x{a:X}, 0x{b:X}}}" for a, b in word_ranges()]
    folds = [f"{{0x{a:X}, 0x{b:X}, {stride}, {d}}}" for a, b, stride, d in fold_runs()]
    return f"""\
// Made by csrc/make_letters.py from Unicode {unicodedata.unidata_version}.
#include "engine/letters.h"

#include <algorithm>
#include <iterator>

namespace nanogpt {{
namespace {{

struct Range {{
  uint32_t first, last;
}};

// Code points first, first + stride, ... last fold to code + delta.
struct FoldRun {{
  uint32_t first, last, stride;
  int32_t delta;
}};

// clang-format off
constexpr Range kWords[] = {{
{rows(words, 5)}}};

constexpr FoldRun kFolds[] = {{
{rows(folds, 4)}}};
// clang-format on

template <class Item>
const Item* find(const Item* begin, const Item* end, uint32_t code) {{
  const Item* after = std::upper_bound(
      begin, end, code, [](uint32_t value, const Item& item) {{ return value < item.first; }});
  return after != begin && code <= (after - 1)->last ? after - 1 : nullptr;
}}

}}  // namespace

bool is_word_character(uint32_t code) {{
  if (code < 0x80) {{
    const uint32_t lower = code | 0x20;
    return (lower >= 'a' && lower <= 'z') || (code >= '0' && code <= '9') || code == '_';
  }}
  return find(std::begin(kWords), std::end(kWords), code) != nullptr;
}}

uint32_t folded(uint32_t code) {{
  if (code < 0x80) return code >= 'A' && code <= 'Z' ? code + 0x20 : code;
  const FoldRun* run = find(std::begin(kFolds), std::end(kFolds), code);
  if (!run || (code - run->first) % run->stride != 0) return code;
  return static_cast<uint32_t>(static_cast<int64_t>(code) + run->delta);
}}

std::vector<uint32_t> unfolded(uint32_t code) {{
  std::vector<uint32_t> forms;
  if (folded(code) == code) forms.push_back(code);
  for (const FoldRun& run : kFolds) {{
    const int64_t form = static_cast<int64_t>(code) - run.delta;
    if (form < run.first || form > run.last) continue;
    if (folded(static_cast<uint32_t>(form)) == code) forms.push_back(static_cast<uint32_t>(form));
  }}
  return forms;
}}

}}  // namespace nanogpt
"""


if __name__ == "__main__":
    path = Path(__file__).parent / "engine" / "letters.cpp"
    path.write_text(source(), encoding="utf-8")
    print(f"wrote {path}")
