"""Checkpoints that are written while a run goes on: of the moment of the call, in order, all."""

import threading

import pytest
import torch
from faults.damage import tiny_model

from nanogpt import checkpoint
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
