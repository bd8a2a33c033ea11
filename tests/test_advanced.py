"""The command over offline RL and self-alignment: what it refuses, leaves and repeats."""

import json
import random

import pytest
import torch

from nanogpt import load
from nanogpt.report.alignment import offline_verdict

SHAPE = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "32"]


def metrics(folder, model=""):
    lines = (folder / model / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


NEUTRAL, GOOD, BAD = ["eh", "he", "oh", "ho"], ["bob", "babe", "bee"], ["aha", "haa", "hah"]


@pytest.fixture
def reward_file(tmp_path):
    """120 lines, good where their words begin with b; hardly any stands there twice."""
    generator = random.Random(0)
    path = tmp_path / "rewards.txt"
    lines = []
    for n in range(120):
        told = GOOD if n % 2 else BAD
        words = [generator.choice(NEUTRAL), *(generator.choice(told) for _ in range(3))]
        generator.shuffle(words)
        lines.append(f"{' '.join(words)}|{1.0 if n % 2 else -1.0}\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def model_file(tmp_path, nanogpt, text_file):
    path = tmp_path / "base.pth"
    done = nanogpt("train", "--text", text_file, *SHAPE, "--max-steps", 20, "--output", path)
    assert done.code == 0, done.err
    return path


def offline(nanogpt, reward_file, *flags, shape=SHAPE):
    return nanogpt("advanced", "--offline-data", reward_file, *shape, *flags)


def test_the_command_of_the_interface_trains_and_writes_a_model(nanogpt, reward_file, tmp_path):
    done = offline(
        nanogpt, reward_file, "--epochs", 3, "--output", "gpt_offline.pth", "--run-dir", "run"
    )
    assert done.code == 0, done.err
    assert "effective sample size" in done.err
    model, tokenizer = load(tmp_path / "gpt_offline.pth")
    assert set(tokenizer.stoi) == set("abeho ") | {"<|endoftext|>"}
    assert model.calibration_temperature is None
    rows = metrics(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()


def test_equal_rewards_warn_and_are_plain_training_bit_for_bit(nanogpt, tmp_path):
    texts = [f"text {n} of {n % 7}" for n in range(50)]
    constant, mixed = tmp_path / "constant.txt", tmp_path / "mixed.txt"
    constant.write_text("".join(f"{text}|0.3\n" for text in texts))
    mixed.write_text("".join(f"{text}|{n % 3}\n" for n, text in enumerate(texts)))
    done = offline(nanogpt, constant, "--output", "c.pth", "--run-dir", "c", "--compare")
    assert done.code == 0
    assert "nothing can be learnt" in done.err
    assert "nothing to compare" in done.err
    plain = offline(
        nanogpt, mixed, "--output", "p.pth", "--run-dir", "p", "--weighting", "identity"
    )
    assert plain.code == 0
    ours, theirs = load(tmp_path / "c.pth")[0], load(tmp_path / "p.pth")[0]
    for name, tensor in ours.named_parameters():
        assert torch.equal(tensor, dict(theirs.named_parameters())[name]), name
    same = ("train_loss", "val_nll", "loss", "grad_norm")
    for a, b in zip(metrics(tmp_path / "c"), metrics(tmp_path / "p"), strict=True):
        assert [a[key] for key in same] == [b[key] for key in same]
    # And the rewards do matter where they differ.
    weighted = offline(nanogpt, mixed, "--output", "w.pth", "--run-dir", "w")
    assert weighted.code == 0
    moved = load(tmp_path / "w.pth")[0]
    assert not torch.equal(moved.token_weight, theirs.token_weight)


def test_a_comparison_prints_and_keeps_its_proof(nanogpt, reward_file, tmp_path):
    flags = ["--compare", "--compare-samples", "150", "--epochs", "12", "--batch-size", "8",
             "--learning-rate", "5e-3", "--beta", "0.3", "--output", "w.pth",
             "--run-dir", "run"]  # fmt: skip
    done = offline(nanogpt, reward_file, *flags)
    assert done.code == 0, done.err
    assert "It helped" in done.out
    kept = json.loads((tmp_path / "run" / "comparison.json").read_text())
    plain, weighted, best = kept["arms"]
    assert [plain["name"], weighted["name"], best["name"]] == ["plain", "weighted", "best fifth"]
    assert weighted["above_plain"]["low"] > 0
    assert weighted["nll_low"]["low"] > 0
    assert weighted["kl_to_plain"]["mean"] > 0
    assert kept["judge"]["auroc"] > 0.95
    report = (tmp_path / "run" / "report.html").read_text()
    assert "It helped" in report
    assert report.count("<svg") == 4
    # The same command again trains nothing and says the same.
    again = offline(nanogpt, reward_file, *flags)
    assert again.code == 0
    assert "is finished" in again.err
    assert again.out == done.out


def test_shuffled_rewards_help_nothing(nanogpt, reward_file, tmp_path):
    lines = reward_file.read_text().splitlines()
    texts = [line.rsplit("|", 1)[0] for line in lines]
    rewards = [line.rsplit("|", 1)[1] for line in lines]
    random.Random(1).shuffle(rewards)
    shuffled = tmp_path / "shuffled.txt"
    pairs = zip(texts, rewards, strict=True)
    shuffled.write_text("".join(f"{text}|{reward}\n" for text, reward in pairs))
    done = offline(
        nanogpt, shuffled, "--compare", "--compare-samples", "60", "--epochs", "4",
        "--learning-rate", "3e-3", "--batch-size", "8", "--output", "w.pth", "--run-dir", "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    _, weighted, _ = json.loads((tmp_path / "run" / "comparison.json").read_text())["arms"]
    gain = weighted["above_plain"]
    error = (gain["high"] - gain["low"]) / 2 / 1.96
    assert abs(gain["mean"]) < 3 * error + 1e-12


def test_an_interrupted_run_goes_on_to_the_same_weights(
    nanogpt, reward_file, tmp_path, monkeypatch
):
    import os
    import signal

    from nanogpt.offline_rl import RewardWeightedTrainer

    flags = ["--epochs", "4", "--batch-size", "16", "--dropout", "0.1", "--plain-epochs", "2"]
    whole = offline(nanogpt, reward_file, *flags, "--output", "a.pth", "--run-dir", "a")
    assert whole.code == 0
    step = RewardWeightedTrainer.step

    taken = 0

    def interrupted(self):
        nonlocal taken
        taken += 1
        done = step(self)
        # Once among the plain steps, and once among the weighted ones.
        if taken in (5, 20):
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    monkeypatch.setattr(RewardWeightedTrainer, "step", interrupted)
    for told in ("base: going on from step 5", "weighted: going on from step 6", ""):
        cut = offline(nanogpt, reward_file, *flags, "--output", "b.pth", "--run-dir", "b")
        if not told:
            break
        assert cut.code == 143
        assert "goes on from here" in cut.err
        assert not (tmp_path / "b.pth").exists()
    assert cut.code == 0
    assert "weighted: going on from step 6" in cut.err
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_move_a_model_towards_good_records(nanogpt, reward_file, tmp_path, objective):
    base = offline(nanogpt, reward_file, "--weighting", "identity", "--epochs", "6",
                   "--output", "base.pth", "--run-dir", "base")  # fmt: skip
    assert base.code == 0
    done = offline(nanogpt, reward_file, "--objective", objective, "--init", "base.pth",
                   "--learning-rate", "1e-3", "--epochs", "4", "--batch-size", "16",
                   "--output", "o.pth", "--run-dir", "o", shape=[])  # fmt: skip
    assert done.code == 0, done.err
    assert metrics(tmp_path / "o")[-1]["val_accuracy"] > 0.9


def test_more_than_the_best_part_is_said_where_rewards_are_alike(nanogpt, reward_file):
    flags = ("--weighting", "topk", "--epochs", 1, "--output", "o.pth")
    done = offline(nanogpt, reward_file, *flags, "--top-fraction", 0.1, "--run-dir", "a")
    assert "% of the records are learnt from and not the best 10%" in done.err
    done = offline(nanogpt, reward_file, *flags, "--top-fraction", 0.5, "--run-dir", "b")
    assert "not the best" not in done.err


@pytest.mark.parametrize(("auroc", "is_doubted"), [(0.375, True), (0.7, False), (None, False)])
def test_a_verdict_says_where_its_judge_is_no_better_than_chance(auroc, is_doubted):
    mean = {"reward": {"mean": 0.5}, "above_plain": {"low": 0.1, "high": 0.3}}
    said = offline_verdict([mean, mean], {"auroc": auroc, "n_held_out": 12})
    assert said.startswith("It helped")
    assert ("the judge hardly tells good texts from bad" in said) is is_doubted


def test_halves_of_one_reward_each_are_not_compared(nanogpt, tmp_path):
    path = tmp_path / "rare.txt"
    path.write_text("".join(f"text {n}|{1 if n == 7 else 0}\n" for n in range(60)))
    done = offline(nanogpt, path, "--compare", "--output", "w.pth")
    assert done.code == 3
    assert "--compare" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("target", [["--target-ess", "0.6"], ["--target-kl", "0.2"]])
def test_a_target_finds_its_beta_with_records_held_out(nanogpt, reward_file, tmp_path, target):
    done = offline(nanogpt, reward_file, *target, "--epochs", 1, "--output", "w.pth",
                   "--run-dir", "run", "--json")  # fmt: skip
    assert done.code == 0, done.err
    stats = json.loads(done.out)["weights"]
    reached = stats["ess_fraction"] if "ess" in target[0] else stats["kl"]
    assert reached == pytest.approx(float(target[1]), rel=1e-6)
    assert metrics(tmp_path / "run")[-1]["val_loss"] > 0


def test_training_that_diverges_ends_in_words_and_writes_nothing(nanogpt, reward_file, tmp_path):
    done = offline(nanogpt, reward_file, "--plain-epochs", 0, "--learning-rate", "1e9",
                   "--epochs", 20, "--batch-size", 8, "--output", "w.pth")  # fmt: skip
    assert done.code == 1
    assert "smaller --learning-rate" in done.err
    assert not (tmp_path / "w.pth").exists()


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_equal_rewards_leave_plain_training_of_any_objective(nanogpt, tmp_path, objective):
    path = tmp_path / "constant.txt"
    path.write_text("".join(f"text {n} of {n % 7}|1\n" for n in range(50)))
    done = offline(nanogpt, path, "--objective", objective, "--epochs", 1, "--output", "w.pth")
    assert done.code == 0, done.err
    assert "plain training" in done.err
    assert (tmp_path / "w.pth").exists()


def test_one_prompt_for_all_records_is_said_to_hold_nothing_out(nanogpt, tmp_path):
    path = tmp_path / "prompt.jsonl"
    rows = [{"prompt": "Say: ", "completion": f"word {n}", "reward": n % 5} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = offline(nanogpt, path, "--epochs", 1, "--output", "w.pth", "--run-dir", "run")
    assert done.code == 0, done.err
    assert "nothing can be held out" in done.err
    compared = offline(nanogpt, path, "--epochs", 1, "--output", "w.pth", "--compare")
    assert compared.code == 3
    assert "cannot be cut into two halves" in compared.err


def test_a_run_cut_off_among_its_plain_epochs_is_found_by_resume(
    nanogpt, reward_file, tmp_path, monkeypatch
):
    import os
    import signal

    from nanogpt.offline_rl import RewardWeightedTrainer

    step = RewardWeightedTrainer.step

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(RewardWeightedTrainer, "step", interrupted)
    flags = ["--epochs", "1", "--output", "w.pth"]
    assert offline(nanogpt, reward_file, *flags, "--run-dir", "run").code == 130
    monkeypatch.setattr(RewardWeightedTrainer, "step", step)
    done = offline(nanogpt, reward_file, *flags, "--resume", "run")
    assert done.code == 0, done.err
    assert (tmp_path / "w.pth").exists()


def test_an_interrupted_alignment_goes_on_after_its_last_round(
    nanogpt, model_file, text_file, tmp_path, monkeypatch
):
    from nanogpt.self_align import SelfAlignTrainer

    def align(name):
        return nanogpt("advanced", "--align-terms", "1,2,3,is", "--init", model_file,
                       "--anchor-text", text_file, "--rounds", "2", "--num-generations", "48",
                       "--max-completion-length", "16", "--epochs", "1", "--kl-budget", "100",
                       "--output", f"{name}.pth", "--run-dir", name)  # fmt: skip

    assert align("whole").code == 0
    step = SelfAlignTrainer.step

    def interrupted(self):
        if len(self.rounds) == 2:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(SelfAlignTrainer, "step", interrupted)
    cut = align("cut")
    assert cut.code == 130
    assert "saved after round 1" in cut.err
    monkeypatch.setattr(SelfAlignTrainer, "step", step)
    rest = align("cut")
    assert rest.code == 0
    assert "going on after round 1" in rest.err
    assert (tmp_path / "whole.pth").read_bytes() == (tmp_path / "cut.pth").read_bytes()
    assert len(metrics(tmp_path / "cut")) == len(metrics(tmp_path / "whole"))


def test_refused_terms_leave_no_run_behind(nanogpt, model_file, text_file, tmp_path):
    flags = ["--init", model_file, "--anchor-text", text_file, "--output", "al.pth",
             "--run-dir", "run", "--rounds", "1", "--num-generations", "16",
             "--max-completion-length", "8", "--epochs", "1"]  # fmt: skip
    refused = nanogpt("advanced", "--align-terms", "is,€uro", *flags)
    assert refused.code == 3
    assert not (tmp_path / "run").exists()
    assert nanogpt("advanced", "--align-terms", "is", *flags).code == 0


def test_json_prints_one_object(nanogpt, reward_file):
    done = offline(
        nanogpt, reward_file, "--epochs", 1, "--output", "w.pth", "--run-dir", "run", "--json"
    )
    assert done.code == 0
    summary = json.loads(done.out)
    assert summary["status"] == "finished"
    assert 100 < summary["weights"]["n"] < 120
    assert {"rewards", "length"} <= {finding["name"] for finding in summary["findings"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("good text|1\nno bar\n", "line 2: there is no |"),
        ("a|1\nb|nan\n", "line 2: the reward must be finite"),
        ("a|1\nb|lovely\n", "line 2: the reward 'lovely' is not a number"),
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("|1\n", "line 1: the text is empty"),
    ],
)
def test_a_bad_reward_file_is_refused_by_line(nanogpt, tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_text(content)
    done = offline(nanogpt, path, "--output", "w.pth")
    assert done.code == 3
    assert message in done.err
    assert "Traceback" not in done.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.txt"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--beta", "0"], 2, "--beta must be above 0"),
        (["--beta", "-1"], 2, "--beta must be above 0"),
        (["--weighting", "softmax"], 2, "--weighting must be one of"),
        (["--target-ess", "5", "--target-kl", "1"], 2, "exclude each other"),
        (["--target-ess", "5000"], 2, "--target-ess"),
        (["--target-kl", "50"], 2, "--target-kl"),
        (["--objective", "dpo", "--plain-epochs", "0"], 2, "needs --init"),
        (["--kl-coef", "0.1", "--plain-epochs", "0"], 2, "needs --init"),
        (["--align-terms", "a,b"], 2, "either --offline-data"),
        (["--max-weight", "0.5"], 2, "--max-weight must be at least 1"),
        (["--init", "nowhere.pth"], 3, "there is no model file nowhere.pth"),
        (["--output", "model.bin"], 2, "ends in"),
        (["--rounds", "2"], 2, "--rounds is of --align-terms"),
        (["--weighting", "topk", "--target-kl", "0.1"], 2, "has no beta"),
        (["--n-embd", "15"], 2, "n_embd"),
    ],
)
def test_impossible_flags_are_named(nanogpt, reward_file, flags, code, message):
    done = offline(nanogpt, reward_file, *flags, "--run-dir", "run")
    assert done.code == code
    assert message in done.err


def test_a_command_without_data_or_terms_says_what_it_needs(nanogpt):
    done = nanogpt("advanced", "--epochs", "1")
    assert done.code == 2
    assert "--offline-data" in done.err
    assert "--align-terms" in done.err


def test_huge_rewards_train_like_any(nanogpt, reward_file, tmp_path):
    text = reward_file.read_text().replace("|1.0", "|1e9").replace("|-1.0", "|-1e9")
    huge = tmp_path / "huge.txt"
    huge.write_text(text)
    for path, name in ((reward_file, "a"), (huge, "b")):
        done = offline(nanogpt, path, "--epochs", 1, "--output", f"{name}.pth", "--run-dir", name)
        assert done.code == 0, done.err
    a, b = load(tmp_path / "a.pth")[0], load(tmp_path / "b.pth")[0]
    torch.testing.assert_close(a.token_weight, b.token_weight)


def test_a_text_that_the_model_cannot_spell_is_refused_by_line(nanogpt, reward_file, model_file):
    done = offline(nanogpt, reward_file, "--init", model_file, "--output", "w.pth", shape=[])
    assert done.code == 3
    assert "rewards.txt, line 1" in done.err


def test_terms_are_aligned_with_and_reported(nanogpt, model_file, text_file, tmp_path):
    flags = ["--align-terms", "1,2,3,is", "--init", model_file, "--anchor-text",
             text_file, "--rounds", "2", "--num-generations", "48", "--max-completion-length",
             "16", "--epochs", "1", "--kl-budget", "100", "--output", "al.pth",
             "--run-dir", "run"]  # fmt: skip
    done = nanogpt("advanced", *flags)
    assert done.code == 0, done.err
    assert "3 to learn, 1 held out" in done.err
    assert "stopped: " in done.err
    load(tmp_path / "al.pth")
    rounds = metrics(tmp_path / "run")
    assert rounds[0]["round"] == 0
    assert {"term_rate", "heldout_term_rate", "kl", "val_loss", "distinct_2"} <= set(rounds[-1])
    assert "Held out for judging" in (tmp_path / "run" / "report.html").read_text()
    again = nanogpt("advanced", *flags)
    assert again.code == 0
    assert "is finished" in again.err
    assert again.out == done.out


@pytest.mark.parametrize(
    ("terms", "flags", "code", "message"),
    [
        ("is,€uro", [], 3, "cannot write the term '€uro'"),
        (",", [], 2, "at least one term"),
        ("missing.txt", [], 3, "missing.txt"),
        ("is", ["--rounds", "0"], 2, "--rounds must be at least 1"),
    ],
)
def test_terms_that_cannot_be_used_are_named(
    nanogpt, model_file, text_file, terms, flags, code, message
):
    done = nanogpt("advanced", "--align-terms", terms, "--init", model_file,
                   "--anchor-text", text_file, "--output", "al.pth", *flags)  # fmt: skip
    assert done.code == code
    assert message in done.err


def test_terms_need_a_model_to_align(nanogpt):
    done = nanogpt("advanced", "--align-terms", "a,b")
    assert done.code == 2
    assert "--init" in done.err


@pytest.mark.slow
def test_film_reviews_teach_what_their_readers_liked(nanogpt, data_folder, tmp_path):
    """Real text, rewards of 1 and -1: good sentences likelier, bad ones less, better samples.

    All three are judged on the half of the file that no model has seen. About five minutes on two
    cores: most of it is plain training, which both models share.
    """
    done = nanogpt(
        "advanced", "--offline-data", data_folder / "movie_reviews.txt", "--compare",
        "--compare-samples", "1024", "--block-size", "192", "--batch-size", "16",
        "--plain-epochs", "12", "--epochs", "1", "--beta", "2", "--output", "reviews.pth",
        "--run-dir", "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    print(done.out)
    _, weighted, best = json.loads((tmp_path / "run" / "comparison.json").read_text())["arms"]
    assert weighted["nll_high"]["high"] < 0
    assert weighted["nll_low"]["low"] > 0
    assert weighted["above_plain"]["low"] > 0
    assert best["nll_high"]["mean"] > weighted["nll_high"]["mean"]
