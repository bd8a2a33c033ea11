"""What is found in records, and what is not: small tables whose truth is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from nanogpt.errors import InputError
from nanogpt.explore import KnowledgeDiscovery, discover, read_records
from nanogpt.explore.crossfit import Fold, assign_folds
from nanogpt.explore.fields import Field, describe_fields, fit_classes
from nanogpt.explore.groups import k_means, related_parts, table_groups
from nanogpt.explore.learning import Encoder
from nanogpt.explore.records import Records
from nanogpt.explore.scoring import Scorer
from nanogpt.model import GPT

COUNTRY_OF = {"Rome": "Italy", "Oslo": "Norway", "Lima": "Peru", "Bonn": "Germany"}


def city_rows(n=600, n_swapped=12, seed=0, name="noise"):
    """Cities in their countries, all equally frequent; a few rows with another country."""
    rng = np.random.default_rng(seed)
    cities = list(COUNTRY_OF)
    rows = [
        {"city": city, "country": COUNTRY_OF[city], name: str(rng.choice(list("xyz")))}
        for city in (cities[row % 4] for row in rng.permutation(n))
    ]
    swapped = rng.choice(n, n_swapped, replace=False).tolist()
    for row in swapped:
        others = [c for c in COUNTRY_OF.values() if c != rows[row]["country"]]
        rows[row]["country"] = str(rng.choice(others))
    return rows, swapped


@pytest.fixture(scope="module")
def cities():
    rows, swapped = city_rows()
    return KnowledgeDiscovery(folds=3, seed=0).fit(rows), swapped


@pytest.fixture(scope="module")
def colours():
    """2 (red, S), 1 (red, L), 3 (blue, L), a hundred times."""
    rows = [("red", "S"), ("red", "S"), ("red", "L"), ("blue", "L"), ("blue", "L"), ("blue", "L")]
    rng = np.random.default_rng(0)
    many = [dict(zip(("colour", "size"), rows[k % 6], strict=True)) for k in rng.permutation(600)]
    return KnowledgeDiscovery(folds=2, seed=0, epochs=4).fit(many)


def auroc(scores, rows):
    inside = np.zeros(len(scores), bool)
    inside[rows] = True
    order = np.argsort(np.argsort(scores, kind="stable"), kind="stable")
    count = inside.sum()
    return (order[inside].sum() - count * (count - 1) / 2) / (count * (~inside).sum())


def test_a_broken_joint_distribution_is_seen(cities):
    """E6: countries that do not fit their city; every field alone looks in order."""
    assert 2 - np.log2(0.99) == pytest.approx(2.0145, abs=1e-4)  # of the ideal model, in order
    assert 2 - np.log2(0.01 / 3) == pytest.approx(10.2288, abs=1e-4)  # and swapped
    kd, swapped = cities
    surprisal = kd.surprisal()
    noise = np.log2(3)
    in_order = np.delete(surprisal.bits, swapped)
    assert np.median(in_order) - noise == pytest.approx(2.03, abs=0.15)
    assert surprisal.bits[swapped].mean() - noise > 6.5
    assert auroc(surprisal.bits, swapped) >= 0.98
    assert auroc(surprisal.z, swapped) >= 0.98
    unigram = sum(cells.unigram_bits for cells in kd._results.cells.values())
    assert auroc(unigram, swapped) == pytest.approx(0.5, abs=0.05)
    anomalies = kd.anomalies()
    named = sum(anomalies.worst_field[row] == "country" for row in swapped)
    assert named >= 0.9 * len(swapped)


def test_swapped_values_are_reported_and_no_others(cities):
    kd, swapped = cities
    found = [each for each in kd.discover() if each.kind == "unusual"]
    rows = {row for each in found for row in each.rows}
    assert rows <= set(swapped)
    assert len(rows) >= 0.9 * len(swapped)
    line = kd.records.lines[found[0].rows[0]]
    assert f"line {line}: country" in found[0].sentence
    assert all(each.q <= 0.05 for each in found)


def test_a_field_that_gives_another_away_is_the_strongest_finding(cities):
    kd, _ = cities
    first = kd.discover()[0]
    assert set(first.fields) == {"city", "country"}
    assert first.effect == pytest.approx(2, abs=0.25)
    assert not any("noise" in each.fields for each in kd.discover())


def test_findings_are_in_order_of_evidence(cities):
    kd, _ = cities
    evidence = [each.evidence_bits for each in kd.discover()]
    assert evidence == sorted(evidence, reverse=True)


def test_completion_of_either_field(colours):
    """E7: P(S | red) = 2/3, and P(red | L) = 1/4, which left to right alone would call 1/2."""
    size = dict(colours.complete({"colour": "red"}, "size").values)
    colour = dict(colours.complete({"size": "L"}, "colour").values)
    assert size["S"] == pytest.approx(2 / 3, abs=0.05)
    assert colour["red"] == pytest.approx(1 / 4, abs=0.05)
    assert sum(size.values()) == pytest.approx(1)
    nothing_known = dict(colours.complete({}, "colour").values)
    assert nothing_known["red"] == pytest.approx(1 / 2, abs=0.1)


def test_a_value_that_was_never_seen_is_improbable_and_possible(colours):
    answer = dict(colours.complete({"size": "L"}, "colour", ["red", "blue", "green"]).values)
    assert sum(answer.values()) == pytest.approx(1)
    assert 0 < answer["green"] < answer["red"]


def test_completion_refuses_what_it_cannot_do(colours):
    with pytest.raises(KeyError):
        colours.complete({}, "weight")


def test_similar_records(colours, cities):
    """E14: a record's equals come first, and with cosine 1."""
    kd, _ = cities
    record = kd.records[5]
    found = kd.similar(record, k=20)
    assert found[0][1] == pytest.approx(1, abs=1e-6)
    assert all(kd.records[row] == record for row, _ in found)
    part = kd.similar({"city": "Oslo"}, k=100)
    assert all(kd.records[row]["city"] == "Oslo" for row, _ in part)
    assert [row for row, _ in kd.similar("oslo", k=100)] == [row for row, _ in part]
    with pytest.raises(ValueError, match="nothing of"):
        kd.similar("Timbuktu")


def test_key_terms_of_a_subset(cities):
    kd, _ = cities
    rows = [row for row in range(len(kd.records)) if kd.records[row]["city"] == "Lima"]
    terms = kd.key_terms(rows)
    assert {terms[0].term, terms[1].term} == {"city=Lima", "country=Peru"}
    others = [row for row in range(len(kd.records)) if kd.records[row]["city"] == "Bonn"]
    against = {term.term: term for term in kd.key_terms(rows, others, k=50)}
    assert against["city=Lima"].background_share == 0
    assert "city=Rome" not in against


def test_independent_fields_tell_nothing_about_each_other():
    """E15: pointwise information is about nothing, and nothing is reported."""
    rng = np.random.default_rng(3)
    rows = [
        {
            "a": str(rng.choice(list("pqr"))),
            "b": str(rng.choice(list("st"))),
            "c": f"{rng.normal():.3f}",
        }
        for _ in range(600)
    ]
    kd = KnowledgeDiscovery(folds=3, seed=0).fit(rows)
    bits = kd._results.pairs.bits
    assert np.nanmax(np.abs(bits)) * np.log(2) < 0.05
    assert kd.discover() == []
    assert kd.report()["findings"] == []


def test_a_model_that_has_seen_an_anomaly_finds_it_less_surprising():
    """E11: five corrupted rows of 500, by models that have not seen them and by one that has."""
    rows, corrupted = city_rows(500, 5, seed=5)
    for number, row in enumerate(rows):
        row["serial"] = str(number % 50)  # something to remember them by
    kd = KnowledgeDiscovery(folds=3, seed=0, epochs=8).fit(rows)
    unseen = kd.surprisal()
    top = np.argsort(-unseen.z)[:10]
    assert len(set(corrupted) & set(top.tolist())) >= 4
    seen = kd.surprisal(kd.records)
    country = kd.encoded.encoder.place("country")
    assert (
        seen.field_bits[corrupted, country].mean()
        < unseen.field_bits[corrupted, country].mean() - 0.3
    )


def test_bins_are_those_of_the_training_rows():
    """E16: an extreme value that is tested moves no bin, and no token of any other row."""
    rng = np.random.default_rng(0)
    values = [f"{value:.3f}" for value in rng.normal(size=100)]
    field = Field("x", "number", 0, 100)
    assert fit_classes(field, values).edges == fit_classes(field, list(values)).edges
    assert fit_classes(field, values).high != fit_classes(field, [*values, "1e9"]).high

    def folds(outlier):
        rows = [{"x": value, "y": "ab"[k % 2]} for k, value in enumerate(values)]
        assignment = assign_folds(100, 2, 0)
        place = int(np.flatnonzero(assignment == 0)[0])
        if outlier:
            rows[place]["x"] = "1e9"
        kd = KnowledgeDiscovery(folds=2, n_layer=1, n_embd=8, n_head=1, epochs=1).fit(rows)
        return kd._folds, place

    (plain, _), (moved, place) = folds(False), folds(True)
    assert place in plain[0].test.tolist()
    assert plain[0].encoder.classes[0].edges == moved[0].encoder.classes[0].edges
    np.testing.assert_array_equal(
        plain[0].encoded.ids[plain[0].train], moved[0].encoded.ids[plain[0].train]
    )
    assert plain[1].encoder.classes[0].high < moved[1].encoder.classes[0].high == 1e9


def test_every_record_is_tested_once():
    assignment = assign_folds(103, 5, 7)
    assert sorted(np.bincount(assignment).tolist()) == [20, 20, 21, 21, 21]
    assert (assign_folds(103, 5, 7) == assignment).all()
    assert (assign_folds(103, 5, 8) != assignment).any()


def test_missing_values_are_filled_in_and_nothing_else():
    rows, _ = city_rows(300, 0)
    hidden = list(range(0, 300, 25))
    truth = [rows[row]["country"] for row in hidden]
    for row in hidden:
        rows[row]["country"] = None
    kd = KnowledgeDiscovery(folds=2, seed=0).fit(rows)
    filled, cells = kd.impute()
    assert [cell[0] for cell in cells] == hidden
    assert [cell[2] for cell in cells] == truth
    assert all(0.5 < cell[3] <= 1 for cell in cells)
    for row in set(range(300)) - set(hidden):
        assert filled[row] == kd.records[row]


def test_a_number_is_completed_with_an_interval():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(500):
        kind = str(rng.choice(["small", "large"]))
        rows.append({"kind": kind, "weight": f"{rng.normal(10 if kind == 'small' else 50, 2):.2f}"})
    kd = KnowledgeDiscovery(folds=2, seed=0).fit(rows)
    small, large = (
        kd.complete({"kind": "small"}, "weight"),
        kd.complete({"kind": "large"}, "weight"),
    )
    assert 8 < float(small.median) < 12
    assert 48 < float(large.median) < 52
    assert float(small.interval[0]) < 10 < float(small.interval[1]) < 25
    told = [each for each in kd.discover() if each.kind == "dependency"]
    assert "weight is" in told[0].sentence
    assert "median" in told[0].sentence


def test_fields_that_repeat_others_and_fields_that_tell_nothing():
    rng = np.random.default_rng(0)
    rows = []
    for number in range(400):
        level = int(rng.integers(3))
        metres = rng.normal(5, 2)
        rows.append(
            {
                "id": f"r{number}", "unit": "m", "level": str(level), "grade": "abc"[level],
                "copy": str(level), "metres": f"{metres:.3f}", "feet": f"{metres * 3.28084:.3f}",
                "other": str(rng.choice(["u", "v"])),
            }
        )  # fmt: skip
    kd = KnowledgeDiscovery(folds=2, seed=0).fit(rows)
    by_fields = {each.fields: each for each in kd.discover()}
    assert by_fields["level", "grade"].kind == "duplicate_fields"
    assert by_fields["level", "copy"].sentence == "copy repeats level, value for value"
    assert "feet = 3.281 · metres" in by_fields["metres", "feet"].sentence
    assert by_fields["id",].kind == "id"
    assert by_fields["unit",].kind == "constant"
    assert by_fields["id",].q is None
    assert not any("other" in fields for fields in by_fields)


def test_copies_of_records_are_found_where_chance_would_not_make_them():
    rng = np.random.default_rng(1)
    rows = [
        {"a": f"{rng.normal():.4f}", "b": f"{rng.normal():.4f}", "c": str(rng.choice(list("xy")))}
        for _ in range(300)
    ]
    rows[250] = dict(rows[20])
    rows[260] = {**rows[30], "c": "xy"[rows[30]["c"] == "x"]}
    few = [{"c": str(rng.choice(list("xy"))), "d": str(rng.choice(list("pq")))} for _ in range(300)]
    found = {each.kind: each for each in KnowledgeDiscovery(folds=2, seed=0).fit(rows).discover()}
    assert found["duplicates"].rows == (20, 250)
    assert found["near_duplicates"].rows == (30, 260)
    assert "but for c" in found["near_duplicates"].sentence
    assert KnowledgeDiscovery(folds=2, seed=0).fit(few).discover() == []


def test_drift_along_the_file():
    rng = np.random.default_rng(2)
    rows = [
        {"heat": f"{rng.normal(20 + row / 50, 3):.2f}", "sky": str(rng.choice(["sun", "rain"]))}
        for row in range(500)
    ]
    found = KnowledgeDiscovery(folds=2, seed=0).fit(rows).discover()
    assert [(each.kind, each.fields) for each in found] == [("drift", ("heat",))]
    assert "changes along the file" in found[0].sentence
    blocks = found[0].details["blocks"]["values"]
    assert blocks[0] < 22 < 28 < blocks[-1]


def test_drift_along_a_date_and_a_number_far_out():
    rng = np.random.default_rng(4)
    rows = [
        {"day": f"2024-{k // 28 + 1:02d}-{k % 28 + 1:02d}",
         "price": f"{k / 5 + rng.normal(0, 5):.1f}",
         "weight": f"{rng.lognormal(3, 0.4):.2f}", "sky": str(rng.choice(["sun", "rain"]))}
        for k in rng.integers(0, 336, 500).tolist()
    ]  # fmt: skip
    rows[77]["weight"] = "99999"
    rows[78]["weight"] = "1e999"
    found = {each.kind: each for each in KnowledgeDiscovery(folds=2, seed=0).fit(rows).discover()}
    assert set(found) == {"drift", "unusual"}
    assert found["drift"].fields == ("price", "day")
    assert "price changes along day: its median goes from" in found["drift"].sentence
    values = found["drift"].details["blocks"]["values"]
    assert values == sorted(values)
    assert found["unusual"].rows == (77,)
    assert "weight 99999 is far out; 99% of the others lie between" in found["unusual"].sentence


@pytest.mark.parametrize("seed", range(4))
def test_small_tables_in_which_nothing_is_hold_nothing(seed):
    """Rare values and heavy tails, as many records as a small fold has: none of it is reported."""
    rng = np.random.default_rng(seed)
    n = (40, 60, 100, 200)[seed]
    rows = [
        {"rare": str(rng.choice(list("abc"), p=[0.9, 0.08, 0.02])),
         "tail": f"{rng.pareto(1.2):.1f}", "many": str(rng.choice(list("abcdefgh"))),
         "gone": None if rng.random() < 0.1 else "xy"[k % 2]}
        for k in rng.permutation(n).tolist()
    ]  # fmt: skip
    assert KnowledgeDiscovery(seed=seed, epochs=4).fit(rows).discover() == []


def test_two_fields_that_change_along_the_file_are_said_to():
    rng = np.random.default_rng(0)
    walks = rng.normal(size=(300, 2)).cumsum(axis=0)
    rows = [{"a": f"{a:.3f}", "b": f"{b:.3f}"} for a, b in walks]
    found = KnowledgeDiscovery(folds=2, seed=0).fit(rows).discover()
    assert sum(each.kind == "drift" for each in found) == 2
    together = [each for each in found if each.kind == "dependency"]
    assert all("both change along the file too" in each.sentence for each in together)
    hump = [{"x": f"{rng.normal(4 * np.sin(k / 400 * np.pi), 1):.3f}", "y": "uv"[k % 2]}
            for k in range(400)]  # fmt: skip
    (drift,) = KnowledgeDiscovery(folds=2, seed=0).fit(hump).discover()
    assert "highest in the fo" in drift.sentence or "highest in the fi" in drift.sentence


def test_copies_let_no_false_finding_through():
    rng = np.random.default_rng(0)
    rows = [
        {"a": str(rng.choice(list("pqr"))), "b": f"{rng.normal():.3f}",
         "c": str(rng.choice(list("xyzw"))), "d": f"{rng.normal():.3f}"}
        for _ in range(300)
    ]  # fmt: skip
    rows += [dict(rows[k]) for k in range(60)]
    kd = KnowledgeDiscovery(folds=3, seed=0).fit(rows)
    assert [each.kind for each in kd.discover()] == ["duplicates"]
    for fold in kd._folds:
        keys = [tuple(kd.records[row].values()) for row in range(360)]
        assert not {keys[row] for row in fold.train} & {keys[row] for row in fold.test}


def test_close_numbers_are_not_the_same_in_another_unit():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        start = rng.uniform(0, 1000)
        end = start + rng.uniform(0, 4)  # correlated by 0.99999
        rows.append(
            {"start": f"{start:.4f}", "end": f"{end:.4f}", "c": str(rng.choice(["u", "v"]))}
        )
    found = KnowledgeDiscovery(folds=2, seed=0).fit(rows).discover()
    assert found[0].fields == ("start", "end") or found[0].fields == ("end", "start")
    assert "another unit" not in found[0].sentence


def test_what_is_said_of_names_of_records():
    rng = np.random.default_rng(0)
    rows = [
        {"id": f"C{k:05d}", "zip": f"{int(rng.integers(100)):05d}", "x": "uv"[int(rng.integers(2))],
         "y": str(rng.choice(["p", "q"]))}
        for k in range(200)
    ]  # fmt: skip
    rows[150]["id"] = rows[3]["id"]
    kd = KnowledgeDiscovery(folds=2, seed=0).fit(rows)
    (fact,) = kd.discover()
    assert "id has 199 different values in 200 records" in fact.sentence
    assert "'C00003' stands on lines 4 and 151" in fact.sentence
    assert fact.rows == (3, 150)
    assert {field.name: field.kind for field in kd.fields}["zip"] == "category"


def test_another_fit_forgets_the_first():
    options = {"folds": 2, "n_layer": 1, "n_head": 1, "n_embd": 8, "epochs": 1}
    kd = KnowledgeDiscovery(**options).fit(city_rows(80, 0, seed=1)[0])
    kd.surprisal()
    kd.fit(city_rows(60, 0, seed=2)[0])
    fresh = KnowledgeDiscovery(**options).fit(city_rows(60, 0, seed=2)[0])
    np.testing.assert_array_equal(kd.surprisal().bits, fresh.surprisal().bits)


def fold_of(rows, seed=0):
    """A fold whose model is not trained: groups must come from the data, not from the model."""
    records = Records.from_rows(rows)
    encoder = Encoder.fit(describe_fields(records), records)
    model = GPT(
        vocab_size=encoder.tokenizer.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=32
    ).eval()
    assignment = assign_folds(len(rows), 3, seed)
    parts = np.flatnonzero(assignment != 0), np.flatnonzero(assignment == 0)
    return Fold(Scorer(model, encoder), encoder.encode(records), *parts)


def test_fields_hang_together_by_related_pairs():
    related = np.zeros((7, 7), bool)
    for a, b in ((0, 1), (1, 4), (2, 3), (5, 6), (6, 2)):
        related[a, b] = related[b, a] = True
    assert related_parts(range(7), related) == [[0, 1, 4], [2, 3, 5, 6]]
    assert related_parts([0, 1, 2, 3], related) == []


def test_a_cluster_is_a_group_and_two_pairs_of_fields_are_none():
    rng = np.random.default_rng(0)
    rows, pairs = [], []
    inside = set(rng.choice(1500, 200, replace=False).tolist())
    for row in range(1500):
        three = {name: str(rng.choice(list("klmn"))) for name in "abc"}
        rows.append(
            {**dict.fromkeys("abc", "k"), "d": "x"}
            if row in inside
            else {**three, "d": "yz"[row % 2]}
        )
        one, two = str(rng.choice(list("pq"))), str(rng.choice(list("st")))
        pairs.append({"e": one, "f": one, "g": two, "h": two})
    groups = table_groups(fold_of(rows), [[0, 1, 2, 3]], seed=0, progress=lambda tokens: None)
    best = int(groups.p.argmin())
    members = set(groups.members[best].tolist())
    assert groups.p[best] < 1e-6
    assert groups.bits[best] > 1
    assert len(members & inside) > 0.95 * len(inside)
    assert len(members) < 1.3 * len(inside)
    none = table_groups(fold_of(pairs), [[0, 1, 2, 3]], seed=0, progress=lambda tokens: None)
    separate = table_groups(fold_of(pairs), [], seed=0, progress=lambda tokens: None)
    assert separate is None
    assert none is None or len(none.p)  # hang together they do not: related_parts keeps them apart


def test_groups_of_independent_fields_do_not_hold():
    found = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        rows = [{name: str(rng.choice(list("klmn"))) for name in "abcd"} for _ in range(400)]
        groups = table_groups(fold_of(rows), [[0, 1, 2, 3]], seed=seed, progress=lambda t: None)
        found += groups is not None and bool((groups.p <= 0.01).any())
    assert found <= 1


def test_k_means_finds_directions():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    x = np.eye(3)[truth] + rng.normal(0, 0.15, (300, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels, centres = k_means(x, 3, rng)
    assert len({(a, b) for a, b in zip(truth.tolist(), labels.tolist(), strict=True)}) == 3
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1)


@pytest.fixture
def files(tmp_path):
    rows, _ = city_rows(120, 2)
    table = "city,country,noise\n" + "".join(f"{','.join(row.values())}\n" for row in rows)
    (tmp_path / "t.csv").write_text(table)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.txt").write_text(
        "".join(f"In {row['city']} of {row['country']} it is {row['noise']}.\n" for row in rows)
    )
    return tmp_path


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.txt"])
def test_discover_on_a_file(files, name):
    """E17: the same for a seed, JSON, with units, n, the model's id and the folds."""
    options = {"folds": 2, "n_layer": 1, "n_head": 2, "n_embd": 32, "seed": 4}
    report = discover(files / name, **options)
    text = json.dumps(report, allow_nan=False)
    assert json.dumps(discover(files / name, **options), allow_nan=False) == text
    assert report["unit"] == "bits"
    assert (report["n"], report["folds"], report["seed"]) == (120, 2, 4)
    assert report["data"] == name
    assert len(report["model"]["id"]) == 16
    assert discover(files / name, **{**options, "seed": 5})["model"]["id"] != report["model"]["id"]


def test_what_there_is_nothing_to_learn_from():
    few = [{"a": "x", "b": "y"}] * 3
    for rows, words in (
        (few, "10 are the least"),
        ([{"a": "x"}] * 20, "no field to learn"),
        ([{"a": "xy"[n % 2]} for n in range(20)], "one field"),
    ):
        with pytest.raises(InputError, match=words):
            KnowledgeDiscovery().fit(rows)


def test_penguins(data_folder):
    kd = KnowledgeDiscovery(seed=0).fit(read_records(data_folder / "penguins.csv"))
    pairs = {frozenset(f.fields) for f in kd.discover() if f.kind in ("dependency", "leak")}
    measures = ("island", "bill_length_mm", "bill_depth_mm", "flipper_length_mm")
    for other in measures:
        assert {"species", other} in pairs
    assert kd.held_out("species")["accuracy"] >= 0.95


@pytest.mark.slow
def test_titanic(data_folder):
    kd = KnowledgeDiscovery(seed=0).fit(read_records(data_folder / "titanic.csv"))
    found = kd.discover()
    kinds = {frozenset(f.fields): f for f in found if len(f.fields) == 2 and f.kind != "unusual"}
    assert kinds[frozenset(("sex", "survived"))].kind == "dependency"
    assert kinds[frozenset(("pclass", "survived"))].kind == "dependency"
    assert kinds[frozenset(("alive", "survived"))].kind in ("leak", "duplicate_fields")
    assert kinds[frozenset(("pclass", "class"))].kind == "duplicate_fields"


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_planted_table(monkeypatch, shuffled):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    from planted_table import judge, planted_table

    table = planted_table(1, shuffled=shuffled)
    findings = [each.as_dict() for each in KnowledgeDiscovery(seed=1).fit(table.rows).discover()]
    if shuffled:
        assert findings == []
        return
    verdict = judge(table, findings)
    assert verdict.share >= 0.9
    assert all(found >= 0.9 * planted for found, planted in verdict.found.values())
    assert verdict.outranked == []
