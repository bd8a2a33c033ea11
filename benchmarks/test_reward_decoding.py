"""Writing with rewards against plain writing, in turns: what a tilt costs."""

import pytest
import torch

from nanogpt import GPT, char_reward_fn, term_reward_fn
from nanogpt.measuring import median_seconds
from nanogpt.reward_model import RewardHead, RewardModel
from nanogpt.tokenizer import CharTokenizer

SHAPES = {
    "S": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65},
    "M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
}
LETTERS = CharTokenizer("".join(map(chr, range(ord("A"), ord("A") + 64))))


def rewards(model: GPT) -> dict:
    """By name; the model's head predicts nothing, which takes as long."""
    head = RewardHead(model.config.n_embd, 65)
    learnt = RewardModel(model, head, low=0.0, high=1.0, two_valued=True, mean=0.5, deviation=0.5)
    return {
        "characters": char_reward_fn("ge", LETTERS),
        "terms": term_reward_fn(["gene", "therapy"], LETTERS),
        "model": learnt,
        "function": lambda ids: (ids[:, -1] == 3).double(),
    }


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["characters", "terms", "model", "function"])
def test_reward_decoding(benchmark, record, name, kind, engine):
    """A text that grows to the full context."""
    if engine == "native" and kind in ("model", "function"):
        pytest.skip("the compiled engine has rewards of characters and terms")
    model = GPT(**SHAPES[name]).eval()
    reward = rewards(model)[kind]
    prompt = torch.randint(60, (1, 16))
    count = SHAPES[name]["block_size"] - 16

    def plain():
        return model.generate(prompt, count, seed=1, engine=engine)

    def rewarded():
        return model.generate_reward_augmented(prompt, count, reward, 1.0, seed=1, engine=engine)

    times = median_seconds({"ours": rewarded, "without rewards": plain}, rounds=5)
    benchmark.pedantic(rewarded, rounds=3)
    record(
        "reward-decoding",
        {"model": name, "reward": kind, "engine": engine, "tokens": count},
        "float32",
        times["ours"] / count,
        {"without rewards": times["without rewards"] / count},
    )
