"""The harnesses of tests/faults in their short form, and that each of them can fail."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import crash_points, damage, kills

from nanogpt.errors import UsageError
from nanogpt.interruption import terminable
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


needs_strace = pytest.mark.skipif(bool(crash_points.why_not()), reason=crash_points.why_not())


@needs_strace
def test_a_save_that_is_cut_off_loses_nothing():
    report = crash_points.run(every=7)
    assert report.failures == []
    assert len(report.tried) >= 8
    assert sum(report.tried.values()) >= 20


@needs_strace
def test_the_crash_points_see_a_save_that_is_not_atomic():
    report = crash_points.run(crash_points.save_carelessly, every=5)
    assert any("no checkpoint loads" in each or "lost" in each for each in report.failures)


def test_what_a_killed_process_began_is_swept_away(tmp_path):
    crash_points.make_run(tmp_path / "run")
    left = tmp_path / "run" / "checkpoints" / ".00000009.77.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / "run" / ".run.json.abc.tmp").write_bytes(b"half")
    crash_points.save_checkpoint(tmp_path / "run")
    assert not left.exists()
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_run_that_was_killed_before_it_was_described_begins_anew(tmp_path):
    path = tmp_path / "run"
    with crash_points.RunDirectory(path, warn=print):
        (path / "config.yaml").write_text("seed: 1")
    crash_points.make_run(path)
    assert (path / "run.json").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.yaml").write_text("somebody's own")
    with pytest.raises(UsageError, match="not a run directory"):
        crash_points.make_run(foreign)


def test_runs_that_are_killed_end_as_if_they_were_not(tmp_path):
    report = kills.run(tmp_path, 6, seed=3, names=("dropout",), most_of_a_run=6)
    assert report.failures == []
    assert report.kills >= 5


def test_the_kills_see_a_run_that_ends_in_another_way(tmp_path, monkeypatch):
    real = kills._outcome

    def other(place):
        weights, metrics = real(place)
        return weights, metrics[:-1] if place.name.endswith("-killed") else metrics

    monkeypatch.setattr(kills, "_outcome", other)
    report = kills.run(tmp_path, 1, names=("plain",), most_of_a_run=1)
    assert [each for each in report.failures if "another outcome" in each]


@pytest.mark.parametrize(
    ("number", "raised"), [("SIGTERM", SystemExit), ("SIGINT", KeyboardInterrupt)]
)
def test_a_signal_that_compiled_code_swallows_still_ends_the_process(number, raised):
    def compiled():
        try:
            os.kill(os.getpid(), getattr(signal, number))
        except BaseException:
            raise ValueError("could not determine the shape") from None

    with pytest.raises(raised), terminable():
        compiled()
    with pytest.raises(ValueError, match="an error of its own"), terminable():
        raise ValueError("an error of its own")
