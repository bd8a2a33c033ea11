"""Shared fixtures: real data, small models, and a command line that runs in this process."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run on the CPU, interpreted; read when a kernel's module is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

from nanogpt import cli

TRITON = importlib.util.find_spec("triton") is not None
# Where there is no Triton (macOS), what tests its kernels is not collected.
collect_ignore_glob = [] if TRITON else ["*_triton.py", "test_kernels_in_training.py"]
collect_ignore = [] if TRITON else ["test_attention_gluon.py", "test_codegen.py"]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data, from $NANOGPT_DATA."""
    folder = os.environ.get("NANOGPT_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real data: set NANOGPT_DATA to its folder")
    return Path(folder)


@pytest.fixture(autouse=True)
def _quiet_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test has its own token cache, cannot see the user's, and leaves torch's threads."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "token-cache"))
    monkeypatch.delenv("NANOGPT_TRACEBACK", raising=False)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@dataclass
class Outcome:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def nanogpt(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Run a command in this process: nanogpt("train", "--text", path).

    What --threads has set is set back: another number of threads sums in another order.
    """
    threads = torch.get_num_threads()

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """About 6,000 characters of text with some structure to learn."""
    path = tmp_path / "text.txt"
    lines = [f"{n} times {m} is {n * m}.\n" for n in range(2, 22) for m in range(2, 22)]
    path.write_text("".join(lines), encoding="utf-8")
    return path
