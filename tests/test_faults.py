"""The harnesses of tests/faults in their short form, and that each of them can fail."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import crash_points, damage, kills, lost_writes

from nanogpt import saver, trainer
from nanogpt.errors import UsageError
from nanogpt.interruption import terminable
from nanogpt.model import GPT
from nanogpt.run_directory import RunDirectory


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

    targets = damage.run(72, extra=extra).as_rows()
    crashed = next(row for row in targets if row["file"] == "crashing")
    assert crashed[damage.CRASHED] == 72 // len(targets)


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
    assert report.interruptions >= 5


def test_runs_that_are_stopped_after_any_step_end_as_if_they_were_not(tmp_path):
    names = ("accumulation", "float16", "rewards")
    report = kills.restarts(tmp_path, 12, seed=1, names=names, workers=2)
    assert report.failures == []
    assert report.interruptions >= 12
    assert len(report.points) >= 8
    assert {name for name, _ in report.points} == set(names)


def test_the_kills_see_a_run_that_ends_in_another_way(tmp_path, monkeypatch):
    real = kills._outcome

    def other(place):
        outcome = real(place)
        if "-whole-" not in place.name:
            outcome["metrics.jsonl"].pop()
        return outcome

    monkeypatch.setattr(kills, "_outcome", other)
    report = kills.run(tmp_path, 1, names=("plain",), most_of_a_run=1)
    assert any("another metrics.jsonl" in each for each in report.failures)
    assert report.rows["plain"]["failures"] == len(report.failures)


def test_the_restarts_see_dropout_that_forgets_its_step(tmp_path, monkeypatch):
    """A trainer whose dropout depends on how long its process has lived is caught."""
    lived = iter(range(10**6))
    monkeypatch.setattr(trainer, "dropout_seed", lambda *_: next(lived))
    report = kills.restarts(tmp_path, 2, names=("dropout",), most_of_a_run=2)
    assert any("another model" in each for each in report.failures)


def test_the_harness_sees_a_signal_that_saves_nothing(tmp_path, monkeypatch):
    """A run that exits with the right code, but forgets what it has done."""
    monkeypatch.setattr(saver.Saver, "has", lambda *_: True)
    report = kills.restarts(tmp_path, 4, names=("plain",), seed=2)
    assert any("is what was saved" in each for each in report.failures)


def test_the_harness_sees_a_run_that_begins_anew(tmp_path, monkeypatch):
    """The end is the same, but what was committed was not used."""
    monkeypatch.setattr(RunDirectory, "newest", lambda self: None)
    report = kills.restarts(tmp_path, 3, names=("plain",), most_of_a_run=3)
    assert any("did not go on from" in each for each in report.failures)


def test_the_harness_sees_that_one_checkpoint_of_two_is_lost():
    assert kills._lost(["00000004", "00000008"], ["00000008"]) == ["00000004"]
    assert kills._lost(["00000004", "00000008"], ["00000008", "00000012"]) == []
    assert kills._lost(["00000004", "00000008"], ["00000012"]) == ["00000004", "00000008"]
    assert kills._lost(["fold-1", "order"], ["order"]) == ["fold-1"]
    assert kills._lost([], ["00000004"]) == []


@needs_strace
def test_a_power_cut_loses_nothing_that_was_told():
    report = lost_writes.run("dropout", every=4, random_parts=1, resume_every=40)
    assert report.failures == []
    assert report.cuts > 50
    assert report.with_checkpoint > 20
    assert report.resumed >= 1


@needs_strace
def test_the_power_cuts_see_a_run_that_syncs_nothing():
    def careless():
        os.fsync = lambda handle: None

    report = lost_writes.run(
        "dropout", every=12, random_parts=1, resume_every=10**6, prepare=careless
    )
    assert any("was saved and is lost" in each for each in report.failures)
    assert any("neither the old nor the new one" in each for each in report.failures)


def test_a_disk_keeps_what_was_synced_and_any_part_of_the_rest():
    """A file that is written, synced and written again, and whose name is synced late."""
    names = lost_writes.Names(0, (("f", 1),))
    events = [names, lost_writes.Bytes(1, 0, b"ab"), lost_writes.Sync(1),
              lost_writes.Bytes(1, 2, b"cd"), lost_writes.Sync(0)]  # fmt: skip
    after = lost_writes.Disk({0: {"f": 1}}, {1: bytearray(b"abcd")})
    recording = lost_writes.Recording(lost_writes.Disk(), after, events, {}, b"", Path(), "")
    found = {
        (what.split(",")[0], bytes(disk.files[1]) if "f" in disk.folders[0] else None)
        for disk, *_, what in lost_writes.disks_after_a_cut(
            recording, np.random.default_rng(0), 1, 30
        )
    }
    assert {raw for event, raw in found if event == "event 1"} == {None, b""}
    assert {raw for event, raw in found if event == "event 3"} == {None, b"ab"}
    at_four = {raw for event, raw in found if event == "event 4"}
    assert at_four == {None, b"ab", b"abcd", b"ab\0\0"}
    assert {raw for event, raw in found if event == "event 5"} == at_four - {None}


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
