"""The documentation says what is so: its Python runs, its links lead somewhere, its commands exist.

A block of Python is run as it stands, with the names of `given()` at hand. One that cannot be run here says why in a
comment above its fence: `<!-- not run: it downloads a model of 8 billion parameters -->`. Devices that are not here are
replaced by the CPU.
"""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dropbp
from dropbp.masks import registry
from tests.common.engine_models import llama_loss, tiny_llama, tokens

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+) -->\n\s*\Z")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)|!\[[^\]]*\]\((?P<image>[^)\s]+)\)")
INSTEAD = {'"cuda"': '"cpu"', '"hpu"': '"cpu"', '"hpu_backend"': '"eager"'}
# Pages of others that say it in their text; each entry must still be there.
ELSEWHERE = {
    "hpu_simulator.install(": "compiles the simulated HPU; tests/test_hpu_simulator.py runs it",
    "class DropBPGaudi": "needs the environment of make test-gaudi",
}


@dataclass(frozen=True)
class Block:
    """A block of Python and where it stands."""

    page: str
    line: int
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    return [block for page in PAGES for block in _blocks_of(page)]


def _blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        marked = NOT_RUN.search(text[: match.start()])
        code = textwrap.dedent(match["code"])
        reason = marked["reason"] if marked else next((why for part, why in ELSEWHERE.items() if part in code), None)
        found.append(Block(str(page.relative_to(ROOT)), text[: match.start()].count("\n") + 1, code, reason))
    return found


def given(folder: Path) -> dict[str, Any]:
    """What a page may take for granted: a model, a batch, a loss, and what a trainer needs."""
    from transformers import Trainer, TrainingArguments

    from tests.common.tiny import random_examples

    model, batch = tiny_llama(layers=4), {"input_ids": tokens(), "labels": tokens()}
    args = TrainingArguments(str(folder), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
    return {
        "__name__": "page",
        "args": args,
        "batch": batch,
        "data": random_examples(8),
        "dropbp": dropbp,
        "loss": llama_loss(model),
        "model": model,
        "nn": nn,
        "torch": torch,
        "Trainer": Trainer,
    }


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a block may write, and what it may register, without a trace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_SAMPLERS", dict(registry._SAMPLERS))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", [block for block in blocks() if block.reason is None], ids=str)
def test_the_python_of_a_page_runs(block: Block, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = block.code
    for device, here in INSTEAD.items():
        code = code.replace(device, here)
    exec(compile(code, str(block), "exec"), given(workplace))


def test_blocks_that_are_not_run_say_why() -> None:
    silent = [block for block in blocks() if block.reason is not None and len(block.reason) < 15]
    assert not silent
    assert len([block for block in blocks() if block.reason is None]) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for match in LINK.finditer(text):
        target, _, anchor = (match["target"] or match["image"]).partition("#")
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(file), f"{page.name}: {target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs make them from headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_every_make_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]+)", text, re.MULTILINE))
        assert named <= targets, f"{page.name}: make {', '.join(named - targets)}"


@functools.cache
def names_in_the_sources() -> frozenset[str]:
    """Paths of the sources and every part of them, and the names of classes, methods, functions and variables."""
    found: set[str] = set()
    for path in (path for folder in ("dropbp", "backends", "bench", "tests") for path in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        found |= {"/".join(parts[place:]) for place in range(len(parts))}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{entry.name}" for entry in node.body if isinstance(entry, ast.FunctionDef)}
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return frozenset(found)


def unknown_names(text: str) -> list[str]:
    """Source files, classes, methods, constants and tests that a text names in backticks and that do not exist."""
    named = re.findall(
        r"`((?:[\w/]+\.py)|(?:_?[A-Z][\w.]+)|(?:test_\w+))`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    )
    return sorted(set(named) - names_in_the_sources() - {"PIP_EXTRA_INDEX_URL"})


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_pages_for_contributors_name_only_what_exists(page: str) -> None:
    assert unknown_names((ROOT / page).read_text(encoding="utf-8")) == []


def test_an_unknown_name_in_a_page_is_found() -> None:
    text = "`engine/engine.py`, `Engine.begin`, `Engine.began`, `engine/engin.py`, `test_nothing`, `METHODS`"
    assert unknown_names(text) == ["Engine.began", "engine/engin.py", "test_nothing"]


def test_the_site_has_every_page_and_no_other() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"([\w/]+\.md)$", site, re.MULTILINE)
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


def test_the_reference_has_every_public_name() -> None:
    shown = {match: _members(options) for match, options in _directives()}
    missing = []
    for name, home in dropbp._HOMES.items():
        whole = shown.get(home, set())
        if f"{home}.{name}" not in shown and (whole is not None and name not in whole):
            missing.append(f"{home}.{name}")
    assert not missing


def _directives() -> list[tuple[str, str]]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.md")))
    return re.findall(r"^::: (\S+)\n((?:    .*\n)*)", text, re.MULTILINE)


def _members(options: str) -> set[str] | None:
    """Of a module, or None for all of them."""
    listed = re.search(r"members: \[(.*)\]", options)
    return set(listed[1].split(", ")) if listed else None


def _modules_with_examples() -> list[str]:
    """Others are not imported: they may need software that is not here."""
    paths = [path for path in sorted((ROOT / "dropbp").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]


@pytest.mark.parametrize("name", _modules_with_examples())
def test_examples_in_docstrings_are_right(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed
