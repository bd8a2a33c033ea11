"""Programs of csrc/ that tests drive, built once with what this environment has."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@cache
def native_program(name: str, sanitizers: str = "") -> Path:
    """A CMake target's program; skips where it cannot be built.

    Args:
        sanitizers: for example "address,undefined", in a build folder of its own.
    """
    if missing_tools():
        pytest.skip(f"native programs: {missing_tools()}")
    folder = ROOT / "build" / ("tests-" + sanitizers.replace(",", "-") if sanitizers else "tests")
    build_native(folder, name, f"-DNANOGPT_SANITIZE={sanitizers}")
    return folder / name


def build_native(folder: Path, target: str, *settings: str) -> None:
    """Build a CMake target of csrc/ in a folder that is kept. AssertionError has what went wrong.

    Args:
        settings: for CMake, such as "-DNANOGPT_SANITIZE=address".
    """
    cmake, ninja = _tool("cmake"), _tool("ninja")
    setting = [
        *(cmake, "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja"),
        *(f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython3_EXECUTABLE={sys.executable}"),
        *settings,
    ]
    for command in (setting, [ninja, "-C", folder, target]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def missing_tools() -> str:
    """What a build would need and does not find, in words; nothing where all is there."""
    if all(map(_tool, ("cmake", "ninja", os.environ.get("CXX", "c++")))):
        return ""
    return "cmake, ninja and a C++ compiler are needed"


def _tool(name: str) -> str:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which(name, path=places) or ""
