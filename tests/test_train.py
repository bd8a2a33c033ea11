"""Training as a user runs it: what it learns, what it leaves, how it goes on, what it refuses."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nanogpt as package
from nanogpt import checkpoint, machine, native
from nanogpt import train as train_module
from nanogpt.config import TrainConfig
from nanogpt.muon import Muon
from nanogpt.native_step import NativeStep
from nanogpt.plan import first_difference
from nanogpt.progress import TrainingProgress
from nanogpt.run_directory import RunDirectory
from nanogpt.trainer import Outcome, can_defer, evaluate, overfits, reserve_moments

SMALL = ("--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--block-size", 16, "--batch-size", 8)
QUICK = (*SMALL, "--sample-tokens", 8, "--no-tensorboard")


@pytest.fixture
def train(nanogpt, tmp_path, monkeypatch):
    """Run `train` with a small model in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return nanogpt("train", *QUICK, *arguments)

    return run


def weights(path) -> dict[str, torch.Tensor]:
    return dict(package.load(path)[0].named_parameters())


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def rows(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(run_dir) / name).read_text().splitlines()]


def interrupted_at(monkeypatch, step, number=signal.SIGTERM):
    """The process is sent a signal before a step; returns what takes that back."""
    real = train_module.optimizer_step

    def stepping(plan, trainer, model, windows):
        if trainer.position.step == step:
            os.kill(os.getpid(), number)
        return real(plan, trainer, model, windows)

    monkeypatch.setattr(train_module, "optimizer_step", stepping)
    return lambda: monkeypatch.setattr(train_module, "optimizer_step", real)


def test_the_seed_command_learns_and_leaves_a_model_and_a_run_directory(train, text_file, tmp_path):
    outcome = train("--text", text_file, "--epochs", 3, "--output", "gpt.pth", "--run-dir", "run")
    assert outcome.code == 0, outcome.err
    metrics = rows("run")
    assert metrics[-1]["val_loss"] < 2.0 < 2.6 < metrics[0]["train_loss"]
    for key in ("step", "train_loss", "tokens_per_second", "learning_rate", "seconds"):
        assert key in metrics[0]
    steps = [row["step"] for row in metrics]
    assert steps == sorted(set(steps))
    for name in ("report.html", "config.yaml", "run.json", "samples.jsonl"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    model, tokenizer = package.load("gpt.pth")
    assert len(tokenizer.stoi) == tokenizer.vocab_size == model.config.vocab_size
    assert outcome.out.strip()  # a sample


def test_the_model_file_is_the_best_of_the_run(train, text_file):
    train("--text", text_file, "--epochs", 2, "--run-dir", "run", "--eval-interval", 5,
          "--dtype", "float32")  # fmt: skip
    model, tokenizer = package.load("gpt.pth")
    best = min(row["val_loss"] for row in rows("run") if "val_loss" in row)
    ids = tokenizer.encode(text_file.read_text())
    tokens = torch.tensor([tokenizer.end_of_text_id, *ids]).numpy()
    val = tokens[int(len(tokens) * 0.9) :]
    assert evaluate(model, val, device=torch.device("cpu")) == pytest.approx(best, abs=1e-6)


def test_validation_loss_is_the_mean_over_every_target_in_consecutive_windows(train, text_file):
    train("--text", text_file, "--max-steps", 3, "--output", "m.safetensors")
    model, tokenizer = package.load("m.safetensors")
    tokens = torch.tensor(tokenizer.encode(text_file.read_text()[:1003]))
    nats = []
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        logp = model(window[None, :-1])[0].double().log_softmax(-1)[0]
        nats += [-logp[i, t].item() for i, t in enumerate(window[1:])]
    assert len(nats) == 1002
    got = evaluate(model, tokens.numpy(), device=torch.device("cpu"))
    assert got == pytest.approx(sum(nats) / len(nats), abs=1e-6)


def test_bits_per_byte_count_raw_bytes_not_tokens(train, tmp_path):
    (tmp_path / "greek.txt").write_text("αβγδ εζηθ\n" * 400, encoding="utf-8")
    train("--text", "greek.txt", "--max-steps", 2, "--run-dir", "run")
    row = [row for row in rows("run") if "val_loss" in row][-1]
    text = ("αβγδ εζηθ\n" * 400)[-400:]
    per_char = len(text[1:].encode()) / len(text[1:])
    want = row["val_loss"] / math.log(2) / per_char
    assert row["val_bits_per_byte"] == pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_every_tokenizer_trains_and_stands_in_the_model_file(train, text_file, kind):
    outcome = train("--text", text_file, "--max-steps", 2, "--tokenizer", kind, "--vocab-size", 300)
    assert outcome.code == 0, outcome.err
    assert ("is ignored" in outcome.err) == (kind != "bpe")
    _, tokenizer = package.load("gpt.pth")
    assert tokenizer.kind == kind
    assert tokenizer.decode(tokenizer.encode("12 times 7")) == "12 times 7"


def test_json_prints_one_object_and_nothing_else(train, text_file):
    outcome = train("--text", text_file, "--max-steps", 3, "--json")
    summary = json.loads(outcome.out)
    assert summary["status"] == "finished"
    assert summary["steps"] == 3
    assert summary["val_loss"] > 0
    again = json.loads(train("--text", text_file, "--max-steps", 3, "--json").out)
    assert again["status"] == "finished"
    assert again["run_dir"] == summary["run_dir"]


def test_gradient_accumulation_gives_the_same_training(train, text_file):
    for micro in (8, 3, 1):
        train("--text", text_file, "--max-steps", 6, "--micro-batch-size", micro, "--dtype",
              "float32", "--output", f"{micro}.pth")  # fmt: skip
    whole = weights("8.pth")
    for micro in (3, 1):
        for name, value in weights(f"{micro}.pth").items():
            assert torch.allclose(value, whole[name], atol=2e-5), name


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (150.4, "asked for; this CPU takes 150 times as long for its products as in float32"),
        (1.2, "asked for"),
    ],
)
def test_a_precision_that_is_emulated_is_remarked_on(times, said, train, text_file, monkeypatch):
    monkeypatch.setattr(machine, "products_slowdown", lambda dtype: times)
    outcome = train("--text", text_file, "--max-steps", 1, "--dtype", "float16")
    assert outcome.code == 0
    assert f"dtype: float16 ({said})\n" in outcome.err


def test_the_slowdown_of_products_is_that_of_the_best_of_three(monkeypatch):
    ticks = iter([0, 2, 2, 8, 8, 9, 9, 12, 12, 15, 15, 20])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))
    assert machine.products_slowdown(torch.bfloat16) == 3
    assert next(ticks, None) is None


def test_a_run_goes_on_with_the_threads_it_began_with(train, text_file, monkeypatch):
    """In a process that would choose others; --threads wins."""
    real, used = train_module.optimizer_step, []

    def stepping(plan, trainer, model, windows):
        used.append(torch.get_num_threads())
        if trainer.position.step == 3 and len(used) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(plan, trainer, model, windows)

    monkeypatch.setattr(train_module, "optimizer_step", stepping)
    flags = ("--text", text_file, "--max-steps", 6, "--run-dir", "run", "--kernels", "torch")
    torch.set_num_threads(2)
    assert train(*flags).code == 143
    torch.set_num_threads(1)
    outcome = train(*flags)
    assert outcome.code == 0
    assert "threads: 2 (as this run began)" in outcome.err
    assert used == [2] * 6


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--dropout", 0.2, "--micro-batch-size", 4),
        ("--kernels", "torch", "--dropout", 0.2, "--micro-batch-size", 4),
        ("--dtype", "float32", "--recompute"),
        ("--recipe", "speed", "--bias"),
        ("--recipe", "speed", "--kernels", "torch"),
    ],
)
def test_an_interrupted_run_goes_on_to_bit_identical_weights(train, text_file, monkeypatch, extra):
    common = ("--text", text_file, "--max-steps", 20, "--eval-interval", 6, *extra)
    assert train(*common, "--output", "whole.pth", "--run-dir", "whole").code == 0

    parts = ("--output", "parts.pth", "--run-dir", "parts")
    go_on = interrupted_at(monkeypatch, 4, signal.SIGINT)
    assert train(*common, *parts).code == 130
    go_on()
    go_on = interrupted_at(monkeypatch, 13, signal.SIGTERM)
    assert train(*common, *parts).code == 143
    go_on()
    go_on = interrupted_at(monkeypatch, 17, signal.SIGUSR1)
    assert train(*common, *parts).code == 128 + signal.SIGUSR1
    assert not Path("parts.pth").exists()
    go_on()
    assert train(*common, *parts).code == 0

    assert_same_weights("whole.pth", "parts.pth")
    assert Path("whole.pth").read_bytes() == Path("parts.pth").read_bytes()
    timing = ("seconds", "tokens_per_second")
    whole, parts = (
        [{k: v for k, v in row.items() if k not in timing} for row in rows(name)]
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert rows("whole", "samples.jsonl") == rows("parts", "samples.jsonl")
    seconds = [row["seconds"] for row in rows("parts")]
    assert seconds == sorted(seconds)


def test_a_killed_process_goes_on_from_its_last_checkpoint(train, text_file, tmp_path):
    """A real SIGKILL of a real process, in the middle of a run."""
    common = ["--text", text_file, "--max-steps", 200, "--eval-interval", 20]
    command = ["train", *QUICK, *common, "--output", "killed.pth", "--run-dir", "killed"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nanogpt", *map(str, command)],
        cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "killed").glob("checkpoints/0*")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not Path("killed.pth").exists()
    outcome = train(*common, "--output", "killed.pth", "--run-dir", "killed")
    assert outcome.code == 0
    assert "going on from step" in outcome.err
    assert train(*common, "--output", "whole.pth", "--run-dir", "whole").code == 0
    assert_same_weights("whole.pth", "killed.pth")
    assert [r["step"] for r in rows("killed")] == [r["step"] for r in rows("whole")]


def test_a_finished_run_says_so_and_restores_a_missing_output(train, text_file):
    common = ("--text", text_file, "--max-steps", 4)
    train(*common)
    before = Path("gpt.pth").read_bytes()
    Path("gpt.pth").unlink()
    outcome = train(*common)
    assert outcome.code == 0
    assert "this run is finished" in outcome.err
    assert Path("gpt.pth").read_bytes() == before


def test_a_finished_run_writes_over_an_older_file_but_not_over_what_became_of_its_own(
    train, text_file, tmp_path
):
    """A power cut may come between the last checkpoint and the model file."""
    flags = ("--text", text_file, "--max-steps", 4, "--run-dir", "run")
    assert train(*flags).code == 0
    trained = Path("gpt.pth").read_bytes()
    older = package.GPT(vocab_size=5, block_size=8, n_layer=1, n_head=1, n_embd=8)
    checkpoint.save(older, "gpt.pth")
    Path("run/delivered.json").unlink()  # as before the file was written
    outcome = train(*flags)
    assert "is finished" in outcome.err
    assert "wrote gpt.pth" in outcome.err
    assert Path("gpt.pth").read_bytes() == trained

    checkpoint.save(older, "gpt.pth")  # now somebody's own
    outcome = train(*flags)
    assert outcome.code == 0
    assert "wrote gpt.pth" not in outcome.err
    assert "gpt.pth was changed after this run wrote it, and stays as it is" in outcome.err
    assert Path("gpt.pth").read_bytes() != trained
    # Another name is another file, whatever stands there.
    Path("other.pth").write_bytes(b"something")
    assert "wrote other.pth" in train(*flags, "--output", "other.pth").err
    assert Path("other.pth").read_bytes() == trained


def test_resume_never_trains_anew_and_the_result_is_the_same(train, text_file):
    common = ("--text", text_file, "--max-steps", 4, "--run-dir", "run")
    train(*common)
    before = Path("gpt.pth").read_bytes()
    outcome = train(*common, "--resume", "never")
    assert outcome.code == 0
    assert "finished, in" not in outcome.err
    assert Path("gpt.pth").read_bytes() == before
    assert len(rows("run")) == 4


def test_a_damaged_checkpoint_is_passed_over_and_said(train, text_file):
    common = ("--text", text_file, "--max-steps", 12, "--eval-interval", 4, "--run-dir", "run")
    train(*common)
    before = Path("gpt.pth").read_bytes()
    Path("gpt.pth").unlink()
    newest = Path("run/checkpoints/00000012/trainer.pt")
    newest.write_bytes(newest.read_bytes()[:-1])
    outcome = train(*common)
    assert outcome.code == 0
    assert "passed over the checkpoint" in outcome.err
    assert "going on from step 8" in outcome.err
    assert Path("gpt.pth").read_bytes() == before


def test_another_configuration_in_a_named_directory_is_refused(train, text_file):
    train("--text", text_file, "--max-steps", 4, "--run-dir", "run")
    metrics = Path("run/metrics.jsonl").read_bytes()
    outcome = train("--text", text_file, "--max-steps", 5, "--run-dir", "run")
    assert outcome.code == 2
    assert "its --max-steps is 4, not 5" in outcome.err
    text_file.write_text(text_file.read_text() + "more")
    outcome = train("--text", text_file, "--max-steps", 4, "--run-dir", "run")
    assert outcome.code == 2
    assert "its text differs" in outcome.err
    assert Path("run/metrics.jsonl").read_bytes() == metrics


def test_a_folder_with_other_things_is_not_taken_for_a_run(train, text_file):
    Path("precious/checkpoints").mkdir(parents=True)
    Path("precious/checkpoints/thesis.txt").write_text("precious")
    outcome = train("--text", text_file, "--max-steps", 4, "--run-dir", "precious")
    assert outcome.code == 2
    assert "is not a run directory" in outcome.err
    assert Path("precious/checkpoints/thesis.txt").read_text() == "precious"


def test_two_trainings_in_one_directory_are_refused(train, text_file):
    with RunDirectory(Path("run"), warn=print):
        outcome = train("--text", text_file, "--max-steps", 4, "--run-dir", "run")
    assert outcome.code == 2
    assert "another process is training in run" in outcome.err


def test_resume_takes_the_path_of_a_run(train, text_file):
    common = ("--text", text_file, "--max-steps", 4)
    train(*common, "--run-dir", "elsewhere")
    Path("gpt.pth").unlink()
    assert "finished" in train(*common, "--resume", "elsewhere").err
    outcome = train(*common, "--resume", "nowhere")
    assert (outcome.code, "there is no run directory" in outcome.err) == (3, True)


def test_init_continues_from_a_models_weights_and_tokenizer(train, text_file):
    train("--text", text_file, "--epochs", 3, "--output", "first.pth", "--run-dir", "one")
    outcome = train("--text", text_file, "--init", "first.pth", "--max-steps", 1,
                    "--learning-rate", 1e-6, "--run-dir", "two")  # fmt: skip
    assert outcome.code == 0, outcome.err
    best = min(row["val_loss"] for row in rows("one") if "val_loss" in row)
    assert rows("two")[-1]["val_loss"] == pytest.approx(best, abs=1e-3)


@pytest.fixture(params=["torch", "auto"])
def norms(request, monkeypatch):
    """Decides the gradient norm of each call, whoever computes the steps; and the flags for it."""

    def decide(norm):
        torchs, own, calls = torch.nn.utils.clip_grad_norm_, NativeStep.gradient_norm, []

        def of(real, *arguments):
            calls.append(1)
            found = norm(len(calls))
            return real(*arguments) if found is None else torch.tensor(found)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: of(torchs, *a))
        monkeypatch.setattr(NativeStep, "gradient_norm", lambda self: float(of(own, self)))
        return ("--kernels", request.param)

    return decide


def test_steps_without_a_finite_gradient_are_skipped_and_reported(train, text_file, norms):
    flags = norms(lambda call: math.nan if call == 3 else None)
    outcome = train("--text", text_file, "--max-steps", 6, "--run-dir", "run", *flags)
    assert outcome.code == 0
    assert "step 3 was skipped" in outcome.err
    assert rows("run", "events.jsonl")[0]["kind"] == "skipped"
    assert all(torch.isfinite(p).all() for p in weights("gpt.pth").values())


def test_a_run_that_only_diverges_ends_with_a_sentence(train, text_file, norms):
    flags = norms(lambda call: math.inf)
    outcome = train("--text", text_file, "--max-steps", 150, *flags)
    assert outcome.code == 1
    assert "100 steps in a row had no finite loss" in outcome.err


def without_times(run_dir):
    timing = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in timing} for row in rows(run_dir)]


@pytest.mark.parametrize("broken", [None, 3, 8])
@pytest.mark.parametrize("cut", [None, 5])
def test_steps_that_are_read_late_are_the_same_steps(train, text_file, monkeypatch, broken, cut):
    """As on a GPU, which decides by itself whether a step is skipped."""
    common = ("--text", text_file, "--max-steps", 12, "--eval-interval", 4,
              "--micro-batch-size", 3, "--dropout", 0.1, "--kernels", "torch")  # fmt: skip
    real, reads, steps = torch.nn.utils.clip_grad_norm_, [], []

    def norm(parameters, limit):
        parameters = list(parameters)
        steps.append(1)
        if len(steps) == broken:
            parameters[0].grad.fill_(math.nan)
        return real(parameters, limit)

    def read(self):
        reads.append(len(steps))
        return real_read(self)

    real_read = Outcome.read
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    monkeypatch.setattr(Outcome, "read", read)
    assert train(*common, "--output", "now.pth", "--run-dir", "now").code == 0
    steps.clear()
    reads.clear()

    monkeypatch.setattr(train_module, "can_defer", lambda plan, trainer: True)
    flags = (*common, "--output", "late.pth", "--run-dir", "late")
    if cut is not None:
        go_on = interrupted_at(monkeypatch, cut)
        assert train(*flags).code == 143
        go_on()
    assert train(*flags).code == 0
    assert without_times("late") == without_times("now")
    assert Path("late.pth").read_bytes() == Path("now.pth").read_bytes()
    if cut is None:
        # Every step is read when the next one has been begun, but those before an evaluation.
        assert reads == [2, 3, 4, 4, 6, 7, 8, 8, 10, 11, 12, 12]
    events = rows("late", "events.jsonl") if Path("late/events.jsonl").exists() else []
    skipped = [row["step"] for row in events if row["kind"] == "skipped"]
    assert skipped == ([] if broken is None else [broken])


@pytest.mark.parametrize("late", [False, True])
def test_the_pace_that_is_shown_is_that_of_the_row(train, text_file, monkeypatch, late):
    """Also where every step has a row of its own, whose counters then start again."""
    shown = []
    if late:
        monkeypatch.setattr(train_module, "can_defer", lambda plan, trainer: True)
    monkeypatch.setattr(TrainingProgress, "update", lambda self, *state: shown.append(state))
    flags = ("--max-steps", 5, "--eval-interval", 5, "--run-dir", "run")
    assert train("--text", text_file, *flags, "--kernels", "torch").code == 0
    assert [step for step, _, _ in shown] == [1, 2, 3, 4, 5]
    for (_, _, rate), row in zip(shown[:-1], rows("run"), strict=False):
        assert rate == pytest.approx(row["tokens_per_second"], rel=0.02)
    assert all(rate > 0 for _, _, rate in shown)
    assert all(row["tokens_per_second"] > 0 for row in rows("run"))


def test_only_torchs_adamw_on_a_gpu_is_read_late(monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def of(device, optimizer, scaler=scaler):
        trainer = SimpleNamespace(optimizer=optimizer, scaler=scaler)
        return can_defer(SimpleNamespace(device=torch.device(device)), trainer)

    adamw = torch.optim.AdamW([weight])
    assert of("cuda", adamw)
    assert not of("cpu", adamw)
    assert not of("cuda", Muon([{"params": [weight], "lr": 1.0}]))
    assert not of("cuda", adamw, torch.amp.GradScaler("cpu", enabled=True))


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_fused_adamw_counts_its_steps_where_the_weights_are(fused, device):
    """As torch itself begins its state; "meta" stands for a device that is not the host."""
    weight = torch.nn.Parameter(torch.zeros(2, 2, device="meta"))
    optimizer = torch.optim.AdamW([{"params": [weight], "fused": fused}])
    reserve_moments(optimizer)
    state = optimizer.state[weight]
    assert {name: value.device.type for name, value in state.items()} == {
        "step": device, "exp_avg": "meta", "exp_avg_sq": "meta",
    }  # fmt: skip


def test_a_failed_checkpoint_leaves_the_run_going_on(train, text_file, monkeypatch):
    real = RunDirectory.save

    def fail_once(self, step, *rest):
        if step == 4:
            raise OSError(28, "No space left on device")
        return real(self, step, *rest)

    monkeypatch.setattr(RunDirectory, "save", fail_once)
    outcome = train("--text", text_file, "--max-steps", 8, "--eval-interval", 4)
    assert outcome.code == 0
    assert "WARNING: the checkpoint of step 4 failed" in outcome.err
    assert Path("gpt.pth").exists()


def test_a_run_that_could_not_save_does_not_say_that_it_has(train, text_file, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDirectory, "save", fail)
    interrupted_at(monkeypatch, 3)
    outcome = train("--text", text_file, "--max-steps", 8)
    assert outcome.code == 1
    assert "the last steps are not saved: the same command begins anew" in outcome.err
    assert "saved after" not in outcome.err


def test_a_report_that_does_not_fit_on_the_disk_ends_nothing(train, text_file, monkeypatch):
    real, calls = RunDirectory.write_report, []

    def write_report(self, html):
        calls.append(len(html))
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return real(self, html)

    monkeypatch.setattr(RunDirectory, "write_report", write_report)
    outcome = train("--text", text_file, "--max-steps", 4)
    assert outcome.code == 0
    assert "WARNING: the report cannot be written now: No space left" in outcome.err
    assert len(calls) > 2


def test_the_alarm_needs_validation_to_rise_while_training_falls():
    assert overfits([[1.0, 2.0], [0.9, 2.1], [0.8, 2.2]])
    assert not overfits([[1.0, 2.0], [0.9, 2.1], [0.8, 2.05]])
    assert not overfits([[0.8, 2.0], [0.9, 2.1], [1.0, 2.2]])
    assert not overfits([[0.9, 2.1], [0.8, 2.2]])


def test_an_overtrained_model_raises_the_alarm(train, tmp_path):
    import random

    rng = random.Random(0)
    text = "".join(rng.choice("abcdefgh ") for _ in range(700))
    (tmp_path / "noise.txt").write_text(text)
    outcome = train("--text", "noise.txt", "--epochs", 300, "--n-embd", 64, "--run-dir", "run",
                    "--eval-interval", 60, "--val-fraction", 0.3)  # fmt: skip
    assert outcome.code == 0
    assert "validation rises while training falls" in outcome.err
    assert "overfitting" in {event["kind"] for event in rows("run", "events.jsonl")}
    best = min((r for r in rows("run") if "val_loss" in r), key=lambda r: r["val_loss"])
    assert best["step"] < 300


def test_without_validation_text_the_last_model_is_written(train, text_file):
    outcome = train("--text", text_file, "--max-steps", 3, "--val-fraction", 0, "--run-dir", "run")
    assert outcome.code == 0
    assert "no text is held out" in outcome.err
    assert all("val_loss" not in row for row in rows("run"))


def test_the_built_in_text_needs_no_file(train):
    outcome = train("--max-steps", 2)
    assert outcome.code == 0, outcome.err
    assert "python-reference" in outcome.err


def test_tensorboard_files_are_written(nanogpt, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--text", text_file, "--max-steps", 3, "--run-dir", "run")
    assert nanogpt("train", *SMALL, *arguments).code == 0
    (events,) = Path("run/tensorboard").iterdir()
    content = events.read_bytes()
    for tag in (b"train_loss", b"val_loss", b"learning_rate", b"tokens_per_second"):
        assert tag in content


def test_the_written_configuration_repeats_the_run(train, text_file, nanogpt):
    train("--text", text_file, "--max-steps", 4, "--run-dir", "run", "--learning-rate", "0.002")
    before = Path("gpt.pth").read_bytes()
    Path("gpt.pth").unlink()
    outcome = nanogpt("train", "--config", "run/config.yaml")
    assert outcome.code == 0, outcome.err
    assert "this run is finished" in outcome.err
    assert Path("gpt.pth").read_bytes() == before


def test_the_first_difference_of_two_runs_is_named():
    assert first_difference({"seed": 1}, {"seed": 1}) is None
    assert first_difference({"seed": 1}, {"seed": 2}) == "its --seed is 1, not 2"
    assert first_difference({}, {"seed": 2}) == "its --seed is not set, not 2"
    assert first_difference({}, {"seed": None}) == "its --seed is unknown, and here it is not set"
    assert first_difference({"text (SHA-256)": "a"}, {"text (SHA-256)": "b"}) == "its text differs"


def test_the_schedule_warms_up_and_ends_at_the_lowest_rate(train, text_file):
    train("--text", text_file, "--max-steps", 40, "--warmup-steps", 9, "--learning-rate", 1e-2,
          "--min-lr", 1e-4, "--run-dir", "run")  # fmt: skip
    rates = [row["learning_rate"] for row in rows("run")]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-2)
    assert rates.index(max(rates)) == 9
    assert rates[-1] == pytest.approx(1e-4)
    assert rates[9:] == sorted(rates[9:], reverse=True)


BAD = {
    "a missing file": (["--text", "nowhere.txt"], 3, "nowhere.txt"),
    "an empty file": (["--text", "empty.txt"], 3, "empty.txt"),
    "a text shorter than a block": (["--text", "short.txt"], 3, "block"),
    "invalid UTF-8": (["--text", "bad.txt"], 3, "20"),
    "a folder without text": (["--text", "folder"], 3, "folder"),
    "heads that do not divide": (["--text", "short.txt", "--n-embd", "30", "--n-head", "4"], 2,
                                 "n_embd (30) is not a multiple of n_head (4)"),
    "an unknown flag": (["--epoch", "3"], 2, "--epochs"),
    "an output in no folder": (["--text", "short.txt", "--output", "empty.txt/gpt.pth"], 2,
                               "--output"),
    "an output of another kind": (["--output", "gpt.bin"], 2, ".pth"),
    "an output that is a folder": (["--output", "folder.pth"], 2, "is not a file"),
    "a device that is not here": (["--device", "cuda"], 2, "no CUDA device"),
    "a device that does not exist": (["--device", "abacus"], 2, "--device must be"),
    "kernels that cannot run": (["--kernels", "triton"], 2, "on a GPU"),
    "a damaged initial model": (["--text", "short.txt", "--init", "damaged.pth"], 3,
                                "damaged.pth"),
    "a missing initial model": (["--init", "nowhere.pth"], 3, "there is no model file nowhere.pth"),
    "a damaged gzip": (["--text", "damaged.gz"], 3, "damaged.gz"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_its_code_and_one_sentence_and_writes_nothing(
    nanogpt, case, tmp_path, monkeypatch
):
    if case == "a device that is not here" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    Path("empty.txt").touch()
    Path("short.txt").write_text("too short")
    Path("bad.txt").write_bytes(b"twenty good bytes...\xff and more")
    Path("folder/inner").mkdir(parents=True)
    Path("folder.pth").mkdir()
    Path("damaged.pth").write_bytes(b"PK\x03\x04 and then nothing")
    Path("damaged.gz").write_bytes(gzip.compress(b"x" * 10_000)[:-20])
    Path("gpt.pth").write_bytes(b"an older model")
    before = sorted(str(p) for p in tmp_path.rglob("*") if "token-cache" not in str(p))
    arguments, code, message = BAD[case]
    outcome = nanogpt("train", *arguments)
    assert outcome.code == code, outcome.err
    sentence = outcome.err.splitlines()[-1]
    assert sentence.startswith("nanogpt train: ")
    assert message in sentence
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert Path("gpt.pth").read_bytes() == b"an older model"
    assert sorted(str(p) for p in tmp_path.rglob("*") if "token-cache" not in str(p)) == before


def test_a_text_with_characters_the_initial_model_lacks_is_refused(train, text_file, tmp_path):
    train("--text", text_file, "--max-steps", 2, "--output", "first.pth")
    (tmp_path / "other.txt").write_text("12 times § is 5.\n" * 50, encoding="utf-8")
    outcome = train("--text", "other.txt", "--init", "first.pth")
    assert outcome.code == 3
    assert "'§'" in outcome.err.splitlines()[-1]
    outcome = train("--text", text_file, "--init", "first.pth", "--n-embd", 32)
    assert outcome.code == 2
    assert "--n-embd 32: the model of --init has 16" in outcome.err
    outcome = train("--text", text_file, "--init", "first.pth", "--tokenizer", "bpe")
    assert "--tokenizer bpe: the model of --init has a char tokenizer" in outcome.err


def test_the_architecture_is_chosen_by_flags_and_every_engine_writes_its_text(
    train, nanogpt, text_file
):
    flags = ("--text", text_file, "--max-steps", 3, "--output", "turned.pth")
    outcome = train(*flags, "--rotary", "--qk-norm")
    assert outcome.code == 0, outcome.err
    model, _ = package.load("turned.pth")
    assert (model.config.rotary, model.config.qk_norm) == (True, True)
    exported = nanogpt("export", "--model", "turned.pth", "--output", "turned.pt")
    assert exported.code == 0, exported.err
    ways = [("turned.pth", "torch")]
    if native.available():
        ways += [("turned.pth", "native"), ("turned.pt", "native")]
    texts = []
    for name, engine in ways:
        written = nanogpt("sample", "--model", name, "--engine", engine, "--seed", 3,
                          "--max-new-tokens", 60, "--threads", 1)  # fmt: skip
        assert written.code == 0, written.err
        texts.append(written.out)
    assert len(texts[0]) >= 60
    assert texts == texts[:1] * len(texts)


def test_the_architecture_of_the_initial_model_stays(train, text_file):
    train("--text", text_file, "--max-steps", 2, "--output", "first.pth", "--rotary")
    outcome = train("--text", text_file, "--init", "first.pth", "--max-steps", 1)
    assert outcome.code == 0, outcome.err
    assert package.load("gpt.pth")[0].config.rotary
    outcome = train("--text", text_file, "--init", "first.pth", "--no-rotary")
    assert outcome.code == 2
    assert "--no-rotary: the model of --init was made with it" in outcome.err
    outcome = train("--text", text_file, "--init", "first.pth", "--qk-norm")
    assert outcome.code == 2
    assert "--qk-norm: the model of --init was made without it" in outcome.err


def test_heads_that_cannot_be_rotary_are_named(train, text_file):
    outcome = train("--text", text_file, "--rotary", "--n-embd", 15, "--n-head", 5)
    assert outcome.code == 2
    assert "is 3, which is odd: set --n-embd and --n-head" in outcome.err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_with_a_sentence_and_the_old_file_stays(
    nanogpt, text_file, tmp_path, monkeypatch
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this system does not let a test mount a small disk")
    try:
        (disk / "gpt.pth").write_bytes(b"an older model")
        monkeypatch.chdir(tmp_path)
        common = ("train", *QUICK, "--text", text_file, "--max-steps", 3)
        outcome = nanogpt(*common, "--output", disk / "gpt.pth", "--n-embd", 64)
        assert outcome.code == 1
        assert "the disk is full" in outcome.err.splitlines()[-1]
        assert (disk / "gpt.pth").read_bytes() == b"an older model"
        assert os.listdir(disk) == ["gpt.pth"]
        outcome = nanogpt(*common, "--run-dir", disk / "run", "--n-embd", 64)
        assert outcome.code == 1
        assert "is full" in outcome.err.splitlines()[-1]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_defaults_of_train_are_those_of_gpt():
    from nanogpt.config import shape_from_flags

    shape = shape_from_flags(TrainConfig(), vocab_size=257)
    assert shape == package.GPT().config


@pytest.mark.slow
def test_tinyshakespeare_reaches_nanogpts_loss(nanogpt, data_folder, tmp_path, monkeypatch):
    """nanoGPT's CPU configuration scores 1.8982 over the whole validation part."""
    monkeypatch.chdir(tmp_path)
    outcome = nanogpt(
        "train", "--text", data_folder / "tinyshakespeare.txt", "--block-size", 64,
        "--batch-size", 12, "--max-steps", 2000, "--json",
    )  # fmt: skip
    assert json.loads(outcome.out)["val_loss"] <= 1.8982


def test_the_seconds_of_metrics_count_from_the_start_of_the_process(train, text_file, monkeypatch):
    real = train_module.prepare

    def slowly(*arguments, **options):
        time.sleep(0.7)
        return real(*arguments, **options)

    monkeypatch.setattr(train_module, "prepare", slowly)
    train("--text", text_file, "--max-steps", 2, "--run-dir", "run")
    assert rows("run")[0]["seconds"] > 0.7


def test_runs_from_before_a_flag_existed_go_on(train, text_file, monkeypatch):
    """Their identity lacks it, which means its default; and torch computed their steps."""
    interrupted = {"--max-steps": 8, "--eval-interval": 4, "--run-dir": "run"}
    flags = ("--text", text_file, *(word for pair in interrupted.items() for word in pair))
    go_on = interrupted_at(monkeypatch, 5)
    assert train(*flags, "--kernels", "torch").code == 143
    go_on()
    kept = json.loads(Path("run/run.json").read_text())
    assert not {"rotary", "qk_norm"} & kept["identity"].keys()
    outcome = train(*flags, "--kernels", "torch", "--rotary")
    assert (outcome.code, "its --rotary is not set, not True" in outcome.err) == (2, True)
    assert train(*flags, "--kernels", "torch").code == 0


def test_a_run_that_goes_on_keeps_who_computes_its_steps(train, text_file, monkeypatch):
    flags = ("--text", text_file, "--max-steps", 6, "--eval-interval", 2, "--run-dir", "run")
    go_on = interrupted_at(monkeypatch, 3)
    assert train(*flags).code == 143
    go_on()
    kept = json.loads(Path("run/run.json").read_text())["step"]
    assert kept["engine"] == ("native" if native.available() else "torch")
    if not native.available():
        return
    assert kept["device"] == "cpu"
    monkeypatch.setenv("NANOGPT_ISA", "scalar")
    outcome = train(*flags)
    assert outcome.code == 0
    if kept["dtype"] == "bfloat16":
        assert "the native engine began this run and cannot go on" in outcome.err
    else:
        assert f"this run began with {kept['instruction_set']}" in outcome.err
