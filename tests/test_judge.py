"""The judge of rewarded texts."""

import random

import pytest
import torch

from nanogpt.judge import BagOfWordsJudge
from nanogpt.reward_data import read_reward_data

NEUTRAL = ["the", "film", "has", "a", "scene", "with", "two", "people", "in", "house", "by", "sea"]


def reviews(n, seed, informative=True):
    """Texts of neutral words; with one telling word among them where informative."""
    generator = random.Random(seed)
    texts, rewards = [], []
    for _ in range(n):
        reward = generator.choice([-1.0, 1.0])
        words = [generator.choice(NEUTRAL) for _ in range(8)]
        if informative:
            words[generator.randrange(8)] = "lovely" if reward > 0 else "dull"
        texts.append(" ".join(words))
        rewards.append(reward)
    return texts, rewards


def test_a_judge_finds_the_telling_words():
    judge = BagOfWordsJudge(*reviews(400, 0))
    assert judge.quality.auroc > 0.99
    low, high = judge.score(["a DULL scene", "a lovely scene"]).tolist()
    assert -1 <= low < -0.5
    assert 0.5 < high <= 1
    texts, rewards = reviews(200, 1)
    right = (judge.score(texts) > 0) == (torch.tensor(rewards) > 0)
    assert float(right.double().mean()) > 0.99


def test_a_judge_of_noise_judges_no_better_than_chance():
    judge = BagOfWordsJudge(*reviews(400, 0, informative=False))
    assert abs(judge.quality.auroc - 0.5) < 0.15
    texts, rewards = reviews(2000, 1, informative=False)
    right = (judge.score(texts) > 0) == (torch.tensor(rewards) > 0)
    assert abs(float(right.double().mean()) - 0.5) < 0.05


def test_graded_rewards_are_predicted_by_least_squares():
    generator = random.Random(0)
    texts, rewards = [], []
    for _ in range(600):
        words = [generator.choice(NEUTRAL) for _ in range(6)]
        score = generator.choice([0.0, 1.0, 2.5])
        words.append({0.0: "one star", 1.0: "two stars", 2.5: "five stars"}[score])
        texts.append(" ".join(words))
        rewards.append(score)
    judge = BagOfWordsJudge(texts, rewards)
    assert judge.quality.correlation > 0.95
    one, two, five = judge.score(["one star", "two stars", "five stars"]).tolist()
    assert one < two < five


def test_texts_without_a_known_word_and_no_texts_are_scored():
    judge = BagOfWordsJudge(*reviews(200, 0))
    scores = judge.score(["", "xyzzy", "lovely"]).tolist()
    assert scores[0] == scores[1] < scores[2]
    assert judge.score([""]).shape == (1,)


def test_the_same_texts_make_the_same_judge():
    texts, rewards = reviews(100, 3)
    first, second = BagOfWordsJudge(texts, rewards), BagOfWordsJudge(texts, rewards)
    assert torch.equal(first.score(texts), second.score(texts))


@pytest.mark.parametrize(
    ("texts", "rewards", "message"),
    [
        (["a"] * 10, [0.0, 1.0] * 5, "at least 20 texts"),
        (["a"] * 30, [1.0] * 30, "all rewards are equal"),
    ],
)
def test_what_cannot_be_judged_is_refused(texts, rewards, message):
    with pytest.raises(ValueError, match=message):
        BagOfWordsJudge(texts, rewards)


@pytest.mark.slow
def test_film_reviews_are_judged_as_their_readers_did(data_folder):
    records = read_reward_data(data_folder / "movie_reviews.txt")
    half = len(records) // 2
    judge = BagOfWordsJudge([r.text for r in records[:half]], [r.reward for r in records[:half]])
    scores = judge.score([r.text for r in records[half:]])
    right = (scores > 0) == torch.tensor([r.reward > 0 for r in records[half:]])
    assert float(right.double().mean()) > 0.72
