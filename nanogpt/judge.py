"""A judge of rewarded texts: linear in their words, and fitted on texts of its own.

It knows nothing of any language model, so it can say which of two models writes what readers
liked, as long as neither has seen the texts that it was fitted on.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_LEAST_TEXTS = 3
_MOST_FEATURES = 200_000
_HELD_OUT = 0.2
# Candidates for the L2 penalty, per text; the one that predicts held-out texts best is taken.
_PENALTIES = (1e-2, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)


@dataclass(frozen=True)
class JudgeQuality:
    """How well a judge predicts texts that it was not fitted on.

    Attributes:
        n_fitted, n_held_out: texts.
        correlation: of predicted and true rewards.
        auroc: chance that a text of more than the mean reward scores above one of less.
        penalty: the L2 penalty that was taken.
    """

    n_fitted: int
    n_held_out: int
    correlation: float
    auroc: float
    penalty: float


class BagOfWordsJudge:
    """Predicts the reward of a text from its words and pairs of words.

    A word counts once a text and weighs log(n / texts with it); texts have unit length. Two-valued
    rewards are fitted by logistic regression, others by least squares, both with an L2 penalty that
    is chosen on a fifth of the texts; the last fit uses all of them.

    Args:
        texts, rewards: what it learns from, at least 20 texts.
        seed: of the fifth that chooses the penalty.
    Attributes:
        quality: on that fifth, before the last fit.
    Raises: ValueError for too few texts or rewards that are all equal.
    """

    def __init__(self, texts: Sequence[str], rewards: Sequence[float], seed: int = 0) -> None:
        if len(texts) < 20:
            raise ValueError(f"a judge needs at least 20 texts, not {len(texts)}")
        self.low, self.high = float(min(rewards)), float(max(rewards))
        if self.low == self.high:
            raise ValueError("all rewards are equal, so there is nothing to judge by")
        self.two_valued = len(set(rewards)) == 2
        counts = Counter(word for text in texts for word in set(_features(text)))
        common = [item for item in counts.most_common(_MOST_FEATURES) if item[1] >= _LEAST_TEXTS]
        self.index = {word: place for place, (word, _) in enumerate(common)}
        rarity = [math.log(len(texts) / count) for _, count in common]
        self.rarity = torch.tensor(rarity, dtype=torch.float64)
        target = torch.tensor(rewards, dtype=torch.float64)
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        held = order[: max(4, int(_HELD_OUT * len(texts)))]
        rest = order[len(held) :]
        fitted = [texts[i] for i in rest.tolist()]
        unseen = [texts[i] for i in held.tolist()]
        best = None
        for penalty in _PENALTIES:
            self._fit(fitted, target[rest], penalty)
            scores = self.score(unseen)
            error = float(F.mse_loss(scores, target[held]))
            if best is None or error < best[0]:
                best = (error, penalty, scores)
        assert best is not None
        _, penalty, scores = best
        self.quality = JudgeQuality(
            len(texts) - len(held),
            len(held),
            correlation(scores, target[held]),
            auroc(scores, target[held] > target.mean()),
            penalty,
        )
        self._fit(texts, target, penalty)

    def score(self, texts: Sequence[str]) -> torch.Tensor:
        """Predicted rewards, (n,) float64, within the range of the rewards that it has seen."""
        margin = self._bags(texts).margins(self.weights) + self.bias
        share = margin.sigmoid() if self.two_valued else margin.clamp(0, 1)
        return self.low + (self.high - self.low) * share

    def _bags(self, texts: Sequence[str]) -> "_Bags":
        ids: list[int] = []
        lengths = []
        for text in texts:
            found = sorted({self.index[f] for f in _features(text) if f in self.index})
            ids += found
            lengths.append(len(found))
        feature = torch.tensor(ids, dtype=torch.int64)
        owner = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(lengths))
        value = self.rarity[feature]
        squares = torch.zeros(len(texts), dtype=torch.float64)
        squares.index_add_(0, owner, value.square())
        return _Bags(feature, owner, value / squares.sqrt().clamp(min=1e-12)[owner], len(texts))

    def _fit(self, texts: Sequence[str], rewards: torch.Tensor, penalty: float) -> None:
        """L-BFGS on a convex loss, from zero, with the gradient written out."""
        bags = self._bags(texts)
        target = (rewards - self.low) / (self.high - self.low)
        both = torch.zeros(len(self.index) + 1, dtype=torch.float64)  # weights, then the bias
        optimizer = torch.optim.LBFGS(
            [both], max_iter=60, history_size=10, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def loss() -> torch.Tensor:
            weights = both[:-1]
            margin = bags.margins(weights) + both[-1]
            if self.two_valued:
                value = F.binary_cross_entropy_with_logits(margin, target)
                slope = (margin.sigmoid() - target) / len(target)
            else:
                value = F.mse_loss(margin, target)
                slope = 2 * (margin - target) / len(target)
            of_weights = bags.gradient(slope, len(weights)) + 2 * penalty * weights
            both.grad = torch.cat([of_weights, slope.sum()[None]])
            return value + penalty * weights.square().sum()

        optimizer.step(loss)
        self.weights, self.bias = both[:-1], both[-1]


@dataclass(frozen=True)
class _Bags:
    """The features of n texts as a sparse matrix: entry i is value[i] at (owner[i], feature[i])."""

    feature: torch.Tensor
    owner: torch.Tensor
    value: torch.Tensor
    n: int

    def margins(self, weights: torch.Tensor) -> torch.Tensor:
        """Matrix times (features,): (n,)."""
        sums = torch.zeros(self.n, dtype=torch.float64)
        return sums.index_add_(0, self.owner, weights[self.feature] * self.value)

    def gradient(self, slope: torch.Tensor, features: int) -> torch.Tensor:
        """Its transpose times (n,): (features,)."""
        sums = torch.zeros(features, dtype=torch.float64)
        return sums.index_add_(0, self.feature, slope[self.owner] * self.value)


def _features(text: str) -> list[str]:
    words = _WORD.findall(text.casefold())
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's, of (n,) and (n,); 0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300))


def auroc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Chance that a positive scores above a negative, ties counting half; nan without both."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return math.nan
    _, level, count = torch.unique(scores, sorted=True, return_inverse=True, return_counts=True)
    ranks = (count.cumsum(0).to(torch.float64) - (count.to(torch.float64) - 1) / 2)[level]
    above = float(ranks[positive].sum()) - n_positive * (n_positive + 1) / 2
    return above / (n_positive * n_negative)
