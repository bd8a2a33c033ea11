"""`nanogpt bench`: what it prints, what its numbers mean, what it refuses; and its clocks."""

import json

import pytest
import torch

from nanogpt import bench, measuring, native
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.model import GPT
from nanogpt.plain_gpt import PlainGPT
from nanogpt.recipe import scheduled_rate
from nanogpt.rehearsal import Rehearsal, random_corpus

TINY = (
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16"),
    *("--vocab-size", "20", "--batch-size", "2", "--seconds", "1"),
)
OPERATIONS = ["attention", "ffn", "cross_entropy", "layer_norm"]
ROW_KEYS = {
    *("suite", "shape", "dtype", "ours_seconds", "peers", "best_peer", "ratio"),
    "fraction_of_ceiling",
}


def test_json_holds_the_machine_what_is_picked_and_every_row(nanogpt):
    outcome = nanogpt("bench", *TINY, "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report.keys() == {"device", "versions", "ceilings", "picked", "model", "rows"}
    assert all(value > 0 for value in report["ceilings"].values())
    assert {"read_bytes_per_second", "copy_bytes_per_second", "matmul_flops"} < {
        *report["ceilings"]
    }
    assert report["picked"].keys() >= {"device", "dtype", "kernels", "threads", "sample"}
    assert report["model"]["parameters"] == 20 * 16 + 16 * 16 + 12 * 16 * 16 + 3 * 16
    rows = report["rows"]
    engines = ["torch", "native"] if native.available() else ["torch"]
    found = [
        (row["suite"], row["shape"].get("operation") or row["shape"].get("engine")) for row in rows
    ]
    expected = [("kernels", name) for name in OPERATIONS] + [("training-step", None)]
    assert found == expected + [("generation", name) for name in engines]
    for row in rows:
        assert row.keys() >= ROW_KEYS
        assert row["ours_seconds"] > 0
        assert row["peers"][row["best_peer"]] == min(row["peers"].values())
        assert row["ratio"] == pytest.approx(min(row["peers"].values()) / row["ours_seconds"])
        assert row["fraction_of_ceiling"] > 0
    step = rows[4]
    flops = GPTConfig(20, 16, 1, 2, 16).flops_per_token() * 2 * 16
    name = "" if step["dtype"] == "float32" else f"_{step['dtype']}"
    floor = flops / report["ceilings"][f"matmul_flops{name}"]
    assert step["fraction_of_ceiling"] == pytest.approx(floor / step["ours_seconds"])
    assert step["tokens_per_second"] == pytest.approx(32 / step["ours_seconds"])


def test_people_get_a_table_and_no_peers_where_none_are_wanted(nanogpt):
    outcome = nanogpt("bench", *TINY, "--device", "cpu", "--no-peers")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].startswith("machine: ")
    assert lines[1].startswith("at most: reading ")
    assert "GFLOP/s" in lines[1]
    table = [
        line for line in lines if line.startswith(("kernels: ", "training-step: ", "generation: "))
    ]
    assert len(table) == 5 + (2 if native.available() else 1)
    assert all("  none" in line for line in table)


def test_a_model_file_brings_its_shape(nanogpt, tmp_path):
    (tmp_path / "book.txt").write_text("to be or not to be, that is the question. " * 20)
    trained = nanogpt(
        "train", "--text", tmp_path / "book.txt", "--output", tmp_path / "m.pth", "--run-dir",
        tmp_path / "run", "--max-steps", "1", "--n-layer", "1", "--n-embd", "16",
        "--block-size", "8",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    arguments = ("--init", tmp_path / "m.pth", "--batch-size", "2", "--seconds", "1", "--json")
    outcome = nanogpt("bench", *arguments, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    model = json.loads(outcome.out)["model"]
    assert (model["n_layer"], model["n_embd"], model["block_size"]) == (1, 16, 8)
    assert model["vocab_size"] == len(set("to be or not to be, that is the question. ")) + 1
    refused = nanogpt("bench", *arguments, "--n-layer", "3")
    assert refused.code == 2
    assert "--n-layer 3: the model of --init has 1" in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seconds", "0"), "--seconds must be at least 1"),
        (("--device", "tpu"), "--device must be auto, cpu, cuda"),
        (("--n-head", "3"), "n_embd (128) is not a multiple of n_head (3)"),
        (("--max-new-tokens", "128"), "--max-new-tokens 128 must be below the context of 128"),
        (("--compile", "--no-peers"), "--compile measures a peer"),
        (("--kernels", "triton", "--device", "cpu"), "--kernels triton"),
        (("--secnds", "1"), "the nearest is --seconds"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_exit_code_2(nanogpt, monkeypatch, arguments, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(measuring, "measure_ceilings", None)  # nothing is measured before that
    outcome = nanogpt("bench", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.out == ""


def test_a_missing_model_is_exit_code_3(nanogpt, tmp_path):
    outcome = nanogpt("bench", "--init", tmp_path / "nowhere.pth")
    assert outcome.code == 3
    assert "nowhere.pth" in outcome.err


def test_compile_needs_a_compiler(nanogpt, monkeypatch):
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    outcome = nanogpt("bench", "--compile", "--device", "cpu")
    assert outcome.code == 2
    assert "g++" in outcome.err


def clock(monkeypatch, ticks):
    """A clock on which each function takes what `ticks` says; returns the functions."""
    now = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    def taking(name):
        def run():
            now[0] += ticks[name].pop(0)

        return run

    return {name: taking(name) for name in ticks}


def test_the_median_leaves_the_first_run_out(monkeypatch):
    functions = clock(monkeypatch, {"a": [100, 1, 2, 9], "b": [100, 5, 4, 3]})
    assert measuring.median_seconds(functions, 3) == {"a": 2, "b": 4}


@pytest.mark.parametrize(("budget", "rounds"), [(0.5, 1), (10, 1), (30, 2), (55, 4), (1e9, 50)])
def test_a_budget_becomes_rounds(monkeypatch, budget, rounds):
    functions = clock(monkeypatch, {"a": [4.0] * 51, "b": [6.0] * 51})
    measuring.median_seconds(functions, budget_seconds=budget)
    assert measuring.time.perf_counter() == pytest.approx(10.0 * (rounds + 1))


def test_one_that_is_far_behind_is_timed_once(monkeypatch):
    functions = clock(monkeypatch, {"a": [9, 1, 2, 9], "b": [9, 4, 2, 2], "c": [9, 5]})
    assert measuring.median_seconds(functions, 3, outrun=4) == {"a": 2, "b": 2, "c": 5}


def test_no_functions_take_no_time():
    assert measuring.median_seconds({}) == {}


def test_a_row_names_the_best_peer_and_both_ratios():
    row = measuring.make_row("x", {"n": 3}, "float32", 2.0, {"slow": 9.0, "quick": 3.0}, 1.0)
    assert (row["best_peer"], row["ratio"], row["fraction_of_ceiling"]) == ("quick", 1.5, 0.5)
    shown = measuring.describe_row(row)
    assert (
        shown
        == "x n 3, float32: ours 2000.000 ms, quick 3000.000 ms, ratio 1.50, 50% of the ceiling"
    )
    alone = measuring.make_row("x", {}, "float32", 2.0, {})
    assert (alone["best_peer"], alone["ratio"], alone["fraction_of_ceiling"]) == (None, None, None)


def test_the_ceiling_of_products_is_that_of_the_precision():
    both = {"matmul_flops": 1.0, "matmul_flops_bfloat16": 2.0}
    assert measuring.matmul_ceiling(both, torch.float32) == 1.0
    assert measuring.matmul_ceiling(both, torch.bfloat16) == 2.0
    assert measuring.matmul_ceiling({"matmul_flops": 1.0}, torch.bfloat16) == 1.0


def test_a_slow_precision_is_measured_on_smaller_matrices(monkeypatch):
    sides = []

    def slow(functions, rounds, device):
        (work,) = functions.values()
        sides.append(len(work()))
        return {"matmul": sides[-1] ** 3 * 1e-9}

    monkeypatch.setattr(measuring, "median_seconds", slow)
    found = measuring._matmul_flops(torch.float32, 2048, "cpu")
    assert found == pytest.approx(2e9)
    assert sides == [256, 512]  # 1024 would take 1.07 s


def test_the_plain_model_computes_what_ours_does():
    config = GPTConfig(vocab_size=30, block_size=12, n_layer=2, n_head=2, n_embd=16, bias=True)
    ours, plain = GPT(config), PlainGPT(config)
    names = {"transformer.": "", ".attn.": ".", "mlp.c_fc": "mlp.0", "mlp.c_proj": "mlp.2"}
    weights = {}
    for name, value in ours.named_parameters():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = torch.randn_like(value) * 0.2
        value.data.copy_(weights[name])
    plain.load_state_dict(weights)
    tokens, targets = torch.randint(30, (2, 3, 12))
    logits, loss = ours(tokens, targets)
    theirs, their_loss = plain(tokens, targets)
    torch.testing.assert_close(theirs, logits)
    torch.testing.assert_close(their_loss, loss)
    torch.testing.assert_close(plain(tokens)[0][:, 0], ours.next_logits(tokens))
    out = plain.generate(tokens[:1, :4], 20)
    assert out.shape == (1, 24)
    assert torch.equal(out[:, :4], tokens[:1, :4])


def tiny_training(**flags):
    given = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 8, "batch_size": 4}
    return TrainConfig(**given | {"device": "cpu", "val_fraction": 0.0, "max_steps": 100} | flags)


def test_a_rehearsal_takes_the_steps_of_the_loop():
    rehearsal = Rehearsal(tiny_training(), random_corpus(20, 500))
    before = rehearsal.trainer.model.token_weight.detach().clone()
    losses = [rehearsal.step() for _ in range(3)]
    assert rehearsal.trainer.position.step == 3
    assert len(set(losses)) == 3
    assert not torch.equal(before, rehearsal.trainer.model.token_weight)
    plan = rehearsal.plan
    rate = scheduled_rate(2, 100, plan.warmup_steps, plan.peak_lr, plan.min_lr)
    assert rehearsal.trainer.optimizer.param_groups[0]["lr"] == rate


def test_a_rehearsal_takes_the_weights_and_windows_that_it_is_given():
    corpus = random_corpus(20, 500)
    initial = GPT(vocab_size=20, n_layer=1, n_embd=16, n_head=2, block_size=8)
    windows = corpus.tokens[:36].reshape(4, 9).astype("int64")
    tokens = torch.from_numpy(windows)
    _, loss = initial(tokens[:, :-1], tokens[:, 1:])
    rehearsal = Rehearsal(tiny_training(dtype="float32"), corpus, initial)
    assert rehearsal.step(windows) == pytest.approx(loss.item(), rel=1e-5)
    later = rehearsal.step(windows)
    assert later < loss.item()


@pytest.mark.parametrize("vocab_size", [2, 65, 50257])
def test_a_random_corpus_has_the_vocabulary_that_was_asked_for(vocab_size):
    corpus = random_corpus(vocab_size, 3000)
    assert corpus.tokenizer.vocab_size == vocab_size
    assert corpus.tokens.max() < vocab_size
    assert len(corpus.tokens) == 3000
    if vocab_size > 2:
        assert len(set(corpus.tokens.tolist())) > min(50, vocab_size - 2)


@pytest.mark.parametrize("vocab_size", [1, 60_000])
def test_an_impossible_vocabulary_is_refused(vocab_size):
    with pytest.raises(ValueError, match="no character vocabulary"):
        random_corpus(vocab_size, 10)


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ("model name\t: CPU A\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", "CPU A (AVX-512 BF16)"),
        ("model name\t: CPU A\nflags\t\t: fpu avx2 avx512f\nbogomips: 1\n", "CPU A (AVX-512)"),
        ("model name\t: CPU A\nflags\t\t: fpu avx2\n", "CPU A (AVX2)"),
        ("model name\t: CPU A\nflags\t\t: fpu sse4_2\n", "CPU A"),
        ("model name\t: CPU A\n", "CPU A"),
        ("Features\t: fp asimd\n", None),
    ],
)
def test_machines_of_one_model_name_differ_by_their_vectors(info, name):
    assert measuring._processor(info) == name
