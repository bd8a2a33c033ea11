"""Exponential tilting: rewards become weights of records, or move a distribution.

Two conventions of `beta` meet here, each named where it is used. For weights it is a temperature,
w = exp(reward / beta): small is greedy. For `tilt` it is a multiplier, q = p exp(beta reward) / Z:
large is greedy. One is the inverse of the other, and tilts add up: beta 1 and then 2 is beta 3.

Everything is in float64 and by way of logarithms, so that no reward overflows.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

WEIGHTINGS = ("exp", "binary", "topk", "rank", "identity")
SCALES = ("std", "group", "none")
# Beyond these a temperature changes no weight any more.
_MILDEST, _GREEDIEST = 1e12, 1e-12
_SOLVER_STEPS = 200


@dataclass(frozen=True)
class WeightStats:
    """What weights do to a data set of n records.

    Attributes:
        beta: the temperature that was used; inf where rewards did not matter.
        ess: effective sample size (sum w)^2 / sum w^2, records.
        ess_fraction: ess / n.
        kl: of the weighted data to the data, sum w/n log w, nats.
        max_share: the largest weight's share of all.
        fraction_clipped: records whose weight max_weight held down.
        reward_mean, reward_std: of the data; the population's deviation.
        reward_weighted: mean under the weights: what the trained model should write at.
        soft_value: beta log mean exp(reward / beta), in the rewards' own unit; nan without a finite
            beta, and where rewards are scaled by group or ranked.
        frac_reward_zero_std: groups (or 1.0 for the whole) with one reward only.
    """

    n: int
    beta: float
    ess: float
    ess_fraction: float
    kl: float
    max_share: float
    fraction_clipped: float
    reward_mean: float
    reward_std: float
    reward_weighted: float
    soft_value: float
    frac_reward_zero_std: float


def reward_weights(
    rewards: torch.Tensor | Sequence[float],
    *,
    weighting: str = "exp",
    beta: float = 1.0,
    scale: str = "std",
    max_weight: float = 20.0,
    top_fraction: float = 0.25,
    groups: Sequence[Hashable] | None = None,
    target_ess: float | None = None,
    target_kl: float | None = None,
) -> tuple[torch.Tensor, WeightStats]:
    """Weights of records, from the rewards of the whole data set.

    With A = reward - mean (of the group, where there are groups), in standard deviations:

        u = min(A / beta, log max_weight);   w = exp(u) / mean(exp(u))

    The limit is set in log space and against a record of average reward, so that one record cannot
    count for more than `max_weight` of those, whatever the others are. Equal rewards give weights
    of exactly 1.

    Args:
        rewards: (n,), finite.
        weighting: "exp"; "binary", equal weights on what is above average; "topk", on the best
            `top_fraction`, ties included; "rank", "exp" of the mid-ranks; "identity", all 1.
        beta: a temperature, in units of the scaled rewards; small is greedy.
        scale: "std" divides A by its standard deviation, "group" by each group's, "none" by 1.
        max_weight: at least 1; inf sets no limit.
        groups: n labels, usually prompts; A is then within the group.
        target_ess, target_kl: solve beta for this effective sample size (records) or KL (nats).
    Returns: (n,) float64 of mean 1, and what they do.
    Raises: ValueError for an argument out of range, rewards that are not finite, or a target that
        no beta reaches.
    Source: Peters and Schaal 2007 (reward-weighted regression); Peng et al. 2019, AWR
        (arXiv:1910.00177); Wang et al. 2020, CRR ("binary"); Peters et al. 2010, REPS (target_kl).
    """
    r = _finite_rewards(rewards)
    _check_weighting(weighting, beta, scale, max_weight, top_fraction)
    if target_ess is not None and target_kl is not None:
        raise ValueError("target_ess and target_kl exclude each other")
    members = _members(groups, len(r))
    if weighting == "rank":
        r_used = torch.empty_like(r)
        for rows in members:
            r_used[rows] = _mid_ranks(r[rows]) / len(rows)
    else:
        r_used = r
    advantage = _advantages(r_used, members, scale)
    clipped = 0.0
    if weighting == "identity" or not bool(advantage.any()):
        weights, used = torch.ones_like(r), math.inf
    elif weighting in ("binary", "topk"):
        keep = advantage > 0 if weighting == "binary" else _top(r, members, top_fraction)
        weights, used = keep.to(torch.float64) * (len(r) / int(keep.sum())), math.inf
    else:
        used = beta
        if target_ess is not None or target_kl is not None:
            used = _solve(lambda b: _weights(advantage, b, max_weight), target_ess, target_kl)
        weights = _weights(advantage, used, max_weight)
        clipped = float((advantage / used > math.log(max_weight)).to(torch.float64).mean())
    constant = sum(bool((r[rows] == r[rows[0]]).all()) for rows in members) / len(members)
    ess = effective_sample_size(weights)
    return weights, WeightStats(
        n=len(r),
        beta=used,
        ess=ess,
        ess_fraction=ess / len(r),
        kl=weights_kl(weights),
        max_share=float(weights.max() / weights.sum()),
        fraction_clipped=clipped,
        reward_mean=float((r / len(r)).sum()),
        reward_std=float(_deviation(_advantages(r, [torch.arange(len(r))], "none"))),
        reward_weighted=float((weights / weights.sum() * r).sum()),
        soft_value=_soft_value(r, used, weighting, scale),
        frac_reward_zero_std=constant,
    )


def effective_sample_size(weights: torch.Tensor) -> float:
    """(sum w)^2 / sum w^2: how many equal records would vary as much.

    Args:
        weights: (n,), at least 0.
    Source: Kish 1965, Survey sampling.
    """
    w = torch.as_tensor(weights, dtype=torch.float64)
    w = w / w.max()  # squares of tiny or huge weights stay within range
    return float(w.sum() ** 2 / (w * w).sum())


def weights_kl(weights: torch.Tensor) -> float:
    """KL of the weighted data to the data, in nats: sum over records of w/n log(n w/sum w).

    Args:
        weights: (n,), at least 0; zeros count as 0 log 0 = 0.
    """
    w = torch.as_tensor(weights, dtype=torch.float64)
    share = w / w.sum()
    return max(0.0, float(torch.special.xlogy(share, share * len(w)).sum()))


def soft_value(rewards: torch.Tensor | Sequence[float], beta: float) -> float:
    """beta log mean exp(reward / beta): the best of E_q[reward] - beta KL(q || data).

    Args:
        rewards: (n,).
        beta: a temperature; large gives the mean, small the maximum.
    """
    r = _finite_rewards(rewards)
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta, a temperature, must be above 0, not {beta}")
    return float(beta * (torch.logsumexp(r / beta, 0) - math.log(len(r))))


def solve_beta(
    rewards: torch.Tensor | Sequence[float],
    *,
    target_ess: float | None = None,
    target_kl: float | None = None,
) -> float:
    """The temperature at which exp(reward / beta) has this effective sample size or KL.

    Args:
        rewards: (n,), not all equal, without scaling or limit.
        target_ess: records, between those of the best reward and n.
        target_kl: nats; it solves the dual of REPS, min over beta of
            beta target_kl + beta log mean exp(reward / beta).
    Raises: ValueError where not one target is given, or no beta reaches it.
    Source: Peters et al. 2010, Relative entropy policy search.
    """
    if (target_ess is None) == (target_kl is None):
        raise ValueError("give either target_ess or target_kl")
    r = _finite_rewards(rewards)
    centred = _advantages(r, [torch.arange(len(r))], "none")
    if not bool(centred.any()):
        raise ValueError("all rewards are equal: no beta changes their weights")
    unit = float(centred.abs().max())
    centred = centred / unit
    return unit * _solve(lambda beta: _weights(centred, beta, math.inf), target_ess, target_kl)


@dataclass(frozen=True)
class Tilt:
    """A tilted distribution q = p exp(beta reward) / Z.

    Attributes:
        log_q: log-probabilities, shape of the base's.
        log_z: log Z = log E_p exp(beta reward).
        reward: E_q[reward].
        kl: KL(q || p) = beta E_q[reward] - log Z, nats.
    The last three have the shape of log_q without its last axis.
    """

    log_q: torch.Tensor
    log_z: torch.Tensor
    reward: torch.Tensor
    kl: torch.Tensor


def tilt(log_p: torch.Tensor, rewards: torch.Tensor, beta: float) -> Tilt:
    """Tilt distributions by rewards.

    Args:
        log_p: (…, V) log-probabilities or logits; -inf is never drawn.
        rewards: (…, V) or (V,); -inf forbids.
        beta: a multiplier; large is greedy, 0 is the base, negative shuns rewards.
    Raises: ValueError where a reward that counts is NaN or infinite the wrong way, or where nothing
        is left.
    """
    base = torch.log_softmax(log_p.to(torch.float64), -1)
    r = rewards.to(torch.float64).expand(base.shape)
    kept = base > -math.inf
    if not math.isfinite(beta):
        raise ValueError(f"beta must be finite, not {beta}")
    if beta == 0:
        reached = torch.where(kept, base.exp() * r, 0.0).sum(-1)
        nothing = torch.zeros_like(reached)
        return Tilt(base, nothing, reached, nothing)
    move = torch.where(kept, beta * r, 0.0)
    if bool((move.isnan() | (move == math.inf)).any()):
        raise ValueError("a reward is NaN or infinite")
    tilted = base + move
    log_z = torch.logsumexp(tilted, -1)
    if bool((log_z == -math.inf).any()):
        raise ValueError("the rewards leave nothing to draw from")
    log_q = tilted - log_z.unsqueeze(-1)
    q = log_q.exp()
    reached = torch.where(q > 0, q * r, 0.0).sum(-1)
    kl = torch.where(q > 0, q * (log_q - base), 0.0).sum(-1).clamp(min=0.0)
    return Tilt(log_q, log_z, reached, kl)


def best_of_n(p: torch.Tensor, rewards: torch.Tensor, n: int) -> torch.Tensor:
    """What the best of n draws is: the exact probabilities, ties shared in proportion to p.

    Args:
        p: (V,) probabilities.
        rewards: (V,).
    Returns: (V,) float64.
    Source: Beirami et al. 2024, Theoretical guarantees on the best-of-n alignment policy
        (arXiv:2401.01879), equation 3.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    p = p.to(torch.float64)
    levels, level = torch.unique(rewards.to(torch.float64), sorted=True, return_inverse=True)
    of_level = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, level, p)
    up_to = of_level.cumsum(0).clamp(max=1.0)
    below = torch.cat([torch.zeros(1, dtype=torch.float64), up_to[:-1]])
    of_best = up_to**n - below**n
    share = torch.where(of_level[level] > 0, p / of_level[level], 0.0)
    return of_best[level] * share


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1)/n: the most that best of n can move a distribution, in nats."""
    return math.log(n) - (n - 1) / n


def _finite_rewards(rewards: torch.Tensor | Sequence[float]) -> torch.Tensor:
    r = torch.as_tensor(rewards, dtype=torch.float64).cpu()
    if r.dim() != 1 or len(r) == 0:
        raise ValueError(f"rewards must be (n,) with n at least 1, not {tuple(r.shape)}")
    if not bool(r.isfinite().all()):
        bad = int((~r.isfinite()).nonzero()[0])
        raise ValueError(f"reward {bad} is {float(r[bad])}: rewards must be finite")
    return r


def _check_weighting(
    weighting: str, beta: float, scale: str, max_weight: float, top_fraction: float
) -> None:
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, not {weighting!r}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, not {scale!r}")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta, a temperature, must be above 0, not {beta}")
    if not max_weight >= 1:
        raise ValueError(f"max_weight must be at least 1, not {max_weight}")
    if not 0 < top_fraction <= 1:
        raise ValueError(f"top_fraction must be above 0 and at most 1, not {top_fraction}")


def _members(groups: Sequence[Hashable] | None, n: int) -> list[torch.Tensor]:
    """The rows of each group; one group of all without."""
    if groups is None:
        return [torch.arange(n)]
    labels: Sequence[Any] = groups.tolist() if isinstance(groups, torch.Tensor) else groups
    if len(labels) != n:
        raise ValueError(f"there are {len(labels)} group labels for {n} rewards")
    rows: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    return [torch.tensor(of_one) for of_one in rows.values()]


def _advantages(r: torch.Tensor, members: list[torch.Tensor], scale: str) -> torch.Tensor:
    """Rewards against their group's mean, scaled; exactly 0 where a group has one reward only."""
    advantage = torch.zeros_like(r)
    for rows in members:
        of_group = r[rows]
        if bool((of_group == of_group[0]).all()):
            continue
        # Within 1 first, so that sums of the largest floats cannot overflow.
        largest = of_group.abs().max()
        shares = of_group / largest
        centred = (shares - shares.mean()) * largest
        if scale == "group":
            centred = centred / _deviation(centred)
        advantage[rows] = centred
    if scale == "std" and bool(advantage.any()):
        advantage = advantage / _deviation(advantage)
    return advantage


def _soft_value(r: torch.Tensor, beta: float, weighting: str, scale: str) -> float:
    """With the temperature turned into the rewards' unit."""
    if not math.isfinite(beta) or weighting == "rank" or scale == "group":
        return math.nan
    if scale == "std":
        beta = beta * float(_deviation(_advantages(r, [torch.arange(len(r))], "none")))
    return soft_value(r, beta) if 0 < beta < math.inf else math.nan


def _deviation(centred: torch.Tensor) -> torch.Tensor:
    """Root mean square, safe for the largest and the smallest floats."""
    largest = centred.abs().max()
    if largest == 0:
        return largest
    return largest * (centred / largest).square().mean().sqrt()


def _weights(advantage: torch.Tensor, beta: float, max_weight: float) -> torch.Tensor:
    largest = torch.finfo(torch.float64).max
    u = (advantage / beta).clamp(-largest, min(largest, math.log(max_weight)))
    # Equal to exp(u - logmeanexp(u)), and exactly 1 where all are equal.
    unnormalised = (u - u.max()).exp()
    return unnormalised / unnormalised.mean()


def _top(r: torch.Tensor, members: list[torch.Tensor], fraction: float) -> torch.Tensor:
    keep = torch.zeros(len(r), dtype=torch.bool)
    for rows in members:
        count = max(1, math.ceil(fraction * len(rows) - 1e-9))
        edge = r[rows].topk(count).values[-1]
        keep[rows] = r[rows] >= edge
    return keep


def _mid_ranks(r: torch.Tensor) -> torch.Tensor:
    """Ranks from 1; equal rewards share the mean of theirs."""
    _, level, count = torch.unique(r, sorted=True, return_inverse=True, return_counts=True)
    last = count.cumsum(0).to(torch.float64)
    return (last - (count.to(torch.float64) - 1) / 2)[level]


def _solve(
    weights_at: Callable[[float], torch.Tensor], target_ess: float | None, target_kl: float | None
) -> float:
    """Bisection on log beta from the mild end, where ESS is n and KL is 0.

    Without a limit on weights both are monotone in beta. With one, the mildest beta that reaches
    the target is found as far as the scan by factors of 1.25 sees it.
    """

    def beyond(beta: float) -> bool:
        weights = weights_at(beta)
        if target_ess is not None:
            return effective_sample_size(weights) <= target_ess
        assert target_kl is not None
        return weights_kl(weights) >= target_kl

    n = len(weights_at(1.0))
    if target_ess is not None and not 1 <= target_ess < n:
        raise ValueError(f"target_ess must be at least 1 and below the {n} records")
    if target_kl is not None and not target_kl > 0:
        raise ValueError(f"target_kl must be above 0, not {target_kl}")
    mild, greedy = _MILDEST, _MILDEST
    while not beyond(greedy):
        mild, greedy = greedy, greedy / 1.25
        if greedy < _GREEDIEST:
            what = f"target_ess {target_ess:g}" if target_ess is not None else f"{target_kl:g} nats"
            least = weights_at(_GREEDIEST)
            raise ValueError(
                f"no beta reaches {what}: the greediest weights have an effective sample size of "
                f"{effective_sample_size(least):.4g} and {weights_kl(least):.4g} nats"
            )
    for _ in range(_SOLVER_STEPS):
        middle = math.sqrt(mild * greedy)
        if middle in (mild, greedy):
            break
        mild, greedy = (mild, middle) if beyond(middle) else (middle, greedy)
    return greedy
