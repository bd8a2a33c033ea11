"""Files from elsewhere: they run nothing, take no room beyond their size, say nowhere to write."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nanogpt import GPT, checkpoint, metadata, native
from nanogpt.errors import InputError
from nanogpt.run_directory import RunDirectory
from nanogpt.tokenizer import CharTokenizer

ROOT = Path(__file__).resolve().parent.parent
GIGA = 2**30
_MOST_MEGABYTES = 300


def small_model():
    model = GPT(vocab_size=5, block_size=8, n_layer=1, n_head=1, n_embd=4)
    model.tokenizer = CharTokenizer("abé\n")
    return model


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.pth"
    checkpoint.save(small_model(), path)
    return path


# Nothing runs.


class Touch:
    """When it is unpickled, a file comes to be."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def write_pickle(path, payload):
    path.write_bytes(pickle.dumps(payload))


def write_state(path, payload):
    """A model file of ours with the payload among its weights."""
    model = small_model()
    sealed = metadata.seal(model.describe(), model.state_dict())
    torch.save({**model.state_dict(), "x": payload, metadata.KEY: metadata.to_tensor(sealed)}, path)


def write_old_state(path, payload):
    """The form that torch had before it wrote zip files."""
    torch.save({"x": payload}, path, _use_new_zipfile_serialization=False)


WRITERS = [write_pickle, write_state, write_old_state]


@pytest.mark.parametrize("write", WRITERS)
def test_the_payload_does_touch_a_file_where_pickles_are_trusted(tmp_path, write):
    touched, path = tmp_path / "touched", tmp_path / "evil"
    write(path, Touch(touched))
    if write is write_pickle:
        pickle.loads(path.read_bytes()).close()
    else:
        torch.load(path, weights_only=False)["x"].close()
    assert touched.exists()


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt"])
def test_a_pickle_in_a_model_file_runs_in_no_command(nanogpt, tmp_path, text_file, write, suffix):
    touched, path = tmp_path / "touched", tmp_path / f"evil{suffix}"
    write(path, Touch(touched))
    out = tmp_path / "out"
    commands = [
        ("sample", "--model", path, "--max-new-tokens", 1),
        ("sample", "--model", path, "--max-new-tokens", 1, "--engine", "torch"),
        ("export", "--model", path, "--output", out / "m.pt"),
        ("calibrate", "--model", path, "--text", text_file, "--output", out / "c.pth"),
        ("train", "--text", text_file, "--init", path, "--run-dir", out, "--output", out / "t.pth"),
    ]
    for command in commands:
        outcome = nanogpt(*command)
        assert outcome.code in (2, 3), (command, outcome)
        assert outcome.err.count("Traceback") == 0
        assert not touched.exists(), command
    with pytest.raises(InputError):
        checkpoint.load(path)
    if native.available():
        with pytest.raises(InputError):
            native.open_file(path)
        program = native.program()
        if program is not None:
            done = subprocess.run([program, path], capture_output=True, check=False)
            assert done.returncode == 3
    assert not touched.exists()


TRAIN = ("--batch-size", 4, "--block-size", 16, "--n-layer", 1, "--n-head", 1, "--n-embd", 8,
         "--device", "cpu", "--threads", 1, "--dtype", "float32", "--kernels", "torch")  # fmt: skip


@pytest.fixture
def run(nanogpt, tmp_path, text_file):
    """A run directory with one checkpoint, and what continues it for two steps more."""
    folder = tmp_path / "run"

    def go(steps):
        return nanogpt(
            "train", "--text", text_file, "--run-dir", folder, "--output", tmp_path / "out.pth",
            "--max-steps", steps, *TRAIN,
        )  # fmt: skip

    assert go(2).code == 0
    *older, newest = sorted((folder / "checkpoints").iterdir())
    for other in older:
        shutil.rmtree(other)
    (tmp_path / "out.pth").unlink()
    return folder, newest, go


def reseal(checkpoint_folder):
    """The manifest of what is there now, as an attacker makes it."""
    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in checkpoint_folder.iterdir()
        if path.name != "manifest.json"
    }
    (checkpoint_folder / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize("write", WRITERS)
def test_a_pickle_in_a_checkpoint_runs_nothing_though_the_manifest_fits(tmp_path, run, write):
    folder, newest, _ = run
    touched = tmp_path / "touched"
    write(newest / "trainer.pt", Touch(touched))
    reseal(newest)
    with RunDirectory(folder, warn=pytest.fail) as opened:
        found = opened.newest()
        assert found is not None
        assert found.folder == newest
        with pytest.raises(InputError, match=r"trainer\.pt cannot be read"):
            found.load_trainer()
    assert not touched.exists()


def test_the_state_of_a_trainer_is_still_read(run):
    folder, newest, _ = run
    theirs = torch.load(newest / "trainer.pt", weights_only=True)
    with RunDirectory(folder, warn=pytest.fail) as opened:
        ours = opened.newest().load_trainer()
    assert ours.keys() == theirs.keys()
    assert str(ours) == str(theirs)


# No room beyond the size.


def pickled(entries):
    """data.pkl of tensors: name -> (storage, record, numbers in it, shape, strides)."""

    def text(word):
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    def whole(number):
        return b"\x8a\x08" + struct.pack("<q", number)

    out = b"\x80\x02}("
    for name, (storage, record, count, shape, strides) in entries.items():
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage")
        out += f"ctorch\n{storage}\n".encode() + text(record) + text("cpu") + whole(count) + b"tQ"
        out += whole(0) + b"(" + b"".join(map(whole, shape)) + b"t("
        out += b"".join(map(whole, strides)) + b"t\x89ccollections\nOrderedDict\n)RtR"
    return out + b"u."


def write_zip(path, pickle_bytes, records, compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as file:
        file.writestr("m/data.pkl", pickle_bytes)
        file.writestr("m/byteorder", "little")
        file.writestr("m/version", "3\n")
        for name, payload in records.items():
            file.writestr(f"m/data/{name}", payload)


META = b'{"config":{}}'
EXTRA = ("ByteStorage", "9", len(META), (len(META),), (1,))
CALL = b"\x80\x02}(X\x01\x00\x00\x00a"


def compressed(path):
    zeros = bytes(GIGA // 2)
    weight = ("FloatStorage", "0", GIGA // 8, (GIGA // 8,), (1,))
    entries = {"a": weight, metadata.KEY: EXTRA}
    write_zip(path, pickled(entries), {"0": zeros, "9": META}, zipfile.ZIP_DEFLATED)


def compressed_pickle(path):
    write_zip(path, b"\x80\x02" + b"N0" * (GIGA // 4) + b"}.", {}, zipfile.ZIP_DEFLATED)


def repeated(path):
    """One number, shown a billion times."""
    weight = ("FloatStorage", "0", 1, (GIGA // 4,), (0,))
    write_zip(path, pickled({"a": weight, metadata.KEY: EXTRA}), {"0": b"1234", "9": META})


def repeated_metadata(path):
    extra = ("ByteStorage", "9", 1, (GIGA,), (0,))
    write_zip(path, pickled({metadata.KEY: extra}), {"9": b"1"})


def shared(path):
    """A thousand tensors in the place of one."""
    weight = ("FloatStorage", "0", 200_000, (200_000,), (1,))
    entries = {f"a{i}": weight for i in range(1000)}
    write_zip(path, pickled({**entries, metadata.KEY: EXTRA}), {"0": bytes(800_000), "9": META})


def called(path):
    """A function that torch's reader allows and that fills memory."""
    write_zip(
        path, CALL + b"cbuiltins\nbytearray\n(\x8a\x08" + struct.pack("<q", GIGA) + b"tRu.", {}
    )


def declared(path):
    """A storage of 4 TB in a record of 16 bytes."""
    weight = ("FloatStorage", "0", 2**40, (4,), (1,))
    write_zip(path, pickled({"a": weight, metadata.KEY: EXTRA}), {"0": bytes(16), "9": META})


def overlapping(path):
    """A hundred records of the directory are one and the same 900 kB."""
    write_zip(path, pickled({}), {"0": bytes(900_000)})
    raw = path.read_bytes()
    end = raw.rindex(b"PK\5\6")
    size, start = struct.unpack("<2L", raw[end + 12 : end + 20])
    directory = raw[start : start + size]
    entry = directory[directory.rindex(b"PK\1\2") :]
    more = b"".join(entry.replace(b"m/data/0", b"m/data/%d" % i) for i in range(1, 10))
    more += b"".join(entry.replace(b"m/data/0", b"m/data/%c" % i) for i in b"abcdefghijklmnopqrstu")
    count = struct.unpack("<H", raw[end + 10 : end + 12])[0] + 9 + 21
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size + len(more), start, 0)
    path.write_bytes(raw[:end] + more + tail)


def two_directories(path):
    """Python's zipfile reads one, and a reader that trusts the locator another."""
    write_zip(path, pickled({}), {})
    raw = path.read_bytes()
    path.write_bytes(raw[:-2] + struct.pack("<H", len(raw)) + raw)


def of_header(path):
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")


def of_tensor(path):
    head = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    path.write_bytes(struct.pack("<Q", len(head)) + head.encode())


def deep(path):
    safetensors.torch.save_file({}, path, {"nanogpt": "[" * 900_000})


def billion_layers(path):
    model = small_model()
    content = model.describe()
    content["config"] = {**content["config"], "n_layer": 10**9, "block_size": 10**12}
    tensors = {n: t for n, t in model.state_dict().items() if n != metadata.KEY}
    sealed = metadata.canonical_json(metadata.seal(content, tensors)).decode()
    safetensors.torch.save_file(tensors, path, {"nanogpt": sealed})


HOSTILE = [
    (".pth", compressed), (".pth", compressed_pickle), (".pth", repeated),
    (".pth", repeated_metadata), (".pth", shared), (".pth", called), (".pth", declared),
    (".pth", overlapping), (".pth", two_directories), (".safetensors", of_header),
    (".safetensors", of_tensor), (".safetensors", deep), (".safetensors", billion_layers),
]  # fmt: skip

# Prints by how many MB the most memory that the process ever held grew with each file.
READER = """
import sys, torch
from nanogpt import checkpoint
from nanogpt.errors import InputError

def most():
    lines = open("/proc/self/status").readlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024

checkpoint.load(sys.argv[1])
for path in sys.argv[3:]:
    before = most()
    try:
        if sys.argv[2] == "torch":
            state = torch.load(path, weights_only=True)
            [value.contiguous() for value in state.values() if hasattr(value, "contiguous")]
            outcome = "read"
        else:
            checkpoint.load(path)
            outcome = "read"
    except InputError as error:
        outcome = str(error)
    print(most() - before, outcome, sep="|")
"""


def read_elsewhere(model_file, how, paths):
    if not Path("/proc/self/status").exists():
        pytest.skip("the most memory held is told by Linux")
    done = subprocess.run(
        [sys.executable, "-c", READER, model_file, how, *paths],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split("|", 1) for line in done.stdout.splitlines()]
    assert len(rows) == len(paths)
    return [(int(megabytes), outcome) for megabytes, outcome in rows]


def test_a_small_file_takes_little_memory_whatever_it_declares(model_file, tmp_path):
    paths = []
    for suffix, write in HOSTILE:
        paths.append(tmp_path / f"{write.__name__}{suffix}")
        write(paths[-1])
        assert paths[-1].stat().st_size < 1.2e6, paths[-1]
    for path, (megabytes, outcome) in zip(
        paths, read_elsewhere(model_file, "ours", paths), strict=True
    ):
        assert str(path) in outcome, (path.name, outcome)
        assert megabytes < _MOST_MEGABYTES, (path.name, megabytes)


def test_torch_alone_would_take_what_they_declare(model_file, tmp_path):
    """The control: what the test above measures can be more."""
    for write in (repeated, called):
        path = tmp_path / f"{write.__name__}.pth"
        write(path)
        ((megabytes, _),) = read_elsewhere(model_file, "torch", [path])
        assert megabytes > 2 * _MOST_MEGABYTES, write.__name__


def test_ordinary_state_dicts_of_torch_are_still_read(tmp_path):
    state = {
        "p": torch.nn.Parameter(torch.ones(2)),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "n": {"list": [1, 2.5, None, "word", True], "empty": torch.zeros(0)},
    }
    path = tmp_path / "state.pth"
    torch.save(state, path)
    again = checkpoint.read_tensors(path)
    assert again["n"]["list"] == state["n"]["list"]
    assert torch.equal(again["p"], state["p"])
    torch.save({"p": torch.ones(2)}, path)
    with pytest.raises(InputError, match="without a configuration"):
        checkpoint.load(path)


ALIASES = "epochs:\n  e0: &a0 [x, x]\n" + "".join(
    f"  e{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ALIASES, "without aliases (line 3)"),
        ("epochs: &a [*a]\n", "without aliases (line 1)"),
        ("[" * 100_000, "nested too deep"),
        ("epochs: " + "[" * 20_000 + "]" * 20_000, "nested too deep"),
        ("# " + "x" * 2_000_000, "longer than 1,000,000"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_a_configuration_of_aliases_or_depths_is_refused(nanogpt, tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    outcome = nanogpt("train", "--config", path)
    assert outcome.code == 3
    assert words in outcome.err
    assert len(outcome.err) < 500


@pytest.mark.parametrize(
    ("command", "name", "text", "words"),
    [
        ("--data", "wide.csv", "a,b\n" + ",".join("1" * 4000) + "\n", "more than 2,000"),
        ("--data", "deep.jsonl", ('{"a":' * 50_000) + "1" + "}" * 50_000 + "\n", "too deep"),
        ("--offline-data", "deep.jsonl", '{"text":"a","reward":' + "[" * 400_000, "too deep"),
    ],
)  # fmt: skip
def test_tables_of_too_many_fields_or_levels_are_refused(
    nanogpt, tmp_path, command, name, text, words
):
    path = tmp_path / name
    path.write_text(text.replace("a,b\n", ",".join(f"c{i}" for i in range(4000)) + "\n"))
    verb = "explore" if command == "--data" else "advanced"
    outcome = nanogpt(
        verb, command, path, "--run-dir", tmp_path / "run", "--output", tmp_path / "out.pth"
    )
    assert outcome.code == 3
    assert words in outcome.err
    assert not (tmp_path / "out.pth").exists()


DEEP = "[" * 200_000


def test_deep_json_in_a_run_directory_is_damage_and_no_crash(run):
    folder, newest, go = run
    (newest / "manifest.json").write_text(DEEP)
    with RunDirectory(folder, warn=lambda _: None) as opened:
        assert opened.newest() is None
    (newest / "state.json").write_text(DEEP)
    reseal(newest)
    warnings = []
    with RunDirectory(folder, warn=warnings.append) as opened:
        assert opened.newest() is None
    assert "its state is damaged" in warnings[0]
    (folder / "metrics.jsonl").write_text(DEEP + "\n")
    (folder / "run.json").write_text(DEEP)
    outcome = go(2)
    assert outcome.code == 3
    assert "run.json is damaged" in outcome.err


# No writes elsewhere.


def test_a_manifest_names_only_files_beside_it(tmp_path, run):
    folder, newest, _ = run
    secret = tmp_path / "secret"
    secret.write_text("x")
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    for name in ("../../../secret", str(secret), "/dev/zero", "..", ""):
        reseal(newest)
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["files"][name] = {**entry, "bytes": 0} if "zero" in name else entry
        (newest / "manifest.json").write_text(json.dumps(manifest))
        warnings = []
        with RunDirectory(folder, warn=warnings.append) as opened:
            assert opened.newest() is None, name
        assert "which is no file in it" in warnings[0]
    reseal(newest)
    with RunDirectory(folder, warn=pytest.fail) as opened:
        assert opened.newest() is not None


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "checkpoints", "tensorboard"])
def test_a_link_in_a_run_directory_leads_nowhere(tmp_path, run, name):
    folder, _, go = run
    elsewhere = tmp_path / "elsewhere"
    if (folder / name).is_dir():
        (folder / name).rename(tmp_path / "moved")
        elsewhere.mkdir()
        (elsewhere / ".1.tmp").write_text("mine")
    else:
        (folder / name).unlink()
        elsewhere.write_text("mine")
    (folder / name).symlink_to(elsewhere)
    outcome = go(2)
    assert outcome.code == 2
    assert f"holds a link where a run writes: {name}" in outcome.err
    kept = elsewhere / ".1.tmp" if elsewhere.is_dir() else elsewhere
    assert kept.read_text() == "mine"


def test_a_run_directory_may_itself_be_a_link(tmp_path, run):
    folder, _, go = run
    folder.rename(tmp_path / "disk")
    folder.symlink_to(tmp_path / "disk")
    assert go(2).code == 0


# Writes down every path that is opened for writing, made, renamed or removed.
WATCHED = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
ONE = {"os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"}
TWO = {"os.rename", "os.link", "os.symlink"}
def watch(event, arguments):
    if event == "open":
        path, _, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        # In a folder, a file without a name: so it is tried out, and nothing is left.
        paths = [path] if writes and (isinstance(path, int) or not os.path.isdir(path)) else []
    elif event == "os.mkdir":
        paths = [] if os.path.isdir(arguments[0]) else arguments[:1]
    else:
        paths = arguments[:1] if event in ONE else arguments[:2] if event in TWO else []
    for path in paths:
        if not isinstance(path, int) and path is not None:
            os.write(log, os.fsencode(os.path.realpath(os.path.dirname(os.path.abspath(path))))
                     + b"/" + os.path.basename(os.fsencode(path)) + b"\\n")
sys.addaudithook(watch)
from nanogpt.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def watched(tmp_path):
    """Run a command elsewhere: watched(*words) -> every path that it wrote to."""
    place = tmp_path / "place"
    (place / "temporary").mkdir(parents=True)

    def run(*words):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        # torch names its cache there for its own children.
        mine = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
        environment = {
            **mine,
            "NANOGPT_CACHE": str(place / "cache"),
            "TMPDIR": str(place / "temporary"),
            "HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", WATCHED, log, *map(str, words)],
            capture_output=True, text=True, cwd=place, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        seen = {Path(line) for line in log.read_text().splitlines()}
        return {path for path in seen if not str(path).startswith(("/dev/", "/proc/"))}

    return run


def below(paths, *folders):
    """What lies in none of the folders."""
    roots = [folder.resolve() for folder in folders]
    return sorted(p for p in paths if not any(root in (p, *p.parents) for root in roots))


HOSTILE_NAME = "..;$(touch x) %2e%2e%2f\n.txt"


def test_commands_write_where_they_were_told_and_nowhere_else(watched, tmp_path, text_file):
    place, out = tmp_path / "place", tmp_path / "out"
    allowed = [place / "cache", place / "temporary", out]
    text = tmp_path / HOSTILE_NAME
    text_file.rename(text)
    model = out / "m.safetensors"
    wrote = watched("train", "--text", text, "--max-steps", 2, "--output", model, *TRAIN)
    assert model in wrote
    # Without --run-dir a run makes its own name, below runs/ where the command was given.
    runs = list((place / "runs").iterdir())
    assert len(runs) == 1
    assert below(wrote, *allowed, place / "runs") == []
    told = tmp_path / "told"
    wrote = watched(
        "train", "--text", text, "--max-steps", 2, "--output", model, "--run-dir", told,
        "--init", model, *TRAIN[:2], *TRAIN[10:],
    )  # fmt: skip
    assert below(wrote, *allowed, told) == []
    wrote = watched("sample", "--model", model, "--max-new-tokens", 3)
    assert below(wrote, place / "temporary") == []
    for format, name in (("torchscript", "m.pt"), ("hf", "m-hf")):
        wrote = watched("export", "--model", model, "--format", format, "--output", out / name)
        assert wrote
        assert below(wrote, *allowed) == []
    wrote = watched(
        "calibrate", "--model", model, "--text", text,
        "--output", out / "c.pth", "--report", out / "c.html",
    )  # fmt: skip
    assert below(wrote, *allowed) == []
    assert {out / "c.pth", out / "c.html"} <= wrote


@pytest.mark.slow
def test_explore_writes_where_it_was_told_and_nowhere_else(watched, tmp_path):
    place, out = tmp_path / "place", tmp_path / "out"
    data = tmp_path / "data.csv"
    rows = "".join(f"{i % 3},../../{i % 3},{i % 2}\n" for i in range(60))
    data.write_text("../../a,/etc/b,c\n" + rows)
    wrote = watched(
        "explore", "--data", data, "--epochs", 1, "--output", out / "k.pth", "--run-dir",
        out / "run", "--report", out / "r.html", "--findings", out / "f.json", "--device", "cpu",
        "--impute", out / "filled.csv",
    )  # fmt: skip
    assert {out / "k.pth", out / "r.html", out / "f.json", out / "filled.csv"} <= wrote
    assert below(wrote, place / "cache", place / "temporary", out) == []


def test_a_write_elsewhere_would_be_seen(watched, tmp_path):
    """The control: the watcher sees what a command does in a folder that was not allowed."""
    source = tmp_path / "m.pth"
    checkpoint.save(small_model(), source)
    wrote = watched(
        "export", "--model", source, "--format", "safetensors", "--output",
        tmp_path / "far" / "m.safetensors",
    )  # fmt: skip
    assert below(wrote, tmp_path / "place")


def test_names_of_tensors_are_no_paths(nanogpt, tmp_path):
    model = small_model()
    tensors = {n: t for n, t in model.state_dict().items() if n != metadata.KEY}
    tensors["../../escaped"] = tensors.pop("transformer.ln_f.weight")
    sealed = metadata.canonical_json(metadata.seal(model.describe(), tensors)).decode()
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(tensors, path, {"nanogpt": sealed})
    before = sorted(tmp_path.rglob("*"))
    outcome = nanogpt("export", "--model", path, "--output", tmp_path / "out.pt")
    assert outcome.code == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_planted_for_a_temporary_file_is_not_followed(tmp_path, monkeypatch):
    """Names of temporary files are drawn; a file or link of that name is passed over."""
    import tempfile

    target = tmp_path / "target"
    target.write_text("mine")
    names = iter(["planted", "planted", "fresh"])
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: names)
    (tmp_path / ".m.pth.planted.tmp").symlink_to(target)
    checkpoint.save(small_model(), tmp_path / "m.pth")
    assert target.read_text() == "mine"
    assert (tmp_path / "m.pth").is_file()
    assert not (tmp_path / "m.pth").is_symlink()


def test_the_name_of_a_run_holds_no_separator():
    from nanogpt.data import _short_name

    for name in ("../../x.txt", "a/../../b", "..", "/etc/passwd", "a\\b\0c", "é" * 300):
        made = _short_name(name)
        assert made == Path(made).name
        assert made not in ("", ".", "..")
        assert len(made) <= 40
