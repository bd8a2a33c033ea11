"""Weights and tilts against closed forms: cases A2 to A7, B1 to B6, B8, B11, B16 to B18."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.tilt import (
    best_of_n,
    best_of_n_kl_bound,
    effective_sample_size,
    reward_weights,
    soft_value,
    solve_beta,
    tilt,
    weights_kl,
)

UNIQUE = math.inf


def logs(*p):
    return torch.tensor(p, dtype=torch.float64).log()


def floats(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(tensor, expected, tolerance=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(tensor, dtype=torch.float64), floats(*expected), atol=tolerance, rtol=0
    )


# Weights.


@pytest.mark.parametrize(
    ("beta", "ess", "kl", "value"),
    [
        (1.0, 2.086111, 0.438757, 2.053895),
        (0.5, 1.312155, 0.930866, 2.379392),
        (2.0, 3.109580, 0.141244, 1.802089),
    ],
)
def test_a2_weights_of_four_rewards_are_the_closed_form(beta, ess, kl, value):
    weights, stats = reward_weights([0, 1, 2, 3], beta=beta, scale="none", max_weight=UNIQUE)
    assert stats.ess == pytest.approx(ess, abs=1e-6)
    assert stats.kl == pytest.approx(kl, abs=1e-6)
    assert stats.soft_value == pytest.approx(value, abs=1e-6)
    # Without clipping, KL is E_w[r]/beta - log mean exp(r/beta).
    assert stats.kl == pytest.approx((stats.reward_weighted - stats.soft_value) / beta, abs=1e-9)
    if beta == 1.0:
        close(weights, [0.128234, 0.348577, 0.947531, 2.575657])
        assert stats.reward_weighted == pytest.approx(2.492653, abs=1e-6)
    assert stats.fraction_clipped == 0


def test_a3_a_shift_of_all_rewards_changes_no_weight():
    r = torch.randn(200, dtype=torch.float64)
    for scale in ("std", "none"):
        weights, _ = reward_weights(r, scale=scale)
        shifted, _ = reward_weights(r + 1e6, scale=scale)
        torch.testing.assert_close(shifted, weights, atol=1e-9, rtol=1e-9)


def test_a3_scaled_rewards_have_no_unit():
    r = torch.randn(200, dtype=torch.float64)
    weights, _ = reward_weights(r)
    assert float((weights - 1).abs().max()) > 0.5
    torch.testing.assert_close(reward_weights(7 * r - 3)[0], weights, atol=1e-9, rtol=1e-9)
    unscaled = reward_weights(7 * r - 3, scale="none")[0]
    assert float((unscaled - weights).abs().max()) > 0.5


def test_a4_a_high_temperature_is_plain_training_and_a_low_one_a_filter():
    weights, _ = reward_weights([0, 1, 2, 3], beta=1e6, scale="none")
    assert float((weights - 1).abs().max()) <= 2e-6
    close(reward_weights([1, 1, 0], beta=1e-3, scale="none")[0], [1.5, 1.5, 0])
    greedy = {"beta": 1e-3, "scale": "none"}
    close(reward_weights([0, 1, 2, 3], max_weight=UNIQUE, **greedy)[0], [0, 0, 0, 4])
    close(reward_weights([0, 1, 2, 3], max_weight=20, **greedy)[0], [0, 0, 2, 2])
    close(reward_weights([0, 1, 2, 3], weighting="binary")[0], [0, 0, 2, 2])


@pytest.mark.parametrize("rewards", [[-200, -210], [1e4, 0], [1e9, 0], [1e308, -1e308]])
def test_a5_no_reward_overflows(rewards):
    for limit in (20.0, UNIQUE):
        weights, stats = reward_weights(rewards, beta=0.05, scale="none", max_weight=limit)
        close(weights, [2, 0])
        assert stats.ess == pytest.approx(1)
        scaled, _ = reward_weights(rewards, max_weight=limit)
        close(scaled, [2 / (1 + math.exp(-2)), 2 / (1 + math.exp(2))], 1e-9)


def test_a6_the_limit_holds_down_a_record_of_its_own():
    rewards = [0.0] * 999 + [1.0]
    weights, free = reward_weights(rewards, max_weight=UNIQUE)
    assert float(weights[-1] / 1000) == pytest.approx(0.99999999998, abs=1e-11)
    assert free.ess == pytest.approx(1.0, abs=1e-4)
    _, held = reward_weights(rewards, max_weight=20)
    assert held.max_share == pytest.approx(0.020245, abs=1e-6)
    assert held.ess == pytest.approx(729.53, abs=1e-2)
    assert held.fraction_clipped == pytest.approx(0.001)


def test_a7_beta_is_solved_for_a_target():
    rewards = [0, 0, 0, 1]
    by_ess = solve_beta(rewards, target_ess=2)
    assert by_ess == pytest.approx(1 / math.log(3 + math.sqrt(12)), abs=1e-9)
    assert by_ess == pytest.approx(0.535829860, abs=1e-9)
    by_kl = solve_beta(rewards, target_kl=0.2)
    assert by_kl == pytest.approx(0.776710258, abs=1e-9)
    weights, stats = reward_weights(rewards, scale="none", target_kl=0.2)
    assert float(weights[-1] / 4) == pytest.approx(0.547077414, abs=1e-9)
    assert stats.beta == by_kl


def test_a7_the_kl_target_solves_the_dual_of_reps():
    r = torch.randn(50, dtype=torch.float64)
    beta = solve_beta(r, target_kl=0.3)

    def dual(b):
        return b * 0.3 + soft_value(r, b)

    assert dual(beta) < min(dual(beta * 1.01), dual(beta / 1.01))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30).filter(lambda r: len(set(r)) > 1),
    st.floats(0.05, 0.95),
)
def test_a_target_is_reached_or_refused(rewards, share):
    n = len(rewards)
    target, free = 1 + share * (n - 1), {"max_weight": UNIQUE}
    if effective_sample_size(reward_weights(rewards, beta=1e-11, **free)[0]) > target:
        with pytest.raises(ValueError, match="no beta reaches"):
            reward_weights(rewards, target_ess=target, **free)
        return
    weights, stats = reward_weights(rewards, target_ess=target, **free)
    assert effective_sample_size(weights) <= target + 1e-6
    assert float(weights.mean()) == pytest.approx(1)
    milder, _ = reward_weights(rewards, beta=stats.beta * 1.0001, **free)
    assert effective_sample_size(milder) >= target - 1e-6


@pytest.mark.parametrize("weighting", ["exp", "binary", "topk", "rank", "identity"])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e9, 1 / 3])
def test_a14_equal_rewards_weigh_exactly_one(weighting, value):
    weights, stats = reward_weights([value] * 7, weighting=weighting, target_ess=3)
    assert weights.tolist() == [1.0] * 7
    assert stats.kl == 0
    assert stats.ess == pytest.approx(7)
    assert stats.frac_reward_zero_std == 1


def test_the_best_part_is_kept_with_its_ties():
    weights, _ = reward_weights([5, 4, 4, 4, 1], weighting="topk", top_fraction=0.4)
    close(weights, [1.25, 1.25, 1.25, 1.25, 0])
    alone, _ = reward_weights([5, 4, 3, 2, 1], weighting="topk", top_fraction=0.2)
    close(alone, [5, 0, 0, 0, 0])


def test_ranks_know_only_the_order():
    r = torch.randn(30, dtype=torch.float64)
    weights, _ = reward_weights(r, weighting="rank")
    torch.testing.assert_close(reward_weights(r.exp() ** 3, weighting="rank")[0], weights)
    assert torch.equal(weights.argsort(), r.argsort())
    tied, _ = reward_weights([1, 2, 2, 3], weighting="rank")
    assert tied[1] == tied[2]


def test_groups_are_compared_within_themselves():
    rewards, prompts = [0, 1, 100, 101, 7], ["a", "a", "b", "b", "c"]
    weights, stats = reward_weights(rewards, groups=prompts, scale="none")
    assert float(weights[0]) == pytest.approx(float(weights[2]))
    assert float(weights[1]) == pytest.approx(float(weights[3]))
    assert float(weights[1] / weights[0]) == pytest.approx(math.e)
    assert float(weights[4] / weights[0]) == pytest.approx(math.exp(0.5))
    assert stats.frac_reward_zero_std == pytest.approx(1 / 3)
    uneven, _ = reward_weights([0, 1, 0, 50], groups=["a", "a", "b", "b"], scale="group")
    torch.testing.assert_close(uneven[:2], uneven[2:])
    together, _ = reward_weights([0, 1, 0, 50], groups=["a", "a", "b", "b"], scale="std")
    assert together[3] > together[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "beta, a temperature, must be above 0"),
        ({"beta": -1.0}, "beta, a temperature, must be above 0"),
        ({"beta": math.nan}, "beta, a temperature"),
        ({"max_weight": 0.5}, "max_weight must be at least 1"),
        ({"weighting": "softmax"}, "weighting must be one of"),
        ({"scale": "minmax"}, "scale must be one of"),
        ({"top_fraction": 0.0}, "top_fraction"),
        ({"target_ess": 9.0}, "below the 3 records"),
        ({"target_kl": 0.0}, "target_kl must be above 0"),
        ({"target_kl": 50.0}, "no beta reaches"),
        ({"target_kl": 0.1, "target_ess": 2.0}, "exclude each other"),
        ({"groups": ["a"]}, "1 group labels for 3 rewards"),
    ],
)
def test_an_impossible_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        reward_weights([0, 1, 2], **arguments)


@pytest.mark.parametrize("rewards", [[], [0.0, math.nan], [math.inf, 0.0], [[1.0]]])
def test_rewards_that_are_no_numbers_are_refused(rewards):
    with pytest.raises(ValueError, match="rewards"):
        reward_weights(rewards)


def test_effective_size_and_kl_of_weights_with_zeros():
    weights = floats(2, 2, 0, 0)
    assert effective_sample_size(weights) == 2
    assert weights_kl(weights) == pytest.approx(math.log(2))
    assert effective_sample_size(floats(1e200, 1e200)) == 2


# Tilts: beta is a multiplier.

P1, R1 = logs(0.5, 0.3, 0.15, 0.05), floats(0, 0, 0, 1)
P2, R2 = logs(0.1, 0.2, 0.3, 0.4), floats(1, 0.5, 0.2, 0)


def test_b1_a_rewarded_token_has_its_closed_form():
    close(tilt(P1, R1, 1.0).log_q.exp(), [0.460442, 0.276265, 0.138132, 0.125161])
    assert float(tilt(P1, R1, 2.0).log_q[3].exp()) == pytest.approx(0.280005, abs=1e-6)
    assert float(tilt(P1, R1, 5.0).log_q[3].exp()) == pytest.approx(0.886508, abs=1e-6)


def test_b2_the_expected_reward_rises_with_beta_by_the_variance():
    close(tilt(P2, R2, 1.0).log_q.exp(), [0.198706, 0.241042, 0.267853, 0.292399])
    expected = [0.26, 0.311807, 0.372798, 0.516520, 0.791009, 0.977329]
    reached = [float(tilt(P2, R2, beta).reward) for beta in (0, 0.5, 1, 2, 4, 8)]
    assert reached == pytest.approx(expected, abs=1e-6)
    assert sorted(reached) == reached
    slope = float(tilt(P2, R2, 1 + 1e-5).reward - tilt(P2, R2, 1 - 1e-5).reward) / 2e-5
    assert slope == pytest.approx(0.130702, abs=1e-5)


def test_b3_kl_is_exact_and_within_its_bounds():
    for beta, kl in [(0.5, 0.013338), (1, 0.059453), (2, 0.276866), (4, 1.083933), (8, 2.079154)]:
        tilted = tilt(P2, R2, beta)
        assert float(tilted.kl) == pytest.approx(kl, abs=1e-6)
        assert float(tilted.kl) <= min(beta**2 / 8, beta, -math.log(0.1))
        assert float(tilted.kl) == pytest.approx(
            float(beta * tilted.reward - tilted.log_z), abs=1e-12
        )
    assert float(tilt(P1, R1, 50.0).kl) == pytest.approx(-math.log(0.05), abs=1e-5)


@pytest.mark.parametrize("shift", [-3.0, 1e4])
def test_b4_a_shift_of_all_rewards_changes_nothing(shift):
    base, shifted = tilt(P2, R2, 3.0), tilt(P2, R2 + shift, 3.0)
    torch.testing.assert_close(shifted.log_q.exp(), base.log_q.exp(), atol=1e-6, rtol=0)
    assert float(shifted.kl) == pytest.approx(float(base.kl), abs=1e-9)
    assert float(shifted.log_z - base.log_z) == pytest.approx(3 * shift)


def test_b5_the_inverse_reward_is_a_negative_beta():
    p, r = logs(0.5, 0.3, 0.15, 0.05), floats(0.2, 0.9, 0.4, 1.0)
    difference = tilt(p, 1 - r, 2.0).log_q.exp() - tilt(p, r, -2.0).log_q.exp()
    assert float(difference.abs().max()) <= 1e-7


def test_b6_tilts_add_up():
    twice = tilt(tilt(P2, R2, 1.0).log_q, R2, 2.0)
    torch.testing.assert_close(twice.log_q, tilt(P2, R2, 3.0).log_q, atol=1e-7, rtol=0)


def test_b6_weights_at_a_temperature_are_the_tilt_of_its_inverse():
    r = torch.randn(9, dtype=torch.float64)
    weights, stats = reward_weights(r, beta=0.7, scale="none", max_weight=UNIQUE)
    tilted = tilt(torch.zeros(9), r, 1 / 0.7)
    torch.testing.assert_close(weights / 9, tilted.log_q.exp())
    assert stats.kl == pytest.approx(float(tilted.kl))


def test_b17_nothing_is_normalised_in_secret():
    close(tilt(logs(0.9, 0.1), floats(0.5, 0.501), 10.0).log_q.exp(), [0.899096, 0.100904])


def test_b18_degenerate_rewards():
    torch.testing.assert_close(tilt(P2, floats(7, 7, 7, 7), 3.0).log_q, P2)
    forbidden = tilt(P2, floats(-math.inf, 0, 0, 0), 1.0)
    close(forbidden.log_q.exp(), [0, 2 / 9, 3 / 9, 4 / 9])
    assert math.isfinite(float(forbidden.reward))
    with pytest.raises(ValueError, match="NaN"):
        tilt(P2, floats(math.nan, 0, 0, 0), 1.0)
    with pytest.raises(ValueError, match="leave nothing"):
        tilt(P2, floats(*[-math.inf] * 4), 1.0)
    # What the filters dropped may have any reward.
    dropped = P2.clone()
    dropped[0] = -math.inf
    assert float(tilt(dropped, floats(math.nan, 0, 0, 1), 1.0).log_q[0].exp()) == 0


def test_tilts_of_a_batch_are_those_of_its_rows():
    log_p, r = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    together = tilt(log_p, r, 1.3)
    for row in range(5):
        alone = tilt(log_p[row], r[row], 1.3)
        torch.testing.assert_close(together.log_q[row], alone.log_q)
        torch.testing.assert_close(together.kl[row], alone.kl)


@pytest.mark.parametrize(
    ("n", "pmf", "reward", "kl", "bound"),
    [
        (2, [0.19, 0.32, 0.33, 0.16], 0.416, 0.157199, 0.193147),
        (4, [0.3439, 0.4160, 0.2145, 0.0256], 0.5948, 0.587114, 0.636294),
        (16, None, 0.906352, 1.676797, 1.835089),
    ],
)
def test_b16_best_of_n_has_exact_probabilities(n, pmf, reward, kl, bound):
    p = P2.exp()
    best = best_of_n(p, R2, n)
    if pmf is not None:
        close(best, pmf, 1e-9 if n == 2 else 1e-4)
    assert float(best.sum()) == pytest.approx(1)
    assert float((best * R2).sum()) == pytest.approx(reward, abs=1e-4)
    assert float((best * (best / p).log()).sum()) == pytest.approx(kl, abs=1e-5)
    assert best_of_n_kl_bound(n) == pytest.approx(bound, abs=1e-6)


def test_b16_ties_of_best_of_n_are_shared():
    best = best_of_n(torch.full((4,), 0.25), floats(0, 0, 1, 1), 4)
    close(best, [0.03125, 0.03125, 0.46875, 0.46875])
    kl = float((best * (best / 0.25).log()).sum())
    assert kl == pytest.approx(0.459356, abs=1e-6)
