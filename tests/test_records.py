"""Records as examples: nothing mixes, every target counts once."""

import numpy as np
import pytest
import torch

from nanogpt.errors import InputError
from nanogpt.records import (
    IGNORED,
    encode_records,
    micro_batches,
    mismatched_records,
    split_records,
)
from nanogpt.reward_data import RewardRecord, read_reward_data
from nanogpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer

CHARS = CharTokenizer("abcdefgh")
END = CHARS.end_of_text_id


def records_of(*texts, reward=1.0):
    return [RewardRecord(text, reward) for text in texts]


def whole_batch(examples):
    return examples.batch(np.arange(len(examples)))


def test_a_record_is_its_text_between_special_tokens():
    batch = whole_batch(encode_records(records_of("abc"), CHARS, 8))
    assert batch.tokens.tolist() == [[END, 0, 1, 2]]
    assert batch.targets.tolist() == [[0, 1, 2, END]]


def test_a_prompt_is_read_and_not_learnt():
    record = RewardRecord("c", 1.0, prompt="ab")
    examples = encode_records([record], CHARS, 8)
    batch = whole_batch(examples)
    assert batch.tokens.tolist() == [[END, 0, 1, 2]]
    assert batch.targets.tolist() == [[IGNORED, IGNORED, 2, END]]
    assert examples.record_counts.tolist() == [2]


def test_a11_the_end_counts_though_it_is_the_padding_too():
    batch = whole_batch(encode_records(records_of("a", "abcd"), CHARS, 8))
    assert batch.targets.tolist() == [[0, END, *[IGNORED] * 3], [0, 1, 2, 3, END]]
    assert batch.records.tolist() == [0, 1]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 64])
def test_every_target_counts_exactly_once_in_windows_of_any_context(block):
    texts = [("", "abcdefg"), ("abc", "de"), ("abcdef", "g"), ("", "a"), ("ab", "cdefgh")]
    records = [RewardRecord(completion, 1.0, prompt=prompt) for prompt, completion in texts]
    examples = encode_records(records, CHARS, block)
    assert examples.lengths.max() <= block
    batch = whole_batch(examples)
    for number, record in enumerate(records):
        rows = batch.records == number
        learnt = [t for row in batch.targets[rows].tolist() for t in row if t != IGNORED]
        assert learnt == [*CHARS.encode(record.completion), END]
        assert examples.record_counts[number] == len(learnt)
    assert (
        examples.n_targets == examples.counts.sum() == sum(len(r.completion) + 1 for r in records)
    )
    # Inputs are what stands before the target in the same record.
    for row in range(len(examples)):
        whole = [END, *CHARS.encode(records[examples.records[row]].text), END]
        length = examples.lengths[row]
        seen = batch.tokens[row, :length].tolist()
        where = [i for i in range(len(whole)) if whole[i : i + length] == seen]
        assert where
        targets = batch.targets[row, :length].tolist()
        after = [whole[i + 1 : i + 1 + length] for i in where]
        assert any(all(t in (IGNORED, w) for t, w in zip(targets, a, strict=True)) for a in after)


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_a1_no_part_of_a_reward_becomes_a_token(tmp_path, tokenizer):
    path = tmp_path / "r.txt"
    path.write_text("a|b|0.5\n  x |-1e-3\nwords of a text|7\n", encoding="utf-8")
    records = read_reward_data(path)
    made = {
        "char": lambda: CharTokenizer("".join(sorted({c for r in records for c in r.text}))),
        "byte": ByteTokenizer,
        "bpe": lambda: BPETokenizer.train((r.text for r in records), 280),
    }[tokenizer]()
    examples = encode_records(records, made, 64)
    for row, record in enumerate(records):
        batch = examples.batch(np.array([row]))
        assert made.decode(batch.tokens[0].tolist()) == record.text
        assert not set(record.text) & set("0123456789")


def test_a_text_that_cannot_be_spelled_is_named_by_its_line():
    with pytest.raises(InputError, match=r"^line 3: the character 'z' \(U\+007A\)"):
        encode_records([RewardRecord("az", 1.0, line=3)], CHARS, 8)


def test_chosen_records_are_numbered_in_the_order_given():
    examples = encode_records(records_of("abcde", "b", "cdefg", "d"), CHARS, 3)
    chosen = examples.of_records([2, 0])
    assert chosen.n_records == 2
    assert chosen.records.tolist() == [0, 0, 1, 1]
    first = chosen.batch(np.array([0, 1]))
    learnt = [t for row in first.targets.tolist() for t in row if t != IGNORED]
    assert learnt == [*CHARS.encode("cdefg"), END]
    assert chosen.record_counts.tolist() == [6, 6]
    assert len(examples.of_records([])) == 0


def test_micro_batches_hold_each_example_once_with_little_padding():
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 256, 500)
    parts = micro_batches(lengths, 4096)
    assert sorted(np.concatenate(parts).tolist()) == list(range(500))
    for part in parts:
        area = len(part) * lengths[part].max()
        assert area <= 4096
        assert area <= 1024 or 1 - lengths[part].sum() / area <= 0.1
    # The bound on padding does not make a micro-batch of every length.
    assert len(parts) < 40


def test_an_example_beyond_the_limit_is_a_micro_batch_of_its_own():
    assert [part.tolist() for part in micro_batches(np.array([3, 9, 3]), 1)] == [[1], [0], [2]]
    assert micro_batches(np.array([], dtype=np.int64), 8) == []


def test_held_out_records_share_neither_text_nor_group_with_the_others():
    draw = np.random.default_rng(0)
    records = [
        RewardRecord(
            f"text {draw.integers(300)}", 1.0, group=f"g{i}" if i % 2 else f"g{draw.integers(400)}"
        )
        for i in range(600)
    ]
    train, held = split_records(records, 0.2, seed=1)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(600))
    assert 100 <= len(held) <= 120
    for name in ("text", "group"):
        sides = [{getattr(records[i], name) for i in side} for side in (train, held)]
        assert not sides[0] & sides[1]


def test_the_split_is_the_seeds():
    records = [RewardRecord(f"text {i}", 1.0) for i in range(100)]
    again = [split_records(records, 0.1, seed)[1].tolist() for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]
    assert [len(held) for held in again] == [10, 10, 10]


def test_small_files_leave_something_to_train_on():
    assert split_records(records_of("a", "b"), 0.5, 0)[0].size == 1
    assert split_records(records_of("a", "a"), 0.5, 0)[0].tolist() == [0, 1]
    assert split_records(records_of("a", "b"), 0.0, 0)[1].size == 0
    assert split_records(records_of("a"), 0.5, 0)[0].tolist() == [0]


def test_a_mismatched_completion_is_never_the_records_own():
    records = [RewardRecord(f"c{i}", 1.0, prompt=f"p{i}") for i in range(20)]
    other = mismatched_records(records, seed=0)
    assert [r.prompt for r in other] == [r.prompt for r in records]
    assert not any(a.completion == b.completion for a, b in zip(records, other, strict=True))
    assert sorted(r.completion for r in other) == sorted(r.completion for r in records)


def test_ten_million_tokens_are_a_few_flat_arrays():
    text = "abcdefgh" * 125
    records = records_of(*[text] * 200)
    examples = encode_records(records, CHARS, 256)
    assert examples.tokens.dtype == np.uint16
    size = sum(
        getattr(examples, name).nbytes
        for name in ("tokens", "starts", "lengths", "first_counted", "records")
    )
    assert size < 2.2 * len(examples.tokens)
    assert isinstance(examples.batch(np.arange(3)).tokens, torch.Tensor)
