"""The C++ targets of csrc/fuzz: libFuzzer's with clang, otherwise with a loop of their own."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from native_programs import ROOT, build_native

from .loop import Report

TARGETS = {"archive": 400, "safetensors": 400, "json": 400, "tokenizer": 4096, "model_file": 6144}
"""Each with the most bytes of an input; small ones are many."""
CORPUS = ROOT / "csrc" / "fuzz" / "corpus"
_SANITIZE = "-DNANOGPT_SANITIZE=address,undefined"
# Short histories of allocations are faster; a reproduced input has the whole.
_FAST = {"ASAN_OPTIONS": "malloc_context_size=2:quarantine_size_mb=16"}


def build(*, coverage: bool = True) -> Path:
    """Build all targets, with AddressSanitizer and UndefinedBehaviorSanitizer: their folder.

    Args:
        coverage: use libFuzzer, which looks at what each input reaches, where clang is there.
            Without it two to three times as many inputs are tried.
    """
    clang = shutil.which("clang++") if coverage else None
    folder = ROOT / "build" / ("fuzz" if clang else "fuzz-loop")
    compiler = [f"-DCMAKE_CXX_COMPILER={clang}", "-DNANOGPT_LIBFUZZER=ON"] if clang else []
    build_native(folder, "fuzzers", _SANITIZE, *compiler)
    return folder


def run(
    program: Path,
    corpus: Path,
    findings: Path,
    *,
    flags: tuple[str, ...] = (),
    found: Path | None = None,
) -> Report:
    """Run a target until its flags end it.

    Args:
        corpus: folder of inputs to begin with.
        findings: folder for the inputs that it fails on.
        flags: such as "-max_total_time=60".
        found: folder for inputs that reach something new, which libFuzzer begins with next time.
    """
    report = Report(program.name.removeprefix("fuzz_"))
    findings.mkdir(parents=True, exist_ok=True)
    prefix = f"{findings}/{report.name}-"
    command = [str(program), *flags, "-print_final_stats=1", f"-artifact_prefix={prefix}"]
    if found is not None:
        found.mkdir(parents=True, exist_ok=True)
        command.append(str(found))
    mine = f"{report.name}-*"  # other targets may be at work in the same folder
    before = set(findings.glob(mine))
    started = time.monotonic()
    done = subprocess.run(
        [*command, str(corpus)],
        env={**os.environ, **_FAST},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    report.seconds = time.monotonic() - started
    for key, words in (("inputs", ("tried ", "executed_units: ")), ("accepted", ("accepted ",))):
        numbers = [re.search(rf"{word}\s*(\d+)", done.stderr) for word in words]
        setattr(report, key, max((int(each[1]) for each in numbers if each), default=0))
    for path in sorted(set(findings.glob(mine)) - before):
        report.findings.append((_reason(done.stderr), path.read_bytes()))
        path.unlink()
    if done.returncode and not report.findings:
        report.findings.append((f"exit code {done.returncode}: {done.stderr[-300:]!r}", b""))
    return report


def _reason(text: str) -> str:
    """The line that says what went wrong."""
    marks = r"^.*(?:a property does not hold|ERROR: \w+Sanitizer|runtime error|takes more).*$"
    found = re.search(marks, text, re.MULTILINE) or re.search(r"^.*ERROR: libFuzzer.*$", text, re.M)
    return found[0].strip() if found else "the program ended"
