"""The audit of `make lint`: it finds what is vulnerable or unpinned, and is never silent."""

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import audit_pins
import pytest

PINS = "jinja2==3.1.2\nrich==15.0.0  # a comment\n\n# another\n"
OLD = {
    "id": "CVE-2024-22195",
    "fix_versions": ["3.1.3"],
    "aliases": ["GHSA-h5c8-rqwp-cp95"],
    "description": "xmlattr",
}


@pytest.fixture
def constraints(tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text(PINS)
    return path


def answering(dependencies, stderr=""):
    text = "" if dependencies is None else json.dumps({"dependencies": dependencies})
    return lambda _: subprocess.CompletedProcess([], 1, text, stderr)


def audited(constraints, ask):
    said: list[str] = []
    return audit_pins.audit(constraints, ask, said.append), said


def test_a_vulnerable_pin_fails_and_is_named_with_its_fix(constraints):
    rich = {"name": "rich", "version": "15.0.0", "vulns": []}
    jinja = {"name": "jinja2", "version": "3.1.2", "vulns": [OLD]}
    passed, said = audited(constraints, answering([jinja, rich]))
    assert not passed
    assert said[0] == "audit: jinja2==3.1.2 is vulnerable: CVE-2024-22195, fixed in 3.1.3"
    assert audited(constraints, answering([{**jinja, "vulns": []}, rich]))[0]


def test_what_is_accepted_needs_its_name_and_is_counted(constraints, monkeypatch):
    jinja = {"name": "jinja2", "version": "3.1.2", "vulns": [OLD]}
    monkeypatch.setattr(audit_pins, "ACCEPTED", {"GHSA-h5c8-rqwp-cp95": "we render no attributes"})
    passed, said = audited(constraints, answering([jinja]))
    assert passed
    assert said == ["audit: 1 pins audited, 0 vulnerabilities, 1 accepted"]


def test_what_the_service_does_not_know_is_said(constraints):
    passed, said = audited(constraints, answering([{"name": "jinja2", "skip_reason": "unknown"}]))
    assert passed
    assert "does not know 1 of 1 pins (jinja2): they were not audited" in said[0]
    assert said[1] == "audit: 0 pins audited, 0 vulnerabilities, 0 accepted"


def test_no_answer_is_said_in_one_line_and_fails_nothing(constraints):
    passed, said = audited(constraints, answering(None, "trouble\nERROR: cannot connect"))
    assert passed
    assert len(said) == 1
    assert "(ERROR: cannot connect): nothing was audited" in said[0]

    def never(_):
        raise subprocess.TimeoutExpired([], 1)

    passed, said = audited(constraints, never)
    assert passed
    assert "nothing was audited" in said[0]


class _Service(BaseHTTPRequestHandler):
    """What OSV answers on the two pins."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        package = {"name": asked["package"]["name"], "ecosystem": "PyPI"}
        events = [{"introduced": "0"}, {"fixed": "3.1.3"}]
        known = {
            "id": "GHSA-h5c8-rqwp-cp95",
            "aliases": ["CVE-2024-22195"],
            "summary": "xmlattr",
            "affected": [{"package": package, "ranges": [{"type": "ECOSYSTEM", "events": events}]}],
        }
        old = (package["name"], asked["version"]) == ("jinja2", "3.1.2")
        raw = json.dumps({"vulns": [known]} if old else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def service() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(
    importlib.util.find_spec("pip_audit") is None, reason="make lint installs pip-audit"
)
def test_pip_audit_itself_finds_a_vulnerable_pin_and_passes_its_fix(constraints, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with service() as url:

        def ask(path: Path) -> subprocess.CompletedProcess[str]:
            return audit_pins.run_pip_audit(path, ("-s", "osv", "--osv-url", url))

        passed, said = audited(constraints, ask)
        assert not passed, said
        assert "jinja2==3.1.2 is vulnerable: CVE-2024-22195, fixed in 3.1.3" in said[0]
        constraints.write_text(PINS.replace("3.1.2", "3.1.3"))
        passed, said = audited(constraints, ask)
        assert passed, said
        assert "2 pins audited" in said[-1]
    passed, said = audited(constraints, ask)  # nobody answers any more
    assert passed
    assert "nothing was audited" in said[-1]


def test_everything_that_is_needed_here_is_pinned():
    there = audit_pins.installed()
    if audit_pins.PROJECT not in there:
        pytest.skip("the package is not installed")
    pinned = audit_pins.pins(audit_pins.CONSTRAINTS.read_text())
    packages = audit_pins.needed(audit_pins.PROJECT, there)
    assert {"torch", "sympy", "pluggy"} <= packages.keys(), "dependencies of dependencies too"
    assert audit_pins.unpinned(pinned, packages) == []
    sympy = {name: version for name, version in pinned.items() if name != "sympy"}
    assert audit_pins.unpinned(sympy, packages) == [f"sympy=={packages['sympy'].version}"]
    other = audit_pins.unpinned({**pinned, "torch": "1.0"}, packages)
    assert [name.partition("==")[0] for name in other] == ["torch"]


def test_a_line_that_pins_nothing_is_an_error():
    with pytest.raises((AssertionError, ValueError)):
        audit_pins.pins("jinja2>=3\n")


def test_the_command_fails_on_a_package_without_a_pin(tmp_path):
    alone = tmp_path / "constraints.txt"
    alone.write_text("rich==15.0.0\n")
    done = subprocess.run(
        [sys.executable, audit_pins.__file__, alone], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "audit: not pinned in constraints.txt: " in done.stdout
    assert "jinja2==" in done.stdout
