"""Writing: the cache against recomputing every token's context, and against other programs."""

import importlib
import importlib.util
import warnings
from functools import partial

import pytest
import torch

from nanogpt import GPT, native
from nanogpt.measuring import median_seconds

SHAPES = {
    "S": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 66},
    "M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 96},
}

LARGE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257}
LARGE |= {"bias": True}
# Shape and new tokens of texts within the context, and rounds.
BESIDE = [
    ("M", SHAPES["M"], 240, 5),
    ("L", LARGE, 64, 5),
    ("L", LARGE, 256, 3),
]


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


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize(("name", "shape", "count", "rounds"), BESIDE)
def test_generation_beside_others(
    benchmark, record, ceilings, nanogpt_if_any, name, shape, count, rounds, engine
):
    """One text, sampled alike: nanoGPT, which has no cache, and transformers with its cache.

    `torch` is what GPT.generate runs without being asked; `native` is what `sample` picks.
    """
    model = GPT(**shape).eval()
    reason = native.unfit(model)
    if engine == "native" and reason is not None:
        pytest.skip(reason)
    prompt = torch.randint(60, (1, 16))
    peers = {}
    if nanogpt_if_any is not None:
        config = nanogpt_if_any.GPTConfig(**{"bias": False, **shape}, dropout=0.0)
        peers["nanoGPT"] = partial(nanogpt_if_any.GPT(config).eval().generate, prompt, count)
    if importlib.util.find_spec("transformers") is not None:
        peers["transformers, with its cache"] = writer_of_transformers(shape, prompt, count)
    if not peers:
        pytest.skip("beside --peer-dir with nanoGPT, or transformers where it is installed")

    def ours():
        out = model.generate(prompt, count, seed=1, engine=engine)
        assert out.shape == (1, 16 + count)

    times = median_seconds({"ours": ours, **peers}, rounds=rounds)
    benchmark.pedantic(ours, rounds=3)
    weights = model.config.n_parameters(positions=False) * 4
    record(
        "generation",
        {"model": name, "engine": engine, "tokens": count},
        "float32",
        times["ours"] / count,
        {peer: times[peer] / count for peer in peers},
        weights / ceilings["read_bytes_per_second"],
        tokens_per_second=count / times["ours"],
        also={f"times {peer}": round(times[peer] / times["ours"], 2) for peer in peers},
    )


def writer_of_transformers(shape, prompt, count):
    """GPT2LMHeadModel.generate of the same shape, sampling from the whole distribution."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own dependencies
        transformers = importlib.import_module("transformers")
        config = transformers.GPT2Config(
            vocab_size=shape["vocab_size"],
            n_positions=shape["block_size"],
            n_layer=shape["n_layer"],
            n_head=shape["n_head"],
            n_embd=shape["n_embd"],
            bos_token_id=None,
            eos_token_id=None,
        )
        model = transformers.GPT2LMHeadModel(config).eval()

    def write():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=True,
            top_k=0,
            use_cache=True,
            pad_token_id=0,
        )
        assert out.shape == (1, 16 + count)

    return write
