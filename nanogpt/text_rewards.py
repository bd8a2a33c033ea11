"""Rewards of finished texts in TRL's signature: domain terms, repetition, length.

(prompts, completions, completion_ids, **columns) -> one number for each completion.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


class TextRewardFunction:
    """A reward of finished texts in TRL's signature."""

    __name__: str

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[str] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        raise NotImplementedError


class DomainTermReward(TextRewardFunction):
    """Share of distinct terms in each completion; see `domain_term_reward`."""

    def __init__(
        self, terms: Iterable[str], *, distinct: bool = True, cap: int = 1, casefold: bool = True
    ) -> None:
        self.__name__ = "domain_term_reward"
        self.distinct, self.cap, self.casefold = distinct, cap, casefold
        self.terms = list(dict.fromkeys(self._fold(term) for term in terms))
        if not self.terms or "" in self.terms:
            raise ValueError("terms must be at least one, and none of them empty")
        if cap < 1 or (distinct and cap != 1):
            raise ValueError(f"cap must be at least 1, and 1 for distinct terms, not {cap}")
        ordered = sorted(self.terms, key=len, reverse=True)
        any_term = "|".join(re.escape(term) for term in ordered)
        self._pattern = re.compile(rf"(?<!\w)(?:{any_term})(?!\w)")

    def _fold(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        # Folding may leave a text that is not composed.
        return unicodedata.normalize("NFC", text.casefold()) if self.casefold else text

    def matches(self, text: str) -> Counter[str]:
        """How often each term stands in a text; terms as `self.terms` has them."""
        return Counter(self._pattern.findall(self._fold(text)))

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[str] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        most = len(self.terms) * _harmonic(self.cap)
        return [
            sum(_harmonic(min(count, self.cap)) for count in self.matches(text).values()) / most
            for text in value_of(completions, "completions", self)
        ]


def domain_term_reward(
    terms: Iterable[str], *, distinct: bool = True, cap: int = 1, casefold: bool = True
) -> DomainTermReward:
    """Share of a list of terms that a completion holds as whole words, 0 to 1, in TRL's signature.

    Texts and terms are NFC and case-folded; matching is (?<!\\w)(?:t1|t2|…)(?!\\w), longer terms
    first, without overlaps: "general" does not hold "gene". Only completions count, not prompts.

    Args:
        terms: at least one; those that fold to the same count once.
        distinct: a term counts once, however often it comes. If not, its k-th occurrence counts
            1/k, up to `cap` of them, and the sum is divided by its largest possible value.
        cap: occurrences of one term that count; 1 for distinct terms.
        casefold: False compares letters as they are.
    Raises: ValueError for no term, an empty one, or a cap out of range.
    """
    return DomainTermReward(terms, distinct=distinct, cap=cap, casefold=casefold)


def _harmonic(count: int) -> float:
    return sum(1 / k for k in range(1, count + 1))


class RepetitionPenalty(TextRewardFunction):
    """A penalty for repeated n-grams; see `repetition_penalty_reward`."""

    def __init__(
        self, ngram_size: int = 3, max_penalty: float = -1.0, *, unit: str = "ids"
    ) -> None:
        self.__name__ = "repetition_penalty_reward"
        if ngram_size < 1:
            raise ValueError(f"ngram_size must be at least 1, not {ngram_size}")
        if not (max_penalty <= 0 and math.isfinite(max_penalty)):
            raise ValueError(f"max_penalty must be finite and at most 0, not {max_penalty}")
        if unit not in ("ids", "words"):
            raise ValueError(f"unit must be ids or words, not {unit!r}")
        self.ngram_size, self.max_penalty, self.unit = ngram_size, max_penalty, unit

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[str] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        items: Iterable[Sequence[Any]]
        if self.unit == "ids":
            items = value_of(completion_ids, "completion_ids", self)
        else:
            items = [text.casefold().split() for text in value_of(completions, "completions", self)]
        return [self._penalty(sequence) for sequence in items]

    def _penalty(self, sequence: Sequence[Any]) -> float:
        count = len(sequence) - self.ngram_size + 1
        if count < 1:
            return 0.0
        ngrams = {tuple(sequence[i : i + self.ngram_size]) for i in range(count)}
        return self.max_penalty * (1 - len(ngrams) / count) + 0.0  # no negative zero


def repetition_penalty_reward(
    ngram_size: int = 3, max_penalty: float = -1.0, *, unit: str = "ids"
) -> RepetitionPenalty:
    """max_penalty (1 - distinct n-grams / n-grams) of each completion, in TRL's signature.

    Args:
        ngram_size: n; shorter completions are not punished.
        max_penalty: at most 0, the limit for a completion of one n-gram alone.
        unit: n-grams of "ids" (completion_ids, as TRL's) or of case-folded "words", which suits
            character vocabularies, whose n-grams repeat in any text.
    Source: Yeo et al. 2025 (arXiv:2502.03373), appendix; TRL's get_repetition_penalty_reward.
    """
    return RepetitionPenalty(ngram_size, max_penalty, unit=unit)


class SoftOverlongPunishment(TextRewardFunction):
    """A penalty near the length limit; see `soft_overlong_punishment`."""

    def __init__(self, max_completion_length: int, cache: int) -> None:
        self.__name__ = "soft_overlong_punishment"
        if not 0 < cache <= max_completion_length:
            raise ValueError(
                f"cache must be above 0 and at most max_completion_length "
                f"{max_completion_length}, not {cache}"
            )
        self.max_completion_length, self.cache = max_completion_length, cache

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[str] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        free = self.max_completion_length - self.cache
        return [
            -1.0
            if len(ids) > self.max_completion_length
            else min(0.0, (free - len(ids)) / self.cache)
            for ids in value_of(completion_ids, "completion_ids", self)
        ]


def soft_overlong_punishment(max_completion_length: int, cache: int) -> SoftOverlongPunishment:
    """0 up to max_completion_length - cache tokens, then down to -1 at the limit and beyond.

    Args:
        max_completion_length, cache: tokens.
    Source: Yu et al. 2025, DAPO (arXiv:2503.14476), equation 13; TRL's
        get_soft_overlong_punishment.
    """
    return SoftOverlongPunishment(max_completion_length, cache)


def value_of(value: Any, name: str, reward: Any) -> Any:
    """What a caller has to give. Raises: ValueError naming the reward where it is None."""
    if value is None:
        raise ValueError(f"{reward.__name__} needs {name}")
    return value
