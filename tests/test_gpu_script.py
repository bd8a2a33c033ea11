"""benchmarks/gpu.py as a program: a trial on the CPU, its files, its messages."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TRITON

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
PARTS = (
    "ceilings",
    "correctness",
    "attention",
    "ffn",
    "cross_entropy",
    "layer_norm",
    "training",
    "decode",
)
ROW_KEYS = {
    "suite",
    "shape",
    "dtype",
    "ours_seconds",
    "peers",
    "best_peer",
    "ratio",
    "fraction_of_ceiling",
}


def run(*arguments, **environment):
    """The script where no device is visible and the package is not on the path."""
    hidden = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env={**hidden, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def check_row(row, ceilings):
    assert row.keys() >= ROW_KEYS
    assert row["ours_seconds"] > 0
    if row["best_peer"] is not None:
        assert row["peers"][row["best_peer"]] == min(row["peers"].values())
        assert row["ratio"] == pytest.approx(min(row["peers"].values()) / row["ours_seconds"])
    if row.get("tflops"):
        fraction = row["tflops"] * 1e12 / ceilings["matmul_flops"]
        assert row["fraction_of_ceiling"] == pytest.approx(fraction)
    if row.get("bytes_per_second"):
        fraction = row["bytes_per_second"] / ceilings["copy_bytes_per_second"]
        assert row["fraction_of_ceiling"] == pytest.approx(fraction)


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """One trial of every part, and the folder of its files."""
    if not TRITON:
        pytest.skip("the trial interprets the kernels: needs Triton")
    folder = tmp_path_factory.mktemp("gpu-trial")
    before = sorted((ROOT / "benchmarks" / "results").rglob("*"))
    arguments = ("--quick", "--output", folder, "--commit", "1234567")
    done = run(*arguments, TRITON_INTERPRET="1")
    assert sorted((ROOT / "benchmarks" / "results").rglob("*")) == before
    return done, folder


def test_a_trial_on_the_cpu_runs_every_part(trial):
    done, _ = trial
    assert done.returncode == 0, done.stdout + done.stderr
    for part in PARTS:
        assert f"\n== {part}" in done.stdout


def test_a_trial_writes_one_file_for_each_suite_by_the_schema(trial):
    _, folder = trial
    suites = ("attention", "cross_entropy", "decode", "ffn", "layer_norm", "training")
    for suite in suites:
        content = json.loads((folder / f"gpu-{suite}.json").read_text())
        assert content.keys() >= {"device", "versions", "commit", "date", "command", "ceilings"}
        assert content["commit"] == "1234567"
        assert content["ceilings"].keys() >= {"copy_bytes_per_second", "matmul_flops"}
        assert content["rows"]
        for row in content["rows"]:
            assert row["suite"] == f"gpu-{suite}"
            check_row(row, content["ceilings"])


def test_a_trial_compares_every_kernel_and_finds_nothing_wrong(trial):
    _, folder = trial
    checks = json.loads((folder / "gpu-correctness.json").read_text())["checks"]
    assert checks["failures"] == []
    assert {"attention", "ffn", "cross_entropy", "layer_norm"} <= checks["kernels"].keys()
    for kernel in ("attention", "ffn", "cross_entropy", "layer_norm"):
        assert checks["kernels"][kernel]["comparisons"] > 0
        # Else the trial would have compared torch with itself.
        assert checks["kernels"][kernel]["not_available"] == 0


def test_a_trial_follows_both_loss_curves(trial):
    _, folder = trial
    curves = json.loads((folder / "gpu-training.json").read_text())["loss_curves"]
    assert curves.keys() == {"torch", "triton"}
    assert all(math.isfinite(loss) for curve in curves.values() for loss in curve)


def test_results_show_the_rates_of_a_gpu_and_drop_the_note_that_none_has_run(
    trial, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from make_results import NO_GPU, results

    _, folder = trial
    (tmp_path / "notes.md").write_text(f"## Not measured\n\n{NO_GPU} no GPU has run this.\n")
    assert NO_GPU in "\n".join(results(tmp_path))
    (tmp_path / "a-gpu").mkdir()
    for path in folder.glob("gpu-*.json"):
        (tmp_path / "a-gpu" / path.name).write_text(path.read_text())
    text = "\n".join(results(tmp_path))
    assert "Not measured" not in text
    assert "| ratio | rate | of the ceiling |" in text
    assert " TFLOP/s | " in text
    assert "| attention | " in text


def test_the_summary_is_short_and_comes_last(trial):
    done, _ = trial
    last = done.stdout[done.stdout.rindex("\n== summary") + 1 :].splitlines()
    assert len(last) <= 60
    assert last[-1].endswith("failures")


def test_what_there_is_no_time_for_is_named(tmp_path):
    done = run("decode", "--quick", "--output", tmp_path, "--budget-seconds", "0.5")
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stdout
    assert "decode" in done.stdout[done.stdout.index("skipped") :]


def test_each_part_can_run_in_a_process_of_its_own(tmp_path):
    done = run("decode", "--quick", "--isolate", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "gpu-decode.json").read_text())["rows"]


def test_an_unknown_part_is_refused_with_the_known_ones():
    done = run("atention")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "'atention'" in done.stderr
    for part in PARTS:
        assert part in done.stderr


def test_without_a_gpu_one_sentence_says_so():
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr
