"""The rules of the house: who may import whom, what the wheel holds, what the README says."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nanogpt import native

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanogpt"

# A module may import only from its own layer's list, all of which lie below it.
PURE = {"errors", "config", "tokenizer"}
MODEL = PURE | {"kernels", "cache", "metadata", "model", "native", "decoding"}
FILES = MODEL | {"checkpoint", "data", "baselines", "machine", "memory", "report"}
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "tokenizer": {"errors"},
    "kernels": set(),
    "cache": {"config"},
    "memory": {"config"},
    "metadata": set(),
    "tilt": set(),
    "reliability": set(),
    "calibration": {"native", "reliability"},
    "judge": set(),
    "text_rewards": set(),
    "term_automaton": {"tokenizer"},
    "rewards": PURE | {"native", "term_automaton", "text_rewards", "_C"},
    "reward_decoding": MODEL | {"rewards", "tilt"},
    "reward_model": MODEL | {"checkpoint", "judge", "records", "reward_data", "rewards"},
    "model": MODEL - {"native", "model"} | {"reward_decoding"},
    "comparison": MODEL | {"judge", "offline_rl", "records", "text_measures"},
    "offline_run": FILES
    | {"comparison", "interruption", "judge", "offline_rl", "plan", "progress", "records"}
    | {"reporter", "reward_data", "run_directory", "saver", "tilt"},
    "align_run": FILES
    | {"plan", "reporter", "run_directory", "saver", "self_align"}
    | {"term_alignment", "terms"},
    "advanced": FILES | {"align_run", "cli", "interruption", "offline_run", "plan"},
    "decoding": {"cache", "model", "native", "tokenizer"},
    # The compiled module is imported by its door alone, and by name for the types elsewhere.
    "native": {"_C", "config", "model", "tokenizer"},
    "terms": {"errors"},
    "confidence": set(),
    "baselines": set(),
    "report": set(),
    "data": {"errors", "tokenizer"},
    "checkpoint": MODEL,
    "machine": {"errors", "kernels"},
    "journal": set(),
    "run_directory": MODEL | {"checkpoint", "journal"},
    "saver": MODEL | {"checkpoint", "run_directory"},
    "progress": set(),
    "interruption": set(),
    "recipe": {"config"},
    "muon": set(),
    "native_step": {"config", "machine", "model", "muon", "native"},
    "plan": FILES | {"native_step", "recipe", "run_directory"},
    "trainer": FILES | {"muon", "native_step", "plan", "recipe", "run_directory"},
    "micro_batch": {"errors", "machine", "plan", "run_directory", "trainer"},
    "reward_data": {"errors"},
    "records": PURE | {"reward_data"},
    "offline_rl": MODEL | {"data", "machine", "recipe", "records", "tilt", "trainer"},
    "text_measures": set(),
    "self_align": {"text_measures", "tilt"},
    "term_alignment": MODEL
    | {"data", "machine", "offline_rl", "records", "reward_decoding", "rewards", "self_align"}
    | {"text_measures", "text_rewards", "trainer"},
    "reporter": FILES | {"plan", "run_directory", "trainer"},
    "train": FILES
    | {"interruption", "micro_batch", "plan", "progress", "reporter", "run_directory", "saver"}
    | {"recipe", "trainer", "cli"},
    "calibrate": FILES | {"calibration", "interruption", "cli"},
    "sample": FILES | {"cli", "confidence", "reward_decoding", "rewards", "terms", "_C"},
    "doctor": FILES | {"cli"},
    "measuring": set(),
    "plain_gpt": {"config"},
    "rehearsal": FILES | {"plan", "trainer"},
    "bench": FILES | {"cli", "measuring", "plain_gpt", "plan", "rehearsal"},
    "explore": FILES
    | {"cli", "interruption", "plan", "progress", "records", "reporter", "run_directory"}
    | {"recipe", "trainer"},
    "cli": {"config", "errors"},
    "__init__": MODEL
    | {"checkpoint", "reward_decoding", "reward_model", "rewards", "text_rewards"},
    "__main__": {"cli"},
    "export": FILES | {"cli", "interruption"},
}
NO_TORCH = {"errors", "config", "cli", "tokenizer", "data", "baselines", "progress", "report"} | {
    "confidence",
    "journal",
    "recipe",
    "memory",
    "reward_data",
    "terms",
    "text_measures",
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Full names of what a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_imports_only_from_below():
    for path, room in modules():
        assert room in ALLOWED, f"{room} has no place in the layers"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "nanogpt" and parts[1] not in ("__version__", room):
                target = {"GPT": "model", "load": "checkpoint"}.get(parts[1], parts[1])
                assert target in ALLOWED[room], f"{path.name} imports {name}"


def test_nothing_imports_tests_or_benchmarks():
    for path, _ in modules():
        assert not [n for n in imports(path) if n.split(".")[0] in ("tests", "benchmarks")]


def test_what_help_needs_imports_no_torch():
    for path, room in modules():
        if room in NO_TORCH:
            assert not [n for n in imports(path) if n.split(".")[0] == "torch"], path.name


def test_no_module_has_a_name_that_says_nothing():
    names = {path.stem for path, _ in modules()}
    assert not names & {"utils", "util", "common", "helpers", "misc", "core", "base"}


def test_torch_jit_stands_in_the_torchscript_exporter_alone():
    for path, _ in modules():
        if path.name != "torchscript.py":
            assert "torch.jit" not in path.read_text(encoding="utf-8"), path.name


# What runs what a file or a text says, with the places that may, by the end of the name.
RUNS_WHAT_IT_READS = {
    "eval": (), "exec": (), "__import__": (),
    "pickle.load": (), "pickle.loads": (), "pickle.Unpickler": ("export/torchscript.py",),
    "marshal.loads": (), "marshal.load": (), "shelve.open": (), "runpy.run_path": (),
    "yaml.load": (), "yaml.unsafe_load": (), "yaml.full_load": (),
    "numpy.load": (), "np.load": (), "joblib.load": (),
    "torch.jit.load": ("export/torchscript.py",), "torch.hub.load": (), "torch.package": (),
    "os.system": (), "os.popen": (), "ctypes.CDLL": (), "torch.ops.load_library": (),
    "subprocess.run": ("doctor.py",), "subprocess.Popen": (), "subprocess.call": (),
    "subprocess.check_output": (),
}  # fmt: skip


def dotted(node):
    """a.b.c of an expression, or ""."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def risks(source, place):
    """What in a file may run what it reads, against the rules above."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Name | ast.Attribute):
            names = [dotted(node)]
        else:
            names = []
        found += [name for name in names if place not in RUNS_WHAT_IT_READS.get(name, (place,))]
        if isinstance(node, ast.Call):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if dotted(node.func) == "torch.load" and given.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if given.get("shell", "False") != "False" or given.get("allow_pickle") == "True":
                found.append(ast.unparse(node))
    return found


def test_nothing_runs_what_it_reads_but_in_the_named_places():
    for path, _ in modules():
        place = path.relative_to(PACKAGE).as_posix()
        assert not risks(path.read_text(encoding="utf-8"), place), place


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=maybe)",
        "eval(x)", "exec(x)", "pickle.loads(x)", "from pickle import loads", "yaml.load(x, L)",
        "np.load(f)", "np.lib.format.read_array(f, allow_pickle=True)", "torch.jit.load(f)",
        "subprocess.run(x)", "run(x, shell=True)", "os.system(x)", "read = pickle.load",
    ],
)  # fmt: skip
def test_the_rule_sees_what_it_is_for(line):
    assert risks(line, "train.py")
    assert not risks("torch.load(f, weights_only=True); model.eval(); re.compile(x)", "train.py")


def test_the_links_lead_into_the_package():
    for name in ("kernels", "export"):
        assert (ROOT / name).is_symlink()
        assert (ROOT / name).resolve() == PACKAGE / name


def test_torch_never_stands_in_the_build_requirements():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not [r for r in project["build-system"]["requires"] if "torch" in r]
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.M)


def test_the_wheel_holds_the_package_and_what_is_compiled(tmp_path):
    """The build folder is the one that installed the package, so that nothing is compiled again."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", tmp_path, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    kinds = {".dist-info", ".data"}
    assert {top for top in tops if Path(top).suffix not in kinds} == {"nanogpt"}
    compiled = {name for name in names if name.endswith(".so")}
    programs = {name.rsplit("/", 1)[-1] for name in names if ".data/" in name}
    if native.available():
        assert len(compiled) == 1
        assert next(iter(compiled)).startswith("nanogpt/_C.")
        assert programs == {"nanogpt-generate"}
    shipped = {name for name in names if name.startswith("nanogpt/")} - compiled
    assert set(tracked("nanogpt")) - {"nanogpt/export/.gitkeep"} == shipped


def tracked(*under):
    names = subprocess.run(
        ["git", "ls-files", *under], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not names:
        pytest.skip("not a git checkout")
    return names


def test_nothing_strays_into_the_top_folder():
    """What a tool or a developer left behind, such as a fuzzer's input, is not the project's."""
    tops = {name.split("/")[0] for name in tracked()}
    hidden = {".ci", ".clang-format", ".gitignore", ".pre-commit-config.yaml"}
    pages = {"CHANGELOG.md", "CONTRIBUTING.md", "LOG.md", "README.md", "RESULTS.md", "SECURITY.md"}
    builds = {"LICENSE", "MANIFEST.in", "Makefile", "constraints.txt", "pyproject.toml", "setup.py"}
    folders = {"benchmarks", "csrc", "export", "kernels", "nanogpt", "tests"}
    assert tops == hidden | pages | builds | folders


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"), re.M)


def test_the_engine_knows_neither_python_nor_torch():
    files = [*(ROOT / "csrc" / "engine").glob("*.h"), *(ROOT / "csrc" / "engine").glob("*.cpp")]
    assert files
    for path in files:
        tops = {name.split("/")[0] for name in includes(path)}
        assert not tops & {"torch", "ATen", "c10", "pybind11", "Python.h"}, path.name
        assert not tops & {"generate", "python", "torchscript", "tests", "fuzz"}, path.name


def test_libtorch_stands_in_the_plug_in_alone():
    for path in (ROOT / "csrc").rglob("*.[ch]*"):
        if path.suffix in (".h", ".cpp") and path.parent.name != "torchscript":
            tops = {name.split("/")[0] for name in includes(path)}
            assert not tops & {"torch", "ATen", "c10"}, path


def test_nothing_native_brings_a_second_openmp():
    """torch loads its own; two of them in a process have deadlocked and counted threads twice."""
    for path in (ROOT / "csrc").rglob("*"):
        if path.name == "CMakeLists.txt" or path.suffix in (".cpp", ".h"):
            comment = "#.*" if path.name == "CMakeLists.txt" else "//.*"
            code = re.sub(comment, "", path.read_text(encoding="utf-8")).lower()
            assert "openmp" not in code, path
            assert "pragma omp" not in code, path


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_tree_is_the_disks():
    block = re.search(r"```text\n(nanogpt/\n.*?)```", readme(), re.S)
    assert block, "the README shows the tree"
    listed = set(re.findall(r"^  ([a-z_]+(?:\.py|/))", block[1].split("\ncsrc/")[0], re.M))
    on_disk = {
        path.name + ("/" if path.is_dir() else "")
        for path in PACKAGE.iterdir()
        if (path.suffix == ".py" or path.is_dir()) and not path.name.startswith("__")
    }
    assert listed == on_disk


def test_every_command_stands_in_the_readme():
    from nanogpt.cli import COMMANDS

    for name in COMMANDS:
        assert f"python -m nanogpt.{name}" in readme()


def test_every_flag_the_readme_shows_exists():
    from nanogpt.cli import COMMANDS

    known = {"--help", "--config", "--version"}
    for config, _ in COMMANDS.values():
        for name in config.__dataclass_fields__:
            flag = name.replace("_", "-")
            known |= {f"--{flag}", f"--no-{flag}"}
    declared = (ROOT / "csrc" / "generate" / "arguments.cpp").read_text(encoding="utf-8")
    of_binary = set(re.findall(r'^    \{"(--[a-z-]+)"', declared, re.M))
    assert {"--bench", "--prompt"} <= of_binary
    code = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", readme(), re.S))
    lines = [line.split("#")[0] for line in code.splitlines() if "nanogpt" in line]
    assert lines
    for line in lines:
        used = set(re.findall(r"(?<!\S)--[a-z-]+", line))
        assert used <= (of_binary if line.startswith("nanogpt-generate") else known), line


def test_the_makefile_lists_what_the_readme_names():
    targets = set(re.findall(r"^([a-z-]+):.*?##", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)`", readme())) <= targets
