"""The page of an exploration: complete, escaped, self-contained, and true to its report."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest

from nanogpt.report.knowledge import cut, render_knowledge_report

VOID = {"meta", "br"}
FIELDS = ["city", "country", "visits"]


class Tree(HTMLParser):
    """The elements of a page in their order; fails where they do not nest."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.shape, self.elements, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        element = {"tag": tag, "words": "", "inside": list(self.open), **dict(attrs)}
        self.elements.append(element)
        self.shape.append((tag, *names))
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open[-1]["tag"] == tag
        self.open.pop()
        self.shape.append(f"/{tag}")

    def handle_data(self, words):
        self.words.append(words)
        for element in self.open:
            element["words"] += words

    def handle_comment(self, words):
        raise AssertionError(f"a comment: {words}")

    def unknown_decl(self, words):
        raise AssertionError(f"a declaration: {words}")

    def all(self, tag, **attributes):
        return [
            each
            for each in self.elements
            if each["tag"] == tag and all(each.get(k) == v for k, v in attributes.items())
        ]

    def section(self, name):
        return next((each for each in self.all("section", id=name)), None)

    def words_of(self, tag, section=None):
        return [
            " ".join(each["words"].split())
            for each in self.all(tag)
            if section is None or any(parent.get("id") == section for parent in each["inside"])
        ]


def parse(page):
    tree = Tree()
    tree.feed(page)
    tree.close()
    assert tree.open == []
    return tree


def make_field(name, **changes):
    return {
        "name": name, "kind": "category", "missing": 3, "distinct": 4, "bits_marginal": 2.0,
        "bits_model": 0.5, "examples": [["Bern", 40], ["Rome", 1]], "histogram": None,
        "role": "used", "reason": None, **changes,
    }  # fmt: skip


def make_finding(number=0, **changes):
    return {
        "kind": "dependency", "fields": ["city", "country"], "rows": [], "effect": 1.25,
        "unit": "bits a record", "q": 0.001, "n": 1200, "evidence_bits": 1000.0 - number,
        "sentence": f"sentence {number} of country and city", "details": {}, "lines": [], **changes,
    }  # fmt: skip


def make_record(fields=FIELDS, guilty=1, **changes):
    return {
        "row": 6, "line": 1008, "z": 7.25, "bits": 31.0, "q": 0.0004, "field": fields[guilty],
        "value": "Peru", "expected": [["Italy", 0.98]],
        "cells": [
            {"field": name, "value": f"value {i}", "bits": 1.5 * i, "tail": None if i % 2 else 0.01}
            for i, name in enumerate(fields)
        ],
        **changes,
    }  # fmt: skip


def make_groups(**changes):
    return {
        "plane": [[0.5, -1.0, 0], [-0.25, 0.75, 1], [1.0, 1.0, -1], [0.0, 0.0, 1]],
        "rows": [0, 1, 2, 3],
        "groups": [
            {"id": 0, "size": 700, "q": 1e-9, "terms": [["device = tablet", 9.0], ["not", -3.0]],
             "fields": [], "examples": [0]},
            {"id": 1, "size": 20, "q": 0.02, "terms": [["channel = shop", 4.0]], "fields": [],
             "examples": [1, 3]},
        ],
        **changes,
    }  # fmt: skip


def make_drift(**changes):
    return {
        "field": "visits", "what": "median", "class": None, "q": 0.001,
        "values": [1.0, 2.0, None, 4.0, 5.0, 6.0, 7.0, 8.0],
        "labels": ["1", "2", "—", "4", "5", "6", "7", "8"], **changes,
    }  # fmt: skip


def make_quality(name, **changes):
    return {
        "field": name, "unigram": 2.0, "nearest": 1.0, "model": 0.5, "accuracy": 0.9, "se": 0.01,
        **changes,
    }  # fmt: skip


def make_report(**changes):
    """What KnowledgeDiscovery.report returns, by hand."""
    n = len(FIELDS)
    return {
        "data": "visits.csv", "n": 1200, "seed": 0, "alpha": 0.05, "folds": 3,
        "model": {"id": "0123456789abcdef", "parameters": 12345, "n_layer": 2, "n_embd": 32,
                  "epochs": 2, "tokens": 5000},
        "versions": {"python": "3.11", "torch": "2.13.0"}, "unit": "bits",
        "notes": ["row was set aside: it is different in every record"],
        "fields": [
            make_field("city"),
            make_field("country"),
            make_field("visits", kind="number", examples=[],
                       histogram={"edges": [0.0, 1.0, 2.0, 1e9], "counts": [5, 0, 9]}),
            make_field("row", kind="id", bits_marginal=None, bits_model=None, examples=[["17", 1]],
                       role="set aside", reason="different in every record"),
        ],
        "findings": [
            make_finding(0, kind="leak", sentence="country gives away city"),
            make_finding(1, kind="group", effect=1.0, unit="groups"),
            make_finding(2, kind="id", q=None, sentence="row is different in every record"),
        ],
        "anomalies": [make_record(), make_record(guilty=0, line=9, z=None, expected=[])],
        "dependencies": {
            "fields": FIELDS,
            "bits": [[None] * n] * n,
            "share": [[None, 0.75, 0.01], [0.5, None, -0.02], [0.2, None, None]],
            "q": [[None, 0.001, 0.9], [0.001, None, 0.8], [0.01, None, None]],
        },
        "groups": make_groups(),
        "quality": [make_quality("city"), make_quality("country", nearest=None)],
        "drift": [make_drift(), make_drift(field="city", what="share", **{"class": "Bern"})],
        "records": {"6": {"city": "Rome", "country": None}},
        **changes,
    }  # fmt: skip


def test_everything_is_on_the_page():
    page = render_knowledge_report(make_report())
    tree = parse(page)
    words = " ".join(" ".join(tree.words).split())
    for expected in (
        "What visits.csv holds", "records 1,200 fields 4",
        "findings at a false discovery rate of 0.05 2", "1.25 bits a record · q 0.001",
        "The strongest finding: country gives away city.", "1 group · q 0.001",
        "Bern (40), Rome", "75%", "set aside: different in every record", "line 1,008 · z 7.2",
        "z —", "country: Italy (98%) was expected", "device = tablet", "channel = shop",
        "visits: median in each eighth, 1 to 8", "city: share of Bern", "2.00", "90%",
        "row was set aside: it is different", "12,345 parameters", "torch 2.13.0", "seed 0",
    ):  # fmt: skip
        assert expected in words, expected
    assert "not" not in " ".join(tree.words_of("td", "groups")).split()
    assert [each["id"] for each in tree.all("section") if "id" in each] == [
        "findings", "fields", "map", "groups", "unusual", "drift", "quality", "notes",
    ]  # fmt: skip


def test_the_page_is_one_whole_document():
    page = render_knowledge_report(make_report())
    assert page.lower().startswith("<!doctype html>")
    tree = parse(page)
    for tag in ("html", "head", "body", "main", "h1"):
        assert len(tree.all(tag)) == 1, tag
    titles = [each for each in tree.all("title") if each["inside"][-1]["tag"] == "head"]
    assert [each["words"] for each in titles] == ["What visits.csv holds"]
    assert tree.all("html")[0]["lang"] == "en"
    assert tree.all("meta")[0]["charset"] == "utf-8"
    assert tree.shape[-1] == "/html"
    for part in tree.all("li"):
        assert part["inside"][-1]["tag"] in ("ul", "ol")
    for part in tree.all("td") + tree.all("th"):
        assert part["inside"][-1]["tag"] == "tr"


def test_nothing_is_loaded_from_anywhere():
    page = render_knowledge_report(make_report())
    assert not re.search(r"https?:|@import|url\(|\bsrc\b|\bhref\b", page)
    tags = {each["tag"] for each in parse(page).elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base"}
    assert not [key for each in parse(page).elements for key in each if key.startswith("on")]


def test_the_same_report_gives_the_same_bytes():
    report = make_report()
    before = copy.deepcopy(report)
    page = render_knowledge_report(report)
    assert page.encode() == render_knowledge_report(make_report()).encode()
    assert page == render_knowledge_report(json.loads(json.dumps(report)))
    assert report == before


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "]]></title></style></svg><!--",
    "&lt;b&gt; &amp; {{ 7 * 7 }} {% raw %}",
    "\u202egnp.exe \u2066x\u2069 \u200f",
    "a\x00b\x1b[31m\x7f\ud800",
    "line\nline\u2028line\tTAB",
    "x" * 5000,
    "👩🏽‍🚀 🏳️‍🌈 e\u0301",
]


def everywhere(text):
    """A report in which everything that comes from the user is one text."""
    other = text + " "  # another field, as names are unique
    fields = [text, other, "visits"]
    return make_report(
        data=text,
        notes=[text],
        fields=[make_field(name, examples=[[text, 2]]) for name in fields],
        findings=[make_finding(i, sentence=text) for i in range(25)],
        anomalies=[make_record(fields, value=text, expected=[[text, 0.5]],
                               cells=[{"field": name, "value": text, "bits": 1.0, "tail": None}
                                      for name in fields])],
        dependencies={**make_report()["dependencies"], "fields": fields},
        groups=make_groups(groups=[{**g, "terms": [[text, 1.0]]} for g in make_groups()["groups"]]),
        quality=[make_quality(text)],
        drift=[make_drift(field=text, what="share", labels=[text] * 8, **{"class": text})],
        versions={"python": text},
    )  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text):
    """The elements are those of a harmless twin, and what can be shown is shown as it is."""
    page = render_knowledge_report(everywhere(text))
    tree, twin = parse(page), parse(render_knowledge_report(everywhere("harmless")))
    assert tree.shape == twin.shape
    page.encode()  # a lone surrogate could not be written
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]", page)
    assert len(page) < len(render_knowledge_report(everywhere("harmless"))) + 40_000
    shown = " ".join(cut(text, 20).split())
    for tag, section in (("h1", None), ("td", "fields"), ("li", "unusual"), ("h3", "drift"),
                         ("text", "map"), ("td", "groups"), ("td", "quality"), ("li", "notes"),
                         ("li", "findings")):  # fmt: skip
        found = " ".join(tree.words_of(tag, section))
        assert shown.removesuffix("…") in found, (tag, section)


def test_cut():
    assert cut("a\tb\x00\u202ec\ud800") == "a b  c "
    assert cut("x" * 80) == "x" * 80
    assert cut("x" * 81) == "x" * 79 + "…"
    assert cut("é日🙂") == "é日🙂"
    assert cut("👩‍🚀 می‌خواهم") == "👩‍🚀 می‌خواهم"


@pytest.mark.parametrize("guilty", [0, 2, 39, 40, 149])
def test_the_guilty_cell_alone_is_marked(guilty):
    names = [f"field {i}" for i in range(150)]
    record = make_record(names, guilty)
    tree = parse(render_knowledge_report(make_report(anomalies=[record, record])))
    marked = tree.all("li", **{"class": "guilty"})
    assert [each["words"].strip() for each in marked] == [f"field {guilty}: value {guilty}"] * 2
    assert marked[0]["title"] == f"{1.5 * guilty:.1f} bits"
    cells = tree.words_of("li", "unusual")
    assert len(cells) == 82
    assert cells[40] == "110 more"
    assert len(set(cells[:40])) == 40
    numbers = [int(cell.split()[1].rstrip(":")) for cell in cells[:40]]
    assert numbers == sorted(numbers)


def test_names_that_are_cut_alike_are_not_marked_alike():
    names = [f"{'long ' * 30}{i}" for i in range(3)]
    tree = parse(render_knowledge_report(make_report(anomalies=[make_record(names, 1)])))
    (marked,) = tree.all("li", **{"class": "guilty"})
    assert "value 1" in marked["words"]


@pytest.mark.parametrize("n", [1, 20, 21, 100, 130])
def test_findings_stand_in_their_order_twenty_of_them_open(n):
    report = make_report(findings=[make_finding(i) for i in range(n)])
    tree = parse(render_knowledge_report(report))
    items = [
        each for each in tree.all("li") if any(p.get("id") == "findings" for p in each["inside"])
    ]
    numbers = [int(re.search(r"sentence (\d+) ", each["words"])[1]) for each in items]
    assert numbers == list(range(min(n, 100)))
    folded = [any(p["tag"] == "details" for p in each["inside"]) for each in items]
    assert folded == [number >= 20 for number in numbers]
    assert len(tree.all("details")) == (n > 20)
    assert [each["words"] for each in tree.all("summary")] == (
        [f"{min(n, 100) - 20} more"] if n > 20 else []
    )
    assert not [each for each in tree.all("details") if "open" in each]
    more = "30 more are in findings.json" in tree.section("findings")["words"]
    assert more == (n == 130)
    assert tree.words_of("dd")[2] == str(n)


def test_without_findings_the_page_says_so():
    tree = parse(render_knowledge_report(make_report(findings=[])))
    assert "Nothing passed" in tree.all("p", **{"class": "verdict"})[0]["words"]
    assert "Nothing passed at 0.05" in tree.section("findings")["words"]
    assert tree.words_of("dd")[2] == "0"


def test_plain_facts_alone_are_no_findings():
    facts = [make_finding(0, kind="constant", q=None, sentence="zone is the same in every record")]
    tree = parse(render_knowledge_report(make_report(findings=facts)))
    assert "Nothing passed" in tree.all("p", **{"class": "verdict"})[0]["words"]
    assert "zone is the same" in tree.section("findings")["words"]
    assert "q " not in tree.section("findings")["words"].replace("Findings, strongest", "")


def test_what_there_is_not_has_no_section():
    report = make_report(
        groups=None, drift=[], quality=[], notes=[], anomalies=[],
        dependencies={"fields": ["text"], "bits": [[None]], "share": [[None]], "q": [[None]]},
    )  # fmt: skip
    tree = parse(render_knowledge_report(report))
    assert [each["id"] for each in tree.all("section") if "id" in each] == ["findings", "fields"]


def test_groups_that_do_not_hold_are_told():
    report = make_report(groups=make_groups(groups=[]))
    tree = parse(render_knowledge_report(report))
    assert "No groups were found" in tree.section("groups")["words"]
    assert not tree.all("circle")


def test_every_record_of_the_plane_has_its_groups_mark():
    tree = parse(render_knowledge_report(make_report()))
    plane = [each for each in tree.elements
             if each["inside"] and each["inside"][-1].get("viewbox") == "0 0 640 400"]  # fmt: skip
    kinds = [(each["tag"], each.get("class", "")) for each in plane]
    assert kinds == [("circle", "rest"), ("circle", ""), ("polygon", ""), ("polygon", "")]
    keys = [each for each in tree.elements
            if each["inside"] and each["inside"][-1].get("class") == "key"]  # fmt: skip
    assert [each["tag"] for each in keys] == ["circle", "polygon"]
    dot = next(each for each in plane if each["tag"] == "circle" and "class" not in each)
    assert (dot["cx"], dot["cy"], dot["fill"]) == ("470.0", "385.0", keys[0]["fill"])


def test_the_map_shows_what_is_sure():
    tree = parse(render_knowledge_report(make_report()))
    cells = tree.all("rect", **{"class": "cell"})
    told = {each["words"]: float(each["fill-opacity"]) for each in cells}
    assert told == {
        "city tells 75% of country": 0.75, "city tells 1% of visits": 0.0,
        "country tells 50% of city": 0.5, "country tells -2% of visits": 0.0,
        "visits tells 20% of city": 0.2,
    }  # fmt: skip
    assert len(tree.all("rect", **{"class": "empty"})) == 4
    numbers = [each["words"] for each in tree.all("text") if each["words"].isdigit()]
    assert numbers == ["75", "50", "20"]


def test_there_is_no_map_where_nothing_is_sure():
    report = make_report()
    report["dependencies"]["q"] = [[None if q is None else 0.5 for q in row]
                                   for row in report["dependencies"]["q"]]  # fmt: skip
    page = render_knowledge_report(report)
    assert "What tells about what" not in page
    assert not parse(page).all("rect", **{"class": "cell"})


def test_one_text_field_only():
    report = make_report(
        fields=[make_field("text", kind="text", bits_marginal=None, bits_model=93.2,
                           examples=[["to be or not", 1], ["", 1]])],
        findings=[make_finding(kind="near_duplicates", effect=1.0, unit="records", rows=[1, 4])],
        anomalies=[{**make_record(["text"], 0), "expected": []}],
        dependencies={"fields": ["text"], "bits": [[None]], "share": [[None]], "q": [[None]]},
        quality=[], drift=[],
    )  # fmt: skip
    tree = parse(render_knowledge_report(report))
    assert tree.section("map") is None
    assert "1 record ·" in tree.section("findings")["words"]
    assert len(tree.all("li", **{"class": "guilty"})) == 1
    assert tree.words_of("td", "fields")[-1] == ""


def make_wide(n):
    names = [f"field {i}" for i in range(n)]
    square = [[None if i == j else 0.25 for i in range(n)] for j in range(n)]
    sure = [[None if i == j else 0.01 for i in range(n)] for j in range(n)]
    return make_report(
        fields=[make_field(name) for name in names],
        anomalies=[make_record(names, n - 1)] * 50,
        dependencies={"fields": names, "bits": square, "share": square, "q": sure},
        quality=[make_quality(name) for name in names],
        drift=[make_drift(field=name) for name in names],
    )


def test_hundreds_of_fields_have_a_page_of_bounded_size():
    page = render_knowledge_report(make_wide(400))
    tree = parse(page)
    assert len(page) < 1_500_000
    assert len(tree.all("rect", **{"class": "cell"})) == 40 * 39
    for section in ("map", "quality", "drift"):
        assert "the first 40 of 400;" in tree.section(section)["words"], section
    assert "first 40" not in parse(render_knowledge_report(make_wide(40))).all("html")[0]["words"]


ODD = {
    "as usual": {},
    "nothing counted": {"fields": [make_field("x", kind="number", histogram={
        "edges": [0.0, 1.0], "counts": [0]})]},
    "one value": {"drift": [make_drift(values=[3.0] * 8), make_drift(values=[None] * 8),
                            make_drift(values=[2.5], labels=["2.5"])]},
    "huge": {"fields": [make_field("x", kind="number", histogram={
        "edges": [-1e308, 0.0, 1e308], "counts": [10**12, 1]})],
        "drift": [make_drift(values=[-1e308, 1e308] * 4)]},
    "no bits": {"quality": [make_quality("x", unigram=0.0, nearest=0.0, model=0.0),
                            make_quality("y", unigram=0.0, nearest=None, model=3.0)]},
    "no points": {"groups": make_groups(plane=[])},
    "none at all": {"fields": [make_field("x", bits_marginal=None, bits_model=None, examples=[]),
                               make_field("y", bits_marginal=0.0, bits_model=0.0)]},
    "wide": make_wide(60),
}  # fmt: skip


@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_pictures_have_finite_numbers_inside_their_box(changes):
    page = render_knowledge_report(make_report(**changes))
    tree = parse(page)
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<style.*?</style>", "", page, flags=re.S))
    pictures = tree.all("svg")
    assert pictures
    for picture in pictures:
        x0, y0, width, height = map(float, picture["viewbox"].split())
        assert width > 0
        assert height > 0
        for each in tree.all("rect"):
            if each["inside"][-1] is picture:
                x, y, w, h = (float(each[key]) for key in ("x", "y", "width", "height"))
                assert w >= 0
                assert h >= 0
                assert x0 <= x <= x + w <= x0 + width + 1
                assert y0 <= y <= y + h <= y0 + height + 0.1


def test_bars_of_one_table_have_one_scale():
    rows = [make_quality("a", unigram=2.0, nearest=1.0, model=0.5),
            make_quality("b", unigram=1.0, nearest=4.0, model=-0.1)]  # fmt: skip
    tree = parse(render_knowledge_report(make_report(quality=rows)))
    bars = [float(each["width"]) for each in tree.all("rect")
            if each["inside"][-1].get("class") == "bars"]  # fmt: skip
    assert bars == [150.0, 75.0, 37.5, 75.0, 300.0, 0.0]


def test_bars_of_a_histogram_are_as_high_as_their_counts():
    tree = parse(render_knowledge_report(make_report()))
    bars = [each for each in tree.all("rect") if each["inside"][-1].get("class") == "small"]
    assert [float(each["height"]) for each in bars] == pytest.approx([30 * 5 / 9, 0, 30], abs=0.06)
    assert all(float(each["y"]) + float(each["height"]) == pytest.approx(30) for each in bars)
    assert tree.all("svg", **{"class": "small"})[0]["aria-label"] == "from 0 to 1e+09"
