"""Readers of rewarded texts, and what is said about them before training."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from nanogpt.errors import InputError
from nanogpt.reward_data import (
    RewardRecord,
    check_reward_data,
    rank_correlation,
    read_reward_data,
    record_groups,
    reward_histogram,
)


@pytest.fixture
def written(tmp_path):
    def write(content, name="rewards.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def pairs(records):
    return [(record.text, record.reward) for record in records]


def findings(rewards, texts=None, lengths=None, **options):
    texts = texts or [f"text {i}" for i in range(len(rewards))]
    records = [RewardRecord(t, r, line=i + 1) for i, (t, r) in enumerate(zip(texts, rewards))]  # noqa: B905
    lengths = lengths or [1] * len(records)
    return {finding.name: finding for finding in check_reward_data(records, lengths, **options)}


def test_a1_lines_are_split_at_the_last_bar_and_keep_their_spaces(written):
    path = written(b"\xef\xbb\xbfa|b|0.5\r\n  x |-1e-3\r\n\r\n   \r\ny| +2. \n")
    records = read_reward_data(path)
    assert pairs(records) == [("a|b", 0.5), ("  x ", -0.001), ("y", 2.0)]
    assert [record.line for record in records] == [1, 2, 5]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("x|nan", "finite, not nan"),
        ("x|-inf", "finite, not -inf"),
        ("x|1e999", "finite, not 1e999"),
        ("x", "no | before the reward"),
        ("x|good", "'good' is not a number"),
        ("x|", "'' is not a number"),
        ("x|1_0", "'1_0' is not a number"),
        ("x|１", "is not a number"),
        ("x|0x1", "'0x1' is not a number"),
        ("x|1,5", "'1,5' is not a number"),
        ("|1", "the text is empty"),
    ],
)
def test_a1_a_bad_line_is_refused_with_its_number(written, line, reason):
    with pytest.raises(InputError) as caught:
        read_reward_data(written(f"good|1\n\n{line}\n"))
    assert "rewards.txt, line 3: " in str(caught.value)
    assert reason in str(caught.value)
    assert "in all" not in str(caught.value)


def test_the_first_of_several_bad_lines_is_named_and_all_are_counted(written):
    with pytest.raises(InputError, match=r"line 2: .*\(3 bad lines in all\)"):
        read_reward_data(written("good|1\nbad\nx|nan\ngood|2\n|3\n"))


def test_only_a_line_feed_ends_a_line(written):
    text = "a\u2028b\x85c\x0bd\re"
    assert pairs(read_reward_data(written(f"{text}|1\n"))) == [(text, 1.0)]


def test_the_last_line_needs_no_line_feed(written):
    assert pairs(read_reward_data(written("a|1\r\nb|2\r"))) == [("a", 1.0), ("b", 2.0)]


@pytest.mark.parametrize("name", ["r.txt", "r.csv", "r.jsonl"])
@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_an_empty_file_is_refused(written, name, content):
    with pytest.raises(InputError, match=r"r\.\w+ is empty"):
        read_reward_data(written(content, name))


def test_what_is_not_utf_8_is_refused_with_its_line(written):
    with pytest.raises(InputError, match="line 2: this is not UTF-8"):
        read_reward_data(written(b"a|1\nb\xff|2\n"))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        read_reward_data(tmp_path / "none.txt")
    with pytest.raises(InputError, match="cannot read"):
        read_reward_data(tmp_path)


def test_a_dash_reads_lines_from_standard_input(monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"a|1\nb\n")))
    with pytest.raises(InputError, match="standard input, line 2"):
        read_reward_data("-")


def test_json_lines_hold_texts_or_prompts_with_completions(written):
    rows = [
        {"text": "a\nb|c", "reward": 1},
        {"prompt": "q ", "completion": "r", "reward": -0.5, "group": 7, "more": []},
        {"text": "é", "reward": 1e-3, "group": None},
    ]
    content = "\n".join(map(json.dumps, rows)) + "\n\n"
    records = read_reward_data(written(content, "r.JSONL"))
    assert pairs(records) == [("a\nb|c", 1.0), ("q r", -0.5), ("é", 0.001)]
    assert (records[1].prompt, records[1].completion, records[1].group) == ("q ", "r", "7")
    assert records[2].group is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "JSON object"),
        ('{"text": "a"}', 'no "reward"'),
        ('{"text": "a", "reward": "1"}', 'must be a number, not "1"'),
        ('{"text": "a", "reward": true}', "must be a number, not true"),
        ('{"text": "a", "reward": NaN}', "must be finite"),
        ('{"text": "a", "reward": 1' + "0" * 400 + "}", "must be finite"),
        ('{"reward": 1}', "neither text, nor prompt"),
        ('{"completion": "a", "reward": 1}', "neither text, nor prompt"),
        ('{"text": "a", "prompt": "b", "completion": "c", "reward": 1}', "both text and"),
        ('{"text": 1, "reward": 1}', "text must be a text, not 1"),
        ('{"prompt": "a", "completion": "", "reward": 1}', "the completion is empty"),
        ('{"text": "\\ud800", "reward": 1}', "surrogate"),
        ('{"text": "a", "reward": 1, "group": [1]}', "group must be"),
    ],
)
def test_a_bad_json_line_is_refused_with_its_number(written, row, reason):
    with pytest.raises(InputError) as caught:
        read_reward_data(written('{"text": "a", "reward": 1}\n' + row, "r.jsonl"))
    assert "r.jsonl, line 2: " in str(caught.value)
    assert reason in str(caught.value)


def test_csv_follows_its_standard(written):
    content = '\ufeffreward,text,group\r\n1,"a, ""b""\r\nc",g\r\n\r\n-2,  d ,\r\n'
    records = read_reward_data(written(content, "r.csv"))
    assert pairs(records) == [('a, "b"\r\nc', 1.0), ("  d ", -2.0)]
    assert [record.group for record in records] == ["g", None]
    assert [record.line for record in records] == [2, 5]


def test_csv_takes_fields_of_any_length_and_leaves_the_limit_as_it_was(written):
    import csv

    before = csv.field_size_limit()
    (record,) = read_reward_data(written("text,reward\n" + "x" * 200_000 + ",1\n", "r.csv"))
    assert len(record.text) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\na\n", "line 1: there is no column reward"),
        ("reward\n1\n", "line 1: there is neither text"),
        ("text,reward,text\na,1,b\n", "line 1: the column 'text' stands there twice"),
        ("text,reward\na,1\nb\n", "line 3: 1 columns, but the header has 2"),
        ('text,reward\n"a\nb",1\nc,x\n', "line 4: the reward 'x' is not a number"),
        ('text,reward\n"a"b,1\n', "line 2: this is not CSV"),
        ('text,reward\n"a,1\n', "line 2: this is not CSV"),
    ],
)
def test_bad_csv_is_refused_with_its_line(written, content, message):
    with pytest.raises(InputError) as caught:
        read_reward_data(written(content, "r.csv"))
    assert message in str(caught.value)


def test_groups_are_named_or_prompts_that_stand_twice():
    alone = [RewardRecord("a", 1, prompt="p"), RewardRecord("b", 1, prompt="q")]
    assert record_groups(alone) is None
    assert record_groups([*alone, RewardRecord("c", 2, prompt="p")]) == ["p", "q", "p"]
    assert record_groups([RewardRecord("a", 1), RewardRecord("b", 1, group="g")]) == ["", "g"]
    assert record_groups([RewardRecord("a", 1), RewardRecord("a", 1)]) is None


def test_equal_rewards_are_said_to_teach_nothing():
    found = findings([0.5, 0.5])["constant"]
    assert found.serious
    assert "nothing can be learnt from these rewards: this is plain training" in str(found)
    assert "constant" not in findings([0.5, 0.6])


def test_repeated_records_are_a_note_and_contradictions_a_warning():
    found = findings([1, 1, 2, 3, 1], ["a", "a", "b", "b", "a"])
    assert found["duplicates"].values == {"texts": 1, "extra": 2, "lines": [1, 2]}
    assert not found["duplicates"].serious
    assert found["contradictions"].values == {"texts": 1, "lines": [3, 4]}
    assert found["contradictions"].serious
    assert "'b' has 2 on line 3 and 3 on line 4" in str(found["contradictions"])
    assert not {"duplicates", "contradictions"} & set(findings([1, 2], ["a", "b"]))


def test_a_reward_that_follows_the_length_is_a_warning_and_chance_is_not():
    lengths = list(range(1, 41))
    longer = findings([float(n) ** 3 for n in lengths], lengths=lengths)["length"]
    assert longer.serious
    assert longer.values["rho"] == pytest.approx(1)
    assert "will learn to write longer texts" in str(longer)
    shorter = findings([-float(n) for n in lengths], lengths=lengths)["length"]
    assert "will learn to write shorter texts" in str(shorter)
    shuffled = np.random.default_rng(0).permutation(40).tolist()
    assert not findings([float(n) for n in shuffled], lengths=lengths)["length"].serious
    assert "length" not in findings([1.0, 2.0], lengths=[3, 3])


def test_the_rank_correlation_of_a_hand_computed_case():
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5.
    rho, p = rank_correlation(np.array([1, 2, 2, 9]), np.array([0, 7, 5, 8]))
    assert rho == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    z = math.atanh(rho) / math.sqrt(1.06)
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)))


def test_p_is_uniform_where_there_is_no_relation():
    draw = np.random.default_rng(0)
    below = [rank_correlation(draw.random(30), draw.random(30))[1] < 0.05 for _ in range(1000)]
    assert 0.03 < np.mean(below) < 0.07


def test_one_reward_beside_which_the_others_are_equal_is_a_warning():
    rewards = [float(i) for i in range(50)]
    assert "outlier" not in findings(rewards)
    found = findings([*rewards, 1e9])["outlier"]
    assert found.serious
    assert found.values["line"] == 51
    assert found.values["share"] == pytest.approx(50 / 51, rel=1e-6)
    # A rare value among two is no slip.
    assert "outlier" not in findings([0.0] * 50 + [1.0])


def test_records_longer_than_the_context_are_counted():
    found = findings([1, 2, 3], lengths=[4, 5, 9], block_size=4)["context"]
    assert found.values == {"longer": 2, "longest": 9}
    assert found.serious
    assert "context" not in findings([1, 2, 3], lengths=[4, 5, 9], block_size=9)


def test_groups_of_one_are_pointed_out():
    records = [RewardRecord("a", 1, group="g"), RewardRecord("b", 2, group="g")]
    records += [RewardRecord("c", 2, group=name) for name in "hij"]
    (found,) = [f for f in check_reward_data(records, [1] * 5) if f.name == "groups"]
    assert found.values == {"groups": 4, "alone": 3}
    assert found.serious


def test_the_histogram_holds_every_reward_once():
    assert reward_histogram([1, -1, 1]) == [(-1, -1, 1), (1, 1, 2)]
    values = np.random.default_rng(0).normal(size=1000)
    bars = reward_histogram(values)
    assert len(bars) == 20
    assert sum(count for *_, count in bars) == 1000
    assert (bars[0][0], bars[-1][1]) == (values.min(), values.max())
    low, high, count = bars[7]
    assert count == ((values >= low) & (values < high)).sum()
    wide = reward_histogram([-1.7e308, *range(20), 1.7e308])
    assert sum(count for *_, count in wide) == 22
    assert all(math.isfinite(edge) for bar in wide for edge in bar)


def test_rewards_of_any_size_are_described():
    found = findings([1e308, -1e308, 1e9])["rewards"]
    assert math.isfinite(found.values["std"])
    assert math.isfinite(found.values["mean"])


def test_every_record_has_a_length():
    with pytest.raises(ValueError, match="one length a record"):
        check_reward_data([RewardRecord("a", 1)], [1, 2])


def test_the_film_reviews_are_read(data_folder):
    records = read_reward_data(data_folder / "movie_reviews.txt")
    assert len(records) == 10_662
    assert {record.reward for record in records} == {1.0, -1.0}
    assert not any("|" in record.text for record in records)
