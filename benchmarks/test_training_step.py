"""One optimizer step, as the training loop does it, beside nanoGPT's."""

import numpy as np
import pytest
import torch

from nanogpt import GPT
from nanogpt.measuring import median_seconds

SHAPES = {
    "S": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 66}, 12, 60),
    "M": ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 96}, 16, 3),
}


def stepper(model, optimizer, batch, block, vocab):
    """A step with fresh data each time, gradient clipping included."""
    rng = np.random.default_rng(0)

    def step():
        windows = torch.from_numpy(rng.integers(0, vocab, (batch, block + 1)))
        _, loss = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


@pytest.mark.parametrize("name", SHAPES)
def test_training_step(benchmark, record, ceilings, nanogpt_peer, name):
    """Eager on both sides, the same batch, nanoGPT's own optimizer for nanoGPT."""
    shape, batch, rounds = SHAPES[name]
    model = GPT(**shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    peer = nanogpt_peer.GPT(nanogpt_peer.GPTConfig(**shape, dropout=0.0, bias=False))
    peer_optimizer = peer.configure_optimizers(0.1, 1e-4, (0.9, 0.99), "cpu")
    args = (batch, shape["block_size"], shape["vocab_size"])
    ours, theirs = stepper(model, optimizer, *args), stepper(peer, peer_optimizer, *args)
    times = median_seconds({"ours": ours, "nanoGPT, eager": theirs}, rounds)
    benchmark.pedantic(ours, rounds=3)
    tokens = batch * shape["block_size"]
    floor = model.config.flops_per_token() * tokens / ceilings["matmul_flops"]
    peers = {"nanoGPT, eager": times["nanoGPT, eager"]}
    record(
        "training-step",
        {"model": name, "batch": batch, "block": shape["block_size"]},
        "float32",
        times["ours"],
        peers,
        floor,
    )
