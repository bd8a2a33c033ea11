"""Flags, configuration files, help, exit codes and sentences."""

import re
import subprocess
import sys

import pytest

from nanogpt import cli
from nanogpt.config import SampleConfig, TrainConfig
from nanogpt.errors import InputError, UsageError
from nanogpt.progress import duration
from nanogpt.recipe import resolve


def parse(*arguments):
    return cli.parse("train", TrainConfig, arguments)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_imports_no_torch_and_shows_every_flag_with_its_default(command):
    program = (
        f"import sys; sys.argv = ['x', {command!r}, '--help'];"
        "from nanogpt.cli import main; code = main();"
        "assert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules), 'heavy import';"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = re.sub(r"\s+", " ", done.stdout)
    for name in cli.COMMANDS[command][0].__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown
    assert shown.count("(default: ") == len(cli.COMMANDS[command][0].__dataclass_fields__) + 1


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_module_and_the_console_script_are_the_same_command(command):
    module = subprocess.run(
        [sys.executable, "-m", f"nanogpt.{command}", "--help"], capture_output=True, text=True
    )
    script = subprocess.run(
        [sys.executable, "-m", "nanogpt", command, "--help"], capture_output=True, text=True
    )
    assert module.returncode == script.returncode == 0
    assert module.stdout == script.stdout


def test_flags_become_typed_values():
    config = parse("--text", "a", "b", "--epochs", "5", "--learning-rate", "1e-3", "--bias")
    assert config.text == ("a", "b")
    assert (config.epochs, config.learning_rate, config.bias) == (5, 1e-3, True)
    assert parse("--text", "a", "--text", "b").text == ("a", "b")
    assert parse("--no-tensorboard").tensorboard is False
    shape = parse("--rotary", "--no-qk-norm")
    assert (shape.rotary, shape.qk_norm, parse().rotary) == (True, False, None)
    assert parse() == TrainConfig()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "5"], "no flag --epoch; the nearest is --epochs"),
        (["--batchsize=4"], "no flag --batchsize; the nearest is --batch-size"),
        (["book.txt"], "unexpected argument 'book.txt'"),
        (["--epochs", "two"], "--epochs must be a whole number, not 'two'"),
        (["--epochs", "0"], "--epochs must be at least 1, not '0'"),
        (["--batch-size", "-3"], "--batch-size must be at least 1, not '-3'"),
        (["--learning-rate", "0"], "--learning-rate must be above 0"),
        (["--learning-rate", "nan"], "--learning-rate must be finite"),
        (["--dropout", "1"], "--dropout must be below 1"),
        (["--tokenizer", "word"], "--tokenizer must be one of char, byte, bpe, not 'word'"),
        (["--epochs"], "--epochs: expected one argument"),
    ],
)
def test_a_wrong_flag_is_one_sentence(arguments, message):
    with pytest.raises(UsageError) as caught:
        parse(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_file_sets_flags_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "epochs: 3\nbatch-size: 8\ntext: [a.txt, b.txt]\nlearning_rate: 1e-3\nbias: true\n"
    )
    config = parse("--config", str(path), "--batch-size", "16")
    assert (config.epochs, config.batch_size, config.text) == (3, 16, ("a.txt", "b.txt"))
    assert (config.learning_rate, config.bias) == (1e-3, True)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("epoch: 3", UsageError, "no flag 'epoch'; the nearest is epochs"),
        ("epochs: -1", UsageError, "epochs must be at least 1"),
        ("bias: 3", UsageError, "bias must be true or false"),
        ("epochs: [1, 2]", UsageError, "epochs must be a single value"),
        ("- 1\n- 2", InputError, "must hold 'flag: value' lines"),
        ("a: [", InputError, "is not valid YAML"),
        ("\xff", InputError, "not UTF-8"),
    ],
)
def test_a_wrong_configuration_file_is_one_sentence(tmp_path, content, error, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(error, match=message):
        parse("--config", str(path))


def test_a_missing_configuration_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        parse("--config", str(tmp_path / "nowhere.yaml"))


def test_an_unknown_command_is_named_with_the_nearest(nanogpt):
    outcome = nanogpt("trian")
    assert outcome.code == 2
    assert "no command 'trian'; the nearest is train" in outcome.err


def test_the_overview_lists_every_command(nanogpt):
    outcome = nanogpt("--help")
    assert outcome.code == 0
    assert all(name in outcome.out for name in cli.COMMANDS)


def test_a_bug_of_ours_is_one_line_and_exit_code_1(nanogpt, monkeypatch):
    monkeypatch.setattr("nanogpt.doctor.examine", lambda: 1 / 0)
    outcome = nanogpt("doctor")
    assert outcome.code == 1
    assert "ZeroDivisionError" in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_full_disk_is_one_line_and_exit_code_1(nanogpt, monkeypatch):
    def full():
        raise OSError(28, "No space left on device", "/some/file")

    monkeypatch.setattr("nanogpt.doctor.examine", full)
    outcome = nanogpt("doctor")
    assert (outcome.code, outcome.err) == (1, "nanogpt doctor: the disk is full (/some/file)\n")


def test_an_interrupt_is_exit_code_130(nanogpt, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("nanogpt.doctor.examine", interrupt)
    assert nanogpt("doctor").code == 130


def test_a_reader_that_goes_away_is_no_failure():
    command = f"{sys.executable} -m nanogpt train --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert "Traceback" not in done.stderr


def test_sample_and_train_defaults_are_the_contracts():
    train, sample = resolve(TrainConfig()), SampleConfig()
    assert (train.batch_size, train.val_fraction, train.resume) == (64, 0.1, "auto")
    assert (sample.temperature, sample.top_k, sample.repetition_penalty) == (1.0, None, 1.0)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.4, "00:00:00"),
        (59.6, "00:01:00"),
        (25_509, "07:05:09"),
        (86_400 + 61, "1 days 00:01:01"),
        (1e20, "1,157,407,407,407,407 days 09:46:40"),
    ],
)
def test_the_time_left_is_told_however_long_it_is(seconds, shown):
    assert duration(seconds) == shown


def test_a_vocabulary_beyond_use_is_refused(nanogpt):
    outcome = nanogpt("train", "--tokenizer", "bpe", "--vocab-size", 2**64 - 1)
    assert outcome.code == 2
    assert outcome.err.startswith("nanogpt train: --vocab-size must be at most")


def test_the_commands_start_without_torchs_compiler():
    """It takes longer to import than all else together."""
    code = "import sys, nanogpt.train; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_constants_are_marked_as_torch_marks_them():
    import torch

    from nanogpt.kernels.dispatch import constant_when_compiled

    ours, theirs = (
        constant_when_compiled(lambda: 1),
        torch.compiler.assume_constant_result(lambda: 1),
    )
    assert vars(ours) == vars(theirs)
