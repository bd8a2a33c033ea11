"""Knowledge discovery as a library: fit models to records, and ask.

kd = KnowledgeDiscovery(seed=0).fit(read_records("data.csv"))
kd.discover()                          findings, strongest first
kd.complete({"island": "Biscoe"}, "species")
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePath
from typing import Any, Protocol

import numpy as np
import torch

from nanogpt import metadata
from nanogpt.errors import InputError
from nanogpt.explore.crossfit import Fold, assign_folds
from nanogpt.explore.discovery import (
    Results,
    expected_value,
    findings,
    guilty_cells,
    investigate,
    terms_of,
)
from nanogpt.explore.fields import (
    Field,
    FieldClasses,
    as_numbers,
    describe_fields,
    number_text,
    why_set_aside,
)
from nanogpt.explore.findings import Finding
from nanogpt.explore.groups import plane
from nanogpt.explore.learning import Encoded, Encoder, LearningPlan, make_plan, train
from nanogpt.explore.learning import random_orders as orders_of
from nanogpt.explore.reading import read_records
from nanogpt.explore.records import Records, Value
from nanogpt.explore.scoring import Scorer, Surprisal, centred, joint_rescoring
from nanogpt.explore.significance import conformal_p, false_discovery_rates
from nanogpt.explore.terms import KeyTerm, words
from nanogpt.explore.wording import Columns, short
from nanogpt.machine import versions
from nanogpt.model import GPT
from nanogpt.tokenizer import RecordTokenizer, Tokenizer

_TRAINING_FLOPS = 1.2e13  # a minute or two on two cores: what more folds than two may take
_SCORED_TOKENS = 20_000_000
_SCORING_COST = 0.28  # of a token, beside one of training
_LEAST_RECORDS, _MOSTLY_DISTINCT = 10, 0.7
_MOST_SHOWN, _MOST_PLANE, _SHOWN_LETTERS = 50, 2000, 300
_NEIGHBOURS, _MOST_NEIGHBOURS, _MOST_JUDGED = 10, 5000, 500
_STATE_ORDERS = 4


class Store(Protocol):
    """Where trained models are kept, so that an interrupted run goes on with the next one."""

    def load(self, name: str) -> Mapping[str, torch.Tensor] | None:
        """The weights of a model that was saved, or None."""

    def save(self, name: str, model: GPT) -> None:
        """Keep a model that is trained."""


@dataclass(frozen=True)
class Anomalies:
    """How unusual records are.

    Attributes:
        z: (n,) typicality, length-free. p: (n,) of the field that fits worst. q: (n,).
        worst_field: of each record.
    """

    z: np.ndarray
    p: np.ndarray
    q: np.ndarray
    worst_field: list[str]


@dataclass(frozen=True)
class Completion:
    """The distribution of a value that is not known.

    Attributes:
        values: (value, probability), likeliest first; ranges of numbers.
        median, interval: of a number or date, as text; the interval holds 90 %.
    """

    values: list[tuple[str, float]]
    median: str | None = None
    interval: tuple[str, str] | None = None


class KnowledgeDiscovery:
    """What a small model finds in records.

    Args:
        model: one to begin with, whose tokenizer describes the same fields; None for a new one.
        tokenizer: that of the model, where the model has none.
        n_permutations: orders of the fields in which records are scored.
        folds: every record is scored by a model of the other folds; None for 2 to 5 by size.
        epochs: in each a record is shown in eight orders of its fields.
        batch_size: records of an optimizer step; None by size.
        n_layer, n_head, n_embd: the shape; None by kind of data.
        seed: of everything that is drawn.
        alpha: the false discovery rate of `discover`.
        note: called with sentences for the user.
        progress: called with (done, total, what), in tokens.
    """

    def __init__(
        self,
        model: GPT | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        n_permutations: int = 8,
        folds: int | None = None,
        epochs: int = 2,
        batch_size: int | None = None,
        n_layer: int | None = None,
        n_head: int | None = None,
        n_embd: int | None = None,
        seed: int = 0,
        alpha: float = 0.05,
        device: torch.device | str = "cpu",
        note: Callable[[str], None] | None = None,
        progress: Callable[[float, float, str], None] | None = None,
    ) -> None:
        if n_permutations < 1 or (folds is not None and folds < 2) or epochs < 1:
            raise ValueError("n_permutations and epochs must be 1 and more, folds 2 and more")
        self.initial = model
        self._initial_tokenizer = tokenizer or (model.tokenizer if model is not None else None)
        self.n_permutations, self.folds, self.epochs = n_permutations, folds, epochs
        self.batch_size, self.seed, self.alpha = batch_size, seed, alpha
        self._shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
        self.device = torch.device(device)
        self._note = note or (lambda sentence: None)
        self._report_progress = progress or (lambda done, total, what: None)
        self._done, self._total, self._what = 0.0, 1.0, "training"

    # Fitting.

    def check(self, records: Records) -> None:
        """Raises: InputError where there is nothing to learn from, or the model's fields differ."""
        fields = describe_fields(records)
        used = [field for field in fields if field.kind not in ("id", "constant")]
        if len(records) < _LEAST_RECORDS:
            raise InputError(
                f"{records.name} holds {len(records)} records: {_LEAST_RECORDS} are the least to "
                f"learn from"
            )
        if not used:
            raise InputError(
                f"{records.name} has no field to learn: all are constant, or different in every "
                f"record as identifiers are"
            )
        if len(used) == 1 and used[0].kind != "text":
            others = "" if len(fields) == 1 else " (the others are constants or identifiers)"
            raise InputError(
                f"{records.name} has one field, {used[0].name!r}{others}: there is nothing that it "
                f"could go with"
            )
        if self.initial is not None:
            self._initial_encoder(used)

    def _initial_encoder(self, used: Sequence[Field]) -> Encoder:
        tokenizer = self._initial_tokenizer
        if not isinstance(tokenizer, RecordTokenizer):
            raise InputError(
                "the model of --init was not made by explore: it does not describe fields"
            )
        try:
            encoder = Encoder.of(tokenizer)
        except ValueError as error:
            raise InputError(f"the model of --init is damaged: {error}") from None
        theirs = [(field.name, field.kind) for field in encoder.fields]
        ours = [(field.name, field.kind) for field in used]
        if theirs != ours:
            raise InputError(f"the model of --init is of other fields: {_difference(theirs, ours)}")
        return encoder

    def fit(
        self, records: Records | Sequence[Mapping[str, Any]], *, store: Store | None = None
    ) -> "KnowledgeDiscovery":
        """Train a model for each fold, and one of all records.

        Args:
            store: keeps the models; what it has is not trained again.
        Raises: InputError where there is nothing to learn from.
        """
        if not isinstance(records, Records):
            records = Records.from_rows(records)
        self.check(records)
        self.records = records
        self.fields = describe_fields(records)
        self.used = [field for field in self.fields if field.kind not in ("id", "constant")]
        fixed = None if self.initial is None else self._initial_encoder(self.used)
        if fixed is not None:
            self._note(
                "the model of --init may have seen these records: its scores are then too sure"
            )
        n = len(records)
        encoder = fixed or Encoder.fit(self.used, records)
        self.encoded = encoder.encode(records)
        self.plan = self._plan(self.encoded)
        tokens = float(self.encoded.lengths().sum()) * self.plan.views * self.plan.epochs
        shape = self.plan.shape
        block = 12 * shape.n_layer * shape.n_embd**2
        flops = tokens * 6 * (block + shape.vocab_size * shape.n_embd)
        # K folds of (K - 1) / K of the records and one of them all: K times all of them.
        most = next((k for k in (5, 3) if k * flops <= _TRAINING_FLOPS), 2)
        self.n_folds = min(self.folds or most, n)
        # Of many records the last model goes on from the first one, with what that has not seen.
        goes_on = self.n_folds == 2 and 2 * flops > _TRAINING_FLOPS and fixed is None
        passes = 1.5 if goes_on else self.n_folds
        self._total = tokens * passes + _SCORING_COST * self._scored_tokens()
        columns = self._columns_of(encoder)
        keys = columns.keys
        rare = len(set(keys)) >= _MOSTLY_DISTINCT * n  # else equal records are only to be expected
        assignment = assign_folds(n, self.n_folds, self.seed, keys if rare else None)
        distinct = np.ones(n, bool)
        if rare:
            distinct[:] = False
            distinct[columns.first_of_each] = True
        self._folds: list[Fold] = []
        for number in range(self.n_folds):
            rows = np.flatnonzero(assignment != number)
            own = fixed or Encoder.fit(self.used, records.take(rows))
            encoded = own.encode(records)
            self._what = f"training, part {number + 1} of {self.n_folds + 1}"
            name = f"fold-{number + 1}"
            model = self._model(name, encoded.take(rows), number, store, self.initial)
            test = np.flatnonzero(assignment == number)
            self._folds.append(Fold(Scorer(model, own), encoded, rows, test, distinct))
        self._what = f"training, part {self.n_folds + 1} of {self.n_folds + 1}"
        shown, begun = self.encoded, self.initial
        if goes_on:
            first = self._folds[0]
            encoder, self.encoded, begun = first.encoder, first.encoded, first.scorer.model
            shown = first.encoded.take(first.test)
        self.model = self._model("final", shown, self.n_folds, store, begun)
        self.tokenizer = encoder.tokenizer
        self.scorer = Scorer(self.model, encoder)
        self._what = "looking"
        for name in ("_columns", "_crossfitted", "_results"):  # of an earlier fit
            self.__dict__.pop(name, None)
        return self

    def _plan(self, encoded: Encoded) -> LearningPlan:
        try:
            plan = make_plan(encoded, epochs=self.epochs, batch_size=self.batch_size, **self._shape)
        except ValueError as error:
            raise InputError(str(error)) from None
        return plan if self.initial is None else replace(plan, shape=self.initial.config)

    def _model(
        self, name: str, encoded: Encoded, number: int, store: Store | None, begun: GPT | None
    ) -> GPT:
        """A model of some records, kept or trained, from the weights of `begun` if there is one."""
        plan = self.plan
        if self.initial is None:
            vocab_size = encoded.encoder.tokenizer.vocab_size
            plan = replace(plan, shape=replace(plan.shape, vocab_size=vocab_size))
        saved = None if store is None else store.load(name)
        if saved is not None:
            model = GPT(plan.shape)
            try:
                model.load_state_dict(
                    {key: value for key, value in saved.items() if key != metadata.KEY}
                )
            except (RuntimeError, InputError):
                self._note(f"the kept model {name} does not fit and is trained anew")
            else:
                model.tokenizer = encoded.encoder.tokenizer
                return model.to(self.device).eval()
        initial = None
        if begun is not None:
            weights = begun.state_dict()
            initial = {key: value for key, value in weights.items() if key != metadata.KEY}
        model = train(
            encoded, plan, (self.seed, number), initial=initial, device=self.device,
            progress=self._learnt,
        )  # fmt: skip
        if store is not None:
            store.save(name, model)
        return model

    def _scored_tokens(self) -> float:
        """About how many tokens `report` passes through models."""
        record = float(self.encoded.lengths().sum())
        coded = self.encoded.encoder.n_coded if len(self.used) > 1 else 0
        groups = 3
        return record * (self._surprisal_orders + coded * self._n_orders + groups)

    def _learnt(self, tokens: float) -> None:
        self._done = min(self._done + tokens, self._total)
        self._report_progress(self._done, self._total, self._what)

    def _advance(self, tokens: int) -> None:
        self._learnt(_SCORING_COST * tokens)

    # What was found.

    @property
    def _n_orders(self) -> int:
        """Orders in which cells are scored: as many as asked for, fewer for many records."""
        per_order = float(self.encoded.lengths().sum()) * len(self.used)
        return max(1, min(self.n_permutations, int(_SCORED_TOKENS / max(1.0, per_order))))

    @property
    def _surprisal_orders(self) -> int:
        return min(max(2, min(4, self._n_orders)), math.factorial(min(4, len(self.used))))

    @cached_property
    def _columns(self) -> Columns:
        return self._columns_of(self.encoded.encoder)

    def _columns_of(self, encoder: Encoder) -> Columns:
        return Columns(self.records, self.used, encoder.classes, self.encoded.codes)

    @cached_property
    def _crossfitted(self) -> tuple[Surprisal, list[np.ndarray]]:
        """Surprisal of every record by the fold that has not seen it; z of the others' for each."""
        n, width = self.encoded.codes.shape
        bits, expected, z = np.zeros((n, width)), np.zeros((n, width)), np.zeros(n)
        for number, fold in enumerate(self._folds):
            part = fold.scorer.surprisal(
                fold.test_encoded, n_orders=self._surprisal_orders,
                seed=(self.seed, 11, number), progress=self._advance,
            )  # fmt: skip
            bits[fold.test], expected[fold.test] = part.field_bits, part.expected_bits
            z[fold.test] = part.z
        references = [np.delete(z, fold.test) for fold in self._folds]
        return Surprisal(bits.sum(axis=1), bits, z, expected), references

    @cached_property
    def _results(self) -> Results:
        surprisal, references = self._crossfitted
        return investigate(
            self._folds, self._columns, surprisal, references,
            n_orders=self._n_orders, seed=self.seed, progress=self._advance,
        )  # fmt: skip

    def discover(self) -> list[Finding]:
        """The findings at level alpha, strongest first; plain facts on fields come last."""
        aside = [field for field in self.fields if field.kind in ("id", "constant")]
        return findings(self._results, aside, self.alpha)

    def surprisal(self, records: Records | None = None) -> Surprisal:
        """Bits of records; of those that were fitted, each by a model that has not seen it."""
        if records is None:
            return self._crossfitted[0]
        encoded = self.encoded.encoder.encode(records)
        return self.scorer.surprisal(
            encoded, n_orders=self.n_permutations, seed=(self.seed, 12), progress=self._advance
        )

    def anomalies(self, records: Records | None = None, alpha: float = 0.05) -> Anomalies:
        """How unusual records are.

        Args:
            records: None for those that were fitted, whose p is of their worst field and whose q
                counts everything tried; new ones have conformal p-values of their typicality
                against those that were fitted.
        """
        if records is not None:
            scored = self.surprisal(records)
            p = conformal_p(self._crossfitted[0].z, scored.z)
            q = false_discovery_rates({"records": p})["records"]
            excess = scored.field_bits - scored.expected_bits
            names = [self.used[place].name for place in excess.argmax(axis=1).tolist()]
            return Anomalies(scored.z, p, q, names)
        results = self._results
        z = results.surprisal.z
        if not results.cells:
            worst = [self.used[0].name] * len(z)
            return Anomalies(z, results.record_z_p, results.q["records"], worst)
        p = np.stack([each.p for each in results.cells.values()]).min(axis=0)
        guilty, _ = guilty_cells(results)
        q = results.q["cells"].min(axis=0)
        for number, (place, far) in enumerate(results.extremes.items()):
            further = far < p
            guilty = np.where(further, place, guilty)
            p, q = np.minimum(p, far), np.minimum(q, results.q["extremes"][number])
        names = [self.used[place].name for place in guilty.tolist()]
        return Anomalies(z, p, q, names)

    # Questions.

    def complete(
        self,
        record: Mapping[str, Value],
        field: str,
        candidates: Sequence[str] | None = None,
        n: int = 5,
    ) -> Completion:
        """The distribution of one field of a record given the others that are known.

        Every class is put in its place and the whole record scored in `n_permutations` orders:
        P(v | rest) = softmax over v of log p(record with v), a mixture over the orders.

        Args:
            record: what is known; names that are not fields are left out.
            candidates: values to choose from; None for all classes of the field.
            n: values to return.
        Raises: KeyError for a field that is not among those used; ValueError for a text field.
        """
        encoder = self.encoded.encoder
        target = encoder.place(field)
        classes = encoder.classes[target]
        if classes is None:
            raise ValueError(f"{field} is a text: its values cannot be listed")
        given = [
            place
            for place, each in enumerate(encoder.fields)
            if place != target and each.name in record
        ]
        codes = np.arange(classes.n_own)
        labels = [classes.label(code) for code in codes.tolist()]
        if candidates is not None:
            codes = classes.codes(list(candidates))
            labels = list(candidates)
        row = {name: value for name, value in record.items() if value is not None}
        full = {each.name: row.get(each.name) for each in encoder.fields}
        one = encoder.encode(Records.from_rows([full]))
        many = one.take(np.zeros(len(codes), np.int64))
        many.codes[:, target] = codes
        many.ids[:, target] = encoder.class_ids[target][codes]
        fields = np.array([*given, target], np.int64)
        rng = np.random.default_rng((self.seed, 13))
        rows = np.arange(len(codes))
        logs = np.zeros((len(codes), self.n_permutations))
        for number in range(self.n_permutations):
            order = fields[orders_of(rng, 1, len(fields))]
            cells, _, _ = self.scorer.cell_scores(
                many, rows, np.broadcast_to(order, (len(codes), len(fields)))
            )
            logs[:, number] = -cells.sum(axis=1) * math.log(2)
        p = joint_rescoring(logs)
        if candidates is not None and classes.is_number is False:
            unseen = [
                label for label, code in zip(labels, codes, strict=True) if code == classes.other
            ]
            for place, code in enumerate(codes.tolist()):  # unseen ones share that class
                if code == classes.other:
                    p[place] /= len(unseen)
            p /= p.sum()
        order_ = np.argsort(-p, kind="stable")[:n]
        values = [(labels[place], float(p[place])) for place in order_.tolist()]
        if not classes.is_number or candidates is not None:
            return Completion(values)
        kind = classes.field.kind
        quantiles = [
            number_text(self._quantile(target, p, each), kind) for each in (0.05, 0.5, 0.95)
        ]
        return Completion(values, quantiles[1], (quantiles[0], quantiles[2]))

    def _quantile(self, target: int, p: np.ndarray, level: float) -> float:
        """Of a number with these probabilities of its bins, spread over the values of each."""
        classes = self.encoded.encoder.classes[target]
        assert classes is not None
        numbers = self._columns.numbers(target)
        known = np.flatnonzero(~np.isnan(numbers))
        known = known[np.argsort(numbers[known], kind="stable")]
        codes = self.encoded.codes[known, target]
        weight = p / np.maximum(np.bincount(codes, minlength=len(p))[: len(p)], 1)
        total = np.cumsum(weight[codes])
        at = int(np.searchsorted(total, level * total[-1]))
        return float(numbers[known[min(at, len(known) - 1)]])

    def impute(self) -> tuple[Records, list[tuple[int, str, str, float]]]:
        """The records with missing values filled in, and (row, field, value, probability) of each.

        A category gets its likeliest value, a number its median; texts stay as they are.
        """
        encoder, columns = self.encoded.encoder, [list(c) for c in self.records.columns]
        filled: list[tuple[int, str, str, float]] = []
        for target, (field, classes) in enumerate(
            zip(encoder.fields, encoder.classes, strict=True)
        ):
            if classes is None or not classes.n_own:
                continue
            rows = np.flatnonzero(self.encoded.codes[:, target] == classes.missing)
            if not len(rows):
                continue
            p = self.scorer.given_rest(
                self.encoded.take(rows), target, n_orders=self.n_permutations, seed=(self.seed, 14)
            )[:, : classes.n_own]
            p /= p.sum(axis=1, keepdims=True)
            column = columns[self.records.names.index(field.name)]
            digits = _digits(self.records.column(field.name))
            for row, each in zip(rows.tolist(), p, strict=True):
                if classes.is_number:
                    middle = self._quantile(target, each, 0.5)
                    if field.kind == "number":
                        value = f"{middle:.{digits}f}"
                    else:
                        value = number_text(round(middle), "date")
                else:
                    value = classes.values[int(each.argmax())]
                column[row] = value
                filled.append((row, field.name, value, float(each.max())))
        filled.sort(key=lambda each: (each[0], each[1]))
        records = self.records
        whole = Records(
            records.name, records.format, records.names, columns, records.lines, records.notes
        )
        return whole, filled

    def held_out(self, field: str) -> dict[str, Any]:
        """How well a field is completed in records that the models have not seen.

        Raises: KeyError for a field that is not among the coded ones.
        """
        cells = self._results.cells[self.encoded.encoder.place(field)]
        majority = float(self._results.pairs.majority[self.encoded.encoder.place(field)])
        return {
            "accuracy": float(cells.correct.mean()),
            "majority": majority,
            "bits": float(cells.bits.mean()),
            "n": len(cells.bits),
        }

    def similar(self, record: Mapping[str, Value] | str, k: int = 10) -> list[tuple[int, float]]:
        """The records most like one, or like a text: (row, cosine of centred states).

        A record with some of the fields is compared by these. A text is compared with the text
        fields; where there are none, its words are looked up among the values of the fields.
        Raises: ValueError where nothing of the text is known.
        """
        encoder = self.encoded.encoder
        if isinstance(record, str):
            record = record_of_text(record, encoder.fields, encoder.classes)
        places = [place for place, each in enumerate(encoder.fields) if each.name in record]
        if not places:
            raise ValueError("the record has none of the fields")
        full = {each.name: record.get(each.name) for each in encoder.fields}
        one = encoder.encode(Records.from_rows([full]))
        total = np.zeros((len(self.records) + 1, self.model.config.n_embd))
        for number in range(_STATE_ORDERS if len(places) > 1 else 1):
            order = np.random.default_rng((self.seed, 15, number)).permutation(places)
            total[1:] += self.scorer.states_of(self.encoded, order)
            total[:1] += self.scorer.states_of(one, order)
        states = total - total[1:].mean(axis=0)
        norms = np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-12)
        states /= norms
        cosine = states[1:] @ states[0]
        best = np.argsort(-cosine, kind="stable")[:k]
        return [(row, float(cosine[row])) for row in best.tolist()]

    def key_terms(
        self, rows: Sequence[int] | np.ndarray, background: Sequence[int] | None = None, k: int = 20
    ) -> list[KeyTerm]:
        """The terms that set some records apart from others, or from all the rest."""
        inside = np.zeros(len(self.records), bool)
        inside[np.asarray(rows, np.int64)] = True
        if background is None:
            return terms_of(self._columns, inside, k=k)
        some = np.unique(np.concatenate([np.flatnonzero(inside), np.asarray(background)]))
        part = replace(
            self._columns, records=self.records.take(some), codes=self.encoded.codes[some]
        )
        return terms_of(part, inside[some], k=k)

    # The report.

    def report(self) -> dict[str, Any]:
        """Everything that findings.json and the page show, JSON-ready."""
        results, records = self._results, self.records
        self._learnt(self._total)
        found = self.discover()
        unusual = self._unusual()
        rows = {row for finding in found[:200] for row in finding.rows[:5]}
        rows |= {each["row"] for each in unusual}
        groups = self._groups_part(found)
        if groups is not None:
            rows |= {row for group in groups["groups"] for row in group["examples"]}
        weights = metadata.tensor_digest(dict(self.model.named_parameters()))
        shape = self.model.config
        return {
            "data": PurePath(records.name).name,
            "n": len(records),
            "seed": self.seed,
            "alpha": self.alpha,
            "folds": self.n_folds,
            "model": {
                "id": hashlib.sha256(weights.encode()).hexdigest()[:16],
                "parameters": shape.n_parameters(),
                "n_layer": shape.n_layer,
                "n_embd": shape.n_embd,
                "epochs": self.epochs,
                "tokens": int(self.encoded.lengths().sum()),
            },
            "versions": versions(),
            "unit": "bits",
            "notes": [*records.notes, *self._field_notes()],
            "fields": [self._field_part(field) for field in self.fields],
            "findings": [
                {**each.as_dict(), "lines": records.lines[list(each.rows)].tolist()}
                for each in found
            ],
            "anomalies": unusual,
            "dependencies": self._dependencies_part(results),
            "groups": groups,
            "quality": self._quality_part(results),
            "drift": [
                {"field": " along ".join(each.fields), **each.details["blocks"], "q": each.q}
                for each in found
                if each.kind == "drift"
            ],
            "records": {str(row): self._shown_record(row) for row in sorted(rows)},
        }

    def _field_notes(self) -> list[str]:
        notes = [
            f"{field.name} was set aside: it {why_set_aside(field)}"
            for field in self.fields
            if field.kind in ("id", "constant")
        ]
        return [*notes, *reading_notes(self.fields)]

    def _field_part(self, field: Field) -> dict[str, Any]:
        column = self.records.column(field.name)
        part: dict[str, Any] = {
            "name": field.name, "kind": field.kind, "missing": field.missing,
            "distinct": field.distinct, "bits_marginal": None, "bits_model": None,
            "examples": [], "histogram": None,
        }  # fmt: skip
        aside = field.kind in ("id", "constant")
        part["role"] = "set aside" if aside else "used"
        part["reason"] = None
        if aside:
            part["reason"] = why_set_aside(field)
        if field.kind in ("number", "date"):
            numbers = as_numbers(column, field.kind)
            numbers = numbers[np.abs(numbers) < 1e100]  # larger ones have no width to count in
            if len(numbers):
                counts, edges = np.histogram(numbers, bins=min(24, max(4, len(numbers) // 10)))
                part["histogram"] = {"edges": edges.tolist(), "counts": counts.tolist()}
        elif field.kind == "category":
            values, counts = np.unique([v for v in column if v is not None], return_counts=True)
            best = np.argsort(-counts, kind="stable")[:8]
            part["examples"] = [[short(str(values[i])), int(counts[i])] for i in best.tolist()]
        else:
            part["examples"] = [[short(v), 1] for v in column[:3] if v is not None]
        if not aside:
            place = self.encoded.encoder.place(field.name)
            if place in self._results.cells:
                cells = self._results.cells[place]
                part["bits_marginal"] = float(cells.unigram_bits.mean())
                part["bits_model"] = float(cells.bits.mean())
            else:
                part["bits_model"] = float(self._results.surprisal.field_bits[:, place].mean())
        return part

    def _unusual(self) -> list[dict[str, Any]]:
        """The most unusual records, significant or not."""
        results, anomalies = self._results, self.anomalies()
        z = np.nan_to_num(anomalies.z, posinf=1e9)
        order = np.lexsort((-z, anomalies.p))[:_MOST_SHOWN].tolist()
        found = []
        for row in order:
            field = anomalies.worst_field[row]
            place = self.encoded.encoder.place(field)
            expected = []
            if place in results.cells:
                expected = [list(expected_value(results, place, row))]
            cells = [
                {
                    "field": self.used[each].name,
                    "value": self._columns.value(each, row),
                    "bits": float(results.surprisal.field_bits[row, each]),
                    "tail": float(results.cells[each].p[row]) if each in results.cells else None,
                }
                for each in range(len(self.used))
            ]
            found.append(
                {
                    "row": row,
                    "line": int(self.records.lines[row]),
                    "z": float(anomalies.z[row]) if np.isfinite(anomalies.z[row]) else None,
                    "bits": float(results.surprisal.bits[row]),
                    "q": float(anomalies.q[row]),
                    "field": field,
                    "value": self._columns.value(place, row),
                    "expected": expected,
                    "cells": cells,
                }
            )
        return found

    def _dependencies_part(self, results: Results) -> dict[str, Any]:
        def table(values: np.ndarray) -> list[list[float | None]]:
            return [[None if np.isnan(v) else float(v) for v in row] for row in values]

        return {
            "fields": [field.name for field in self.used],
            "bits": table(results.pairs.bits),
            "share": table(results.pairs.share),
            "q": table(results.q["pair_table"]),
        }

    def _groups_part(self, found: Sequence[Finding]) -> dict[str, Any] | None:
        groups = self._results.groups
        if groups is None:
            return None
        n = len(self.records)
        rng = np.random.default_rng((self.seed, 16))
        rows = np.arange(n) if n <= _MOST_PLANE else np.sort(rng.choice(n, _MOST_PLANE, False))
        states = self.scorer.states(self.encoded.take(rows), n_orders=2, seed=(self.seed, 17))
        flat = plane(centred(states, 0))
        parts = []
        for finding in found:
            if finding.kind != "group":
                continue
            g = int(finding.details["group"])
            members = groups.members[g]
            parts.append(
                {
                    "id": g,
                    "size": len(members),
                    "q": finding.q,
                    "terms": finding.details["terms"][:10],
                    "fields": [],
                    "examples": members[:3].tolist(),
                }
            )
        of = np.full(n, -1)
        for part in sorted(parts, key=lambda each: -each["size"]):  # the smallest are seen
            of[groups.members[part["id"]]] = part["id"]
        labels = of[rows].tolist()
        points = [[float(x), float(y), g] for (x, y), g in zip(flat, labels, strict=True)]
        return {"plane": points, "rows": rows.tolist(), "groups": parts}

    def _quality_part(self, results: Results) -> list[dict[str, Any]]:
        """Bits of each field: by its shares, by the nearest records, by the model; held out."""
        nearest = self._nearest_bits()
        found = []
        for place, cells in results.cells.items():
            difference = cells.bits - cells.unigram_bits
            found.append(
                {
                    "field": self.used[place].name,
                    "unigram": float(cells.unigram_bits.mean()),
                    "nearest": nearest.get(place),
                    "model": float(cells.bits.mean()),
                    "accuracy": float(cells.correct.mean()),
                    "se": float(difference.std(ddof=1) / math.sqrt(len(difference))),
                }
            )
        return found

    def _nearest_bits(self) -> dict[int, float]:
        """Bits of each coded field by the ten training records that agree in most other fields."""
        total: dict[int, float] = {}
        count = 0
        rng = np.random.default_rng((self.seed, 18))
        coded = self._results.coded
        for fold in self._folds:
            train_rows = fold.train
            if len(train_rows) > _MOST_NEIGHBOURS:
                train_rows = rng.choice(train_rows, _MOST_NEIGHBOURS, replace=False)
            test = fold.test[: max(1, _MOST_JUDGED // len(self._folds))]
            ours, theirs = fold.encoded.codes[test], fold.encoded.codes[train_rows]
            agree = (ours[:, None, coded] == theirs[None, :, coded]).astype(np.int16)
            whole = agree.sum(axis=2)
            count += len(test)
            for number, place in enumerate(coded):
                rest = whole - agree[:, :, number]
                k = min(_NEIGHBOURS, rest.shape[1])
                best = np.argpartition(-rest, k - 1, axis=1)[:, :k]
                hits = (theirs[best, place] == ours[:, place, None]).sum(axis=1)
                p = (hits + fold.shares(place)[ours[:, place]]) / (k + 1)
                total[place] = total.get(place, 0.0) - float(np.log2(p).sum())
        return {place: value / count for place, value in total.items()}

    def _shown_record(self, row: int) -> dict[str, Value]:
        record = self.records[row]
        return {
            name: value if value is None else value[:_SHOWN_LETTERS]
            for name, value in record.items()
        }


def record_of_text(
    text: str, fields: Sequence[Field], classes: Sequence[FieldClasses | None]
) -> dict[str, Value]:
    """What a text tells of a record: all of it its text fields, or else the values it names.

    Args:
        classes: of the fields, None for a text.
    Raises: ValueError where there is no text field and nothing of it is a value.
    """
    pairs = list(zip(fields, classes, strict=True))
    written = [field.name for field, each in pairs if each is None]
    if written:
        return dict.fromkeys(written, text)
    known = set(words(text)) | {text.strip().lower()}
    found: dict[str, Value] = {}
    for field, each in pairs:
        for value in each.values if each is not None else ():
            if value.lower() in known:
                found.setdefault(field.name, value)
    if not found:
        raise ValueError(f"nothing of {short(text)!r} is a value of a field: write FIELD=VALUE,…")
    return found


def reading_notes(fields: Sequence[Field]) -> list[str]:
    """Sentences on values that were read as something else than what is written."""
    notes = []
    for field in fields:
        if field.words:
            names = ", ".join(repr(word) for word in field.words)
            notes.append(f"{field.name}: {names} was read as missing")
        if field.odd:
            odd = f"1 value is no {field.kind}"
            if field.odd > 1:
                odd = f"{field.odd:,} values are no {field.kind}s"
            notes.append(f"{field.name}: {odd}")
    return notes


def _difference(theirs: Sequence[tuple[str, str]], ours: Sequence[tuple[str, str]]) -> str:
    """How (name, kind) of a model's fields differ from those of records, in words."""
    if sorted(theirs) == sorted(ours):
        return "it knows the same ones in another order"
    here = dict(ours)
    for name, kind in theirs:
        if name not in here:
            known = ", ".join(repr(each) for each, _ in ours[:6])
            return f"it knows {name!r} as a {kind}, and these records have {known}"
        if here[name] != kind:
            return f"it knows {name!r} as a {kind}, and in these records it is a {here[name]}"
    name = next(name for name, _ in ours if name not in dict(theirs))
    return f"it does not know {name!r}, which these records have"


def _digits(column: Sequence[Value]) -> int:
    """Digits behind the point that most of a field's numbers have."""
    found = [len(value.partition(".")[2]) for value in column[:1000] if value]
    return int(np.median(found)) if found and all(each < 12 for each in found) else 2


def discover(path: str, **options: Any) -> dict[str, Any]:
    """Read a file, fit, and report: the dict of `KnowledgeDiscovery.report`.

    Args:
        options: of KnowledgeDiscovery.
    Raises: InputError where the file cannot be read or there is nothing to learn from.
    """
    return KnowledgeDiscovery(**options).fit(read_records(path)).report()


__all__ = [
    "Anomalies",
    "Completion",
    "KnowledgeDiscovery",
    "Store",
    "discover",
    "reading_notes",
    "record_of_text",
]
