"""Building: with a compiler, without one, with one that fails; what travels in an sdist."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from native_programs import native_program

from nanogpt import native

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = os.environ.get("NANOGPT_REQUIRE_NATIVE", "0") not in ("", "0")


@pytest.fixture
def source(tmp_path):
    """A copy of what pip needs, so that no build touches this folder."""
    copy = tmp_path / "source"
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "nanogpt", copy / "nanogpt", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def build_wheel(source, folder, **changes):
    """pip's outcome in a changed environment; None takes a variable away."""
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    environment["NANOGPT_REQUIRE_NATIVE"] = "0"
    for name, value in changes.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation",
         "-w", folder, source],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def wheel_in(folder):
    (wheel,) = folder.glob("*.whl")
    return wheel.name, zipfile.ZipFile(wheel).namelist()


def test_without_a_compiler_the_package_installs_and_says_what_is_missing(source, tmp_path):
    (tmp_path / "empty").mkdir()
    done = build_wheel(source, tmp_path / "out", PATH=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stdout + done.stderr
    name, files = wheel_in(tmp_path / "out")
    assert name.endswith("-py3-none-any.whl")
    assert "nanogpt/native.py" in files
    assert not [file for file in files if file.endswith(".so") or ".data/" in file]
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "no C++ compiler" in line]
    assert len({line.strip() for line in lines}) == 1
    assert "apt-get install g++" in lines[0]


def test_a_required_engine_is_no_obstacle_where_there_is_no_compiler(source, tmp_path):
    (tmp_path / "empty").mkdir()
    changes = {"PATH": str(tmp_path / "empty"), "NANOGPT_REQUIRE_NATIVE": "1"}
    assert build_wheel(source, tmp_path / "out", **changes).returncode == 0


def broken_compiler(folder):
    folder.mkdir()
    program = folder / "c++"
    program.write_text("#!/bin/sh\necho cannot compile >&2\nexit 1\n")
    program.chmod(0o755)
    return str(program)


def test_a_build_that_fails_leaves_the_package_whole_and_is_named(source, tmp_path):
    done = build_wheel(source, tmp_path / "out", CXX=broken_compiler(tmp_path / "bin"))
    assert done.returncode == 0, done.stdout + done.stderr
    _, files = wheel_in(tmp_path / "out")
    assert "nanogpt/native.py" in files
    assert not [file for file in files if file.endswith(".so") or ".data/" in file]
    assert "the native engine was not built" in done.stdout + done.stderr


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")
def test_what_was_built_before_the_source_folder_was_moved_is_no_obstacle(source, tmp_path):
    # A source that compiles in a second; what CMake keeps is the same.
    main = source / "csrc" / "CMakeLists.txt"
    main.write_text(
        "cmake_minimum_required(VERSION 3.19)\nproject(small LANGUAGES CXX)\n"
        "add_executable(nanogpt-generate small.cpp)\n"
        "add_library(module MODULE small.cpp)\n"
        'set_target_properties(module PROPERTIES PREFIX "" OUTPUT_NAME _C SUFFIX\n'
        f'  "{sysconfig.get_config_var("EXT_SUFFIX")}")\n'
    )
    (source / "csrc" / "small.cpp").write_text("int main() { return 0; }\n")
    moved = tmp_path / "moved to a name with spaces"
    for folder in (source, moved):
        if folder == moved:
            source.rename(moved)
        out = tmp_path / f"out of {folder.name}"
        done = build_wheel(folder, out, NANOGPT_REQUIRE_NATIVE="1")
        assert done.returncode == 0, done.stdout + done.stderr
        assert any(file.endswith("scripts/nanogpt-generate") for file in wheel_in(out)[1])


def test_a_build_that_fails_is_an_error_where_the_engine_is_required(source, tmp_path):
    compiler = broken_compiler(tmp_path / "bin")
    done = build_wheel(source, tmp_path / "out", CXX=compiler, NANOGPT_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "the native engine was not built" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.whl"))


def test_where_it_is_required_and_can_be_built_the_engine_is_here():
    """Otherwise every other test of it would skip, and nobody would see."""
    if native.compiler() is None or not REQUIRED:
        pytest.skip("NANOGPT_REQUIRE_NATIVE is not set, or there is no compiler")
    assert native.why_not() == ""
    assert native.program() is not None


def test_an_sdist_holds_what_the_build_needs(source, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path / "out",
         source],
        check=True, capture_output=True, env={**os.environ, "NANOGPT_REQUIRE_NATIVE": "0"},
    )  # fmt: skip
    (archive,) = (tmp_path / "out").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.suffix in (".h", ".cpp", ".txt"):
            assert path.relative_to(ROOT).as_posix() in names
    assert {"setup.py", "pyproject.toml", "nanogpt/_C.pyi"} <= names


def test_what_the_build_requires_is_pinned_and_holds_no_torch():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    required = {re.split(r"[<>=!]", name)[0] for name in project["build-system"]["requires"]}
    assert {"setuptools", "cmake", "ninja", "pybind11", "nlohmann-json"} == required
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    assert required <= set(pinned)
    assert "clang-format" in pinned


@pytest.mark.skipif(not native.available(), reason="the native engine is not built")
def test_the_binary_of_this_environment_starts():
    program = native.program()
    if program is None and not REQUIRED:
        pytest.skip("the engine was copied here without its program")
    assert program is not None
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
    assert "--max-new-tokens" in done.stdout
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="nm writes another form elsewhere")
def test_code_for_newer_processors_is_shared_with_no_one():
    """A function that two files compile is linked once, from any of them: from none of these."""
    objects = list(native_program("decode_check").parent.rglob("kernels_*.cpp.o"))
    assert len(objects) >= 2
    for path in objects:
        names = subprocess.run(
            ["nm", "-C", path], capture_output=True, text=True, check=True
        ).stdout
        assert re.search(r" [RD] nanogpt::k\w+Kernels$", names, re.M) or path.stat().st_size < 5000
        assert not re.findall(r"^.* [WVu] .*$", names, re.M), path.name
