"""Builds what is compiled: the module nanogpt._C and the program nanogpt-generate.

Everything else is declared in pyproject.toml. CMake and ninja do the work, in build/native-*, which
is kept, so that a second build compiles only what has changed. torch is not needed. Where there is
no C++ compiler the package installs without the two. Where there is one and the build fails it does
too, and says so; NANOGPT_REQUIRE_NATIVE=1 makes that an error.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# setuptools brings this module, also where Python no longer does.
from distutils.command.build_scripts import build_scripts  # isort: skip

ROOT = Path(__file__).resolve().parent
PROGRAM = "nanogpt-generate"
REQUIRED = os.environ.get("NANOGPT_REQUIRE_NATIVE", "") not in ("", "0")


def say(sentence: str) -> None:
    """One line; pip shows it with -v, or where the build fails."""
    print(f"personal-nanogpt: {sentence}", file=sys.stderr, flush=True)


def compiler() -> str | None:
    """The C++ compiler that CMake will take, or None."""
    named = os.environ.get("CXX", "").split()
    candidates = named[:1] or ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def program_of(package: str) -> str:
    """A build tool from the package of PyPI, or else from PATH."""
    spec = importlib.util.find_spec(package)
    if spec is not None:
        module = importlib.import_module(package)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
        found = shutil.which(package, path=folder) if folder else None
        if found:
            return found
    found = shutil.which(package)
    if found is None:
        raise CompileError(f"{package} is missing: pip install {package}")
    return found


def json_headers() -> str:
    spec = importlib.util.find_spec("nlohmann_json")
    if spec is None or not spec.submodule_search_locations:
        raise CompileError("nlohmann/json.hpp is missing: pip install nlohmann-json")
    return os.path.join(spec.submodule_search_locations[0], "include")


def has_python_headers() -> bool:
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


@functools.cache
def compiled(version: str) -> Path:
    """The folder with what CMake and ninja have made.

    Raises: CompileError, in one line; what the compiler said has been printed before.
    """
    folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    cmake, ninja = program_of("cmake"), program_of("ninja")
    cache = folder / "CMakeCache.txt"
    here = f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT / 'csrc'}\n"
    if cache.is_file() and here not in cache.read_text(errors="replace"):
        shutil.rmtree(folder)  # CMake refuses what it made before the source folder was moved
    flags = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_BUILD_TYPE": "Release",
        "NLOHMANN_JSON_INCLUDE": json_headers(),
        "NANOGPT_VERSION": version,
        "NANOGPT_WERROR": "OFF",  # the tests build with it; who installs may have any compiler
        "NANOGPT_PYTHON_MODULE": "OFF",
    }
    if has_python_headers():
        import pybind11

        flags["NANOGPT_PYTHON_MODULE"] = "ON"
        flags["pybind11_DIR"] = pybind11.get_cmake_dir()
        flags["Python_EXECUTABLE"] = sys.executable
        flags["Python_INCLUDE_DIR"] = sysconfig.get_path("include")
    defined = [f"-D{name}={value}" for name, value in flags.items()]
    for command in (
        [cmake, "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja", *defined],
        [cmake, "--build", str(folder)],
    ):
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the native engine was not built: {error}") from None
    return folder


class NativeDistribution(Distribution):
    """A wheel with compiled parts is for one platform, even if only the program could be built."""

    def has_ext_modules(self) -> bool:
        return bool(self.ext_modules)


class FreshBuild(build):
    """Files of an earlier version that still lie in build/lib would be shipped again."""

    def run(self) -> None:
        for folder in (self.build_lib, self.build_scripts):
            if Path(folder).resolve().is_relative_to(ROOT / "build"):
                shutil.rmtree(folder, ignore_errors=True)
        super().run()


class BuildModule(build_ext):
    """nanogpt._C by CMake. setuptools passes over an optional extension that fails."""

    def build_extension(self, ext: Extension) -> None:
        if not has_python_headers():
            raise CompileError("Python.h is missing: apt-get install python3-dev")
        folder = compiled(self.distribution.get_version())
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / target.name), str(target))


class BuildProgram(build_scripts):
    """The program as a script of the distribution, which pip copies onto the PATH as it is."""

    def get_source_files(self) -> list[str]:
        return []

    def run(self) -> None:
        self.mkpath(self.build_dir)
        try:
            program = compiled(self.distribution.get_version()) / PROGRAM
        except CompileError as error:
            if REQUIRED:
                raise
            say(f"{error}; {PROGRAM} is left out")
            return
        if program.exists():
            target = Path(self.build_dir, PROGRAM)
            target.unlink(missing_ok=True)
            shutil.copy2(program, target)
            target.chmod(0o755)


def native() -> dict[str, object]:
    """What `setup` is told where a compiler exists, else nothing."""
    if compiler() is None:
        say("no C++ compiler: installing without the native engine (apt-get install g++ adds it)")
        return {}
    # Headers are something to install, as a compiler is; their absence is no failure.
    optional = not (REQUIRED and has_python_headers())
    return {
        "distclass": NativeDistribution,
        "ext_modules": [Extension("nanogpt._C", sources=[], optional=optional)],
        # Only its presence counts: BuildProgram knows where the file is.
        "scripts": [PROGRAM],
        "cmdclass": {"build": FreshBuild, "build_ext": BuildModule, "build_scripts": BuildProgram},
    }


setup(**{"cmdclass": {"build": FreshBuild}, **native()})
