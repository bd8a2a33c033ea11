"""Checkpoints that are written while a run goes on: of the moment of the call, in order, all."""

import errno
import fcntl
import json
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from faults.damage import tiny_model

from nanogpt import checkpoint
from nanogpt.errors import InputError
from nanogpt.journal import Journal
from nanogpt.run_directory import RunDirectory
from nanogpt.saver import Saver


@pytest.fixture
def folder(tmp_path):
    with RunDirectory(tmp_path / "run", warn=print) as directory:
        directory.begin({"identity": {}}, {})
        yield directory


@pytest.fixture
def held(monkeypatch):
    """Saves that begin only when this event is set."""
    go_on = threading.Event()
    real = RunDirectory.save

    def waiting(self, *arguments):
        assert go_on.wait(10)
        return real(self, *arguments)

    monkeypatch.setattr(RunDirectory, "save", waiting)
    return go_on


def weights(model):
    return [value.clone() for value in model.parameters()]


def assert_equal(model, expected):
    for value, wanted in zip(model.parameters(), expected, strict=True):
        assert torch.equal(value, wanted)


def trainer_of(step):
    return {"optimizer": {"m": torch.full((4,), float(step)), "steps": [torch.tensor(step)]}}


def train_on(model, trainer):
    """What a run does after the call: every tensor changes in its place."""
    with torch.no_grad():
        for value in model.parameters():
            value += 1
    trainer["optimizer"]["m"] += 1
    trainer["optimizer"]["steps"][0] += 1


def test_what_is_written_is_the_moment_of_the_call(folder, held):
    model, trainer = tiny_model(), trainer_of(1)
    before, state = weights(model), {"position": {"recent": [[1.0, 2.0]]}}
    with Saver(folder, None, print) as saver:
        saver.save(1, model, trainer, state, is_best=True)
        assert folder.newest() is None  # the run goes on before anything is written
        train_on(model, trainer)
        state["position"]["recent"].clear()
        held.set()
    newest = folder.newest()
    assert newest.state["position"] == {"recent": [[1.0, 2.0]]}
    assert_equal(newest.load_model(), before)
    assert_equal(saver.best(), before)
    saved = newest.load_trainer()["optimizer"]
    assert saved["m"].tolist() == [1.0] * 4
    assert [int(each) for each in saved["steps"]] == [1]


def test_saves_are_written_in_order_and_the_last_one_before_the_end(folder):
    model = tiny_model()
    with Saver(folder, None, print) as saver:
        for step in (1, 2, 3):
            saver.save(step, model, trainer_of(step), {}, is_best=step < 3)
            train_on(model, trainer_of(step))
        assert saver.has(3)
        assert not saver.has(2)
    assert sorted(p.name for p in (folder.path / "checkpoints").iterdir()) == [
        "00000002",
        "00000003",
    ]
    second = checkpoint.load(folder.path / "checkpoints" / "00000002" / "model.safetensors")[0]
    assert_equal(saver.best(), weights(second))


def test_a_save_that_fails_is_told_and_its_model_is_not_lost(folder, monkeypatch):
    real, told = RunDirectory.save, []

    def failing(self, step, *rest):
        if step == 1:
            raise OSError(28, "No space left on device")
        return real(self, step, *rest)

    monkeypatch.setattr(RunDirectory, "save", failing)
    model = tiny_model()
    best = weights(model)
    with Saver(folder, None, told.append, unit="round") as saver:
        saver.save(1, model, {}, {}, is_best=True)
        assert not saver.has(1)
        assert told == ["WARNING: the checkpoint of round 1 failed: No space left on device"]
        assert_equal(saver.best(), best)  # of what is kept in memory
        train_on(model, trainer_of(1))
        saver.save(2, model, {}, {}, is_best=False)
    assert_equal(folder.newest().load_model("best"), best)
    assert_equal(folder.newest().load_model(), weights(model))


def test_the_best_model_of_the_checkpoint_that_a_run_goes_on_from_stays(folder):
    first, second = tiny_model(1), tiny_model(2)
    with Saver(folder, None, print) as saver:
        saver.save(1, first, {}, {}, is_best=True)
    with Saver(folder, folder.newest(), print) as saver:
        saver.save(2, second, {}, {}, is_best=False)
    assert_equal(folder.newest().load_model("best"), weights(first))
    assert_equal(saver.best(), weights(first))


def test_an_error_that_is_no_files_reaches_the_run(folder, monkeypatch):
    monkeypatch.setattr(RunDirectory, "save", lambda *_: 1 / 0)
    saver = Saver(folder, None, print)
    saver.save(1, tiny_model(), {}, {}, is_best=True)
    with pytest.raises(ZeroDivisionError):
        saver.wait()

    def both_fail():
        with Saver(folder, None, print) as saver:
            saver.save(1, tiny_model(), {}, {}, is_best=True)
            raise KeyError("the run's own")

    with pytest.raises(KeyError, match="the run's own"):
        both_fail()


def test_too_little_room_is_seen_before_anything_is_written(folder, monkeypatch):
    from nanogpt import run_directory

    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(run_directory.shutil, "disk_usage", lambda path: full)
    told = []
    with Saver(folder, None, told.append) as saver:
        saver.save(1, tiny_model(), trainer_of(1), {}, is_best=True)
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert list((folder.path / "checkpoints").iterdir()) == []


def saved(folder, *steps):
    with Saver(folder, None, print) as saver:
        for step in steps:
            saver.save(step, tiny_model(step), trainer_of(step), {}, is_best=True)


def steps_of(folder):
    return sorted(int(p.name) for p in (folder.path / "checkpoints").iterdir())


def damage(folder, step):
    path = folder.path / "checkpoints" / f"{step:08d}" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_a_run_that_goes_on_does_not_save_again_what_it_began_with(folder):
    saved(folder, 3)
    with Saver(folder, folder.newest(), print) as saver:
        assert saver.has(3)
        assert not saver.has(4)
        assert saver.goes_on() == "the same command goes on from step 3"
    assert Saver(folder, None, print).goes_on() == "the same command begins anew"


def test_of_damaged_checkpoints_none_counts_among_the_two_that_are_kept(tmp_path):
    """A run that went on from the third newest, as the others were damaged."""
    told = []
    with RunDirectory(tmp_path / "run", warn=told.append) as folder:
        folder.begin({"identity": {}}, {})
        for step in (4, 8, 12):
            folder.save(step, tiny_model(step), {}, {}, tiny_model(9))
        assert steps_of(folder) == [8, 12]
        damage(folder, 12)
        assert folder.newest().state["step"] == 8
        folder.save(9, tiny_model(9), {}, {}, tiny_model(9))
        assert steps_of(folder) == [8, 9]
        damage(folder, 9)
    with RunDirectory(tmp_path / "run", warn=told.append) as folder:
        assert folder.newest().state["step"] == 8
        folder.save(10, tiny_model(9), {}, {}, tiny_model(9))
        assert steps_of(folder) == [8, 10]
        assert folder.newest().state["step"] == 10


def test_a_checkpoint_of_the_same_step_replaces_the_other_and_neither_is_lost(folder, monkeypatch):
    saved(folder, 2, 3)
    saved(folder, 3)
    assert steps_of(folder) == [2, 3]
    real = os.rename

    def cut_off(source, target, **more):
        if str(source).endswith(".tmp") and "aside" not in f"{source} {target}":
            raise KeyboardInterrupt
        real(source, target, **more)

    monkeypatch.setattr(Path, "rename", lambda self, target: cut_off(self, target))
    with pytest.raises(KeyboardInterrupt):
        folder.save(3, tiny_model(7), {}, {}, tiny_model(7))
    monkeypatch.undo()
    assert folder.newest().state["step"] == 3  # a save that fails changes nothing
    assert_equal(folder.newest().load_model(), weights(tiny_model(3)))
    checkpoints = folder.path / "checkpoints"  # as a process leaves it that is killed there
    (checkpoints / "00000003").rename(checkpoints / ".00000003.aside.tmp")
    assert folder.newest().state["step"] == 2
    folder._sweep()  # as the next process does
    assert folder.newest().state["step"] == 3
    assert_equal(folder.newest().load_model(), weights(tiny_model(3)))
    assert not list((folder.path / "checkpoints").glob(".*"))


def test_lines_that_a_full_disk_delays_are_in_the_next_checkpoint(tmp_path, monkeypatch):
    told, full = [], False
    real = Journal.flush

    def flush(self):
        if full:
            written = self._unwritten[:3]  # what still fitted
            self._file.write(written)
            self._unwritten = self._unwritten[3:]
            raise OSError(28, "No space left on device")
        real(self)

    monkeypatch.setattr(Journal, "flush", flush)
    with RunDirectory(tmp_path / "run", warn=told.append) as folder:
        folder.begin({"identity": {}}, {})
        with Saver(folder, None, told.append) as saver:
            folder.append("metrics.jsonl", {"step": 1})
            full = True
            folder.append("metrics.jsonl", {"step": 2})
            saver.save(2, tiny_model(), {}, {}, is_best=True)
            assert saver.written is None
            full = False
            folder.append("metrics.jsonl", {"step": 3})
            saver.save(3, tiny_model(), {}, {}, is_best=False)
        assert [row["step"] for row in folder.journal("metrics.jsonl")] == [1, 2, 3]
        sizes = folder.newest().state["journals"]
        assert sizes["metrics.jsonl"] == (tmp_path / "run" / "metrics.jsonl").stat().st_size
    path = tmp_path / "run" / "metrics.jsonl"
    assert told == [
        f"WARNING: {path} cannot be written now: No space left on device",
        "WARNING: the checkpoint of step 2 failed: No space left on device",
    ]
    with RunDirectory(tmp_path / "run", warn=told.append) as folder:
        os.truncate(path, sizes["metrics.jsonl"] - 12)
        folder.cut_journals(sizes)
    assert told[-1] == f"WARNING: {path} has lost 12 bytes of its lines"


def test_where_the_model_went_is_not_forgotten(tmp_path):
    output, told = tmp_path / "gpt.pth", []
    with RunDirectory(tmp_path / "run", warn=told.append) as folder:
        folder.begin({"identity": {}}, {})
        output.write_bytes(b"somebody's older file")
        assert not folder.has_delivered(output)
        assert folder.deliver(tiny_model(1), output)
        assert not folder.deliver(tiny_model(1), output)
        assert told == []
        whole = output.read_bytes()
        output.write_bytes(b"calibrated")
        assert not folder.deliver(tiny_model(1), output)
        assert told == [f"note: {output} was changed after this run wrote it, and stays as it is"]
        assert output.read_bytes() == b"calibrated"
        for damage in ('{"outputs": 5}', "[]", "{", "[" * 100_000):
            (folder.path / "delivered.json").write_text(damage)
            assert not folder.has_delivered(output)
            assert "delivered.json is damaged" in told[-1]
        assert folder.deliver(tiny_model(1), output)
        assert output.read_bytes() == whole


def test_a_run_of_the_first_version_goes_on(folder):
    path = folder.path / "run.json"
    path.write_text(json.dumps({"identity": {"a": 1}, "kernels": {}}))
    assert folder.read_identity()["identity"] == {"a": 1}
    path.write_text(json.dumps({"identity": {"a": 1}, "sha257": "0"}))
    with pytest.raises(InputError, match="damaged"):
        folder.read_identity()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOLCK])
def test_file_systems_that_lack_something_are_good_enough(tmp_path, monkeypatch, number):
    def lacking(*_):
        raise OSError(number, os.strerror(number))

    if number == errno.EINVAL:
        real = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda h: lacking() if stat.S_ISDIR(os.fstat(h).st_mode) else real(h)
        )
    else:
        monkeypatch.setattr(fcntl, "flock", lacking)
    told = []
    with RunDirectory(tmp_path / "run", warn=told.append) as folder:
        folder.begin({"identity": {}}, {})
        saved(folder, 1)
        assert folder.newest().state["step"] == 1
    assert len(told) == (number == errno.ENOLCK)


def test_where_no_thread_can_be_started_the_run_waits_for_its_checkpoint(folder, monkeypatch):
    model = tiny_model()
    with Saver(folder, None, print) as saver:

        def refused(self):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            saver.save(1, model, trainer_of(1), {"step": 1}, is_best=True)
            assert saver.has(1)  # already
        expected = weights(model)
        train_on(model, trainer_of(1))
        saver.save(2, model, trainer_of(2), {"step": 2}, is_best=False)
        assert saver.has(2)
        assert_equal(saver.best(), expected)
    assert folder.newest().state["step"] == 2
