"""Measurements: ours, the peers and the floor in one run, as rows that RESULTS.md is made from.

pytest benchmarks --benchmark-only                       this machine
pytest benchmarks --benchmark-only --write-results       … and benchmarks/results/<device>/
pytest benchmarks --benchmark-only --peer-dir DIR        … beside a checkout of nanoGPT
pytest benchmarks --benchmark-only --llama-dir DIR       … beside llama.cpp; see test_native.py
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from recording import Recorder

from nanogpt.measuring import measure_ceilings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-results", action="store_true", help="write benchmarks/results/")
    parser.addoption("--llama-dir", help="a folder with llama-bench and llama-simple")
    parser.addoption("--peer-dir", help="a checkout of nanoGPT to measure beside ours")


@pytest.fixture(scope="session")
def nanogpt_peer(request: pytest.FixtureRequest) -> ModuleType:
    """nanoGPT's model.py from --peer-dir, where the user has a checkout."""
    folder = request.config.getoption("--peer-dir")
    if folder is None:
        pytest.skip("the peer is measured with --peer-dir pointing at a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_peer", Path(folder) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_peer"] = module
    spec.loader.exec_module(module)
    return module


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
