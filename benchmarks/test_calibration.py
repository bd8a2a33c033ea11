"""Fitting one temperature to logits in memory, beside LBFGS on the temperature itself.

The common recipe starts from 1.5 and takes at most 50 iterations at a learning rate of 0.01; the
other peer is LBFGS with a line search, until it moves no more. The floor reads the logits once.
"""

import pytest
import torch
import torch.nn.functional as F

from nanogpt.calibration import TemperatureScaler
from nanogpt.measuring import median_seconds

SHAPES = {"65 characters": (100_000, 65), "4,096 tokens": (8_192, 4_096)}
TRUE_TEMPERATURE = 1.7


def by_lbfgs(logits, labels, **options):
    """The temperature after one LBFGS step, which holds all of its iterations."""
    temperature = torch.nn.Parameter(torch.full((1,), 1.5))
    optimizer = torch.optim.LBFGS([temperature], **options)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / temperature, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(temperature.detach())


@pytest.mark.parametrize("name", SHAPES)
def test_calibration(benchmark, record, ceilings, name):
    """Labels are drawn at a known temperature, which every fit but a short one finds."""
    count, classes = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=generator) * 3
    chances = (logits / TRUE_TEMPERATURE).softmax(-1)
    labels = torch.multinomial(chances, 1, generator=generator)[:, 0]
    found = {}

    def ours():
        found["ours"] = TemperatureScaler().fit(logits, labels).temperature_

    def recipe():
        found["recipe"] = by_lbfgs(logits, labels, lr=0.01, max_iter=50)

    def converged():
        options = {"max_iter": 100, "line_search_fn": "strong_wolfe"}
        found["converged"] = by_lbfgs(logits, labels, **options)

    peers = {
        "LBFGS, 50 iterations at 0.01": recipe,
        "LBFGS with a line search": converged,
    }
    times = median_seconds({"ours": ours, **peers}, rounds=5)
    benchmark.pedantic(ours, rounds=3)
    assert found["ours"] == pytest.approx(TRUE_TEMPERATURE, rel=0.05)
    assert found["ours"] == pytest.approx(found["converged"], rel=1e-3)
    record(
        "calibration",
        {"logits": name, "N": count},
        "float32",
        times["ours"],
        {peer: times[peer] for peer in peers},
        logits.numel() * 4 / ceilings["read_bytes_per_second"],
        also={
            "T": round(found["ours"], 5),
            "the recipe's T": round(found["recipe"], 5),
            "the line search's T": round(found["converged"], 5),
        },
    )
