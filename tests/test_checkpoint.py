"""Model files: whole or refused, equal for equal models, readable the ways the README says."""

import fcntl
import json
import os
import random
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import nanogpt
from nanogpt import GPT, metadata
from nanogpt.checkpoint import load, save, write_atomically
from nanogpt.errors import InputError, UsageError
from nanogpt.tokenizer import CharTokenizer

SUFFIXES = (".pth", ".safetensors")


def make_model() -> GPT:
    model = GPT(vocab_size=5, block_size=8, n_layer=2, n_head=2, n_embd=8, bias=True)
    model.tokenizer = CharTokenizer("abé\n")
    model.calibration_temperature = 1.25
    return model


@pytest.fixture(params=SUFFIXES)
def saved(request, tmp_path):
    """A model and the file it was saved to."""
    model = make_model()
    path = tmp_path / f"model{request.param}"
    save(model, path)
    return model, path


def test_a_loaded_model_is_the_saved_one(saved):
    model, path = saved
    again, tokenizer = nanogpt.load(path)
    assert again.config == model.config
    assert not again.training
    assert again.calibration_temperature == 1.25
    assert tokenizer is again.tokenizer
    assert tokenizer.stoi == model.tokenizer.stoi
    for (name, a), (other, b) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)


def test_equal_models_are_equal_files_whatever_their_name(saved, tmp_path):
    _, path = saved
    other = tmp_path / f"another{path.suffix}"
    save(load(path)[0], other)
    assert other.read_bytes() == path.read_bytes()
    assert str(tmp_path).encode() not in path.read_bytes()


def test_the_seeds_way_of_loading_works(tmp_path):
    save(make_model(), tmp_path / "gpt.pth")
    model = GPT(vocab_size=5, block_size=8, n_layer=2, n_head=2, n_embd=8, bias=True)
    model.load_state_dict(torch.load(tmp_path / "gpt.pth", map_location="cpu"))
    model.eval()
    out = model.generate(torch.tensor([[0, 1]]), max_new_tokens=10, temperature=1.0)
    itos = model.tokenizer.itos
    assert len("".join(itos[i] for i in out[0].tolist() if i != 4)) <= 12
    assert out.shape == (1, 12)


def test_the_metadata_is_readable_without_us(saved):
    model, path = saved
    if path.suffix == ".pth":
        content = json.loads(torch.load(path, weights_only=True)["_extra_state"].numpy().tobytes())
    else:
        with safetensors.safe_open(path, framework="pt") as file:
            content = json.loads(file.metadata()["nanogpt"])
    assert content["config"]["n_embd"] == 8
    assert content["tokenizer"]["kind"] == "char"
    assert content["calibration_temperature"] == 1.25
    assert content["sha256"] == metadata.tensor_digest(dict(model.named_parameters()))


def test_no_flipped_byte_is_loaded_silently(saved):
    """Every file with one changed byte is refused, or holds the very same model."""
    model, path = saved
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        at = rng.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            again, _ = load(path)
        except InputError:
            refused += 1
            continue
        assert again.describe() == model.describe(), at
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), at
    assert refused > 100


def test_a_truncated_file_is_refused(saved):
    _, path = saved
    whole = path.read_bytes()
    for size in {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"model\.(pth|safetensors)"):
            load(path)


def test_changed_weights_are_refused_by_load_state_dict_too(tmp_path):
    save(make_model(), tmp_path / "gpt.pth")
    state = torch.load(tmp_path / "gpt.pth")
    state["transformer.wte.weight"][0, 0] += 1
    with pytest.raises(InputError, match="weights do not match"):
        make_model().load_state_dict(state)
    del state["_extra_state"]
    make_model().load_state_dict(state)  # changed on purpose


def write_foreign(tmp_path):
    torch.save({"model": {}, "iter_num": 3}, tmp_path / "nanogpt.pth")
    torch.save({"weight": torch.ones(2)}, tmp_path / "bare.pth")
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    torch.save({"x": os.system}, tmp_path / "code.pth")
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "model.bin").write_bytes(b"x")
    return {
        "nanogpt.pth": "holds more than weights",
        "bare.pth": "weights without a configuration",
        "tensor.pth": "holds more than weights",
        "code.pth": "damaged or not a file of tensors",
        "foreign.safetensors": "has no configuration",
        "text.pth": "damaged or not a file of tensors",
        "text.safetensors": "damaged or not safetensors",
        "folder.pth": "is not a file",
        "model.bin": "the name of one ends in",
        "nowhere.pth": "there is no model file",
    }


def test_a_foreign_file_is_refused_in_one_sentence(tmp_path):
    for name, message in write_foreign(tmp_path).items():
        with pytest.raises(InputError, match=message) as caught:
            load(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"n_layer": 10**9}},
        {"config": {"vocab_size": 5, "n_embd": 8, "n_head": 3}},
        {"config": None},
        {"config": {"surprise": 1}},
        {"tokenizer": {"kind": "char", "characters": "aa"}},
        {"tokenizer": {"kind": "morse"}},
        {"tokenizer": 7},
    ],
)
def test_sealed_but_hostile_metadata_is_refused(tmp_path, change):
    model = make_model()
    tensors = dict(model.named_parameters())
    content = metadata.seal({**model.describe(), **change}, tensors)
    state = {
        **{n: t.detach() for n, t in tensors.items()},
        metadata.KEY: metadata.to_tensor(content),
    }
    torch.save(state, tmp_path / "hostile.pth")
    with pytest.raises(InputError):
        load(tmp_path / "hostile.pth")


def test_an_unknown_ending_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match=r"\.pth or \.safetensors"):
        save(make_model(), tmp_path / "model.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_has_left_beside_the_file_goes_and_nothing_else(tmp_path):
    """Old temporary files of the same name; none that is young or in use, and no other's."""
    path = tmp_path / "model [1].pth"
    left = {}
    for name in ("old", "young", "in use"):
        left[name] = tmp_path / f".{path.name}.{name}.tmp"
        left[name].write_bytes(b"half")
    left["another's"] = tmp_path / ".model 1.pth.old.tmp"
    left["another's"].write_bytes(b"half")
    for name in left.keys() - {"young"}:
        os.utime(left[name], (1, 1))
    with left["in use"].open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        save(make_model(), path)
    assert {name for name, each in left.items() if each.exists()} == {
        "young",
        "in use",
        "another's",
    }
    assert load(path)[0].describe() == make_model().describe()


def test_too_little_memory_for_a_safetensors_file_is_an_error_and_no_dead_process(tmp_path):
    """The library ends or stops a process whose memory runs out inside it."""
    code = """
import resource, sys
import torch
from nanogpt import GPT, checkpoint
model = GPT(n_embd=512, n_layer=4, n_head=4)
checkpoint.save(model, sys.argv[1])
size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 30_000_000, resource.RLIM_INFINITY))
try:
    checkpoint.save(model, sys.argv[1])
except MemoryError:
    print('told')
"""
    path = tmp_path / "m.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr
    load(path)
    assert [each.name for each in tmp_path.iterdir()] == ["m.safetensors"]
