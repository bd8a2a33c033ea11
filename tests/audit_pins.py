"""`make lint`: whether everything that we need is pinned, and no pin is known to be vulnerable.

    python tests/audit_pins.py [CONSTRAINTS]

pip-audit asks PyPI. Where it gives no answer, that is said in a line and nothing fails: a build
without a network is no worse than before. Exit codes: 0 nothing found; 1 a package without a pin,
or a pin with a known vulnerability.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
ACCEPTED: dict[str, str] = {}
"""Vulnerabilities, by the name that PyPI gives them, which do not concern us, and why."""
PROJECT = "personal-nanogpt"
NOT_OURS = {"pip", PROJECT}
_SECONDS = 300


def pins(text: str) -> dict[str, str]:
    """Names to versions, of a file of `name==version` lines."""
    found = {}
    for line in text.splitlines():
        wanted = line.partition("#")[0].strip()
        if wanted:
            requirement = Requirement(wanted)
            (exact,) = requirement.specifier
            assert exact.operator == "==", f"{line} is no pin"
            found[canonicalize_name(requirement.name)] = exact.version
    return found


def installed() -> dict[str, importlib.metadata.Distribution]:
    """What this Python would import, by name: the first of each on its path."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for each in importlib.metadata.distributions():
        found.setdefault(canonicalize_name(each.metadata["Name"]), each)
    return found


def needed(
    root: str, there: Mapping[str, importlib.metadata.Distribution]
) -> dict[str, importlib.metadata.Distribution]:
    """What is installed and `root` needs, with every extra of its own, at however many removes."""
    extras = there[root].metadata.get_all("Provides-Extra") or []
    left, seen = [(root, frozenset(extras))], set()
    while left:
        name, asked = left.pop()
        if (name, asked) in seen or name not in there:
            continue
        seen.add((name, asked))
        for text in there[name].requires or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in (asked or {""})):
                left.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name: there[name] for name, _ in seen if name not in NOT_OURS}


def unpinned(
    pinned: Mapping[str, str], packages: Mapping[str, importlib.metadata.Distribution]
) -> list[str]:
    """Packages without a pin, or in another version than it, as `name==version`.

    What a pinned package asks for in one version alone, as torch does for CUDA's, needs no pin.
    """
    exact = dict(pinned)
    for name in packages.keys() & pinned.keys():
        for text in packages[name].requires or ():
            requirement = Requirement(text)
            wanted = {each.version for each in requirement.specifier if each.operator == "=="}
            if len(wanted) == 1:
                exact.setdefault(canonicalize_name(requirement.name), *wanted)
    return sorted(
        f"{name}=={each.version}"
        for name, each in packages.items()
        if name not in exact or Version(exact[name]).public != Version(each.version).public
    )


def run_pip_audit(
    constraints: Path, service: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """pip-audit's own words on the pins of a file; `service` are its flags of whom to ask."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        lines = (f"{name}=={v}\n" for name, v in pins(constraints.read_text()).items())
        requirements.write_text("".join(lines))
        return subprocess.run(
            [sys.executable, "-m", "pip_audit", "--requirement", requirements, "--no-deps",
             "--disable-pip", "--format", "json", "--progress-spinner", "off", *service],
            capture_output=True, text=True, check=False, timeout=_SECONDS,
        )  # fmt: skip


def audit(
    constraints: Path,
    ask: Callable[[Path], subprocess.CompletedProcess[str]] = run_pip_audit,
    say: Callable[[str], None] = print,
) -> bool:
    """Whether no pin is known to be vulnerable, as far as there was an answer; says what it saw."""
    try:
        done = ask(constraints)
        answer: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        say(f"audit: no answer from the vulnerability service in {_SECONDS} s: nothing was audited")
        return True
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        say(f"audit: no answer from the vulnerability service ({reason}): nothing was audited")
        return True
    skipped = [each["name"] for each in answer if "skip_reason" in each]
    found = [
        (f"{each['name']}=={each['version']}", problem)
        for each in answer
        for problem in each.get("vulns", ())
    ]
    refused = [(pin, p) for pin, p in found if not {p["id"], *p.get("aliases", ())} & set(ACCEPTED)]
    for pin, problem in refused:
        fixed = ", ".join(problem.get("fix_versions", ())) or "no version yet"
        say(f"audit: {pin} is vulnerable: {problem['id']}, fixed in {fixed}")
    if skipped:
        some = ", ".join(skipped[:3]) + (", …" if len(skipped) > 3 else "")
        say(
            f"audit: the vulnerability service does not know {len(skipped)} of {len(answer)} pins "
            f"({some}): they were not audited"
        )
    say(
        f"audit: {len(answer) - len(skipped)} pins audited, {len(refused)} vulnerabilities, "
        f"{len(found) - len(refused)} accepted"
    )
    return not refused


def main() -> int:
    """Both checks."""
    constraints = Path(sys.argv[1]) if len(sys.argv) > 1 else CONSTRAINTS
    loose = unpinned(pins(constraints.read_text()), needed(PROJECT, installed()))
    if loose:
        print(f"audit: not pinned in {constraints.name}: {' '.join(loose)}")
    return 0 if audit(constraints) and not loose else 1


if __name__ == "__main__":
    sys.exit(main())
