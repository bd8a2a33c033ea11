"""Exploring a table of 2,000 rows whose truth is known, and the questions that may follow.

There is no peer that does the same; benchmarks/explore.py says what is found of which table.
"""

import statistics
import time

import pytest
from planted_table import judge, planted_table

from nanogpt.explore import KnowledgeDiscovery

ROUNDS = 3


@pytest.fixture(scope="module")
def explored():
    """The table, what has read it, and the seconds of fitting and of looking, each ROUNDS times."""
    table = planted_table(0)
    taken: dict[str, list[float]] = {"fit": [], "discover": []}
    for _ in range(ROUNDS):
        started = time.perf_counter()
        discovery = KnowledgeDiscovery(seed=0).fit(table.rows)
        between = time.perf_counter()
        found = discovery.discover()
        taken["fit"].append(between - started)
        taken["discover"].append(time.perf_counter() - between)
    return table, discovery, found, taken


@pytest.mark.parametrize("stage", ["fit", "discover"])
def test_exploring(benchmark, record, explored, stage):
    """Training on the rows, and every test on what was trained."""
    table, discovery, found, taken = explored
    benchmark.pedantic(discovery.discover, rounds=1)
    verdict = judge(table, [each.as_dict() for each in found])
    planted = [sum(numbers) for numbers in zip(*verdict.found.values(), strict=True)]
    assert planted[0] > 0, "something of what was planted must be found"
    seconds = statistics.median(taken[stage])
    shape = {"stage": stage, "rows": len(table.rows), "fields": len(table.rows[0])}
    also = {"found": f"{planted[0]} of {planted[1]}", "not planted": len(verdict.unplanted)}
    record("exploring", shape, "float32", seconds, {}, also=also)


@pytest.mark.parametrize("question", ["complete", "similar"])
def test_a_question(benchmark, record, explored, question):
    """One record with a field to complete, or to compare with all rows."""
    table, discovery, *_ = explored
    known = {name: value for name, value in table.rows[0].items() if name != "country"}

    def ask():
        if question == "complete":
            return discovery.complete(known, "country")
        return discovery.similar(known)

    assert ask()
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        ask()
        seconds.append(time.perf_counter() - started)
    benchmark.pedantic(ask, rounds=3)
    shape = {"question": question, "rows": len(table.rows), "fields": len(table.rows[0])}
    record("exploring", shape, "float32", statistics.median(seconds), {})
