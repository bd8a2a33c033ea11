"""Writing with the cache against recomputing the whole context for every token."""

import pytest
import torch

from nanogpt import GPT
from nanogpt.measuring import median_seconds

SHAPES = {
    "S": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 66},
    "M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 96},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("beyond", [False, True], ids=["within", "beyond"])
def test_generation(benchmark, record, ceilings, name, beyond):
    """A text that grows to the full context, or 256 tokens written past it."""
    shape = SHAPES[name]
    model = GPT(**shape).eval()
    block = shape["block_size"]
    prompt = torch.randint(60, (1, block if beyond else 16))
    count = 256 if beyond else block - 16
    few = 32 if beyond else count

    def write(tokens, use_cache):
        return model.generate(prompt, tokens, use_cache=use_cache, seed=1)

    times = median_seconds(
        {"ours": lambda: write(count, True), "recomputing": lambda: write(few, False)}, rounds=3
    )
    benchmark.pedantic(lambda: write(count, True), rounds=3)
    weights = model.config.n_parameters(positions=False) * 4
    record(
        "generation",
        {"model": name, "context": "beyond" if beyond else "within", "tokens": count},
        "float32",
        times["ours"] / count,
        {"recomputing": times["recomputing"] / few},
        weights / ceilings["read_bytes_per_second"],
    )


@pytest.mark.parametrize("name", SHAPES)
def test_generation_beside_nanogpt(benchmark, record, nanogpt_peer, name):
    """The same shape in nanoGPT, which has no cache."""
    shape = SHAPES[name]
    model = GPT(**shape).eval()
    peer = nanogpt_peer.GPT(nanogpt_peer.GPTConfig(**shape, dropout=0.0, bias=False)).eval()
    prompt = torch.randint(60, (1, 16))
    count = shape["block_size"] - 16
    times = median_seconds(
        {
            "ours": lambda: model.generate(prompt, count, seed=1),
            "nanoGPT": lambda: peer.generate(prompt, count),
        },
        rounds=3,
    )
    benchmark.pedantic(lambda: model.generate(prompt, count, seed=1), rounds=3)
    peers = {"nanoGPT": times["nanoGPT"] / count}
    record(
        "generation",
        {"model": name, "context": "within, beside nanoGPT", "tokens": count},
        "float32",
        times["ours"] / count,
        peers,
    )
