"""One optimizer step as the training loop does it, beside nanoGPT's best setting and llm.c.

Ours goes through what `train` makes of its flags; theirs is the step of nanoGPT's train.py, eager
and compiled, in float32 and under bfloat16 autocast. Every step has new data on both sides.
"""

import re
import statistics
import subprocess
import time
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from nanogpt import GPT
from nanogpt.config import TrainConfig
from nanogpt.data import gather, prepare
from nanogpt.measuring import matmul_ceiling, median_seconds
from nanogpt.rehearsal import Rehearsal, random_corpus

pytestmark = [  # torch.compile's own imports and advice
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

# Shape, sequences in a step, rounds. In a round a setting makes as many steps in a row as take
# about half a second, as a training run does: otherwise it begins with the other's data in the
# caches, beside threads of the other that still spin.
SHAPES = {
    "S": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65}, 12, 20),
    "M": ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 96}, 16, 5),
    "L": (
        {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 64, "vocab_size": 50257}
        | {"bias": True},
        4,
        5,
    ),
}
IN_A_ROW = {"S": 12}
SLOW_PRODUCTS = 4
"""Times slower than float32's above which bfloat16 products rule that precision out."""
OUTRUN = 4
"""Times the fastest setting above which one is timed once: no peer is judged by its slowest."""
STEPS, LAST = 200, 20
LARGEST_DIFFERENCE = 0.02
"""Nats between both losses after STEPS. nanoGPT's GELU is the exact one, ours GPT-2's."""
LLMC_STEPS = 6


def rehearsal(shape: dict, batch: int, dtype: str = "auto") -> Rehearsal:
    """The training that the flags of `train` give, on random tokens."""
    sizes = {name: value for name, value in shape.items() if name != "vocab_size"}
    corpus = random_corpus(shape["vocab_size"], 64 * (batch + 1) * (shape["block_size"] + 1))
    config = TrainConfig(
        **sizes, batch_size=batch, max_steps=100_000, val_fraction=0.0, dtype=dtype, device="cpu"
    )
    return Rehearsal(config, corpus)


def their_model(nanogpt_peer, shape: dict):
    """nanoGPT's model and its own optimizer."""
    config = nanogpt_peer.GPTConfig(**{"bias": False, **shape, "dropout": 0.0})
    model = nanogpt_peer.GPT(config)
    return model, model.configure_optimizers(0.1, 1e-4, (0.9, 0.99), "cpu")


def their_step(model, forward, optimizer, batch: int, autocast: bool):
    """The step of nanoGPT's train.py: a batch of the text, clipping, AdamW, the loss read."""
    block = model.config.block_size
    data = np.random.default_rng(0).integers(0, model.config.vocab_size, 64 * batch * block)
    data = data.astype(np.uint16)

    def step() -> float:
        starts = torch.randint(len(data) - block, (batch,))
        x, y = (
            torch.stack(
                [torch.from_numpy(data[i + off : i + off + block].astype(np.int64)) for i in starts]
            )
            for off in (0, 1)
        )
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            _, loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def repeat(step, count: int) -> None:
    """Several steps in a row."""
    for _ in range(count):
        step()


@pytest.mark.parametrize("name", SHAPES)
def test_training_step(benchmark, record, ceilings, nanogpt_peer, may_compile, name):
    """Rows of ours as `train` picks its precision, and in bfloat16 where it is no emulation."""
    shape, batch, rounds = SHAPES[name]
    rates = [matmul_ceiling(ceilings, dtype) for dtype in (torch.float32, torch.bfloat16)]
    dtypes = ["float32", "bfloat16"] if rates[0] < SLOW_PRODUCTS * rates[1] else ["float32"]
    ours = {dtype: rehearsal(shape, batch, dtype) for dtype in ["auto", *dtypes[1:]]}
    model, optimizer = their_model(nanogpt_peer, shape)
    # The same weights serve every setting: only the time counts.
    settings = {"eager": model}
    if may_compile:
        torch._dynamo.reset()
        settings["compile"] = torch.compile(model)
    theirs = {
        f"nanoGPT, {how}, {dtype}": their_step(model, run, optimizer, batch, dtype == "bfloat16")
        for how, run in settings.items()
        for dtype in dtypes
    }
    mine = {dtype: each.step for dtype, each in ours.items()}
    count = IN_A_ROW.get(name, 1)
    runs = {setting: partial(repeat, step, count) for setting, step in (mine | theirs).items()}
    taken = median_seconds(runs, rounds, outrun=OUTRUN)
    times = {setting: seconds / count for setting, seconds in taken.items()}
    benchmark.pedantic(mine["auto"], rounds=3)
    tokens = batch * shape["block_size"]
    for asked, each in ours.items():
        if asked != "auto" and each.plan.dtype == ours["auto"].plan.dtype:
            continue
        flops = each.plan.shape.flops_per_token() * tokens
        record(
            "training-step",
            {"model": name, "batch": batch, "block": shape["block_size"]},
            str(each.plan.dtype).removeprefix("torch."),
            times[asked],
            {peer: times[peer] for peer in theirs},
            flops / matmul_ceiling(ceilings, each.plan.dtype),
            tokens_per_second=tokens / times[asked],
        )


def test_training_step_beside_llm_c(benchmark, record, ceilings, llmc_folder):
    """llm.c's own program, which reports the time of its steps; ended after a few of them."""
    shape, batch, rounds = SHAPES["L"]
    ours = rehearsal(shape, batch)
    process = subprocess.Popen(
        [llmc_folder / "train_gpt2"], cwd=llmc_folder, stdout=subprocess.PIPE, text=True
    )
    took: list[float] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            found = re.search(r"\(took ([\d.]+) ms\)", line)
            took += [float(found[1]) / 1e3] if found else []
            if len(took) > LLMC_STEPS:
                break
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert len(took) > LLMC_STEPS, "train_gpt2 reported too few steps"
    times = median_seconds({"ours": ours.step}, rounds)
    benchmark.pedantic(ours.step, rounds=3)
    tokens = batch * shape["block_size"]
    record(
        "training-step",
        {"model": "L, beside llm.c", "batch": batch, "block": shape["block_size"]},
        "float32",
        times["ours"],
        {"llm.c": statistics.median(took[1:])},
        ours.plan.shape.flops_per_token() * tokens / matmul_ceiling(ceilings, ours.plan.dtype),
        tokens_per_second=tokens / times["ours"],
    )


def test_the_same_loss_after_200_steps(benchmark, record, nanogpt_peer, data_folder, tmp_path):
    """The same weights, batches and rates on real text: both must learn alike."""
    shape, batch, _ = SHAPES["S"]
    sizes = {name: value for name, value in shape.items() if name != "vocab_size"}
    corpus = prepare([str(data_folder / "tinyshakespeare.txt")], cache_dir=tmp_path)
    config = TrainConfig(
        **sizes, batch_size=batch, max_steps=STEPS, learning_rate=1e-3, device="cpu"
    )
    torch.manual_seed(0)
    initial = GPT(**shape | {"vocab_size": corpus.tokenizer.vocab_size})
    ours = Rehearsal(config, corpus, initial)
    model, _ = their_model(nanogpt_peer, {**shape, "vocab_size": corpus.tokenizer.vocab_size})
    weights = dict(initial.named_parameters())
    model.load_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"]})
    betas = (config.beta1, config.beta2)
    optimizer = model.configure_optimizers(config.weight_decay, 1e-3, betas, "cpu")
    train_tokens, _ = corpus.split(config.val_fraction)
    losses: dict[str, list[float]] = {"ours": [], "nanoGPT": []}
    seconds = dict.fromkeys(losses, 0.0)

    def windows_at(step: int) -> np.ndarray:
        return gather(train_tokens, ours.plan.order.starts(step), shape["block_size"])

    def their_loss(step: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = ours.plan.learning_rate(step)
        both = torch.from_numpy(windows_at(step))
        _, loss = model(both[:, :-1].contiguous(), both[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    settings = {"ours": lambda step: ours.step(windows_at(step)), "nanoGPT": their_loss}

    def steps() -> None:
        for first in range(0, STEPS, LAST):
            for name, loss_of in settings.items():
                started = time.perf_counter()
                losses[name] += [loss_of(step) for step in range(first, first + LAST)]
                seconds[name] += time.perf_counter() - started

    benchmark.pedantic(steps, rounds=1)
    first = abs(losses["ours"][0] - losses["nanoGPT"][0])
    assert first < 1e-3, "both began with the same weights and the same batch"
    last = {name: statistics.mean(each[-LAST:]) for name, each in losses.items()}
    record(
        "training-loss",
        {"model": "S", "batch": batch, "steps": STEPS, "text": "tinyshakespeare"},
        str(ours.plan.dtype).removeprefix("torch."),
        seconds["ours"],
        {"nanoGPT, eager, float32": seconds["nanoGPT"]},
        also={
            f"mean loss of the last {LAST} steps": round(last["ours"], 4),
            "nanoGPT's": round(last["nanoGPT"], 4),
        },
    )
    assert abs(last["ours"] - last["nanoGPT"]) < LARGEST_DIFFERENCE, last
    assert last["ours"] < losses["ours"][0] - 1, "nothing was learnt"
