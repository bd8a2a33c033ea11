"""The harnesses of tests/faults in their short form, and that each of them can fail."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import damage

from nanogpt.model import GPT


def test_damaged_files_are_refused_or_unharmed():
    report = damage.run(1200, seed=1)
    assert report.total == 1200
    assert report.failures == []
    rows = {row["file"]: row for row in report.as_rows()}
    for name in ("model.pth", "model.safetensors", "records.pth"):
        assert rows[name]["refused"] > 50, name
    assert rows["run/model.safetensors"]["unharmed"] > 50  # the checkpoint before it is taken


def careless(path: Path) -> tuple:
    """A reader that looks at no check sum."""
    state = torch.load(path, weights_only=True)
    return tuple((name, tensor.numpy().tobytes()) for name, tensor in state.items())


def test_the_harness_sees_a_reader_that_looks_at_no_check_sum():
    def extra(folder: Path) -> list[damage.Target]:
        path = folder / "careless.pth"
        torch.save(dict(damage.tiny_model().state_dict()), path)
        return [damage.Target("careless", path, careless)]

    report = damage.run(1300, extra=extra)
    outcomes = {row["file"]: row for row in report.as_rows()}
    assert outcomes["careless"][damage.WRONG] > 10
    assert outcomes["careless"][damage.RAISED] > 10  # no error of ours
    assert any("careless" in failure for failure in report.failures)
    assert outcomes["model.pth"][damage.WRONG] == 0


def test_the_harness_outlives_a_reader_that_crashes():
    def extra(folder: Path) -> list[damage.Target]:
        path = folder / "model.safetensors"
        return [damage.Target("crashing", path, lambda p: None if p == path else os._exit(9))]

    targets = damage.run(52, extra=extra).as_rows()
    crashed = next(row for row in targets if row["file"] == "crashing")
    assert crashed[damage.CRASHED] == 52 // len(targets)


@pytest.mark.parametrize("way", sorted(damage.WAYS))
def test_every_way_damages(way):
    changed = 0
    for seed in range(20):
        raw = bytearray(np.random.default_rng(9).bytes(9000))
        before = bytes(raw)
        damage.WAYS[way](raw, np.random.default_rng(seed))
        changed += bytes(raw) != before
    assert changed >= 19


def test_content_is_told_apart_by_a_single_weight():
    model, other = damage.tiny_model(), damage.tiny_model()
    assert damage._content_of_model(model, model.tokenizer) == damage._content_of_model(
        other, other.tokenizer
    )
    with torch.no_grad():
        next(iter(other.parameters())).view(-1)[0] += 1e-6
    assert isinstance(other, GPT)
    assert damage._content_of_model(model, model.tokenizer) != damage._content_of_model(
        other, other.tokenizer
    )
