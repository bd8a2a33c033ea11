"""What is installed, what a missing part would give, and the command that adds it."""

if __name__ == "__main__":
    import sys

    from nanogpt.cli import main

    sys.exit(main(["doctor", *sys.argv[1:]]))

import importlib.util
import json
import subprocess
from dataclasses import asdict, dataclass

import torch

from nanogpt import kernels, machine, native
from nanogpt.config import DoctorConfig
from nanogpt.errors import UsageError


@dataclass(frozen=True)
class Part:
    """One thing that may be here.

    Attributes:
        found: what is here, or None.
        gives: what it is good for.
        add: how to get it.
    """

    name: str
    found: str | None
    gives: str
    add: str


def run(config: DoctorConfig) -> int:
    """Print a line for every part. Returns 0: a missing part is no failure."""
    parts = examine()
    picked = kernels.describe("auto", machine.resolve_device("auto"))
    if config.json:
        report = {"parts": [asdict(part) for part in parts], "versions": machine.versions()}
        print(json.dumps({**report, "kernels": picked}))
        return 0
    for part in parts:
        if part.found is not None:
            print(f"yes  {part.name}: {part.found}")
        else:
            print(f"no   {part.name}: would give {part.gives}; {part.add}")
    print(f"\nkernels: {picked}")
    return 0


def examine() -> list[Part]:
    """Everything that training and writing can use."""
    versions = machine.versions()
    compiler = native.compiler()
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    elif torch.backends.mps.is_available():
        gpu = "Apple GPU"
    else:
        gpu = None
    return [
        Part("torch", f"{torch.__version__}, {torch.get_num_threads()} threads", "", ""),
        Part(
            "GPU",
            gpu,
            "training many times faster",
            "needs an NVIDIA GPU with its driver, and the CUDA build of torch",
        ),
        Part(
            "Triton",
            versions["triton"] if importlib.util.find_spec("triton") else None,
            "what torch.compile needs on a GPU",
            "pip install triton",
        ),
        Part(
            "C++ compiler",
            _first_line(compiler) if compiler else None,
            "the native engine, and --compile on a CPU",
            "apt-get install g++",
        ),
        *_native_parts(),
        Part(
            "GGUF files",
            "gguf" if importlib.util.find_spec("gguf") else None,
            "export --format gguf, for llama.cpp",
            "pip install gguf",
        ),
        Part(
            "TensorBoard files",
            "tensorboardX" if importlib.util.find_spec("tensorboardX") else None,
            "curves in TensorBoard beside report.html",
            "pip install tensorboardX",
        ),
    ]


def _native_parts() -> list[Part]:
    """The engine, the binary and the plug-in."""
    engine, reason = None, native.why_not()
    if not reason:
        try:
            engine = native.describe()
        except UsageError as error:  # $NANOGPT_ISA
            reason = str(error)
    program, plugin = native.program(), native.plugin()
    build = "pip install --force-reinstall --no-deps . in the source folder builds it"
    return [
        Part(
            "native engine",
            engine,
            "writing on a CPU several times as fast (sample --engine native), and model.pt there",
            reason,
        ),
        Part(
            native.PROGRAM,
            None if program is None else str(program),
            "writing from a model file without Python",
            build,
        ),
        Part(
            "TorchScript plug-in",
            None if plugin is None else str(plugin),
            f"{native.PROGRAM} --engine torchscript",
            "make build, in the source folder, builds it against the installed torch",
        ),
    ]


def _first_line(program: str) -> str:
    out = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return (out.stdout or program).splitlines()[0]
