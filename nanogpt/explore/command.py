"""Explore records from the command line: `python -m nanogpt.explore --data path/to/data.csv`.

Every model is kept in the run directory once it is trained, so that an interrupted command goes on
with the next one, and another question about the same records costs no training.
"""

import csv
import difflib
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt import checkpoint
from nanogpt.config import ExploreConfig
from nanogpt.errors import InputError, UsageError
from nanogpt.explore.fields import Field, as_numbers, describe_fields, fit_classes, why_set_aside
from nanogpt.explore.knowledge import KnowledgeDiscovery, reading_notes, record_of_text
from nanogpt.explore.learning import width_and_heads
from nanogpt.explore.reading import read_records
from nanogpt.explore.records import Records, Value, write_csv
from nanogpt.interruption import terminable
from nanogpt.machine import resolve_device, set_threads, versions
from nanogpt.model import GPT
from nanogpt.plan import goes_on, make_identity, run_path
from nanogpt.progress import WorkProgress
from nanogpt.report.knowledge import render_knowledge_report
from nanogpt.reporter import flags_as_text
from nanogpt.run_directory import RunDirectory, json_ready

FINAL = "final"
"""The name of the model that is trained on all records; the others are fold-1, fold-2, …"""
_SHOWN_FINDINGS, _SHOWN_ROWS = 20, 10
_COMPLETED_ROWS = 200
_SHOWN_LETTERS = 60
_ASIDE = ("constant", "id")
"""Kinds of fields that tell nothing about the others, and why."""
_FOR_PROGRAMS = (
    "data", "n", "seed", "versions", "alpha", "model", "folds", "unit", "fields", "quality",
    "notes", "findings",
)  # fmt: skip
"""What of the report findings.json holds."""


def run(config: ExploreConfig) -> int:
    """Check, read, train, look, write. Returns the exit code."""
    _check_flags(config)
    device = resolve_device(config.device)
    set_threads(config.threads)
    with terminable():
        assert config.data is not None
        records = read_records(config.data, None if config.format == "auto" else config.format)
        initial = checkpoint.load(config.init)[0] if config.init else None
        KnowledgeDiscovery(initial).check(records)
        fields = describe_fields(records)
        _check_shape(config, fields, initial)
        question = _read_question(config, records, fields)
        # The same lines are texts in a .txt and values in a table of one column.
        digest = records.digest + (" lines" if records.format == "txt" else "")
        identity = make_identity(config, digest, None, initial)
        path = run_path(config, Path(config.data).stem or "data", None, identity)
        with RunDirectory(path, warn=_say) as folder:
            exploration = _Exploration(config, records, fields, question, initial, device, folder)
            return exploration.carry_out(goes_on(config, folder, identity), identity)


def _check_flags(config: ExploreConfig) -> None:
    """Raises: UsageError for flags that contradict each other, or files that cannot be written."""
    if config.data is None:
        raise UsageError("explore needs --data: a .csv, .tsv, .jsonl or .txt file")
    if config.given is not None and config.complete is None:
        raise UsageError("--given is what is known of a record that --complete FIELD completes")
    if config.n_embd and config.n_head and config.n_embd % config.n_head:
        raise UsageError(
            f"--n-embd {config.n_embd} is not a multiple of --n-head {config.n_head}: "
            f"set both so that it is"
        )
    outputs = {
        "--output": config.output,
        "--report": config.report,
        "--findings": config.findings,
        "--impute": config.impute,
    }
    taken = {"--data": config.data}
    for flag, name in outputs.items():
        if name is None:
            continue
        for other, theirs in taken.items():
            if checkpoint.same_place(name, theirs):
                raise UsageError(f"{flag} {name} is also {other}: name another file")
        taken[flag] = name
        if flag != "--output" and config.init and checkpoint.same_place(name, config.init):
            raise UsageError(f"{flag} {name} is also --init: name another file")
    checkpoint.check_output(Path(config.output))
    if config.impute is not None and Path(config.impute).suffix.lower() != ".csv":
        raise UsageError(f"--impute {config.impute} must end in .csv, which is what it writes")
    for flag, name in outputs.items():
        if name is not None and flag != "--output":
            if Path(name).exists() and not Path(name).is_file():
                raise UsageError(f"{flag} {name} exists and is not a file")
            checkpoint.check_writable(Path(name), flag)


def _check_shape(config: ExploreConfig, fields: Sequence[Field], initial: GPT | None) -> None:
    """Raises: UsageError for a shape that is impossible, or not that of the model of --init."""
    if initial is None:
        texts = any(field.kind == "text" for field in fields)
        width, heads = width_and_heads(texts, n_head=config.n_head, n_embd=config.n_embd)
        if width % heads:
            raise UsageError(
                f"--n-head {heads} does not divide the width, {width}: set --n-embd to a multiple"
            )
        return
    for name in ("n_layer", "n_head", "n_embd"):
        ours, theirs = getattr(config, name), getattr(initial.config, name)
        if ours not in (None, theirs):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {ours}: the model of --init has {theirs}")


@dataclass(frozen=True)
class _Question:
    """What the user asks beside the findings.

    Attributes:
        complete: the field, or None.
        given: what is known of the record to complete; None for the records themselves.
        query: the text or record that others are compared with, or None.
        notes: sentences on values that no record has.
    """

    complete: str | None
    given: dict[str, Value] | None
    query: str | dict[str, Value] | None
    notes: tuple[str, ...]

    @property
    def asked(self) -> bool:
        return self.complete is not None or self.query is not None


def _read_question(config: ExploreConfig, records: Records, fields: Sequence[Field]) -> _Question:
    """Raises: UsageError for what these records cannot answer."""
    asked = {"--complete": config.complete, "--given": config.given, "--query": config.query}
    for flag, text in asked.items():
        if text is not None and not _is_text(text):
            raise UsageError(f"{flag} is not UTF-8 text")
    given = None
    if config.complete is not None:
        _check_completable(config.complete, records, fields)
    if config.given is not None:
        given = _read_pairs(config.given)
        if given is None:
            raise UsageError(
                f"--given {config.given!r} must be FIELD=VALUE, with commas between several"
            )
        for name in given:
            _used_field("--given", name, records, fields)
        if config.complete in given:
            raise UsageError(f"--given tells {config.complete}, which is what --complete asks for")
    query: str | dict[str, Value] | None = config.query
    if config.query is not None:
        if not config.query.strip():
            raise UsageError("--query is empty: give a text to compare records with")
        pairs = _read_pairs(config.query)
        if pairs is not None and set(pairs) <= set(records.names):
            for name in pairs:
                _used_field("--query", name, records, fields)
            query = pairs
        else:
            query = _values_named(config.query, records, fields)
    notes = [*_unknown_values("--given", given, records, fields)]
    if isinstance(query, dict):
        notes += _unknown_values("--query", query, records, fields)
    return _Question(config.complete, given, query, tuple(notes))


def _check_completable(name: str, records: Records, fields: Sequence[Field]) -> None:
    """Raises: UsageError for a field that has no values to choose from."""
    field = _used_field("--complete", name, records, fields)
    if field.kind == "text":
        reason = "that field is free text, whose values cannot be listed"
    elif not fit_classes(field, records.column(name)).n_own:
        reason = "none of its values stands there twice, so there is none to expect again"
    else:
        return
    raise UsageError(f"--complete {name!r}: {reason}")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _values_named(text: str, records: Records, fields: Sequence[Field]) -> str | dict[str, Value]:
    """The text where there are text fields to compare it with, or the values that it names.

    Raises: UsageError where it names none.
    """
    used = [field for field in fields if field.kind not in _ASIDE]
    if any(field.kind == "text" for field in used):
        return text
    classes = [fit_classes(field, records.column(field.name)) for field in used]
    try:
        return record_of_text(text, used, classes)
    except ValueError as error:
        raise UsageError(f"--query: {error}") from None


def _unknown_values(
    flag: str, asked: Mapping[str, Value] | None, records: Records, fields: Sequence[Field]
) -> Iterable[str]:
    """A sentence on every value that the models can only take for another one."""
    for field in fields:
        value = None if asked is None else asked.get(field.name)
        if value is None:
            continue
        if field.kind == "category" and value not in records.column(field.name):
            yield f"{flag}: no record has {field.name}={_short(value)}; it counts as another value"
        elif field.kind in ("number", "date") and np.isnan(as_numbers([value], field.kind)[0]):
            yield f"{flag}: {field.name}={_short(value)} is no {field.kind}"


def _read_pairs(text: str) -> dict[str, Value] | None:
    """The record that FIELD=VALUE,… describes, or None where it is no such text."""
    try:
        (parts,) = csv.reader([text], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError):
        return None
    pairs = [part.partition("=") for part in parts]
    if not pairs or not all(sign and name.strip() for name, sign, _ in pairs):
        return None
    return {name.strip(): value for name, _, value in pairs}


def _used_field(flag: str, name: str, records: Records, fields: Sequence[Field]) -> Field:
    """Raises: UsageError for a field that is not there, or of which nothing is learnt."""
    if name not in records.names:
        close = difflib.get_close_matches(name, records.names, n=1, cutoff=0.0)
        raise UsageError(
            f"{flag} {name!r}: {records.name} has no such field; the nearest is {close[0]!r}"
        )
    field = fields[records.names.index(name)]
    if field.kind in _ASIDE:
        raise UsageError(f"{flag} {name!r}: that field is set aside, as it {why_set_aside(field)}")
    return field


class _TrainedModels:
    """The models of a run, kept in its directory; what `KnowledgeDiscovery.fit` calls a store."""

    def __init__(self, folder: RunDirectory, progress: WorkProgress) -> None:
        self.folder, self.progress = folder, progress
        self.saved: list[str] = []

    def _path(self, name: str) -> Path:
        return self.folder.path / "checkpoints" / f"{name}.safetensors"

    def load(self, name: str) -> dict[str, torch.Tensor] | None:
        """The state of a model that was trained before, or None."""
        model = self.load_model(name)
        return None if model is None else dict(model.state_dict())

    def load_model(self, name: str) -> GPT | None:
        path = self._path(name)
        if not path.exists():
            return None
        try:
            model, _ = checkpoint.load(path)
        except InputError as error:
            self.progress.say(f"trained anew: {error}")
            return None
        self.saved.append(name)
        return model

    def save(self, name: str, model: GPT) -> None:
        """Keep a model that is trained."""
        checkpoint.save(model, self._path(name))
        self.saved.append(name)


class _Exploration:
    """A run: its models, its report and the answers."""

    def __init__(
        self,
        config: ExploreConfig,
        records: Records,
        fields: Sequence[Field],
        question: _Question,
        initial: GPT | None,
        device: torch.device,
        folder: RunDirectory,
    ) -> None:
        self.config, self.records, self.fields = config, records, fields
        self.question = question
        self.initial, self.device, self.folder = initial, device, folder
        self.output = Path(config.output)
        self.notes: list[str] = []
        self.progress = WorkProgress(quiet=config.json)
        self.models = _TrainedModels(folder, self.progress)

    def carry_out(self, begun: bool, identity: Mapping[str, Any]) -> int:
        """Train what is not trained yet, look, answer, write. Returns the exit code."""
        discovery = self._discovery()
        with self.progress:
            for note in self.records.notes:
                self._note(note)
            self._say(_what_was_read(self.records, self.fields))
            for note in (*reading_notes(self.fields), *self.question.notes):
                self._note(note)
            if not begun:
                content = {"identity": dict(identity), "versions": versions()}
                self.folder.begin(content, flags_as_text(self.config))
            report = self._kept_report() if begun else None
            final = self.models.load_model(FINAL) if report is not None else None
            answers: dict[str, Any] = {}
            if report is not None and final is not None:
                self._say(
                    f"this run is finished, in {self.folder.path} (--resume never trains anew)"
                )
            if report is None or final is None or self.question.asked or self.config.impute:
                try:
                    discovery.fit(self.records, store=self.models)
                    if report is None:
                        report = self._keep_report(discovery.report())
                    answers = self._answer(discovery)
                except (KeyboardInterrupt, SystemExit):
                    self._tell_interruption()
                    raise
                final = discovery.model
            assert final is not None
            files = self._write(report, final)
        self._tell(report, answers, files)
        return 0

    def _discovery(self) -> KnowledgeDiscovery:
        config, initial = self.config, self.initial
        return KnowledgeDiscovery(
            initial,
            None if initial is None else initial.tokenizer,
            folds=config.folds,
            epochs=config.epochs,
            batch_size=config.batch_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            seed=config.seed,
            alpha=config.alpha,
            device=self.device,
            note=self._note,
            progress=self.progress.update,
        )

    def _say(self, message: str) -> None:
        if not self.config.json:
            self.progress.say(message)

    def _note(self, message: str) -> None:
        self.notes.append(message)
        self._say(f"note: {message}")

    def _tell_interruption(self) -> None:
        kept = len(set(self.models.saved))
        done = f"{kept} trained model{'s are' if kept != 1 else ' is'} kept in {self.folder.path}"
        self.progress.say(f"{done}; the same command goes on from here")

    # The report, as JSON: everything that the page and findings.json are made of.

    def _report_key(self) -> dict[str, Any]:
        """What a kept report must agree with beside the run's identity."""
        return {"alpha": self.config.alpha, "data": self.records.name, "versions": versions()}

    def _kept_report(self) -> dict[str, Any] | None:
        """The report of an earlier process, where it answers the same command."""
        path = self.folder.path / "report.json"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            report = kept["report"]
            whole = kept["sha256"] == hashlib.sha256(_as_text(report).encode()).hexdigest()
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return report if whole and kept.get("key") == self._report_key() else None

    def _keep_report(self, report: Mapping[str, Any]) -> dict[str, Any]:
        text = _as_text(json_ready(dict(report)))
        again: dict[str, Any] = json.loads(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        kept = {"key": self._report_key(), "sha256": digest, "report": again}
        self.folder.write("report.json", _as_text(kept))
        return again

    # Answers.

    def _answer(self, discovery: KnowledgeDiscovery) -> dict[str, Any]:
        answers: dict[str, Any] = {}
        if self.question.complete is not None:
            answers["complete"] = self._complete(discovery, self.question.complete)
        if self.question.query is not None:
            found = discovery.similar(self.question.query, k=self.config.k)
            answers["query"] = [
                {**self._row(row), "cosine": float(cosine)} for row, cosine in found
            ]
        if self.config.impute is not None:
            filled, cells = discovery.impute()
            target = Path(self.config.impute)
            target.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomically(target, lambda file: write_csv(filled, file))
            answers["impute"] = {
                "file": self.config.impute,
                "left": sum(column.count(None) for column in filled.columns),
                "cells": [
                    {**self._place(row), "field": field, "value": value, "probability": float(p)}
                    for row, field, value, p in cells
                ],
            }
        return answers

    def _complete(self, discovery: KnowledgeDiscovery, field: str) -> dict[str, Any]:
        """Of the record of --given, of the records that lack the field, or how well it would do."""
        if self.question.given is not None:
            completion = discovery.complete(self.question.given, field)
            answer = {"given": self.question.given, **_completion_as_dict(completion)}
            return {"field": field, "answers": [answer]}
        column = self.records.column(field)
        words = self.fields[self.records.names.index(field)].words
        rows = [row for row, value in enumerate(column) if value is None or value in words]
        if not rows:
            held_out = discovery.held_out(field)
            return {"field": field, "answers": [], "held_out": held_out}
        answers = []
        for row in rows[:_COMPLETED_ROWS]:
            completion = discovery.complete(self.records[row], field)
            answers.append({**self._place(row), **_completion_as_dict(completion)})
        return {"field": field, "missing": len(rows), "answers": answers}

    def _place(self, row: int) -> dict[str, Any]:
        return {"row": int(row), "line": int(self.records.lines[row])}

    def _row(self, row: int) -> dict[str, Any]:
        return {**self._place(row), "record": self.records[row]}

    # Files and words.

    def _write(self, report: Mapping[str, Any], final: GPT) -> dict[str, str]:
        """Model, page and findings, where they were asked for and in the run directory."""
        page = render_knowledge_report(report)
        findings = _as_text({name: report[name] for name in _FOR_PROGRAMS if name in report})
        self.folder.deliver(final, self.output)
        files = {
            "output": str(self.output),
            "report": str(self.folder.write_report(page)),
            "findings_file": str(self.folder.path / "findings.json"),
        }
        self.folder.write("findings.json", findings)
        for name, given, text in (
            ("report", self.config.report, page),
            ("findings_file", self.config.findings, findings),
        ):
            if given is not None:
                _write_text(Path(given), text)
                files[name] = given
        return files

    def _tell(
        self, report: Mapping[str, Any], answers: Mapping[str, Any], files: Mapping[str, str]
    ) -> None:
        """One JSON object, or the findings and answers as lines."""
        aside = [field["name"] for field in report["fields"] if field["role"] != "used"]
        if self.config.json:
            summary = {
                "status": "finished",
                **{name: report[name] for name in ("data", "n", "seed", "alpha", "folds", "unit")},
                "fields": [field["name"] for field in report["fields"]],
                "set_aside": aside,
                **files,
                "run_dir": str(self.folder.path),
                "n_findings": len(report["findings"]),
                "findings": report["findings"],
                **{name: answers.get(name) for name in ("complete", "query", "impute")},
                "notes": list(dict.fromkeys([*self.notes, *report["notes"]])),
            }
            print(json.dumps(json_ready(summary), allow_nan=False))
            return
        lines = [*_findings_in_words(report, files["findings_file"]), *_answers_in_words(answers)]
        print("\n".join(lines), flush=True)
        _say(f"wrote {files['output']}: the model of all records")
        _say(f"report: {files['report']}")
        _say(f"findings: {files['findings_file']}")


def _what_was_read(records: Records, fields: Sequence[Field]) -> str:
    """Records, fields, and which of them tell nothing about the others."""
    aside = [f"{_short(f.name)} (it {why_set_aside(f)})" for f in fields if f.kind in _ASIDE]
    return _size_in_words(records.name, len(records), len(fields), aside)


def _size_in_words(name: str, n: int, n_fields: int, aside: Sequence[str]) -> str:
    fields = f"{n_fields:,} field{'s' if n_fields != 1 else ''}"
    text = f"{name}: {n:,} records of {fields}"
    return f"{text}; set aside: {', '.join(aside)}" if aside else text


def _findings_in_words(report: Mapping[str, Any], where: str) -> Iterable[str]:
    found: Sequence[Mapping[str, Any]] = report["findings"]
    aside = [
        f"{_short(field['name'])} (it {field['reason']})"
        for field in report["fields"]
        if field["role"] != "used"
    ]
    yield _size_in_words(report["data"], report["n"], len(report["fields"]), aside)
    rate = f"at a false discovery rate of {report['alpha']:g}"
    if not found:
        yield f"nothing was found {rate}"
        return
    tested = sum(finding["q"] is not None for finding in found)
    facts = f", and {len(found) - tested:,} plain facts" if len(found) > tested else ""
    yield f"{tested:,} finding{'s' if tested != 1 else ''} {rate}, strongest first{facts}:"
    for number, finding in enumerate(found[:_SHOWN_FINDINGS], 1):
        q = "" if finding["q"] is None else f"  (q = {finding['q']:.2g})"
        yield f"{number:3}. {_one_line(finding['sentence'])}{q}"
    if len(found) > _SHOWN_FINDINGS:
        yield f"     and {len(found) - _SHOWN_FINDINGS:,} more in {where}"


def _answers_in_words(answers: Mapping[str, Any]) -> Iterable[str]:
    if "complete" in answers:
        yield ""
        yield from _completion_in_words(answers["complete"])
    if "query" in answers:
        yield ""
        yield "most similar records:"
        for each in answers["query"]:
            yield f"  {each['cosine']:+.3f}  line {each['line']}: {_record(each['record'])}"
    if "impute" in answers:
        yield ""
        yield _imputed_in_words(answers["impute"])


def _imputed_in_words(answer: Mapping[str, Any]) -> str:
    cells, left, file = answer["cells"], answer["left"], answer["file"]
    if not cells and not left:
        return f"no value is missing: {file} holds the same records"
    if not cells:
        return f"none of the {left:,} missing values can be guessed: {file} holds the same records"
    sure = sum(cell["probability"] for cell in cells) / len(cells)
    values = f"{len(cells):,} missing value{'s' if len(cells) > 1 else ''} filled in"
    more = f"; {left:,} that cannot be guessed left as they are" if left else ""
    return f"{file}: {values}, each with a probability of {sure:.0%} on average{more}"


def _completion_in_words(answer: Mapping[str, Any]) -> Iterable[str]:
    field = _short(answer["field"])
    if "held_out" in answer:
        yield _held_out_in_words(field, answer["held_out"])
        return
    for each in answer["answers"][:_SHOWN_ROWS]:
        about = f"given {_record(each['given'])}" if "given" in each else f"line {each['line']}"
        values = ", ".join(f"{_short(v['value'])} {v['probability']:.1%}" for v in each["values"])
        numbers = ""
        if each["median"] is not None:
            numbers = f"; median {each['median']}"
            if each["interval"] is not None:
                numbers += f", 90 % between {each['interval'][0]} and {each['interval'][1]}"
        yield f"{field}, {about}: {values}{numbers}"
    more = answer.get("missing", 0) - _SHOWN_ROWS
    if more > 0:
        yield f"and {more:,} more records without {field}: --impute OUT.csv fills them all in"


def _held_out_in_words(field: str, held_out: Mapping[str, Any]) -> str:
    return (
        f"{field} is missing nowhere. Hidden in each of {held_out['n']:,} records and asked of a "
        f"model that has not seen it, it is guessed right in {held_out['accuracy']:.1%}, against "
        f"{held_out['majority']:.1%} by its commonest value"
    )


def _completion_as_dict(completion: Any) -> dict[str, Any]:
    return {
        "values": [{"value": value, "probability": float(p)} for value, p in completion.values],
        "median": completion.median,
        "interval": None if completion.interval is None else list(completion.interval),
    }


def _record(record: Mapping[str, Value]) -> str:
    """A record in one line of bearable length."""
    if set(record) == {"text"}:
        return _short(record["text"], 2 * _SHOWN_LETTERS)
    return ", ".join(
        f"{_short(name)}={_short(value)}" for name, value in record.items() if value is not None
    )


def _short(text: Value, length: int = _SHOWN_LETTERS) -> str:
    """Text in one line, cut where it is long; control characters would move the cursor."""
    if text is None:
        return "(missing)"
    text = _one_line(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _as_text(content: Any) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
