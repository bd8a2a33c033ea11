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
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja = (shutil.which(tool, path=places) for tool in ("cmake", "ninja"))
    compiler = shutil.which(os.environ.get("CXX", "c++"), path=places)
    if not (cmake and ninja and compiler):
        pytest.skip("native programs: cmake, ninja and a C++ compiler are needed")
    folder = ROOT / "build" / ("tests-" + sanitizers.replace(",", "-") if sanitizers else "tests")
    setting = [
        *(cmake, "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja"),
        *(f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython3_EXECUTABLE={sys.executable}"),
        f"-DNANOGPT_SANITIZE={sanitizers}",
    ]
    for command in (setting, [ninja, "-C", folder, name]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / name
