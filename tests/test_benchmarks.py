"""What the programs under benchmarks/ read, count and write, without measuring anything."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt import GPT
from nanogpt.config import GPTConfig
from nanogpt.data import prepare
from nanogpt.measuring import make_row
from nanogpt.plain_gpt import PlainGPT
from nanogpt.trainer import evaluate

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def time_to_loss(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import time_to_loss

    yield time_to_loss
    sys.modules.pop("recording", None)
    sys.modules.pop("time_to_loss", None)


def test_nanogpts_files_are_a_text_by_characters(time_to_loss, tmp_path):
    text = "hello world" * 3
    val_ids = time_to_loss.prepare_text(text, tmp_path / "data")
    meta = pickle.loads((tmp_path / "data" / "meta.pkl").read_bytes())
    train, val = (
        np.fromfile(tmp_path / "data" / name, dtype=np.uint16) for name in ("train.bin", "val.bin")
    )
    assert meta["vocab_size"] == 8
    assert "".join(meta["itos"][i] for i in [*train, *val]) == text
    assert (len(train), len(val)) == (29, 4)
    assert val.tolist() == val_ids.tolist()
    assert all(meta["itos"][meta["stoi"][letter]] == letter for letter in text)


def test_both_sides_hold_out_the_same_characters(time_to_loss, tmp_path):
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 110, 1117).tolist()))
    (tmp_path / "text.txt").write_text(text)
    val_ids = time_to_loss.prepare_text(text, tmp_path / "data")
    corpus = prepare([str(tmp_path / "text.txt")], cache_dir=tmp_path)
    _, ours = corpus.split(0.1)
    assert corpus.tokenizer.decode(ours.tolist()) == text[-len(val_ids) :]


def test_the_whole_loss_is_what_train_calls_val_loss(time_to_loss):
    config = GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=8)
    ours, theirs = GPT(config), PlainGPT(config)
    theirs.config = config
    ids = np.random.default_rng(0).integers(0, 11, 8 * 300 + 5).astype(np.uint16)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            renamed = name.replace(".c_attn", ".attn.c_attn").replace(".c_proj", ".attn.c_proj")
            renamed = renamed.replace("mlp.0", "mlp.c_fc").replace("mlp.2", "mlp.c_proj")
            value.copy_(ours.state_dict()[f"transformer.{renamed}"])
    expected = evaluate(ours, ids, device=torch.device("cpu"))
    assert time_to_loss.whole_loss(theirs, ids) == pytest.approx(expected, rel=1e-6)
    assert time_to_loss.whole_loss(theirs, ids[:-3]) != pytest.approx(expected, rel=1e-6)


def test_the_first_evaluation_that_is_low_enough_counts(time_to_loss, tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert time_to_loss.first_below(path, 9.0) is None
    rows = [{"step": 1, "train_loss": 0.1}, {"step": 2, "val_loss": 3.0}]
    rows += [{"step": 3, "val_loss": 2.0}, {"step": 4, "val_loss": 1.0}]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(whole)
    assert time_to_loss.first_below(path, 2.0)["step"] == 3
    assert time_to_loss.first_below(path, 1.99)["step"] == 4
    assert time_to_loss.first_below(path, 0.5) is None
    path.write_text(whole[:-5])
    assert time_to_loss.first_below(path, 1.5) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peer-dir", "nowhere"), "is no checkout of nanoGPT: no train.py"),
        (("--peer-dir", "x", "--max-iters", "9", "--write-results"), "is no checkout"),
    ],
)
def test_a_missing_checkout_is_named(
    time_to_loss, monkeypatch, tmp_path, capsys, arguments, message
):
    (tmp_path / "tinyshakespeare.txt").write_text("text")
    monkeypatch.setenv("NANOGPT_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["time_to_loss.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        time_to_loss.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("recipe", "code"), [("reaches", 0), ("never", 1)])
def test_only_what_reached_the_loss_becomes_a_row(
    time_to_loss, monkeypatch, tmp_path, capsys, recipe, code
):
    def ours(text, folder, name, flags, target):
        assert target == 1.9
        reached = {"seconds": 5.0, "loss": 1.8, "step": 700}
        missed = dict.fromkeys(reached)
        sizes = {"best": 1.95, "last": 1.7, "whole_seconds": 9.0, "parameters": 800_000}
        sizes["dtype"] = "bfloat16"
        return {**(reached if name == "reaches" else missed), **sizes}

    theirs = {"seconds": 20.0, "loss": 1.9, "parameters": 804_096}
    monkeypatch.setattr(time_to_loss, "run_nanogpt", lambda *_: theirs)
    monkeypatch.setattr(time_to_loss, "run_ours", ours)
    monkeypatch.setattr(time_to_loss, "COPIED", ())
    monkeypatch.setattr(time_to_loss, "RESULTS", tmp_path)
    monkeypatch.setattr(time_to_loss, "measure_ceilings", dict)
    monkeypatch.setenv("NANOGPT_DATA", str(tmp_path))
    (tmp_path / "tinyshakespeare.txt").write_text("text")
    flags = ["--peer-dir", str(tmp_path), "--recipe", recipe, "--write-results"]
    monkeypatch.setattr(sys, "argv", ["time_to_loss.py", *flags])
    assert time_to_loss.main() == code
    written = list(tmp_path.glob("*/time-to-loss.json"))
    assert len(written) == 1 - code
    if code == 0:
        (row,) = json.loads(written[0].read_text())["rows"]
        assert row["dtype"] == "bfloat16"
        assert (row["ratio"], row["also"]["loss"], row["shape"]["recipe"]) == (4.0, 1.8, "reaches")
        import make_results

        lines = "\n".join(make_results._suite("x", json.loads(written[0].read_text())))
        assert "| nanoGPT, CPU configuration 20.0 s | 4.00 |" in lines
        assert "nanoGPT's 1.9" in lines
    else:
        assert "its best was 1.9500" in capsys.readouterr().out


def test_rows_without_notes_have_no_column_for_them(time_to_loss):
    import make_results

    head = {"device": "d", "date": "today", "commit": "c", "command": "x", "ceilings": {}}
    content = {**head, "versions": {"torch": "2"}, "rows": [make_row("s", {}, "f", 1.0, {})]}
    assert "also" not in "\n".join(make_results._suite("s", content))
    content["rows"].append(make_row("s", {}, "f", 1.0, {}, also={"loss": 2}))
    assert "| loss 2 |" in "\n".join(make_results._suite("s", content))


def test_steps_to_a_loss_are_those_of_the_first_evaluation_below_it(
    nanogpt, text_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shape = ("--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--block-size", 8, "--batch-size", 4)
    done = nanogpt("train", "--text", text_file, *shape, "--max-steps", 9, "--eval-interval", 3,
                   "--recipe", "speed", "--sample-tokens", 0, "--run-dir", "run")  # fmt: skip
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import steps_to_loss

    def compared(loss):
        arguments = ["--run-dir", "run", "--model", "gpt.pth", "--loss", str(loss)]
        monkeypatch.setattr(sys, "argv", ["steps_to_loss.py", *arguments])
        return steps_to_loss.main(), json.loads(capsys.readouterr().out)

    code, row = compared(losses[6])
    assert (code, row["reached at step"]) == (0, 6)
    assert (row["steps"], row["tokens of a step"]) == (9, 32)
    assert row["best"] == round(min(losses.values()), 4)
    assert "--recipe speed" in row["flags"]
    assert "text" not in row["flags"]
    code, row = compared(min(losses.values()) - 1e-6)
    assert (code, row["reached at step"]) == (1, None)
    for name in ("recording", "steps_to_loss"):
        sys.modules.pop(name, None)
