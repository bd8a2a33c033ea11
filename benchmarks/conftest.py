"""Measurements: ours, the peers and the floor in one run, as rows that RESULTS.md is made from.

pytest benchmarks --benchmark-only                       this machine
pytest benchmarks --benchmark-only --write-results       … and benchmarks/results/<device>/
pytest benchmarks --benchmark-only --peer-dir DIR        … beside a checkout of nanoGPT, or of llm.c
                                                         with train_gpt2 built and the starter pack
                                                         there; give the flag twice for both
pytest benchmarks --benchmark-only --no-compile          … without torch.compile, which takes long
pytest benchmarks --benchmark-only --llama-dir DIR       … beside llama.cpp; see test_native.py

transformers is measured where it is installed. A suite's file is written anew from what one session
has measured, so that with --write-results whole suites are run: one file of tests each, and for
training-step, training-loss and generation with --peer-dir. Two more programs write results of
their own: explore.py, and time_to_loss.py, which trains to nanoGPT's loss.
"""

import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from recording import Recorder, nanogpt_model

from nanogpt.measuring import measure_ceilings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-results", action="store_true", help="write benchmarks/results/")
    parser.addoption("--llama-dir", help="a folder with llama-bench and llama-simple")
    parser.addoption(
        "--peer-dir",
        action="append",
        default=[],
        help="a checkout of nanoGPT, or of llm.c, to measure beside ours",
    )
    parser.addoption("--no-compile", action="store_true", help="leave torch.compile out")


def checkout(config: pytest.Config, mark: str) -> Path | None:
    """The first --peer-dir that holds the file `mark`."""
    folders = map(Path, config.getoption("--peer-dir"))
    return next((folder for folder in folders if (folder / mark).is_file()), None)


@pytest.fixture(scope="session")
def nanogpt_if_any(request: pytest.FixtureRequest) -> ModuleType | None:
    """nanoGPT's model.py from --peer-dir, where the user has a checkout."""
    folder = checkout(request.config, "configurator.py")
    if folder is None:
        return None
    return nanogpt_model(folder)


@pytest.fixture(scope="session")
def nanogpt_peer(nanogpt_if_any: ModuleType | None) -> ModuleType:
    """The same, for what makes no sense without it."""
    if nanogpt_if_any is None:
        pytest.skip("the peer is measured with --peer-dir pointing at a checkout of nanoGPT")
    return nanogpt_if_any


@pytest.fixture(scope="session")
def llmc_folder(request: pytest.FixtureRequest) -> Path:
    """A checkout of llm.c, with its CPU program built and its starter pack there."""
    folder = checkout(request.config, "train_gpt2.c")
    if folder is None:
        pytest.skip("llm.c is measured with --peer-dir pointing at a checkout of it")
    for needed in ("train_gpt2", "gpt2_124M.bin"):
        if not (folder / needed).is_file():
            pytest.skip(f"the checkout of llm.c has no {needed}: see its README")
    return folder


@pytest.fixture(scope="session")
def may_compile(request: pytest.FixtureRequest) -> bool:
    """Whether torch.compile is measured: it needs a C++ compiler on a CPU."""
    return not request.config.getoption("--no-compile") and shutil.which("g++") is not None


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data, from $NANOGPT_DATA."""
    folder = os.environ.get("NANOGPT_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real data: set NANOGPT_DATA to its folder")
    return Path(folder)


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """Measured once a session."""
    return measure_ceilings()


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest, ceilings: dict[str, float]) -> Any:
    """Recorder of the session."""
    recorder = Recorder(ceilings)
    yield recorder
    if request.config.getoption("--write-results"):
        recorder.write()
