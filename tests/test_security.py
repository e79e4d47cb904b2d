"""Nothing in the packages unpickles, evaluates or shells out; nothing is fetched when a module is imported."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dropbp", "backends", "bench")
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "telnetlib", "ftplib"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.loads", "yaml.load"}
LOADERS = {"torch.load", "torch.hub.load"}
# The simulated HPU is compiled from these files, which are part of the package, and from nothing else.
SOURCES = {"simulator.cpp"}
# What a command needs must be there without a network; nothing below is called when a module is imported.
PROBE = """
import json, pkgutil, importlib, sys
import torch, psutil
events = []
watched = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "http.client.connect")
sys.addaudithook(lambda event, args: events.append(f"{event} {args}") if event in watched else None)
import dropbp
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(events))
"""
# They import what is not installed here.
VENDORS = {f"dropbp.integrations.{name}" for name in ("axolotl", "lightning", "optimum_habana")}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def faults(code: str) -> Iterator[str]:
    """What is not allowed in this code."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from _imports(node)
        elif isinstance(node, ast.Call):
            yield from _call(node)


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    yield from (f"line {node.lineno}: import {name}" for name in names if name.partition(".")[0] in MODULES)


def _call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in CALLS:
        yield f"line {node.lineno}: {name}"
    if name in LOADERS and options.get("weights_only") != "True":
        yield f"line {node.lineno}: {name} without weights_only=True"
    if options.get("shell", "False") != "False":
        yield f"line {node.lineno}: {name} with shell={options['shell']}"
    if options.get("trust_remote_code", "False") != "False":
        yield f"line {node.lineno}: {name} runs code from the Hub"


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_unpickles_evaluates_or_shells_out(package: str) -> None:
    found = {
        str(path.relative_to(ROOT)): list(faults(path.read_text(encoding="utf-8")))
        for path in sources()
        if path.is_relative_to(ROOT / package)
    }
    assert found
    assert not {path: each for path, each in found.items() if each}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import load",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "eval('1')",
        "exec(code)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.Popen('ls', shell=flag)",
        "Model.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_scan_can_fail(code: str) -> None:
    assert list(faults(code))


def test_the_scan_lets_what_is_safe_pass() -> None:
    code = "import json\ntorch.load('x', weights_only=True)\nsubprocess.run(['ls'], shell=False)\nmodel.eval()"
    assert not list(faults(code))


def test_importing_any_module_opens_no_connection() -> None:
    names = [".".join(("dropbp", *path.relative_to(ROOT / "dropbp").with_suffix("").parts)) for path in _importable()]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([name for name in names if name not in VENDORS])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []


def _importable() -> list[Path]:
    return [path for path in (ROOT / "dropbp").rglob("*.py") if not path.stem.startswith("__")]


def test_the_simulated_hpu_compiles_its_own_sources_only() -> None:
    code = (ROOT / "backends" / "hpu_simulator" / "_build.py").read_text(encoding="utf-8")
    named = set(re.findall(r'"([\w./-]+\.(?:cpp|cc|cu|c))"', code))
    assert named == SOURCES
    assert all((ROOT / "backends" / "hpu_simulator" / name).is_file() for name in named)


def test_every_package_for_development_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in pins.splitlines() if line.strip() and not line.startswith("#")]
    assert all(re.match(r"^[\w.-]+==[\w.]+( ; .+)?$", line) for line in lines)
    pinned = {_normal(line.partition("==")[0]) for line in lines}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = {_normal(name) for name in re.findall(r'"([A-Za-z][\w.-]*)(?:\[[\w,]+\])?>=', project)}
    assert asked - pinned <= {"optimum-habana", "pip-audit"}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_ci_audits_the_pins() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "pip-audit --strict --disable-pip --no-deps -r constraints.txt" in workflow
    assert "permissions:\n  contents: read" in workflow
