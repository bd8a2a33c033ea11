"""How sure a finding is: permutation tests, conformal p-values, false discovery rates.

Everything that is tried on one set of records goes through `false_discovery_rates` together, so
that among all findings reported at level alpha no more than alpha are false on average. Where
nothing is true at all, that is the chance of reporting anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

_FEW_EXCEED = 10
_CHUNK = 4_000_000
_SMALLEST = 1e-300
_HEAVY = 0.4


@dataclass(frozen=True)
class PermutationTest:
    """The outcome of a permutation test.

    Attributes:
        statistic: the sum of the scores.
        mean, deviation: of the same sum where classes are dealt out to the rows at random.
        p: how often chance reaches the statistic.
    """

    statistic: float
    mean: float
    deviation: float
    p: float


def permutation_test(
    scores: np.ndarray,
    classes: np.ndarray,
    rng: np.random.Generator,
    *,
    rows: np.ndarray | None = None,
    n_resamples: int = 999,
) -> PermutationTest:
    """Whether rows and their classes belong together: is sum_i scores[row_i, class_i] large?

    Under the null hypothesis every assignment of the classes to the rows is equally likely. Mean
    and variance of the sum over all assignments are exact. Where fewer than ten of the resamples
    reach the statistic, p is the tail of a gamma distribution with these two moments, the exact
    skewness and no less than the excess kurtosis, never above what the resamples allow.

    Args:
        scores: (R, K) finite, one row for each row of the data, or for each value of `rows`.
        classes: (n,) int, the class of each row of the data.
        rng: draws the assignments.
        rows: (n,) int, the row of `scores` for each row of the data; None for 0 to n - 1.
    Source: Hoeffding 1951, A combinatorial central limit theorem; Winkler et al. 2016, Faster
        permutation inference in brain imaging, for the tail.
    """
    n = len(classes)
    places = np.arange(n) if rows is None else rows
    if n < 2:
        return PermutationTest(0.0, 0.0, 0.0, 1.0)
    table = scores.astype(np.float64)
    row_weight = np.bincount(places, minlength=len(table)).astype(np.float64)
    class_weight = np.bincount(classes, minlength=table.shape[1]).astype(np.float64)
    by_row = table @ class_weight / n  # (R,)
    by_class = row_weight @ table / n  # (K,)
    grand = float(row_weight @ by_row) / n
    centred = table - by_row[:, None] - by_class[None, :] + grand  # (R, K)
    variance = float(row_weight @ (centred**2) @ class_weight) / (n - 1)
    deviation = float(np.sqrt(max(variance, 0.0)))
    statistic = float(table[places, classes].sum())
    mean = n * grand
    scale = float(np.abs(table[places, classes]).max(initial=0.0)) * n
    if deviation <= 1e-12 * max(scale, 1e-30):  # nothing differs between the assignments
        return PermutationTest(statistic, mean, 0.0, 1.0)
    draws = _resampled(centred, places, classes, rng, n_resamples) / deviation
    z = (statistic - mean) / deviation
    exceed = int((draws >= z - 1e-9).sum())
    p = (exceed + 1) / (n_resamples + 1)
    if exceed < _FEW_EXCEED:
        skew = _tail_skew(centred / deviation, row_weight, class_weight)
        p = min(p, gamma_tail(z, skew))
    return PermutationTest(statistic, mean, deviation, max(p, _SMALLEST))


def _tail_skew(scores: np.ndarray, row_weight: np.ndarray, class_weight: np.ndarray) -> float:
    """The skewness of a gamma distribution as skewed and as heavy as a sum over assignments.

    A score too rare to be seen in the resamples counts all the same. The third moment is exact,
    the fourth that of rows which draw their classes independently.

    Args:
        scores: (R, K), whose rows and columns have mean 0 and whose sum has variance 1.
    """
    n = float(row_weight.sum())
    third = float(row_weight @ scores**3 @ class_weight) * n / max(1.0, (n - 1) * (n - 2))
    by_row = scores**2 @ class_weight / n
    fourth = float(row_weight @ (scores**4 @ class_weight / n - 3 * by_row**2))
    return max(third, float(np.sqrt(max(0.0, fourth) / 1.5)))  # a gamma's excess: 1.5 skewness^2


def _resampled(
    centred: np.ndarray,
    places: np.ndarray,
    classes: np.ndarray,
    rng: np.random.Generator,
    n_resamples: int,
) -> np.ndarray:
    """(n_resamples,) sums of the centred scores under random assignments."""
    n, width = len(classes), centred.shape[1]
    flat = centred.ravel()
    base = places.astype(np.int64) * width
    at_once = max(1, min(n_resamples, _CHUNK // n))
    sums = []
    for first in range(0, n_resamples, at_once):
        count = min(at_once, n_resamples - first)
        dealt = rng.permuted(np.broadcast_to(classes, (count, n)), axis=1)
        sums.append(flat[base + dealt].sum(axis=1))
    return np.concatenate(sums)


def gamma_tail(z: float, skew: float) -> float:
    """P(Z >= z) of a Pearson type III variable with mean 0, variance 1 and this skewness >= 0."""
    if skew < 1e-3:
        return 0.5 * float(torch.special.erfc(torch.tensor(z / np.sqrt(2), dtype=torch.float64)))
    shape = 4 / skew**2
    at = shape + z * np.sqrt(shape)  # a gamma variable of that shape and scale 1
    if at <= 0:
        return 1.0
    values = torch.tensor([shape, at], dtype=torch.float64)
    return float(torch.special.gammaincc(values[0], values[1]))


def merged_p(values: list[float]) -> float:
    """One p-value of several for the same hypothesis, whatever their dependence (Bonferroni)."""
    return min(1.0, max(1, len(values)) * min(values, default=1.0))


def conformal_p(reference: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(n,) p-values of new scores against a reference: (1 + #{reference >= score}) / (n_ref + 1).

    Right for one record that is exchangeable with the reference. The smallest is 1 / (n_ref + 1),
    so that ranking a table against itself never passes a false discovery rate.
    Source: Vovk, Gammerman and Shafer 2005, Algorithmic learning in a random world.
    """
    ordered = np.sort(reference)
    below = np.searchsorted(ordered, scores, side="left")
    return (1 + len(ordered) - below) / (len(ordered) + 1)


def exceedance_p(reference: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(n,) p-values of high scores, beyond the reference by the tail that it has.

    Where fewer than a twentieth of the reference lie, a generalised Pareto distribution goes on,
    fitted by probability-weighted moments and never lighter than an exponential; its shape is
    raised by its standard error, so that what is rare is not called impossible. Infinite scores
    count as the largest finite one where the reference holds some.
    Source: Hosking and Wallis 1987, Parameter and quantile estimation for the generalised Pareto
        distribution.
    """
    plain = conformal_p(reference, scores)
    n = len(reference)
    count = n // 20
    finite = reference[np.isfinite(reference)]
    if count < 10 or not len(finite):
        return plain
    if np.isposinf(reference).any():
        scores = np.minimum(scores, finite.max())
    ordered = np.sort(np.minimum(reference, finite.max()))
    threshold, top = ordered[-count - 1], ordered[-count:]
    if not -np.inf < threshold < top[-1]:
        return plain
    excess = top - threshold
    mean = float(excess.mean())
    weights = (count - 1 - np.arange(count)) / (count - 1)
    gap = mean - 2 * float((weights * excess).mean())  # of an exponential: mean / 2
    fitted = min(max(2 - mean / gap, -1.0), 0.9) if gap > 0 else -1.0
    scale = mean * (1 - fitted)
    shape = max(fitted, 0.0)
    if fitted > _HEAVY and threshold > 0:  # where moments need not exist (Hill 1975)
        shape = max(shape, float((np.log(top) - np.log(threshold)).mean()))
    shape += (1 + shape) / np.sqrt(count)
    beyond = np.maximum(scores - threshold, 0.0)
    with np.errstate(over="ignore"):
        tail = count / n * (1 + shape * beyond / scale) ** (-1 / shape)
    return np.where(beyond > 0, np.minimum(plain, np.maximum(tail, _SMALLEST)), plain)


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """(m,) q-values: the least level at which each would be found.

    Source: Benjamini and Hochberg 1995, Controlling the false discovery rate.
    """
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    ranked = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum(1.0, np.minimum.accumulate(ranked[::-1])[::-1])
    return q


def false_discovery_rates(families: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """q-values over everything that was tried, in families of very different sizes.

    Each family has the same part of the level, so that a hundred pairs of fields do not drown
    among a million cells, and that many true findings in one let no false ones through in another:
    Benjamini-Hochberg in each, times the number of families. The rate of all is then at most the
    sum of theirs.

    Args:
        families: name to (m,) p-values, not NaN; empty ones are none.
    Returns: name to (m,) q-values, at most 1.
    """
    count = sum(len(p) > 0 for p in families.values())
    return {name: np.minimum(1.0, count * benjamini_hochberg(p)) for name, p in families.items()}
