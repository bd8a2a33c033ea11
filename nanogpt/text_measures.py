"""What a set of texts is like, without any model: variety, repetition, terms, copying."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_WORD = re.compile(r"\w+")


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different word n-grams over all word n-grams of the texts, case ignored; nan without any.

    It falls with the number of texts, so compare sets of one size only.

    Args:
        n: words in a gram, at least 1; grams do not cross from one text into another.
    Source: Li et al. 2016, A diversity-promoting objective function (arXiv:1510.03055), section 5.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    grams = [gram for words in map(_words, texts) for gram in _grams(words, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def duplicate_rate(texts: Sequence[str]) -> float:
    """Share of the texts that equal an earlier one; 0 without texts."""
    return 1 - len(set(texts)) / len(texts) if texts else 0.0


def self_overlap(texts: Sequence[str], n: int = 4) -> float:
    """Share of the word n-grams of a text that another text holds too, the mean over texts.

    It stands in for self-BLEU: 0 where no two texts share a phrase of n words, 1 where they are
    copies, in linear time instead of quadratic. Texts shorter than n words do not count; nan where
    none is left.

    Source: Zhu et al. 2018, Texygen (arXiv:1802.01886), for what self-BLEU measures.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    grams = [set(_grams(words, n)) for words in map(_words, texts) if len(words) >= n]
    holders = Counter(gram for of_one in grams for gram in of_one)
    shares = [sum(holders[gram] > 1 for gram in of_one) / len(of_one) for of_one in grams]
    return sum(shares) / len(shares) if shares else math.nan


@dataclass(frozen=True)
class TermRate:
    """How often texts use terms.

    Attributes:
        per_1000_tokens: matches over tokens, times 1,000, with its standard error.
        per_text: different terms in a text, the mean, with its standard error.
    The errors are of the sampling of whole texts; nan for a single text.
    """

    per_1000_tokens: float
    per_1000_tokens_se: float
    per_text: float
    per_text_se: float


def term_rate(found: Sequence[Counter[str]], n_tokens: Sequence[int]) -> TermRate:
    """Term rates of texts.

    Args:
        found: for each text how often it has each term.
        n_tokens: tokens of each text.
    Raises: ValueError for no texts, or another number of lengths.
    Source: Cochran 1977, Sampling techniques, section 2.11 (standard error of a ratio).
    """
    if not found or len(found) != len(n_tokens):
        raise ValueError(f"there are {len(found)} texts and {len(n_tokens)} lengths")
    matches = np.array([counts.total() for counts in found], dtype=np.float64)
    distinct = np.array([len(counts) for counts in found], dtype=np.float64)
    tokens = np.asarray(n_tokens, dtype=np.float64)
    ratio = matches.sum() / max(1.0, tokens.sum())
    return TermRate(
        per_1000_tokens=1000 * float(ratio),
        per_1000_tokens_se=1000 * _error_of_mean(matches - ratio * tokens) / float(tokens.mean()),
        per_text=float(distinct.mean()),
        per_text_se=_error_of_mean(distinct),
    )


def whole_words(text: str, before: str = "", *, cut_off: bool = False) -> str:
    """A piece of a longer text without the words that its edges cut.

    Args:
        before: what stands right before the piece.
        cut_off: whether the piece ends only because it had to.
    """
    if _WORD.match(before[-1:]):
        text = re.sub(r"^\w+", "", text)
    return re.sub(r"\w+$", "", text) if cut_off else text


def longest_common_substring(texts: Sequence[str], corpus: str) -> int:
    """Characters of the longest piece of any of the texts that the corpus holds word for word.

    Every piece of length 2^j gets a number, made of the numbers of its halves, and a binary search
    finds the longest length with a piece in both: exact, without hashing.

    Source: Karp, Miller and Rosenberg 1972, Rapid identification of repeated patterns.
    """
    pieces = [_code_points(text) for text in texts if text]
    if not pieces or not corpus:
        return 0
    # Every text ends with a code of its own that the corpus does not have.
    ends = [np.array([-1 - i]) for i in range(len(pieces))]
    ours = np.concatenate([part for pair in zip(pieces, ends, strict=True) for part in pair])
    levels = [_numbers(ours, _code_points(corpus))]
    if not levels[0].common:
        return 0
    longest = max(map(len, pieces))
    while 2 ** len(levels) <= longest:
        level = _joined(levels[-1], levels[-1], 2 ** (len(levels) - 1))
        if not level.common:
            break
        levels.append(level)
    # The longest is at least the last level's length, and below twice that.
    low, high = 2 ** (len(levels) - 1), min(longest + 1, 2 ** len(levels))
    while high - low > 1:
        middle = (low + high) // 2
        joined = _joined(levels[-1], levels[-1], middle - 2 ** (len(levels) - 1))
        low, high = (middle, high) if joined.common else (low, middle)
    return low


@dataclass(frozen=True)
class _Numbers:
    """Pieces of one length: a number for each different one of ours, at every position.

    The corpus's positions whose piece is none of ours are left out.
    """

    ours: np.ndarray
    corpus_at: np.ndarray
    corpus: np.ndarray
    common: bool


def _numbers(ours: np.ndarray, corpus: np.ndarray) -> _Numbers:
    """Numbers of `ours` (n,), and of those of `corpus` (m,) that are among them."""
    return _matched(ours, np.arange(len(corpus)), corpus)


def _matched(ours: np.ndarray, at: np.ndarray, keys: np.ndarray) -> _Numbers:
    known, numbers = np.unique(ours, return_inverse=True)
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    kept = known[place] == keys
    return _Numbers(numbers, at[kept], place[kept], bool(kept.any()))


def _joined(first: _Numbers, second: _Numbers, offset: int) -> _Numbers:
    """Pieces made of one of `first` and the one of `second` that begins `offset` later."""
    size = int(second.ours.max()) + 1
    # Where the second half would begin behind the end, a number that nothing else has.
    beyond = np.full(min(offset, len(second.ours)), -1)
    ours = first.ours * size + np.concatenate([second.ours[offset:], beyond])
    ours[len(ours) - len(beyond) :] = -1 - np.arange(len(beyond))
    place = np.searchsorted(second.corpus_at, first.corpus_at + offset)
    place = np.minimum(place, max(0, len(second.corpus_at) - 1))
    whole = second.corpus_at[place] == first.corpus_at + offset
    keys = first.corpus[whole] * size + second.corpus[place[whole]]
    return _matched(ours, first.corpus_at[whole], keys)


def _code_points(text: str) -> np.ndarray:
    raw = text.encode("utf-32-le", "surrogatepass")
    return np.frombuffer(raw, dtype=np.uint32).astype(np.int64)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _error_of_mean(values: np.ndarray) -> float:
    if len(values) < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))
