"""A table whose truth is known: what was planted in it, and whether findings are that or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ROWS = 2000
_COUNTRIES = {
    "Rome": "Italy", "Milan": "Italy", "Paris": "France", "Lyon": "France",
    "Berlin": "Germany", "Bonn": "Germany", "Porto": "Portugal", "Lisbon": "Portugal",
}  # fmt: skip
_TIERS = {"free": "0", "basic": "1", "plus": "1", "pro": "2"}
_PARTS = (
    ("city", "country"),
    ("plan", "tier"),
    ("visits", "spend"),
    ("device", "channel", "hours"),
)
"""Fields that have something to do with each other."""


@dataclass(frozen=True)
class PlantedTable:
    """A table and its truth.

    Attributes:
        rows: of fields by name, as text.
        swapped: rows with a value of another row, and the field.
        duplicates: (original, copy).
        cluster: rows.
    """

    rows: list[dict[str, str]]
    swapped: dict[int, str]
    duplicates: list[tuple[int, int]]
    cluster: np.ndarray


def planted_table(seed: int, *, n: int = ROWS, shuffled: bool = False) -> PlantedTable:
    """2,000 customers. Planted are:

    a leak, as the plan decides the tier; dependencies, as spend rises with visits and a city lies
    in a country; a cluster, as a tenth use a tablet through a partner at certain hours; 1 % of the
    rows with a country or a tier of another row; ten rows that are copies of others.

    Args:
        shuffled: every column is shuffled, so that nothing is there.
    """
    rng = np.random.default_rng((seed, 1))
    cities, plans = list(_COUNTRIES), list(_TIERS)
    city = rng.choice(cities, n)
    country = np.array([_COUNTRIES[name] for name in city], dtype=object)
    plan = rng.choice(plans, n, p=[0.4, 0.3, 0.2, 0.1])
    tier = np.array([_TIERS[name] for name in plan], dtype=object)
    visits = rng.gamma(3.0, 4.0, n)
    spend = 5 + 2.5 * visits + rng.normal(0, 8, n)
    device = rng.choice(["phone", "desktop", "tablet", "tv"], n)
    channel = rng.choice(["search", "mail", "partner", "shop"], n)
    hours = rng.uniform(0, 100, n)
    cluster = np.sort(rng.choice(n, n // 10, replace=False))
    inside = cluster[rng.random(len(cluster)) < 0.95]
    device[inside], channel[inside] = "tablet", "partner"
    hours[inside] = rng.normal(42, 2, len(inside))
    region = rng.choice(["north", "south", "east", "west"], n)  # goes with nothing
    swapped: dict[int, str] = {}
    for field, column in (("country", country), ("tier", tier)):
        while sum(each == field for each in swapped.values()) < n // 200:
            row, other = (int(each) for each in rng.choice(n, 2, replace=False))
            if row not in swapped and column[row] != column[other]:
                column[row] = column[other]
                swapped[row] = field
    columns: dict[str, Sequence[Any]] = {
        "city": city, "country": country, "plan": plan, "tier": tier,
        "visits": [f"{value:.1f}" for value in visits],
        "spend": [f"{value:.2f}" for value in spend],
        "device": device, "channel": channel, "hours": [f"{value:.1f}" for value in hours],
        "region": region,
    }  # fmt: skip
    rows = [{name: str(column[row]) for name, column in columns.items()} for row in range(n)]
    places = [int(each) for each in rng.permutation(n) if int(each) not in swapped][:20]
    duplicates = list(zip(places[:10], places[10:], strict=True))
    for original, copy in duplicates:
        rows[copy] = dict(rows[original])
    if shuffled:
        for name in columns:
            values = [row[name] for row in rows]
            for row, place in enumerate(rng.permutation(n).tolist()):
                rows[row][name] = values[place]
    return PlantedTable(rows, swapped, duplicates, cluster)


@dataclass(frozen=True)
class Verdict:
    """What of the truth was found.

    Attributes:
        found: of each planted kind (found, planted).
        unplanted: sentences of findings that are none of it.
        outranked: planted kinds of which something stands below a finding that is none of it.
    """

    found: dict[str, tuple[int, int]]
    unplanted: list[str]
    outranked: list[str]

    @property
    def share(self) -> float:
        """Of all that was planted, what was found."""
        counts = list(self.found.values())
        return sum(found for found, _ in counts) / sum(planted for _, planted in counts)


def judge(table: PlantedTable, findings: Sequence[Mapping[str, Any]]) -> Verdict:
    """Compare findings, strongest first, with the truth."""
    got: dict[str, set[Any]] = {
        name: set() for name in ("leak", "dependencies", "cluster", "swapped", "duplicates")
    }
    copies = {row for pair in table.duplicates for row in pair}
    of_copy = {row: number for number, pair in enumerate(table.duplicates) for row in pair}
    inside = set(table.cluster.tolist())
    unplanted: list[str] = []
    outranked: list[str] = []
    for finding in findings:
        new: list[tuple[str, Any]] = []
        fields, rows = set(finding["fields"]), set(finding["rows"])
        kind = finding["kind"]
        part = next((each for each in _PARTS if fields <= set(each)), None)
        explained = False
        if kind in ("leak", "duplicate_fields"):
            explained = part is not None
            if finding["fields"] == ["plan", "tier"]:
                new.append(("leak", 0))
            if fields == {"city", "country"}:
                new.append(("dependencies", "city"))
        elif kind in ("dependency", "joint_dependency"):
            explained = part is not None
            if fields == {"city", "country"}:
                new.append(("dependencies", "city"))
            if fields == {"visits", "spend"}:
                new.append(("dependencies", "visits"))
        elif kind == "unusual":
            (row,) = rows
            explained = table.swapped.get(row) in fields
            if explained:
                new.append(("swapped", row))
        elif kind in ("duplicates", "near_duplicates"):
            explained = rows <= copies
            new += [("duplicates", of_copy[row]) for row in rows & copies]
        elif kind == "group":
            explained = len(rows & inside) > 0.5 * len(rows)
            if explained and len(rows & inside) > 0.5 * len(inside):
                new.append(("cluster", 0))
        if not explained:
            unplanted.append(finding["sentence"])
        for what, which in new:
            if which not in got[what] and unplanted:
                outranked.append(f"{what} {which}")
            got[what].add(which)
    planted = {
        "leak": 1, "dependencies": 2, "cluster": 1, "swapped": len(table.swapped),
        "duplicates": len(table.duplicates),
    }  # fmt: skip
    found = {name: (len(got[name]), count) for name, count in planted.items()}
    return Verdict(found, unplanted, outranked)
