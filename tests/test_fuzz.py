"""The fuzzers in their short form, the inputs that are kept, and that each fuzzer can fail."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fuzz import __main__ as command
from fuzz import loop, mutation, programs, readers
from native_outcomes import ENVIRONMENT, SANITIZERS
from native_programs import native_program

from nanogpt.errors import InputError
from nanogpt.explore.fields import describe_fields
from nanogpt.explore.records import Records

READERS = [reader.name for reader in readers.make_readers()]
SLOW = {"sealed metadata": 300, "table .csv": 500, "table of any kind": 500, "model .pth": 500}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_takes_mutants_or_refuses_them_in_words(name):
    runs = SLOW.get(name, 2000)
    report = loop.run(readers.named(name), seed=1, runs=runs)
    assert report.findings == []
    assert report.inputs == runs
    assert 0 < report.accepted < runs


def careful(path: Path) -> None:
    if path.read_bytes() != b"good":
        raise InputError(f"{path} is not good")


def reader_of(read):
    return loop.Reader("planted", ".bin", read, [b"good"])


def findings(read, runs: int = 300) -> list[str]:
    return [sentence for sentence, _ in loop.run(reader_of(read), seed=2, runs=runs).findings]


def test_a_careful_reader_is_left_alone():
    report = loop.run(reader_of(careful), seed=2, runs=300)
    assert (report.findings, report.inputs) == ([], 300)
    assert 0 < report.accepted < 300


def test_an_error_that_is_not_ours_is_found_and_can_be_reproduced():
    def careless(path: Path) -> None:
        path.read_bytes().decode("ascii")

    report = loop.run(reader_of(careless), seed=2, runs=300)
    ((sentence, raw),) = report.findings
    assert sentence.startswith("UnicodeDecodeError at test_fuzz.py:")
    again = loop.run(loop.with_input(reader_of(careless), raw), seed=0, runs=1)
    assert [found for found, _ in again.findings] == [sentence]


def test_a_refusal_of_several_lines_is_found():
    def talkative(path: Path) -> None:
        raise InputError("one\ntwo")

    (sentence,) = findings(talkative)
    assert sentence.startswith("a refusal is not one printable line")


def test_a_reader_that_ends_the_process_is_found():
    def crashing(path: Path) -> None:
        if path.read_bytes()[:1] != b"g":
            os._exit(9)

    report = loop.run(reader_of(crashing), seed=2, runs=40)
    ((sentence, raw),) = report.findings
    assert sentence == "the process ended with 9"
    assert raw[:1] != b"g"
    assert report.inputs == 40  # it goes on with what is left


def test_a_slow_reader_is_found(monkeypatch):
    monkeypatch.setattr(loop, "SLOW_SECONDS", 0.2)

    def slow(path: Path) -> None:
        try:
            time.sleep(60)
        except Exception:
            raise InputError("not in time") from None

    assert findings(slow, runs=1) == ["it takes more than 0.2 s"]


def test_a_reader_that_no_signal_reaches_is_found(monkeypatch):
    monkeypatch.setattr(loop, "STUCK_SECONDS", 0.5)

    def hanging(path: Path) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(60)

    assert findings(hanging, runs=1) == ["it takes more than 0.5 s and cannot be interrupted"]


def test_a_reader_that_takes_much_memory_is_found():
    kept = []
    (sentence,) = findings(lambda path: kept.append(b"x" * 2**29), runs=1)
    assert sentence.startswith("it takes ")
    assert sentence.endswith(" MB of memory")


def test_mutants_differ_and_come_again_with_their_seed():
    import random

    def some(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [mutation.mutated(rng, [b"abcdef", b"123"], [b"{}"]) for _ in range(500)]

    assert some(1) == some(1)
    assert some(1) != some(2)
    assert len(set(some(1))) > 400
    assert max(map(len, some(1))) <= mutation.LARGEST_BYTES


# What was found, kept.


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("rewards .txt", b"a|" + b"9" * 60_000 + b"x\n"),
        ("table .csv", b"a,b\n" + b"9" * 60_000 + b"x,1\n2,3\n"),
    ],
)
def test_a_very_long_number_is_read_in_one_pass(name, raw):
    # Going back at every digit takes longer than the loop allows.
    assert loop.run(loop.with_input(readers.named(name), raw), seed=0, runs=1).findings == []


def test_a_number_with_a_separator_after_it_is_one():
    column = [f"{n}.5\x1f" for n in range(40)]
    field = describe_fields(Records("r", "csv", ["a"], [column], range(40)))[0]
    assert field.kind == "number"


# The C++ targets.


@pytest.mark.parametrize("name", programs.TARGETS)
def test_a_parser_is_clean_on_the_kept_inputs_and_some_mutants(name, tmp_path):
    program = native_program(f"fuzz_{name}", SANITIZERS)
    kept = sorted((programs.CORPUS / name).iterdir())
    assert kept
    done = subprocess.run(
        [program, *kept], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"tried {len(kept)} accepted" in done.stderr
    report = programs.run(
        program, programs.CORPUS / name, tmp_path, flags=("-runs=3000", "-seed=1")
    )
    assert report.findings == []
    assert report.inputs == 3000 + len(kept)
    assert 0 < report.accepted < report.inputs


@pytest.mark.parametrize(
    ("begin", "reason"),
    [
        (b"l len:\x01 and more", "AddressSanitizer"),
        (b"s sum:\x01\x02 and more", "the sum is smaller than its part"),
    ],
)
def test_the_loop_finds_what_was_planted(begin, reason, tmp_path):
    program = native_program("fuzz_planted", SANITIZERS)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "begin").write_bytes(begin)
    flags = ("-runs=20000", "-seed=1")
    report = programs.run(program, corpus, tmp_path / "findings", flags=flags)
    ((sentence, raw),) = report.findings
    assert reason in sentence
    found = tmp_path / "found"
    found.write_bytes(raw)
    again = subprocess.run([program, found], capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert reason in again.stderr


def test_no_two_targets_have_one_name():
    assert len({*READERS, *programs.TARGETS}) == len(READERS) + len(programs.TARGETS)


def test_the_corpus_is_small():
    files = [path for path in programs.CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == set(programs.TARGETS)
    assert sum(path.stat().st_size for path in files) < 32 * 1024


# The command.


def test_counts_are_added_up_and_a_finding_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "FINDINGS", tmp_path / "findings")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    planted = loop.Reader("planted", ".bin", careful, [b"good"])
    monkeypatch.setattr(readers, "make_readers", lambda: [planted])
    arguments = ["planted", "--seconds", "0.3", "--seed", "1"]
    assert command.main(arguments) == 0
    first = capsys.readouterr().out
    assert "nothing found" in first
    broken = loop.Reader("planted", ".bin", lambda path: path.read_text("ascii"), [b"good"])
    monkeypatch.setattr(readers, "make_readers", lambda: [broken])
    assert command.main(arguments) == 1
    second = capsys.readouterr().out
    counts = [
        int(re.search(r" ([\d,]+) inputs", out)[1].replace(",", "")) for out in (first, second)
    ]
    (path,) = (tmp_path / "results").rglob("fuzz.json")
    (row,) = json.loads(path.read_text())["checks"]["fuzz"]
    assert row["inputs"] == sum(counts)
    assert row["findings"] == 1
    (kept,) = (tmp_path / "findings").iterdir()
    assert f"python tests/fuzz planted --reproduce findings/{kept.name}" in second
    assert command.main(["planted", "--reproduce", str(kept)]) == 1
    assert "UnicodeDecodeError" in capsys.readouterr().out


def test_the_totals_stand_in_the_results():
    import make_results

    rows = [
        {"parser": "json", "language": "C++", "inputs": 5_000_000, "accepted": 7, "seconds": 50.0,
         "findings": 0}
    ]  # fmt: skip
    assert make_results._checks({"fuzz": rows})[2] == "| json | C++ | 5,000,000 | 100,000 | 7 | 0 |"
