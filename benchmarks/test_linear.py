"""The thin linear map of decoding against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from nanogpt.kernels import linear
from nanogpt.measuring import median_seconds


@pytest.mark.parametrize("rows", [1, 2, 8, 32])
@pytest.mark.parametrize(("outputs", "inputs"), [(1152, 384), (384, 1536), (3072, 768)])
def test_linear(benchmark, record, ceilings, rows, outputs, inputs):
    """24 weights in turn, so that they come from memory as a model's do."""
    weights = [torch.randn(outputs, inputs) for _ in range(24)]
    x = torch.randn(rows, inputs)

    def walk(operation):
        with torch.inference_mode():
            for weight in weights:
                operation(x, weight, None)

    times = median_seconds(
        {"ours": lambda: walk(linear), "F.linear": lambda: walk(F.linear)}, rounds=15
    )
    benchmark.pedantic(lambda: walk(linear), rounds=5)
    floor = len(weights) * outputs * inputs * 4 / ceilings["read_bytes_per_second"]
    shape = {"rows": rows, "outputs": outputs, "inputs": inputs}
    peers = {"F.linear": times["F.linear"] / len(weights)}
    ours = times["ours"] / len(weights)
    record("linear", shape, "float32", ours, peers, floor / len(weights))
