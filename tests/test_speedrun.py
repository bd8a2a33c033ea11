"""The speedrun's steps, and that the README's table is what it measured."""

import json
import sys
from pathlib import Path

import pytest

from nanogpt import native

ROOT = Path(__file__).resolve().parent.parent
BINARY = Path(sys.executable).parent / "nanogpt-generate"


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of benchmarks as a place to import from."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def recorded():
    """A result as a speedrun leaves it."""
    return {
        "device": "a processor, 2 threads",
        "date": "2026-01-02",
        "commit": "abc",
        "versions": {"torch": "2.13.0"},
        "command": "make speedrun",
        "ceilings": {},
        "rows": [],
        "checks": {
            "speedrun": {
                "text": "book.txt",
                "characters": 100,
                "recipe": "standard",
                "seconds": 100.0,
                "text_written": "word",
                "steps": {
                    "train": {"seconds": 60.0, "steps": 900, "val_loss": 1.5, "bytes": 1,
                              "bits_per_byte": 2.164, "baselines": {"gzip -9": 3.1}},
                    "align": {"seconds": 20.0, "terms": ["a"], "term_rate_before": 0.5,
                              "term_rate_after": 2.0},
                    "calibrate": {"seconds": 9.0, "temperature": 1.05, "ece_before": 0.03,
                                  "ece_after": 0.01, "bits_per_byte": 2.1},
                    "export": {"seconds": 9.0, "bytes": 3_300_000},
                    "write": {"seconds": 2.0, "bytes": 2_000_000, "tokens": 500, "load_ms": 1.0,
                              "first_token_ms": 7.25, "tokens_per_second": 12_345.0},
                },
            }
        },
    }  # fmt: skip


def test_the_readmes_table_is_what_the_speedrun_recorded(benchmarks):
    from make_results import with_speedrun
    from recording import RESULTS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_speedrun(readme, RESULTS) == readme, "run python benchmarks/make_results.py"


def test_a_figure_that_changes_changes_the_readme(benchmarks, tmp_path):
    """The check above can fail; and the newest of several results counts."""
    from make_results import README_BEGINS, README_ENDS, with_speedrun

    page = f"before\n{README_BEGINS}\nold\n{README_ENDS}\nafter"
    assert "No speedrun" in with_speedrun(page, tmp_path)
    content = recorded()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "speedrun.json").write_text(json.dumps(content))
    made = with_speedrun(page, tmp_path)
    assert made.startswith(f"before\n{README_BEGINS}\n")
    assert made.endswith(f"{README_ENDS}\nafter")
    assert "12,345 tokens/s" in made
    assert with_speedrun(made, tmp_path) == made
    content["checks"]["speedrun"]["steps"]["write"]["tokens_per_second"] = 54_321.0
    content["date"] = "2026-01-01"
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "speedrun.json").write_text(json.dumps(content))
    assert with_speedrun(made, tmp_path) == made
    content["date"] = "2026-01-03"
    (tmp_path / "two" / "speedrun.json").write_text(json.dumps(content))
    assert "54,321 tokens/s" in with_speedrun(made, tmp_path)
    with pytest.raises(ValueError, match="the README lacks"):
        with_speedrun("no markers", tmp_path)


def test_results_show_speedruns_and_forecasts(benchmarks, tmp_path):
    from make_results import results

    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "speedrun.json").write_text(json.dumps(recorded()))
    row = {"shape": "S", "program": 4e8, "forecast": 5.2e8, "peak": 5e8, "ratio": 1.04}
    memory = {**recorded(), "checks": {"memory": {"S": row}}}
    (tmp_path / "one" / "memory.json").write_text(json.dumps(memory))
    lines = "\n".join(results(tmp_path))
    assert "| S | 400 MB | 520 MB | 500 MB | 1.040 |" in lines
    assert "temperature 1.050; ECE 0.0300 before, 0.0100 after" in lines


def test_a_step_that_fails_ends_the_speedrun_and_records_nothing(benchmarks, tmp_path, capfd):
    import speedrun

    (tmp_path / "text.txt").write_text("too short")
    code = speedrun.main(
        ["--text", str(tmp_path / "text.txt"), "--folder", str(tmp_path / "run"), "--quick",
         "--result", str(tmp_path / "result")]
    )  # fmt: skip
    assert code == 1
    assert "train ended with exit code 3" in capfd.readouterr().err
    assert not (tmp_path / "result").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not (native.available() and BINARY.is_file()), reason="the binary is not built here"
)
def test_every_step_of_the_speedrun_works(benchmarks, tmp_path, capfd):
    import speedrun

    arguments = ["--folder", str(tmp_path / "run"), "--quick", "--result", str(tmp_path)]
    assert speedrun.main(arguments) == 0, capfd.readouterr().err
    checks = json.loads((tmp_path / "speedrun.json").read_text())["checks"]["speedrun"]
    assert list(checks["steps"]) == ["train", "align", "calibrate", "export", "write"]
    assert checks["steps"]["write"]["tokens"] == 40
    assert checks["steps"]["train"]["steps"] == 20
    assert checks["text_written"]
    assert "| write |" in capfd.readouterr().out
