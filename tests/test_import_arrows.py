"""The arrows between the parts, on the installed wheel: only there do backends and bench bear their real names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from tests.common.wheel import ROOT, build_wheel, install_wheel

# Programs rather than parts of the core: they may use what an extra installs.
OUTSIDE_CORE = ("dropbp.cli", "dropbp.integrations", "dropbp.backends", "dropbp.bench")
CORE_MAY_IMPORT = {"torch", "psutil"}
ADAPTERS_MAY_IMPORT = {"dropbp.device", "dropbp.errors"}

# Contract -> (file, line added to it) that breaks it.
PLANTS = {
    "layers": ("errors.py", "from dropbp.integrations import planted"),
    "adapters-by-name": ("errors.py", "import dropbp.backends"),
    "bench-on-top": ("errors.py", "from dropbp.bench import planted"),
    "bench-layers": ("bench/common/records.py", "from dropbp.bench.gpu import invariants"),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("arrows")
    return install_wheel(build_wheel(workdir), workdir / "site")


def lint_imports(site: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--config", str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "PYTHONPATH": str(site), "NO_COLOR": "1"}
    return subprocess.run(
        [*command, "--no-cache", "--no-logo", *options],
        cwd=site, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def build_graph(site: Path, monkeypatch: pytest.MonkeyPatch) -> grimp.ImportGraph:
    """The import graph of the package under `site`; no module is executed."""
    shadowing = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "dropbp"}
    for name in shadowing:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(site))
    return grimp.build_graph("dropbp", include_external_packages=True, cache_dir=None)


def imports_of(graph: grimp.ImportGraph, modules: set[str]) -> set[tuple[str, str]]:
    return {(module, target) for module in modules for target in graph.find_modules_directly_imported_by(module)}


def within(modules: set[str], *packages: str) -> set[str]:
    return {module for module in modules if any(f"{module}.".startswith(f"{package}.") for package in packages)}


def foreign_imports_of_core(graph: grimp.ImportGraph) -> set[tuple[str, str]]:
    """(module, package) for each package that the core imports and may not."""
    core = within(graph.modules, "dropbp") - within(graph.modules, *OUTSIDE_CORE)
    allowed = {"dropbp", *CORE_MAY_IMPORT, *sys.stdlib_module_names}
    found = {(module, target.split(".")[0]) for module, target in imports_of(graph, core)}
    return {(module, package) for module, package in found if package not in allowed}


def core_imports_of_adapters(graph: grimp.ImportGraph) -> set[tuple[str, str]]:
    """(adapter, module) for each module of the core that an adapter imports and may not."""
    adapters = within(graph.modules, "dropbp.backends")
    forbidden = within(graph.modules, "dropbp") - adapters - ADAPTERS_MAY_IMPORT
    return {(module, target) for module, target in imports_of(graph, adapters) if target in forbidden}


def plant(installed: Path, target: Path, file: str, line: str) -> Path:
    """A copy of the installed package with one line more."""
    shutil.copytree(installed, target)
    for folder in ("integrations", "bench"):
        (target / "dropbp" / folder / "planted.py").touch()
    path = target / "dropbp" / file
    path.write_text(path.read_text() + f"\n{line}\n")
    return target


def test_arrows_go_one_way(installed: Path) -> None:
    done = lint_imports(installed)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("contract", PLANTS)
def test_planted_violation_is_caught(installed: Path, tmp_path: Path, contract: str) -> None:
    site = plant(installed, tmp_path / "site", *PLANTS[contract])
    done = lint_imports(site, "--contract", contract)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout


def test_core_imports_only_torch_and_psutil(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert foreign_imports_of_core(build_graph(installed, monkeypatch)) == set()


def test_foreign_import_in_the_core_is_caught(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = plant(installed, tmp_path / "site", "errors.py", "def f():\n    import transformers")
    assert ("dropbp.errors", "transformers") in foreign_imports_of_core(build_graph(site, monkeypatch))


def test_adapters_import_only_the_device_protocol(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert core_imports_of_adapters(build_graph(installed, monkeypatch)) == set()


def test_adapter_reaching_past_the_device_protocol_is_caught(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = plant(installed, tmp_path / "site", "backends/__init__.py", "from dropbp.integrations import planted")
    found = core_imports_of_adapters(build_graph(site, monkeypatch))
    assert ("dropbp.backends", "dropbp.integrations.planted") in found


def second_copies(graph: grimp.ImportGraph) -> set[str]:
    """The folders of the repository imported as packages of their own, which loads their modules twice."""
    return {"backends", "bench", "tests"} & graph.modules


def test_no_module_is_imported_twice(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert second_copies(build_graph(installed, monkeypatch)) == set()


def test_second_copy_of_a_module_is_caught(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = plant(installed, tmp_path / "site", "bench/__init__.py", "from backends.cpu import create_device")
    assert second_copies(build_graph(site, monkeypatch)) == {"backends"}
