"""The wheel holds what it should and nothing else; importing the package is light and leaves no trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.common.wheel import ROOT, build_wheel, install_wheel

PACKAGES = {
    "dropbp": "dropbp",
    "dropbp/backends": "backends",
    "dropbp/bench": "bench",
}
DATA_SUFFIXES = {".py", ".typed", ".cpp", ".h"}

# torch and psutil are the core's own dependencies: what they do on import is not ours, so it comes first.
# torch._dynamo and sympy cost seconds and are easily pulled in by a decorator.
PROBE = """
import json, os, sys
import torch, psutil
before, events = set(sys.modules), []
watched = ("socket.", "os.putenv", "os.unsetenv", "subprocess.Popen", "os.system", "os.fork")
sys.addaudithook(lambda event, args: events.append(event) if event.startswith(watched) else None)
random_state, threads = torch.get_rng_state(), torch.get_num_threads()
import dropbp
heavy = {"transformers", "peft", "accelerate", "datasets", "habana_frameworks", "optimum", "matplotlib", "scipy",
         "tqdm", "sympy", "torch._dynamo", "torch._inductor"}
modules = set(sys.modules) - before
print(json.dumps({
    "events": events,
    "heavy": sorted(heavy & modules),
    "globals": [] if random_state.equal(torch.get_rng_state()) and threads == torch.get_num_threads() else ["torch"],
    "origin": [dropbp.__file__],
}))
"""

SIDE_EFFECTS = {
    "heavy": "import habana_frameworks",
    "events": "import os; os.environ['DROPBP_PLANTED'] = '1'",
    "globals": "import torch; torch.manual_seed(1)",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("packaging"))


@pytest.fixture(scope="module")
def files(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def probe_import(site: Path) -> dict[str, list[str]]:
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=site, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    assert Path(found.pop("origin")[0]).is_relative_to(site)
    return found


def modules_in_sources() -> set[str]:
    """Where each Python file of the repository's packages lies in the wheel."""
    return {
        f"{package}/{path.relative_to(ROOT / source).as_posix()}"
        for package, source in PACKAGES.items()
        for path in (ROOT / source).rglob("*.py")
    }


def test_wheel_holds_only_the_package(files: set[str]) -> None:
    assert {name for name in files if not name.startswith("dropbp/")} == set()
    assert {name for name in files if Path(name).suffix not in DATA_SUFFIXES} == set()


def test_wheel_holds_every_module_of_the_repository(files: set[str]) -> None:
    assert {name for name in files if name.endswith(".py")} == modules_in_sources()


def test_wheel_holds_data(files: set[str]) -> None:
    sources = {f"dropbp/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("backends/**/*.[ch]*")}
    assert {"dropbp/py.typed", *sources} - files == set()


def test_wheel_names_its_licence_and_its_two_dependencies(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    required = {line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line}
    assert required == {"Requires-Dist: torch>=2.10", "Requires-Dist: psutil>=5.9"}
    assert "License-Expression: Apache-2.0" in lines
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())


def test_import_is_light_and_leaves_no_trace(wheel: Path, tmp_path: Path) -> None:
    assert probe_import(install_wheel(wheel, tmp_path)) == {"events": [], "heavy": [], "globals": []}


@pytest.mark.parametrize("kind", SIDE_EFFECTS)
def test_side_effect_of_import_is_caught(tmp_path: Path, kind: str) -> None:
    for package, code in (("habana_frameworks", ""), ("dropbp", SIDE_EFFECTS[kind])):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(code)
    found = probe_import(tmp_path)
    assert found.pop(kind)
    assert not any(found.values())


def test_socket_opened_by_import_is_caught(tmp_path: Path) -> None:
    (tmp_path / "dropbp").mkdir()
    (tmp_path / "dropbp" / "__init__.py").write_text("import socket; socket.socket().close()")
    assert probe_import(tmp_path)["events"] == ["socket.__new__"]


@pytest.mark.parametrize(("target", "extras"), [("setup", "dev"), ("test-gaudi", "gaudi"), ("test-oldest", "hf,bench")])
def test_the_makefile_sets_up_each_environment_with_whole_commands(target: str, extras: str, tmp_path: Path) -> None:
    environments = [f"{name}={tmp_path / name}" for name in ("VENV", "GAUDI_VENV", "OLDEST_VENV")]
    command = ["make", "--no-print-directory", "-n", target, *environments]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    script = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    subprocess.run(["sh", "-n"], input=script, check=True, text=True)
    assert f"-e '.[{extras}]'" in script
    assert "--upgrade" in next(line for line in script.splitlines() if " setuptools " in line)  # venv has an old one
