"""The calibration command: its two halves, what it writes, what it refuses, and that it helps."""

import json
import math
import re
from contextlib import suppress

import numpy as np
import pytest
import torch

from nanogpt import GPT, checkpoint, load
from nanogpt.calibrate import fit_model, split_windows, windows_of
from nanogpt.calibration import PerTokenTemperature, TemperatureScaler
from nanogpt.metadata import tensor_digest
from nanogpt.model import evaluating
from nanogpt.reliability import calibration_report
from nanogpt.report.calibration import CalibrationPage, render_calibration_report
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer
from nanogpt.trainer import evaluate

LETTERS = "abcdefghijklmnopqrstuvwxy\n "


def make_model(**shape):
    """A small random model of letters whose probabilities are far from even."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 28, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = GPT(**{**sizes, **shape}).eval()
    with torch.no_grad():
        model.transformer["wte"].weight.mul_(40)
    model.tokenizer = CharTokenizer(LETTERS)
    return model


@pytest.fixture
def model_path(tmp_path):
    checkpoint.save(make_model(), tmp_path / "gpt.pth")
    return tmp_path / "gpt.pth"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Numbers as few as these are summed sooner by one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def written():
    """(10, 300) letters that the model wrote at temperature 2."""
    model = make_model()
    return model.generate(torch.full((10, 1), 27), 300, temperature=2.0, seed=1)[:, 1:]


@pytest.fixture
def text_path(tmp_path, written):
    """3,000 letters for which the model's right temperature is 2."""
    path = tmp_path / "held.txt"
    path.write_text(CharTokenizer(LETTERS).decode(written.flatten().tolist()), encoding="utf-8")
    return path


@pytest.fixture
def calibrate(nanogpt, model_path, text_path):
    def run(*arguments):
        return nanogpt("calibrate", "--model", model_path, "--text", text_path, *arguments)

    return run


# Windows.


@pytest.mark.parametrize(("count", "block"), [(2, 8), (3, 8), (4, 8), (17, 8), (100, 8), (101, 7)])
def test_the_halves_hold_every_target_once(count, block):
    tokens = np.arange(count, dtype=np.uint16)
    halves = split_windows(windows_of(tokens, block), seed=0)
    targets = np.concatenate([half.targets() for half in halves])
    assert sorted(targets.tolist()) == list(range(1, count))
    if count > 2:
        assert all(half.n_targets for half in halves)
    else:
        assert [half.n_targets for half in halves] == [1, 0]


def test_the_halves_come_from_everywhere_and_not_in_turns():
    windows = windows_of(np.zeros(8001, dtype=np.uint16), 8)
    first, second = split_windows(windows, seed=0)
    assert first.n_targets == second.n_targets == 4000
    pairs = first.starts // 16
    assert np.array_equal(pairs, np.arange(500))
    from_even = (first.starts // 8 % 2 == 0).mean()
    assert 0.4 < from_even < 0.6
    again, _ = split_windows(windows, seed=1)
    assert not np.array_equal(first.starts, again.starts)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_a_pass_gives_what_validation_sees(batch_size):
    model = make_model()
    tokens = np.random.default_rng(0).integers(0, 27, 150).astype(np.uint16)
    windows = windows_of(tokens, 16)
    total, count, groups = 0.0, 0, []
    for logits, labels, numbers in windows.batches(model, batch_size)():
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
        groups += numbers.tolist()
    assert count == 149
    assert total / count == pytest.approx(evaluate(model, tokens, device=torch.device("cpu")))
    assert groups == [window for window in range(10) for _ in range(16)][:149]


def test_d14_a_fit_leaves_out_dropout_and_gives_the_mode_back(written):
    tokens = written.flatten().numpy().astype(np.uint16)
    still = fit_model(make_model(), tokens).temperature_
    model = make_model(dropout=0.5).train()
    assert fit_model(model, tokens).temperature_ == pytest.approx(still, rel=1e-9)
    assert model.training
    assert model.calibration_temperature is None
    with suppress(KeyError), evaluating(model):
        assert not model.training
        raise KeyError
    assert model.training


def test_a_fit_does_not_depend_on_the_batches(written):
    tokens = written.flatten().numpy().astype(np.uint16)
    model = make_model()
    one, many = (fit_model(model, tokens, batch_size=size) for size in (1, 50))
    assert one.temperature_ == pytest.approx(many.temperature_, rel=1e-5)
    assert one.temperature_se_ == pytest.approx(many.temperature_se_, rel=1e-4)


# The command.


def test_the_model_file_carries_temperature_and_record(calibrate, model_path, tmp_path):
    before = model_path.read_bytes()
    outcome = calibrate("--json")
    assert outcome.code == 0
    result = json.loads(outcome.out)
    assert model_path.read_bytes() == before
    model, _ = load(tmp_path / "gpt-calibrated.pth")
    assert result["output"] == str(tmp_path / "gpt-calibrated.pth")
    assert model.calibration_temperature == result["temperature"]
    assert model.calibration == {
        "temperature": result["temperature"],
        "se": result["temperature_se"],
        "n_tokens": result["n_tokens_fitted"],
        "nll_before": result["nll_fitted_before"],
        "nll_after": result["nll_fitted_after"],
        "weights_sha256": tensor_digest(dict(model.named_parameters())),
    }
    assert not model.calibration_is_stale
    original, _ = load(model_path)
    for ours, theirs in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    # The text was drawn at temperature 2.
    assert result["temperature"] == pytest.approx(2, abs=4 * result["temperature_se"])
    assert result["after"]["nll"] < result["before"]["nll"]


def test_the_numbers_are_those_of_the_half_that_judges(calibrate, model_path, text_path):
    result = json.loads(calibrate("--json", "--seed", 5).out)
    model, tokenizer = load(model_path)
    tokens = np.array([tokenizer.end_of_text_id, *tokenizer.encode(text_path.read_text())])
    _, judges = split_windows(windows_of(tokens.astype(np.uint16), 16), seed=5)
    parts = list(judges.batches(model)())
    logits, labels = (torch.cat([part[index] for part in parts]) for index in (0, 1))
    for name, temperature in (("before", 1.0), ("after", result["temperature"])):
        expected = calibration_report((logits.double() / temperature).softmax(1), labels)
        for field in ("nll", "ece", "ece_floor", "brier", "auroc", "entropy", "accuracy", "aurc"):
            value = getattr(expected, field)
            assert result[name][field] == pytest.approx(value, rel=1e-4), (name, field)
        assert result[name]["bits_per_byte"] == pytest.approx(expected.nll / math.log(2), rel=1e-5)
    assert result["n_tokens_judged"] == len(labels)
    difference = result["nll_difference"]
    assert difference["mean"] == pytest.approx(result["after"]["nll"] - result["before"]["nll"])
    assert difference["interval"][0] < difference["mean"] < difference["interval"][1] < 0


def test_the_terminal_shows_temperature_error_and_noise(calibrate):
    outcome = calibrate()
    assert re.match(r"temperature [12]\.\d+ ± 0\.\d+\n", outcome.out)
    for name in ("NLL", "bits a byte", "ECE", "noise alone", "AUROC", "entropy − NLL", "Brier"):
        assert name in outcome.out, name
    assert "not trained on" in outcome.err
    assert "gpt-calibrated.pth" in outcome.err


def test_sampling_is_as_before_and_its_probabilities_are_not(nanogpt, calibrate, model_path):
    assert calibrate("--output", model_path.with_name("warm.safetensors")).code == 0

    def sample(path):
        arguments = ["--prompt", "abc", "--max-new-tokens", 30, "--seed", 5, "--json"]
        return json.loads(nanogpt("sample", "--model", path, *arguments).out)["samples"][0]

    cold, warm = sample(model_path), sample(model_path.with_name("warm.safetensors"))
    assert warm["tokens"] == cold["tokens"]
    assert warm["text"] == cold["text"]
    temperature = load(model_path.with_name("warm.safetensors"))[0].calibration_temperature
    assert sum(warm["token_probs"]) < sum(cold["token_probs"])
    assert temperature > 1


def test_the_output_may_be_the_model_itself(calibrate, model_path):
    assert calibrate("--output", model_path).code == 0
    first = load(model_path)[0]
    assert first.calibration_temperature is not None
    # A second time the same: the weights decide, not the temperature that is there.
    raw = model_path.read_bytes()
    assert calibrate("--output", model_path).code == 0
    assert model_path.read_bytes() == raw


def test_a_temperature_for_each_token_is_stored_only_where_it_is_better(calibrate, tmp_path):
    result = json.loads(calibrate("--json", "--per-token").out)
    head = result["per_token"]
    model, _ = load(tmp_path / "gpt-calibrated.pth")
    error = head["nll_difference"]["standard_error"]
    assert head["kept"] == (head["nll_difference"]["mean"] < -2 * error)
    assert model.calibration.get("per_token") == (head["weights"] if head["kept"] else None)
    assert any("temperature for each token" in note for note in result["notes"])
    PerTokenTemperature(result["temperature"], head["weights"])
    assert json.loads(calibrate("--json").out)["per_token"] is None


def test_the_report_is_one_page_without_network(calibrate, tmp_path):
    outcome = calibrate("--report", tmp_path / "new" / "page.html", "--bins", 10)
    assert outcome.code == 0
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)\s*=|@import|url\(|<script|<link", page)
    assert page.count("<svg") == 3
    words = re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.S)
    for expected in ("gpt.pth on held", "over-confident", "ECE before", "seed 0", "passes"):
        assert expected in words, expected
    temperature = re.match(r"temperature (\S+)", outcome.out)[1]
    assert f"{float(temperature):.4g}" in words
    for number in re.findall(r"NLL, nats a token +(\S+) +(\S+)", outcome.out)[0]:
        assert number in words
    assert " nan" not in words


def test_a_text_of_fewer_than_a_thousand_tokens_warns_with_the_error(calibrate, text_path):
    text_path.write_text(text_path.read_text()[:300])
    result = json.loads(calibrate("--json").out)
    (note,) = result["notes"]
    assert "fewer than 1,000" in note
    assert f"standard error {result['temperature_se']:.2g}" in note
    assert "note: the temperature was fitted to" in calibrate().err


def test_tokens_that_stand_for_no_bytes_have_no_bits_a_byte(nanogpt, tmp_path):
    """A bpe vocabulary has tokens of several bytes: the bits are per byte, not per token."""
    text = tmp_path / "words.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 60, encoding="utf-8")
    trained = nanogpt(
        "train", "--text", text, "--tokenizer", "bpe", "--vocab-size", 280, "--max-steps", 2,
        "--n-layer", 1, "--n-embd", 16, "--n-head", 2, "--block-size", 16, "--batch-size", 4,
        "--sample-tokens", 0, "--output", tmp_path / "bpe.pth", "--run-dir", tmp_path / "run",
        "--no-tensorboard",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    done = nanogpt("calibrate", "--model", tmp_path / "bpe.pth", "--text", text, "--json")
    result = json.loads(done.out)
    _, tokenizer = load(tmp_path / "bpe.pth")
    ids = np.array([tokenizer.end_of_text_id, *tokenizer.encode(text.read_text())], dtype=np.uint16)
    _, judges = split_windows(windows_of(ids, 16), seed=0)
    n_bytes = int(tokenizer.token_byte_lengths[judges.targets()].sum())
    assert n_bytes > 1.5 * judges.n_targets
    bits = result["after"]["nll"] / math.log(2) * judges.n_targets / n_bytes
    assert result["after"]["bits_per_byte"] == pytest.approx(bits)


def page_of(confidence, correct, **changes):
    """The page of a calibration that changed nothing."""
    content = {**calibration_report(confidence, correct).as_dict(), "nll": 1.5, "entropy": 1.0}
    fields = {
        "title": "gpt.pth on held",
        "temperature": 2.0,
        "standard_error": 0.1,
        "before": {**content, "entropy_gap": -0.5},
        "after": {**content, "entropy_gap": 0.0},
        "bits_per_nat": 1.44,
        "difference": {"mean": -0.1, "interval": [-0.2, -0.05]},
    }
    return render_calibration_report(CalibrationPage(**{**fields, **changes}))


def test_a_page_says_which_way_the_model_was_wrong_and_whether_noise_is_left():
    sure, right = torch.full((400,), 0.9), torch.arange(400) % 10 < 9
    assert "right within noise before" in page_of(sure, right)
    assert "noise alone would show" in page_of(sure, right)
    over = page_of(sure, torch.arange(400) % 10 < 5)
    assert "over-confident" in over
    assert "right 50.0% of the time, with a probability of 90.0%" in over
    assert "more than noise would show" in over
    assert "under-confident" in page_of(1 - sure, right)


def test_a_page_of_odd_numbers_and_hostile_names_is_a_page():
    bad = "</h1><script>alert(1)</script>"
    page = page_of(
        torch.ones(3), torch.ones(3), title=bad, notes=[bad], facts={bad: bad},
        standard_error=None, bits_per_nat=None, difference={"mean": 0.0, "interval": None},
    )  # fmt: skip
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 5
    assert "—" in page  # no AUROC where all is right
    assert page_of(torch.ones(3), torch.ones(3)) == page_of(torch.ones(3), torch.ones(3))


# Stale calibrations.


def test_further_training_marks_the_calibration_stale(
    nanogpt, calibrate, text_path, tmp_path, monkeypatch
):
    calibrate("--output", tmp_path / "warm.pth")
    record = load(tmp_path / "warm.pth")[0].calibration
    seen, save = [], checkpoint.save

    def noting(model, path):
        content = getattr(model, "content", None) or model.describe()  # of a checkpoint, or a model
        seen.append((content["calibration_temperature"], content["calibration"].get("stale")))
        save(model, path)

    monkeypatch.setattr(checkpoint, "save", noting)
    outcome = nanogpt(
        "train", "--text", text_path, "--init", tmp_path / "warm.pth", "--max-steps", 2,
        "--batch-size", 4, "--output", tmp_path / "on.safetensors", "--run-dir", tmp_path / "run",
        "--sample-tokens", 0, "--no-tensorboard",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert seen  # from the first checkpoint on, not only in the file
    assert set(seen) == {(None, True)}
    model, _ = load(tmp_path / "on.safetensors")
    assert model.calibration_temperature is None
    assert model.calibration_is_stale
    assert model.calibration == {**record, "stale": True}
    again = nanogpt("calibrate", "--model", tmp_path / "on.safetensors", "--text", text_path)
    assert again.code == 0
    fresh, _ = load(tmp_path / "on-calibrated.safetensors")
    assert not fresh.calibration_is_stale
    assert fresh.calibration_temperature is not None


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_changed_in_any_way_are_saved_with_a_stale_calibration(calibrate, tmp_path, suffix):
    calibrate("--output", tmp_path / f"warm{suffix}")
    model, _ = load(tmp_path / f"warm{suffix}")
    checkpoint.save(model, tmp_path / f"same{suffix}")
    assert (tmp_path / f"same{suffix}").read_bytes() == (tmp_path / f"warm{suffix}").read_bytes()
    with torch.no_grad():
        model.transformer["ln_f"].weight[0] += 1e-3
    checkpoint.save(model, tmp_path / f"changed{suffix}")
    changed, _ = load(tmp_path / f"changed{suffix}")
    assert changed.calibration_is_stale
    assert changed.calibration_temperature is None
    # What someone then sets by hand is theirs, and stays.
    changed.calibration_temperature = 1.5
    checkpoint.save(changed, tmp_path / f"changed{suffix}")
    assert load(tmp_path / f"changed{suffix}")[0].calibration_temperature == 1.5


def test_a_file_of_an_earlier_version_loads_without_a_record(tmp_path, monkeypatch):
    model = make_model()
    model.calibration_temperature = 1.25
    describe = GPT.describe

    def earlier(self):
        content = describe(self)
        del content["calibration"]
        return content

    monkeypatch.setattr(GPT, "describe", earlier)
    checkpoint.save(model, tmp_path / "old.pth")
    monkeypatch.undo()
    again, _ = load(tmp_path / "old.pth")
    assert again.calibration_temperature == 1.25
    assert again.calibration is None
    assert not again.calibration_is_stale


@pytest.mark.parametrize("form", ["torchscript", "safetensors"])
def test_an_export_carries_the_temperature_to_the_native_engine(nanogpt, calibrate, tmp_path, form):
    from nanogpt import native

    calibrate("--output", tmp_path / "warm.pth")
    output = tmp_path / ("warm.pt" if form == "torchscript" else "warm.safetensors")
    done = nanogpt("export", "--model", tmp_path / "warm.pth", "--format", form, "--output", output)
    assert done.code == 0, done.err
    if not native.available():
        pytest.skip(f"no native engine: {native.why_not()}")
    engine = native.open_file(output)
    assert engine.calibration_temperature == load(tmp_path / "warm.pth")[0].calibration_temperature


# What is refused.


def bare(path):
    model = make_model()
    model.tokenizer = None
    checkpoint.save(model, path)
    return path


BAD = {
    "no text": (lambda t: ["--model", t / "gpt.pth"], 2, "--text"),
    "no model": (lambda t: ["--model", t / "no.pth", "--text", t / "held.txt"], 3, "no.pth"),
    "a missing text": (lambda t: ["--text", t / "nowhere.txt"], 3, "nowhere.txt"),
    "an empty text": (lambda t: ["--text", t / "empty.txt"], 3, "is empty"),
    "a text of one letter": (lambda t: ["--text", t / "one.txt"], 3, "at least 10 tokens"),
    "letters that the model lacks": (lambda t: ["--text", t / "greek.txt"], 3, "'α'"),
    "bytes that are no text": (lambda t: ["--text", t / "raw.bin"], 3, "not UTF-8"),
    "a foreign model": (lambda t: ["--model", t / "held.txt"], 3, "held.txt"),
    "a model of another kind": (lambda t: ["--model", t / "m.pt"], 3, "not a model file"),
    "a damaged model": (lambda t: ["--model", t / "bad.pth"], 3, "bad.pth"),
    "a model without a tokenizer": (lambda t: ["--model", t / "bare.pth"], 3, "no tokenizer"),
    "an output that is a folder": (lambda t: ["--output", t / "dir.pth"], 2, "not a file"),
    "an output of another kind": (lambda t: ["--output", t / "x.bin"], 2, "x.bin"),
    "an output below a file": (lambda t: ["--output", t / "held.txt" / "x.pth"], 2, "--output"),
    "a report below a file": (lambda t: ["--report", t / "held.txt" / "x.html"], 2, "--report"),
    "a report that is a folder": (lambda t: ["--report", t / "dir.pth"], 2, "not a file"),
    "no bins": (lambda t: ["--bins", 0], 2, "--bins must be at least 1"),
    "a device that is not here": (lambda t: ["--device", "cuda:9"], 2, "CUDA"),
    "an unknown flag": (lambda t: ["--txt", "x"], 2, "--text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_its_code_and_one_sentence(
    nanogpt, model_path, text_path, tmp_path, case
):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "greek.txt").write_text("abc α", encoding="utf-8")
    (tmp_path / "raw.bin").write_bytes(b"ab\xff\xfe")
    (tmp_path / "dir.pth").mkdir()
    (tmp_path / "m.pt").write_bytes(b"PK")
    raw = bytearray(model_path.read_bytes())
    raw[len(raw) // 2] ^= 255
    (tmp_path / "bad.pth").write_bytes(raw)
    bare(tmp_path / "bare.pth")
    make, code, message = BAD[case]
    given = make(tmp_path)
    if case != "no text" and "--text" not in given:
        given += ["--text", text_path]
    if "--model" not in given:
        given += ["--model", model_path]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    outcome = nanogpt("calibrate", *given)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    after.pop(tmp_path / "token-cache", None)
    assert after == before


# That it helps.


def over_train(tokens, vocab_size):
    """A tiny model that knows 1,500 letters almost by heart."""
    torch.manual_seed(0)
    model = GPT(vocab_size=vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(300):
        starts = torch.randint(0, len(tokens) - 33, (16,))
        windows = torch.stack([tokens[start : start + 33] for start in starts])
        _, loss = model(windows[:, :-1], windows[:, 1:], return_logits=False)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_d16_an_over_trained_model_learns_to_doubt(nanogpt, data_folder, tmp_path):
    text = (data_folder / "tinyshakespeare.txt").read_text(encoding="utf-8")
    tokenizer = CharTokenizer.from_text(text)
    tokens = torch.tensor(tokenizer.encode(text[:1500]))
    model = over_train(tokens, tokenizer.vocab_size)
    model.tokenizer = tokenizer
    checkpoint.save(model, tmp_path / "gpt.pth")
    (tmp_path / "held.txt").write_text(text[600_000:625_000], encoding="utf-8")
    outcome = nanogpt(
        "calibrate", "--model", tmp_path / "gpt.pth", "--text", tmp_path / "held.txt", "--json"
    )
    result = json.loads(outcome.out)
    known = evaluate(model, tokens.numpy(), device=torch.device("cpu"))
    assert known < result["before"]["nll"] - 1
    assert result["temperature"] > 1 + 10 * result["temperature_se"]
    assert result["nll_difference"]["interval"][1] < 0
    before, after = (result[name]["entropy_gap"] for name in ("before", "after"))
    assert before < 0
    assert abs(after) <= 0.2 * abs(before)
    warm, _ = load(tmp_path / "gpt-calibrated.pth")
    prompt = tokens[None, :20]
    for temperature in (0.0, 0.7, 1.0):
        drawn = [
            each.generate(prompt, 50, temperature=temperature, seed=1) for each in (model, warm)
        ]
        assert torch.equal(*drawn)


def test_d16_control_a_model_that_is_right_keeps_its_temperature():
    """Text that the model itself wrote at temperature 1: T is 1 within its error."""
    model = make_model()
    rows = model.generate(torch.full((150, 1), 27), 16, seed=2)
    logits, _ = model(rows[:, :-1])
    groups = torch.arange(150).repeat_interleave(16)
    batch = (logits.flatten(0, 1), rows[:, 1:].flatten(), groups)
    scaler = TemperatureScaler().fit_batches(lambda: [batch])
    assert abs(scaler.temperature_ - 1) < 3 * scaler.temperature_se_
    assert scaler.temperature_se_ < 0.1


def test_a_byte_model_reads_any_text(nanogpt, tmp_path):
    model = GPT(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16)
    model.tokenizer = ByteTokenizer()
    checkpoint.save(model, tmp_path / "bytes.safetensors")
    (tmp_path / "greek.txt").write_text("καλημέρα " * 80, encoding="utf-8")
    outcome = nanogpt(
        "calibrate", "--model", tmp_path / "bytes.safetensors", "--text", tmp_path / "greek.txt"
    )
    assert outcome.code == 0, outcome.err
    assert load(tmp_path / "bytes-calibrated.safetensors")[0].calibration_temperature is not None


def test_a_report_never_overwrites_what_the_command_reads_or_writes(
    calibrate, model_path, text_path, tmp_path
):
    output = tmp_path / "calibrated.pth"
    before = model_path.read_bytes(), text_path.read_bytes()
    for path in (model_path, text_path, output):
        done = calibrate("--output", output, "--report", path)
        assert done.code == 2
        assert "name another file" in done.err
    assert (model_path.read_bytes(), text_path.read_bytes()) == before
    assert not output.exists()


def test_a_model_whose_weights_are_no_numbers_is_refused(nanogpt, text_path, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.token_weight.fill_(math.nan)
    checkpoint.save(model, tmp_path / "nan.pth")
    done = nanogpt("calibrate", "--model", tmp_path / "nan.pth", "--text", text_path)
    assert done.code == 3
    assert "cannot be calibrated" in done.err
    written = nanogpt("sample", "--model", tmp_path / "nan.pth", "--engine", "torch")
    assert written.code == 3
    assert "not finite" in written.err
