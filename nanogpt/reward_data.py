"""Rewarded texts: files of records, and what to know about them before training.

Three formats, by the ending of the name: `.jsonl`, `.csv`, and lines `text|reward` for any other.
"""

import csv
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.errors import InputError

# What float() takes beyond this (1_000, digits of other scripts) is a slip, not a reward.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_STRONG_CORRELATION = 0.3
_SMALL_P = 1e-3
_OUTLIER_SHARE = 0.5
_LEAST_RECORDS = 10
_FEW_VALUES = 10
_BINS = 20
_WIDEST_CSV_FIELD = 2**31 - 1


@dataclass(frozen=True)
class RewardRecord:
    """A text and how good it is.

    Attributes:
        completion: what is learnt; the whole text where there is no prompt. Never empty.
        reward: finite.
        prompt: what it answers; read, not learnt.
        group: records that are compared with each other, by name; None without one.
        line: where it begins in its file, from 1; 0 for a record of no file.
    """

    completion: str
    reward: float
    prompt: str = ""
    group: str | None = None
    line: int = 0

    @property
    def text(self) -> str:
        """Prompt and completion."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Finding:
    """One thing to know about the records before they are trained on.

    Attributes:
        name: "rewards" | "constant" | "duplicates" | "contradictions" | "length" | "outlier" |
            "context" | "groups".
        serious: a warning; otherwise a note.
        message: one sentence for the user.
        values: its figures, JSON-ready.
    """

    name: str
    serious: bool
    message: str
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


class _BadLine(ValueError):
    """What is wrong with a line, in words."""


def read_reward_data(path: str | Path) -> list[RewardRecord]:
    """The records of a file, in its order.

    Lines are `text|reward`, split at the last bar; all spaces of the text are kept, blank lines are
    skipped. `.jsonl` holds an object a line and `.csv` (RFC 4180) a header and rows, both with
    "text", or "prompt" and "completion", and with "reward"; a "group" may be given. A byte order
    mark and CRLF are accepted.

    Args:
        path: a file, or "-" for lines on standard input.
    Raises: InputError naming the file, the first bad line and the number of bad ones: no bar, no
        column, an empty text, a reward that is not a finite decimal number; for a file that is
        missing, empty or not UTF-8.
    """
    name = "standard input" if str(path) == "-" else str(path)
    text = _read_text(path, name)
    rows, parse = _FORMATS.get(Path(name).suffix.lower(), (_lines, _bar_record))
    records: list[RewardRecord] = []
    bad: list[tuple[int, str]] = []
    for line, content in rows(text, name):
        try:
            records.append(parse(content, line))
        except _BadLine as error:
            bad.append((line, str(error)))
    if bad:
        line, reason = bad[0]
        more = f" ({len(bad):,} bad lines in all)" if len(bad) > 1 else ""
        raise InputError(f"{name}, line {line:,}: {reason}{more}")
    if not records:
        raise InputError(f"{name} is empty: it holds no rewarded text")
    return records


def record_groups(records: Sequence[RewardRecord]) -> list[str] | None:
    """The group of every record: the one it names, else its prompt; None where nothing is compared.

    Prompts make groups only where one of them stands twice: a record that is alone in its group
    has no advantage over anything.
    """
    if any(record.group is not None for record in records):
        return [record.prompt if record.group is None else record.group for record in records]
    prompts = [record.prompt for record in records]
    if any(prompts) and len(set(prompts)) < len(prompts):
        return prompts
    return None


def _read_text(path: str | Path, name: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no file {name}") from None
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}, line {line:,}: this is not UTF-8 text") from None


def _lines(text: str, name: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank. Only line feeds end them: texts may hold U+2028 and the like."""
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            yield line, content.removesuffix("\r")


def _bar_record(content: str, line: int) -> RewardRecord:
    text, bar, reward = content.rpartition("|")
    if not bar:
        raise _BadLine("there is no | before the reward: write text|reward")
    return _record({"text": text}, _decimal(reward), line)


def _json_record(content: str, line: int) -> RewardRecord:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else "too large or too deep"
        raise _BadLine(f"this is not JSON: {what}") from None
    if not isinstance(row, dict):
        raise _BadLine("a JSON object is wanted, with text and reward")
    if "reward" not in row:
        raise _BadLine('there is no "reward"')
    reward = row["reward"]
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        raise _BadLine(f'"reward" must be a number, not {json.dumps(reward)[:40]}')
    try:
        number = float(reward)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _BadLine(f"the reward must be finite, not {str(reward)[:40]}")
    return _record(row, number, line)


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, tuple[list[str], list[str]]]]:
    """Header and row, for every row, with the line on which it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(_WIDEST_CSV_FIELD)
    header: list[str] | None = None
    begins = 1
    try:
        for row in reader:
            line, begins = begins, reader.line_num + 1
            if not row or (len(row) == 1 and not row[0].strip()):
                continue
            if header is None:
                header = row
                _check_header(header, name, line)
            else:
                yield line, (header, row)
    except csv.Error as error:
        raise InputError(f"{name}, line {begins:,}: this is not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _check_header(header: list[str], name: str, line: int) -> None:
    twice = [column for column, count in Counter(header).items() if count > 1]
    if twice:
        raise InputError(f"{name}, line {line:,}: the column {twice[0]!r} stands there twice")
    try:
        _columns(set(header))
    except _BadLine as error:
        raise InputError(f"{name}, line {line:,}: {error}") from None
    if "reward" not in header:
        raise InputError(f"{name}, line {line:,}: there is no column reward")


def _csv_record(content: tuple[list[str], list[str]], line: int) -> RewardRecord:
    header, row = content
    if len(row) != len(header):
        raise _BadLine(f"{len(row)} columns, but the header has {len(header)}")
    columns: dict[str, Any] = dict(zip(header, row, strict=True))
    columns["group"] = columns.get("group") or None
    return _record(columns, _decimal(columns["reward"]), line)


def _columns(present: set[str]) -> bool:
    """Whether texts stand under prompt and completion, and not under text."""
    pair = {"prompt", "completion"} & present
    if "text" in present:
        if pair:
            raise _BadLine(f"there are both text and {min(pair)}: give one text, or both parts")
        return False
    if len(pair) < 2:
        raise _BadLine("there is neither text, nor prompt and completion")
    return True


def _record(row: dict[str, Any], reward: float, line: int) -> RewardRecord:
    pair = _columns(set(row))
    texts = {}
    for name in ("prompt", "completion") if pair else ("text",):
        value = row[name]
        if not isinstance(value, str):
            raise _BadLine(f"{name} must be a text, not {json.dumps(value)[:40]}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise _BadLine(f"{name} holds half of a surrogate pair, which is no character")
        texts[name] = value
    completion = texts["completion" if pair else "text"]
    if not completion:
        raise _BadLine(f"the {'completion' if pair else 'text'} is empty")
    group = row.get("group")
    if group is not None and (isinstance(group, bool) or not isinstance(group, str | int)):
        raise _BadLine(f"group must be a text or a whole number, not {json.dumps(group)[:40]}")
    group = None if group is None else str(group)
    return RewardRecord(completion, reward, texts.get("prompt", ""), group, line)


def _decimal(text: str) -> float:
    text = text.strip(" \t\r")
    if _NUMBER.fullmatch(text):
        value = float(text)
        if math.isfinite(value):
            return value
    elif not _NOT_FINITE.fullmatch(text):
        raise _BadLine(f"the reward {text[:40]!r} is not a number")
    raise _BadLine(f"the reward must be finite, not {text[:40]}")


_FORMATS: dict[str, tuple[Callable[..., Any], Callable[..., RewardRecord]]] = {
    ".jsonl": (_lines, _json_record),
    ".csv": (_csv_rows, _csv_record),
}


def check_reward_data(
    records: Sequence[RewardRecord], lengths: Sequence[int], block_size: int | None = None
) -> list[Finding]:
    """What to know before training: the rewards' histogram first, then notes and warnings.

    Args:
        lengths: of each record, in the unit that the model counts: targets.
        block_size: the context, in the same unit.
    """
    rewards = np.array([record.reward for record in records], dtype=np.float64)
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) != len(rewards) or not len(rewards):
        raise ValueError(f"{len(rewards)} records and {len(sizes)} lengths: one length a record")
    found = [
        _describe_rewards(rewards),
        _constant(rewards),
        _singletons(records),
        *_duplicates(records),
        _length(rewards, sizes),
        _outlier(records, rewards),
        _context(sizes, block_size),
    ]
    return [finding for finding in found if finding is not None]


def reward_histogram(rewards: Sequence[float] | np.ndarray) -> list[tuple[float, float, int]]:
    """(low, high, count) of each bar: one a value where they are few, else 20 of equal width."""
    values, counts = np.unique(np.asarray(rewards, dtype=np.float64), return_counts=True)
    if len(values) <= _FEW_VALUES:
        return [(float(v), float(v), int(n)) for v, n in zip(values, counts, strict=True)]
    # Halved first, so that the range of rewards near the largest number is finite.
    edges = 2 * np.linspace(values[0] / 2, values[-1] / 2, _BINS + 1)
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, _BINS - 1)
    totals = np.bincount(place, weights=counts, minlength=_BINS)
    return [(float(edges[i]), float(edges[i + 1]), int(totals[i])) for i in range(_BINS)]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Spearman's rho of two samples (n,), and the chance of one as large without any relation.

    Ties share the mean of their ranks. nan where a sample is constant; the chance is nan below four
    values.

    Source: Fieller, Hartley and Pearson 1957, Tests for rank correlation coefficients I: the
    z-transform of rho has variance 1.06 / (n - 3).
    """
    x, y = _mid_ranks(a), _mid_ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    if scale == 0:
        return math.nan, math.nan
    rho = max(-1.0, min(1.0, float(x @ y) / scale))
    if len(x) < 4:
        return rho, math.nan
    if abs(rho) == 1:
        return rho, 0.0
    return rho, math.erfc(abs(math.atanh(rho)) * math.sqrt((len(x) - 3) / 1.06) / math.sqrt(2))


def _mid_ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _describe_rewards(rewards: np.ndarray) -> Finding:
    bars = reward_histogram(rewards)
    largest = float(np.abs(rewards).max()) or 1.0
    scaled = rewards / largest  # so that no sum overflows
    mean, deviation = float(scaled.mean()) * largest, float(scaled.std()) * largest
    shape = ", ".join(f"{low:g} × {count:,}" for low, high, count in bars if low == high)
    message = (
        f"{len(rewards):,} rewards from {rewards.min():g} to {rewards.max():g}, mean {mean:g}, "
        f"standard deviation {deviation:g}"
    )
    values = {"n": len(rewards), "mean": mean, "std": deviation, "histogram": bars}
    return Finding("rewards", False, f"{message}: {shape}" if shape else message, values)


def _constant(rewards: np.ndarray) -> Finding | None:
    if rewards.min() != rewards.max():
        return None
    message = (
        f"every reward is {rewards[0]:g}, so nothing can be learnt from these rewards: this is "
        f"plain training"
    )
    return Finding("constant", True, message, {"reward": float(rewards[0])})


def _singletons(records: Sequence[RewardRecord]) -> Finding | None:
    groups = record_groups(records)
    if groups is None:
        return None
    sizes = Counter(groups)
    alone = sum(size == 1 for size in sizes.values())
    values = {"groups": len(sizes), "alone": alone}
    if not alone:
        return Finding("groups", False, f"{len(sizes):,} groups of records", values)
    message = (
        f"{alone:,} of {len(sizes):,} groups hold one record, which is compared with nothing: its "
        f"reward does not matter"
    )
    return Finding("groups", alone * 2 > len(sizes), message, values)


def _duplicates(records: Sequence[RewardRecord]) -> list[Finding]:
    """Texts that stand more than once: with one reward, and with several."""
    seen: dict[tuple[str, str], list[RewardRecord]] = {}
    for record in records:
        seen.setdefault((record.prompt, record.completion), []).append(record)
    same: list[list[RewardRecord]] = []
    different: list[list[RewardRecord]] = []
    for several in seen.values():
        if len(several) > 1:
            rewards = {record.reward for record in several}
            (same if len(rewards) == 1 else different).append(several)
    found = []
    if same:
        extra = sum(len(several) - 1 for several in same)
        lines = [record.line for record in same[0]]
        message = (
            f"{extra:,} records repeat an earlier one, text and reward (lines {lines[0]:,} and "
            f"{lines[1]:,}, say): they count twice"
        )
        values = {"texts": len(same), "extra": extra, "lines": lines[:2]}
        found.append(Finding("duplicates", False, message, values))
    if different:
        first = different[0][0]
        second = next(record for record in different[0] if record.reward != first.reward)
        message = (
            f"{len(different):,} texts stand there with different rewards: {_short(first.text)!r} "
            f"has {first.reward:g} on line {first.line:,} and {second.reward:g} on line "
            f"{second.line:,}"
        )
        values = {"texts": len(different), "lines": [first.line, second.line]}
        found.append(Finding("contradictions", True, message, values))
    return found


def _length(rewards: np.ndarray, sizes: np.ndarray) -> Finding | None:
    rho, p = rank_correlation(rewards, sizes)
    if not math.isfinite(rho):
        return None
    strong = abs(rho) >= _STRONG_CORRELATION and p < _SMALL_P
    message = f"reward and length of a text: rank correlation {rho:+.3f}"
    if math.isfinite(p):
        message += f" (p = {p:.2g})"
    if strong:
        message += f"; the model will learn to write {'longer' if rho > 0 else 'shorter'} texts"
    return Finding("length", strong, message, {"rho": rho, "p": p})


def _outlier(records: Sequence[RewardRecord], rewards: np.ndarray) -> Finding | None:
    """One reward that makes up most of the variance, next to which all others are equal."""
    if len(rewards) < _LEAST_RECORDS:
        return None
    largest = float(np.abs(rewards).max()) or 1.0
    scaled = rewards / largest
    squares = (scaled - scaled.mean()) ** 2
    total = float(squares.sum())
    place = int(squares.argmax())
    share = float(squares[place]) / total if total else 0.0
    # With two values one of them may be rare and still be meant.
    if share <= _OUTLIER_SHARE or len(np.unique(rewards)) < 3:
        return None
    record = records[place]
    message = (
        f"the reward {record.reward:g} on line {record.line:,} alone makes {share:.1%} of the "
        f"rewards' variance: next to it the others are nearly equal"
    )
    return Finding("outlier", True, message, {"line": record.line, "share": share})


def _context(sizes: np.ndarray, block_size: int | None) -> Finding | None:
    if block_size is None:
        return None
    longer = int((sizes > block_size).sum())
    if not longer:
        return None
    message = (
        f"{longer:,} of {len(sizes):,} records are longer than the context of {block_size:,} "
        f"tokens and are cut into windows, which do not see each other"
    )
    values = {"longer": longer, "longest": int(sizes.max())}
    return Finding("context", longer * 4 > len(sizes), message, values)


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
