"""Key terms: what sets some records apart from others.

Source: Monroe, Colaresi and Quinn 2008, Fightin' Words; Dunning 1993, Accurate methods for the
statistics of surprise and coincidence; Tomokiyo and Hurst 2003, A language model approach to
keyphrase extraction.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nanogpt.explore.significance import benjamini_hochberg

# Accents and vowel signs that follow their letter are part of its word; \w does not hold them.
_MARKS = "".join(c for c in map(chr, range(0x300, 0x3100)) if unicodedata.category(c)[0] == "M")
_LETTERS = rf"[^\W\d][\w{_MARKS}]*"
_WORD = re.compile(rf"\d+(?:[.,]\d+)*|{_LETTERS}(?:'{_LETTERS})*")
_PRIOR_RECORDS = 10.0


def words(text: str) -> list[str]:
    """Lower-cased words, numbers and identifiers of a text, in their order."""
    return _WORD.findall(unicodedata.normalize("NFC", text.lower()).replace("’", "'"))


def fightin_words(
    counts_a: Mapping[str, float],
    counts_b: Mapping[str, float],
    alpha: float | Mapping[str, float] = 0.05,
) -> dict[str, float]:
    """z-score of each term's log-odds difference between two corpora, positive towards a.

        delta_w = log (a_w + alpha_w) / (n_a + alpha_0 - a_w - alpha_w) - the same of b
        z_w     = delta_w / sqrt(1 / (a_w + alpha_w) + 1 / (b_w + alpha_w))

    Args:
        alpha: the Dirichlet prior, one number for every term or one for each.
    """
    terms = list(dict.fromkeys([*counts_a, *counts_b]))
    prior = {w: alpha[w] if isinstance(alpha, Mapping) else alpha for w in terms}
    total = sum(prior.values())
    n_a, n_b = sum(counts_a.values()), sum(counts_b.values())
    found = {}
    for w in terms:
        a, b = counts_a.get(w, 0) + prior[w], counts_b.get(w, 0) + prior[w]
        rest_a, rest_b = n_a + total - a, n_b + total - b
        if rest_a <= 0 or rest_b <= 0:  # there is no other term
            found[w] = 0.0
            continue
        delta = math.log(a / rest_a) - math.log(b / rest_b)
        found[w] = delta / math.sqrt(1 / a + 1 / b)
    return found


def g_squared(a: float, n_a: float, b: float, n_b: float) -> float:
    """Dunning's log-likelihood ratio of counts a of n_a against b of n_b, as Poisson counts."""
    both = (a + b) / (n_a + n_b)
    terms = ((a, n_a * both), (b, n_b * both))
    return 2 * sum(seen * math.log(seen / expected) for seen, expected in terms if seen > 0)


def pointwise_kl(p: Sequence[float] | np.ndarray, q: Sequence[float] | np.ndarray) -> np.ndarray:
    """p log(p / q) of each term, in nats; they sum to KL(p || q). 0 where p is 0."""
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0.0)


def language_model_scores(
    terms: Sequence[str],
    log_p_domain: Sequence[float] | np.ndarray,
    log_p_background: Sequence[float] | np.ndarray,
) -> dict[str, float]:
    """Mean over a term's occurrences of log p_domain - log p_background, in nats.

    Args:
        terms: (n,) the term at each place of a text; the log-probabilities are of the same places.
    """
    sums: dict[str, list[float]] = defaultdict(list)
    for term, ours, theirs in zip(terms, log_p_domain, log_p_background, strict=True):
        sums[term].append(float(ours) - float(theirs))
    return {term: sum(values) / len(values) for term, values in sums.items()}


@dataclass(frozen=True)
class KeyTerm:
    """A term of a subset of records. Records are counted, so that one long record counts once.

    Attributes:
        z: Fightin' Words, positive where it is more frequent in the subset.
        g2: Dunning's statistic.
        pointwise_kl: nats.
        count: records of the subset that hold it.
        share, background_share: of the records of the subset and of the others.
        q: false discovery rate among the terms tried, from z.
    """

    term: str
    z: float
    g2: float
    pointwise_kl: float
    count: int
    share: float
    background_share: float
    q: float


def key_terms(
    subset: Sequence[Sequence[str]], background: Sequence[Sequence[str]], k: int = 20
) -> list[KeyTerm]:
    """The terms that most set a subset apart, by |z|, those that it has more of first.

    Args:
        subset, background: the terms of each record. The prior is proportional to how many records
            of both hold a term, and weighs as much as ten records.
    """
    a = Counter(term for record in subset for term in set(record))
    b = Counter(term for record in background for term in set(record))
    n_a, n_b = len(subset), len(background)
    if not a or not n_a or not n_b:
        return []
    both = a + b
    total = sum(both.values())
    per_record = total / (n_a + n_b)
    prior = {term: _PRIOR_RECORDS * per_record * count / total for term, count in both.items()}
    z = fightin_words(a, b, prior)
    terms = sorted(both)
    p = np.array([math.erfc(abs(z[term]) / math.sqrt(2)) for term in terms])
    q = dict(zip(terms, benjamini_hochberg(p).tolist(), strict=True))
    sum_a, sum_b = sum(a.values()), sum(b.values())
    ranked = sorted(terms, key=lambda term: (-z[term], term))[:k]
    return [
        KeyTerm(
            term=term,
            z=z[term],
            g2=g_squared(a[term], sum_a, b[term], sum_b),
            pointwise_kl=float(pointwise_kl([a[term] / sum_a], [both[term] / total])[0]),
            count=a[term],
            share=a[term] / n_a,
            background_share=b[term] / n_b,
            q=q[term],
        )
        for term in ranked
    ]
