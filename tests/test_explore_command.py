"""The command that explores records: what it refuses, writes, answers, repeats and goes on with."""

import contextlib
import csv
import io
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import Outcome

from nanogpt import GPT, checkpoint, cli, load, native
from nanogpt.explore import knowledge, sources
from nanogpt.explore.reading import read_records
from nanogpt.tokenizer import CharTokenizer

SHAPE = ["--n-layer", 1, "--n-embd", 16, "--n-head", 2]
SMALL = ["--epochs", 1, "--folds", 2, "--threads", 1]
FIELDS = ["colour", "shape", "size", "weight"]
SHAPES = {"red": "round", "green": "square", "blue": "flat"}
N = 120


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows_of_things(seed=1):
    """Things whose colour decides their shape, in all but a few; two shapes and a weight lack."""
    generator = random.Random(seed)
    rows = []
    for _ in range(N):
        colour = generator.choice(sorted(SHAPES))
        shape = SHAPES[colour] if generator.random() > 0.05 else "round"
        weight = f"{generator.gauss(10, 2):.2f}"
        rows.append([colour, shape, generator.choice([*["small"] * 3, "large"]), weight])
    rows[5][1] = rows[17][1] = rows[30][3] = None
    return rows


def as_table(rows, names=FIELDS, delimiter=","):
    lines = [names, *([cell or "" for cell in row] for row in rows)]
    return "".join(delimiter.join(line) + "\n" for line in lines)


def things(format, seed=1):
    """The same things in the words of a format; of a text, each is a sentence."""
    rows = rows_of_things(seed)
    if format == "jsonl":
        pairs = [dict(zip(FIELDS, row, strict=True)) for row in rows]
        return "".join(json.dumps(pair) + "\n" for pair in pairs)
    if format == "txt":
        line = "One {2} thing that is {0} and {1} came in, and it weighed {3} pounds.\n"
        return "".join(line.format(*row) for row in rows)
    return as_table(rows, delimiter="\t" if format == "tsv" else ",")


def command(*arguments):
    """Run a command in this process, also where a fixture has no capsys."""
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    torch.set_num_threads(threads)
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture
def explore(nanogpt):
    """Explore with small models; without other words, a table of the test's own."""

    def run(*flags, data=None, shape=SHAPE):
        if data is None:
            data = Path("things.csv")
            if not data.exists():
                data.write_text(things("csv"))
        return nanogpt("explore", "--data", data, *shape, *SMALL, *flags)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of a format: its folder with data, model.pth, run, and what was printed."""
    known = {}

    def of(format):
        if format not in known:
            folder = tmp_path_factory.mktemp(format)
            (folder / f"things.{format}").write_text(things(format))
            done = command(
                "explore", "--data", folder / f"things.{format}", *SHAPE, *SMALL,
                "--output", folder / "model.pth", "--run-dir", folder / "run",
                "--report", folder / "page.html", "--findings", folder / "found.json",
            )  # fmt: skip
            assert done.code == 0, done.err
            known[format] = folder, done
        return known[format]

    return of


@pytest.fixture
def resumed(nanogpt, finished, tmp_path):
    """The finished run of the table, copied, and the command that ran it: resumed(*flags)."""
    folder, _ = finished("csv")
    shutil.copytree(folder / "run", tmp_path / "run")

    def run(*flags):
        return nanogpt("explore", "--data", folder / "things.csv", *SHAPE, *SMALL,
                       "--output", "model.pth", "--run-dir", "run", *flags)  # fmt: skip

    return run


@pytest.fixture
def trained(monkeypatch):
    """The seeds of the models that are trained, one after another."""
    seeds, train = [], knowledge.train

    def counted(encoded, plan, seed, **options):
        seeds.append(seed)
        return train(encoded, plan, seed, **options)

    monkeypatch.setattr(knowledge, "train", counted)
    return seeds


# What is refused.

IDS = "".join(f"{n},key-{n * 7919 % 1000}\n" for n in range(40))
REFUSED = {
    "an empty file": ("data.csv", "", "data.csv is empty"),
    "a header alone": ("data.csv", "a,b\n", "data.csv holds a header and no records"),
    "one column": ("data.csv", "a\n" + "x\ny\nx\n" * 20, "has one field, 'a'"),
    "identifiers alone": ("data.csv", "id,key\n" + IDS, "has no field to learn"),
    "constants alone": ("data.csv", "a,b\n" + "x,y\n" * 20, "has no field to learn"),
    "one column and identifiers": (
        "data.csv",
        "id,a\n" + "".join(f"{n},{'xyz'[n % 3]}\n" for n in range(40)),
        "has one field, 'a' (the others are constants or identifiers)",
    ),
    "few records": ("data.csv", "a,b\n" + "x,y\nz,w\n" * 4, "holds 8 records: 10 are the least"),
    "a long line": ("data.csv", f"a,b\n1,2\n3,{'x' * 1000}\n", "line 3: the line is longer than"),
    "bytes": ("data.csv", bytes(range(256)), "line 1: this is not text"),
    "bytes of no ending": ("data.bin", bytes(range(256)), "line 1: this is not text"),
    "a workbook": ("data.csv", b"PK\x03\x04...", "is an Excel workbook"),
    "another encoding": ("data.csv", "a,b\n1,é\n".encode("latin-1"), "line 2: this is not UTF-8"),
    "a name that stands twice": ("data.csv", "a,b,a\n1,2,3\n", "two fields are called 'a'"),
    "broken objects": ("data.jsonl", '{"a": 1\n' * 20, "line 1: this is not JSON"),
    "no file": ("data.csv", None, "there is no file data.csv"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_touched(
    explore, tmp_path, monkeypatch, case
):
    name, content, message = REFUSED[case]
    monkeypatch.setattr(sources, "LONGEST_LINE_BYTES", 500)
    for each in ("model.pth", "page.html", "found.json", "full.csv"):
        Path(each).write_text("from before")
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = explore("--output", "model.pth", "--report", "page.html", "--findings", "found.json",
                   "--impute", "full.csv", data=name)  # fmt: skip
    assert done.code == 3
    assert message in done.err
    assert done.err.startswith("nanogpt explore: ")
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_unknown_ending_is_read_by_its_content_and_said(explore, tmp_path):
    Path("things.xyz").write_text(things("csv"))
    done = explore("--output", "a.pth", data="things.xyz")
    assert done.code == 0, done.err
    assert "note: things.xyz has no ending that is known: it was read as csv" in done.err
    assert "4 fields" in done.err
    told = explore("--output", "b.pth", "--format", "csv", data="things.xyz")
    assert told.code == 0
    assert "no ending" not in told.err


def test_values_of_other_types_are_said(explore):
    rows = rows_of_things()
    rows[3][3], rows[4][3], rows[50][3] = "heavy", "light", "n/a"
    Path("mixed.csv").write_text(as_table(rows))
    done = explore("--output", "m.pth", "--run-dir", "run", "--json", data="mixed.csv")
    assert done.code == 0, done.err
    notes = json.loads(done.out)["notes"]
    assert "weight: 2 values are no numbers" in notes
    assert "weight: 'n/a' was read as missing" in notes
    again = explore("--output", "m.pth", "--run-dir", "run", data="mixed.csv")
    assert "note: weight: 2 values are no numbers" in again.err
    # So that is one more to fill in.
    asked = explore("--output", "m.pth", "--run-dir", "run", "--json", "--complete", "weight",
                    data="mixed.csv")  # fmt: skip
    lines = [answer["line"] for answer in json.loads(asked.out)["complete"]["answers"]]
    assert lines == [32, 52]


def test_identifiers_are_set_aside_and_that_is_said(explore):
    rows = [[f"no-{n}", *row] for n, row in enumerate(rows_of_things())]
    Path("named.csv").write_text(as_table(rows, ["id", *FIELDS]))
    done = explore("--output", "m.pth", "--run-dir", "run", data="named.csv")
    assert done.code == 0, done.err
    assert "set aside: id (it is different in every record)" in done.err
    assert "set aside: id (it is different in every record)" in done.out
    found = json.loads(Path("run/findings.json").read_text())
    assert [field["role"] for field in found["fields"]] == ["set aside", *["used"] * 4]
    # The strongest first, and plain facts last.
    assert [each["kind"] for each in found["findings"]] == ["dependency", "id"]
    told = found["findings"][1]
    assert told["fields"] == ["id"]
    assert told["q"] is None
    summary = explore("--output", "m.pth", "--run-dir", "run", "--json", data="named.csv")
    assert json.loads(summary.out)["set_aside"] == ["id"]
    # And nothing can be asked of them.
    for flags in (["--complete", "id"], ["--query", "id=no-3"],
                  ["--complete", "shape", "--given", "id=no-3"]):  # fmt: skip
        asked = explore("--output", "other.pth", *flags, data="named.csv")
        assert asked.code == 2
        assert "'id': that field is set aside, as it is different in every record" in asked.err
    assert not Path("other.pth").exists()


# The model of --init.


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        (["hue", *FIELDS[1:]], None, "it knows 'colour' as a category, and these records have"),
        (["shape", "colour", "size", "weight"], None, "it knows the same ones in another order"),
        (FIELDS, "heavy", "it knows 'weight' as a number, and in these records it is a category"),
        ([*FIELDS, "more"], "more", "it does not know 'more', which these records have"),
    ],
)
def test_a_model_of_other_fields_is_refused(explore, finished, tmp_path, names, change, message):
    rows = rows_of_things(seed=2)
    if change == "heavy":
        rows = [[*row[:3], "heavy" if n % 2 else "light"] for n, row in enumerate(rows)]
    if change == "more":
        rows = [[*row, "yes" if n % 2 else "no"] for n, row in enumerate(rows)]
    Path("other.csv").write_text(as_table(rows, names))
    model = finished("csv")[0] / "model.pth"
    done = explore("--init", model, "--output", "m.pth", data="other.csv")
    assert done.code == 3
    assert message in done.err
    assert done.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.csv"]


def test_a_model_of_the_same_fields_begins_the_training(explore, finished):
    folder, _ = finished("csv")
    Path("more.csv").write_text(things("csv", seed=2))
    begun = explore("--init", folder / "model.pth", "--seed", 1, "--output", "m.pth",
                    data="more.csv", shape=[])  # fmt: skip
    assert begun.code == 0, begun.err
    assert "may have seen these records" in begun.err
    ours, theirs = load("m.pth"), load(folder / "model.pth")
    assert ours[1].to_dict() == theirs[1].to_dict()
    weights = [model.token_weight.flatten() for model, _ in (ours, theirs)]
    assert not torch.equal(*weights)
    assert torch.cosine_similarity(*weights, dim=0) > 0.5  # new ones would have nothing in common
    refused = explore("--init", folder / "model.pth", "--n-embd", 32, data="more.csv", shape=[])
    assert refused.code == 2
    assert "--n-embd 32: the model of --init has 16" in refused.err


def test_a_model_of_text_is_refused(explore, tmp_path):
    model = GPT(vocab_size=4, block_size=8, n_layer=1, n_head=1, n_embd=8)
    for tokenizer in (CharTokenizer("abc"), None):
        model.tokenizer = tokenizer
        checkpoint.save(model, "gpt.pth")
        done = explore("--init", "gpt.pth", "--output", "m.pth")
        assert done.code == 3
        assert "the model of --init was not made by explore" in done.err
        assert done.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt.pth", "things.csv"]


# Flags that are wrong, all told before anything is trained.

WRONG = {
    "no data": (["--output", "m.pth"], "explore needs --data"),
    "no such field": (["--complete", "shap"], "no such field; the nearest is 'shape'"),
    "no such field given": (
        ["--complete", "shape", "--given", "color=red"],
        "--given 'color': things.csv has no such field; the nearest is 'colour'",
    ),
    "given alone": (["--given", "colour=red"], "--complete FIELD"),
    "given is no record": (["--complete", "shape", "--given", "red"], "must be FIELD=VALUE"),
    "given what is asked": (
        ["--complete", "shape", "--given", "shape=flat"],
        "--given tells shape, which is what --complete asks for",
    ),
    "a free text": (["--complete", "words"], "'words': that field is free text"),
    "a query of no value": (["--query", "xyzzy"], "nothing of 'xyzzy' is a value of a field"),
    "an empty query": (["--query", " "], "--query is empty"),
    "half a character": (["--query", "\udcff"], "--query is not UTF-8 text"),
    "the model over the data": (["--output", "things.csv"], "is also --data"),
    "the page over the data": (["--report", "things.csv"], "--report things.csv is also --data"),
    "findings over the data": (["--findings", "./things.csv"], "is also --data"),
    "imputed over the data": (["--impute", "things.csv"], "is also --data"),
    "two outputs in one": (["--report", "x", "--findings", "x"], "is also --report"),
    "imputed in another format": (["--impute", "full.tsv"], "must end in .csv"),
    "an unwritable page": (["--report", "things.csv/page.html"], "cannot be written"),
    "a folder as the page": (["--report", "."], "exists and is not a file"),
    "heads that do not divide": (["--n-head", 3], "--n-head 3 does not divide the width, 64"),
    "heads that do not divide a width": (
        ["--n-head", 3, "--n-embd", 16],
        "--n-embd 16 is not a multiple of --n-head 3",
    ),
    "one fold": (["--folds", 1], "--folds must be at least 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flags_end_in_a_sentence_and_touch_nothing(nanogpt, tmp_path, case):
    flags, message = WRONG[case]
    rows, names = rows_of_things(), list(FIELDS)
    if "words" in flags:
        generator = random.Random(3)
        names.append("words")
        for row in rows:
            row.append(" ".join(generator.choice(["oak", "elm", "ash", "fir"]) for _ in range(6)))
    Path("things.csv").write_text(as_table(rows, names))
    before = Path("things.csv").read_bytes()
    data = [] if case == "no data" else ["--data", "things.csv"]
    done = nanogpt("explore", *data, *flags)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["things.csv"]
    assert Path("things.csv").read_bytes() == before


# What a run writes.


@pytest.mark.parametrize("format", ["csv", "tsv", "jsonl", "txt"])
def test_a_run_writes_a_model_a_page_and_findings(finished, format):
    folder, done = finished(format)
    model, tokenizer = load(folder / "model.pth")
    assert tokenizer.kind == "record"
    assert model.config.n_embd == 16
    names = ["text"] if format == "txt" else FIELDS
    assert [name for name, _ in tokenizer.fields] == names
    page = (folder / "page.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    found = json.loads((folder / "found.json").read_text())
    assert {"data", "n", "seed", "versions", "findings"} <= found.keys()
    assert (found["data"], found["n"], found["seed"]) == (f"things.{format}", N, 0)
    assert found["versions"]["torch"] == torch.__version__
    wanted = {"kind", "fields", "rows", "effect", "unit", "q", "n", "sentence"}
    for each in found["findings"]:
        assert wanted <= each.keys()
        assert set(each["fields"]) <= set(names)
        assert all(0 <= row < N for row in each["rows"])
        assert each["lines"] == [row + (2 if "sv" in format else 1) for row in each["rows"]]
        assert each["q"] is None or 0 <= each["q"] <= 0.05
    bits = [each["evidence_bits"] for each in found["findings"]]
    if format != "txt":
        first = found["findings"][0]
        assert first["kind"] == "dependency"
        assert set(first["fields"]) == {"colour", "shape"}
        assert first["q"] < 1e-6
        assert "colour goes with shape" in done.out
    run = folder / "run"
    assert (run / "findings.json").read_bytes() == (folder / "found.json").read_bytes()
    assert (run / "report.html").read_bytes() == (folder / "page.html").read_bytes()
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["final.safetensors", "fold-1.safetensors", "fold-2.safetensors"]
    assert bits == sorted(bits, reverse=True)


def test_formats_of_the_same_records_find_the_same(finished):
    pages = [finished(format)[0] / "found.json" for format in ("csv", "tsv", "jsonl")]
    found = [json.loads(page.read_text())["findings"] for page in pages]
    sentences = [[each["sentence"] for each in one] for one in found]
    assert sentences[0] == sentences[1] == sentences[2]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(explore, finished, tmp_path):
    folder, _ = finished("csv")
    for seed in (0, 1):
        done = explore("--seed", seed, "--output", f"{seed}.pth", "--run-dir", f"run-{seed}")
        assert done.code == 0, done.err
    pairs = {"0.pth": "model.pth", "run-0/report.html": "page.html",
             "run-0/findings.json": "found.json"}  # fmt: skip
    for ours, theirs in pairs.items():
        assert (tmp_path / ours).read_bytes() == (folder / theirs).read_bytes(), ours
    assert Path("1.pth").read_bytes() != Path("0.pth").read_bytes()
    assert Path("run-1/findings.json").read_bytes() != Path("run-0/findings.json").read_bytes()


def test_without_a_run_directory_the_command_finds_its_own(explore, trained):
    assert explore("--output", "m.pth").code == 0
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("things-")
    again = explore("--output", "m.pth", "--alpha", 0.2)
    assert again.code == 0
    assert [path.name for path in Path("runs").iterdir()] == [run.name]
    assert len(trained) == 3
    # Another level of significance asks anew what was found, and trains nothing.
    assert json.loads((run / "findings.json").read_text())["alpha"] == 0.2


# Questions.


def test_json_prints_one_object(resumed, trained):
    done = resumed("--json", "--report", "page.html", "--findings", "found.json")
    assert done.code == 0, done.err
    assert done.err == ""
    summary = json.loads(done.out)
    assert summary["status"] == "finished"
    assert summary["fields"] == FIELDS
    assert summary["n"] == N
    assert summary["n_findings"] == len(summary["findings"]) > 0
    assert (summary["output"], summary["report"]) == ("model.pth", "page.html")
    assert json.loads(Path("found.json").read_text())["findings"] == summary["findings"]
    assert summary["complete"] is summary["query"] is summary["impute"] is None
    assert not trained


def test_missing_values_of_a_field_are_completed(resumed):
    done = resumed("--json", "--complete", "shape")
    answer = json.loads(done.out)["complete"]
    assert (answer["field"], answer["missing"]) == ("shape", 2)
    assert [(each["row"], each["line"]) for each in answer["answers"]] == [(5, 7), (17, 19)]
    for each in answer["answers"]:
        probabilities = [value["probability"] for value in each["values"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)
        assert {value["value"] for value in each["values"]} == set(SHAPES.values())
    shown = resumed("--complete", "shape")
    assert "shape, line 7: " in shown.out
    assert "shape, line 19: " in shown.out


def test_numbers_are_completed_with_a_median_and_an_interval(resumed):
    done = resumed("--json", "--complete", "weight")
    (answer,) = json.loads(done.out)["complete"]["answers"]
    low, high = map(float, answer["interval"])
    assert low < float(answer["median"]) < high
    assert 5 < low < high < 16


def test_a_field_without_missing_values_says_how_well_it_would_do(resumed):
    done = resumed("--json", "--complete", "size")
    answer = json.loads(done.out)["complete"]
    assert answer["answers"] == []
    assert answer["held_out"]["n"] == N
    assert 0 < answer["held_out"]["accuracy"] < 1
    sizes = [row[2] for row in rows_of_things()]
    assert answer["held_out"]["majority"] == pytest.approx(sizes.count("small") / N)
    assert "size is missing nowhere. Hidden in each of 120 records" in (
        resumed("--complete", "size").out
    )


def test_a_record_that_is_given_is_completed(resumed):
    likely = {}
    for colour in SHAPES:
        done = resumed("--json", "--complete", "shape", "--given", f"colour={colour}, size=small")
        answer = json.loads(done.out)["complete"]["answers"][0]
        assert answer["given"] == {"colour": colour, "size": "small"}
        likely[colour] = {value["value"]: value["probability"] for value in answer["values"]}
    for colour, shape in SHAPES.items():
        by_others = [likely[other][shape] for other in SHAPES if other != colour]
        assert likely[colour][shape] > max(by_others)
    shown = resumed("--complete", "shape", "--given", "colour=purple")
    assert shown.code == 0
    assert "shape, given colour=purple: " in shown.out
    assert "note: --given: no record has colour=purple" in shown.err
    shown = resumed("--complete", "shape", "--given", "weight=much")
    assert "note: --given: weight=much is no number" in shown.err


@pytest.mark.parametrize("query", ["blue", "colour=blue", "something Blue, or so"])
def test_records_like_a_query_are_shown(resumed, query):
    done = resumed("--json", "--query", query, "--k", 7)
    assert done.code == 0, done.err
    found = json.loads(done.out)["query"]
    assert len(found) == 7
    assert all(each["record"]["colour"] == "blue" for each in found)
    assert all(each["line"] == each["row"] + 2 for each in found)
    cosines = [each["cosine"] for each in found]
    assert cosines == sorted(cosines, reverse=True)
    shown = resumed("--query", query)
    assert "most similar records:" in shown.out
    assert shown.out.count("colour=blue") >= 10


def test_texts_are_compared_with_any_text(nanogpt, finished, tmp_path):
    folder, _ = finished("txt")
    shutil.copytree(folder / "run", tmp_path / "run")
    done = nanogpt("explore", "--data", folder / "things.txt", *SHAPE, *SMALL, "--output", "m.pth",
                   "--run-dir", "run", "--query", "nothing of these = words, at all",
                   "--k", 3, "--json")  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)["query"]
    assert len(found) == 3
    assert all(set(each["record"]) == {"text"} for each in found)


def test_imputing_changes_missing_cells_alone(resumed, finished):
    done = resumed("--impute", "new/full.csv")
    assert done.code == 0, done.err
    assert "new/full.csv: 3 missing values filled in" in done.out
    before = read_records(finished("csv")[0] / "things.csv")
    after = read_records("new/full.csv")
    assert after.names == before.names
    changed = [
        (row, name)
        for name in FIELDS
        for row, (old, new) in enumerate(zip(before.column(name), after.column(name), strict=True))
        if old != new
    ]
    assert sorted(changed) == [(5, "shape"), (17, "shape"), (30, "weight")]
    assert {after[5]["shape"], after[17]["shape"]} <= set(SHAPES.values())
    assert 5 < float(after[30]["weight"]) < 16
    assert len(after[30]["weight"].partition(".")[2]) == 2
    with open("new/full.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + N


def test_imputing_what_lacks_nothing_writes_the_same_records(explore):
    rows = [[cell or "round" for cell in row] for row in rows_of_things()]
    rows = [[*row[:3], "10.00" if row[3] == "round" else row[3]] for row in rows]
    Path("whole.csv").write_text(as_table(rows))
    done = explore("--output", "m.pth", "--impute", "full.csv", data="whole.csv")
    assert done.code == 0, done.err
    assert "no value is missing: full.csv holds the same records" in done.out
    assert read_records("full.csv") == read_records("whole.csv")


def test_values_that_stand_there_once_are_not_guessed(explore):
    rows = [
        [*row[:1], SHAPES[row[0]], f"only-{n}" if n % 15 == 0 else None]
        for n, row in enumerate(rows_of_things())
    ]
    Path("rare.csv").write_text(as_table(rows, ["colour", "shape", "label"]))
    done = explore("--complete", "label", data="rare.csv")
    assert done.code == 2
    assert "--complete 'label': none of its values stands there twice" in done.err
    flags = ["--output", "m.pth", "--run-dir", "run"]
    done = explore(*flags, "--impute", "full.csv", data="rare.csv")
    assert done.code == 0, done.err
    assert "none of the 112 missing values can be guessed" in done.out
    assert read_records("full.csv") == read_records("rare.csv")
    rows[3][1] = None
    Path("rarer.csv").write_text(as_table(rows, ["colour", "shape", "label"]))
    done = explore("--output", "m.pth", "--impute", "full.csv", data="rarer.csv")
    assert "full.csv: 1 missing value filled in" in done.out
    assert "112 that cannot be guessed left as they are" in done.out


# Runs that were cut off, and runs that are finished.


@pytest.mark.parametrize(("at", "kept"), [(2, 1), (3, 2)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    explore, finished, trained, monkeypatch, at, kept, number
):
    train = knowledge.train

    def cut(*arguments, **options):
        if len(trained) == at - 1 and number == signal.SIGINT:
            raise KeyboardInterrupt  # whoever runs tests in the background may ignore the signal
        if len(trained) == at - 1:
            os.kill(os.getpid(), number)
        return train(*arguments, **options)

    flags = ["--output", "model.pth", "--run-dir", "run"]
    monkeypatch.setattr(knowledge, "train", cut)
    done = explore(*flags)
    assert done.code == (130 if number == signal.SIGINT else 143)
    assert f"{kept} trained model{'s are' if kept > 1 else ' is'} kept in run" in done.err
    assert "goes on from here" in done.err
    assert "Traceback" not in done.err
    assert not Path("model.pth").exists()
    assert not Path("run/findings.json").exists()
    monkeypatch.setattr(knowledge, "train", train)
    trained.clear()
    done = explore(*flags)
    assert done.code == 0, done.err
    assert trained == [(0, number) for number in range(kept, 3)]
    folder, whole = finished("csv")
    assert Path("model.pth").read_bytes() == (folder / "model.pth").read_bytes()
    assert Path("run/findings.json").read_bytes() == (folder / "found.json").read_bytes()
    assert Path("run/report.html").read_bytes() == (folder / "page.html").read_bytes()
    assert done.out == whole.out


def test_a_finished_run_says_so_and_restores_what_is_gone(resumed, finished, trained):
    folder, whole = finished("csv")
    Path("run/report.html").unlink()
    Path("run/findings.json").unlink()
    done = resumed()
    assert done.code == 0
    assert "this run is finished, in run (--resume never trains anew)" in done.err
    assert done.out == whole.out
    assert not trained
    assert Path("model.pth").read_bytes() == (folder / "model.pth").read_bytes()
    assert Path("run/findings.json").read_bytes() == (folder / "found.json").read_bytes()
    assert Path("run/report.html").read_bytes() == (folder / "page.html").read_bytes()


def test_resume_never_trains_anew(resumed, finished, trained):
    done = resumed("--resume", "never")
    assert done.code == 0, done.err
    assert "is finished" not in done.err
    assert trained == [(0, 0), (0, 1), (0, 2)]
    assert Path("model.pth").read_bytes() == (finished("csv")[0] / "model.pth").read_bytes()


def test_a_run_is_found_by_its_directory(resumed, trained):
    assert resumed("--resume", "run").code == 0
    assert not trained
    refused = resumed("--resume", "elsewhere")
    assert refused.code == 3
    assert "there is no run directory" in refused.err


def test_another_configuration_in_its_directory_is_refused(resumed, explore, trained):
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    done = resumed("--seed", 1, "--epochs", 3)
    assert done.code == 2
    assert "run holds the run of another configuration: its --epochs is 1, not 3" in done.err
    Path("other.csv").write_text(things("csv", seed=2))
    done = explore("--output", "model.pth", "--run-dir", "run", data="other.csv")
    assert done.code == 2
    assert "another configuration: its text differs" in done.err
    assert not trained
    assert not Path("model.pth").exists()
    assert {path: path.read_bytes() for path in before} == before


def damage(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 255
    path.write_bytes(raw)


@pytest.mark.parametrize(("name", "number"), [("fold-2", 1), ("final", 2)])
def test_a_damaged_model_is_trained_anew_and_that_is_said(resumed, finished, trained, name, number):
    damage(Path(f"run/checkpoints/{name}.safetensors"))
    Path("run/report.json").unlink()
    done = resumed()
    assert done.code == 0, done.err
    assert f"trained anew: run/checkpoints/{name}.safetensors is damaged" in done.err
    assert trained == [(0, number)]
    folder, _ = finished("csv")
    assert Path("model.pth").read_bytes() == (folder / "model.pth").read_bytes()
    assert Path("run/findings.json").read_bytes() == (folder / "found.json").read_bytes()


def test_a_kept_model_of_another_shape_is_trained_anew(resumed, finished, trained):
    model = GPT(vocab_size=9, block_size=8, n_layer=1, n_head=1, n_embd=8)
    checkpoint.save(model, "run/checkpoints/fold-1.safetensors")
    done = resumed("--complete", "shape")
    assert done.code == 0, done.err
    assert "the kept model fold-1 does not fit and is trained anew" in done.err
    assert trained == [(0, 0)]
    assert Path("model.pth").read_bytes() == (finished("csv")[0] / "model.pth").read_bytes()


def test_a_damaged_report_is_made_again(resumed, finished, trained):
    kept = json.loads(Path("run/report.json").read_text())
    kept["report"]["n"] = 7
    Path("run/report.json").write_text(json.dumps(kept))
    done = resumed()
    assert done.code == 0
    assert not trained
    found = finished("csv")[0] / "found.json"
    assert Path("run/findings.json").read_bytes() == found.read_bytes()


# The model in other commands.


@pytest.mark.parametrize("engine", ["auto", "native", "torch"])
@pytest.mark.parametrize("format", ["csv", "txt"])
def test_sample_writes_records(nanogpt, finished, engine, format):
    if engine == "native" and not native.available():
        pytest.skip(f"native engine: {native.why_not()}")
    model = finished(format)[0] / "model.pth"
    flags = ["--max-new-tokens", 20, "--seed", 1, "--threads", 1, "--ignore-eos"]
    done = nanogpt("sample", "--model", model, "--engine", engine, *flags)
    assert done.code == 0, done.err
    assert done.err == ""
    assert done.out == nanogpt("sample", "--model", model, "--engine", "torch", *flags).out
    started = nanogpt("sample", "--model", model, "--engine", engine, "--json", *flags,
                      "--prompt", "text\x1fOne" if format == "txt" else "colour\x1f")  # fmt: skip
    assert len(json.loads(started.out)["samples"][0]["tokens"]) == 20


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "purple"], "is not in the model's vocabulary"),
        (["--reward-chars", "a"], "rewards are for models of text"),
        (["--reward-terms", "red"], "rewards are for models of text"),
    ],
)
def test_sample_refuses_in_a_sentence_what_records_cannot(
    nanogpt, finished, engine, flags, message
):
    model = finished("csv")[0] / "model.pth"
    done = nanogpt("sample", "--model", model, "--engine", engine, *flags)
    assert done.code == 3
    assert message in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_export_writes_what_can_be_read_back(nanogpt, finished):
    model = finished("csv")[0] / "model.pth"
    done = nanogpt("export", "--model", model, "--output", "m.safetensors",
                   "--format", "safetensors")  # fmt: skip
    assert done.code == 0, done.err
    assert load("m.safetensors")[1].to_dict() == load(model)[1].to_dict()
    done = nanogpt("export", "--model", model, "--output", "m.pt")
    assert done.code == 0, done.err
    assert "read back and compared" in done.err
    if native.available():
        flags = ["--max-new-tokens", 20, "--seed", 1, "--threads", 1]
        exported = nanogpt("sample", "--model", "m.pt", *flags)
        assert exported.out == nanogpt("sample", "--model", model, *flags).out


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize("data", ["csv", "txt"])
def test_formats_without_a_word_for_whole_values_are_refused(
    nanogpt, finished, tmp_path, format, data
):
    """Their vocabularies hold every text once; two fields share values, and more than letters."""
    model = finished(data)[0] / "model.pth"
    done = nanogpt("export", "--model", model, "--format", format, "--output", f"m-{format}")
    assert done.code == 3
    assert "use torchscript or safetensors" in done.err
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
