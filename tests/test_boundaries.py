"""What is private to a module stays there, and the page on the architecture shows the arrows that there are."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from tests.common.picture import PAGE, imports, longest_chain, mermaid, page_with, reduced

ROOT = Path(__file__).parents[1]
FOLDERS = ("dropbp", "backends", "bench")
OF_TORCH = {name for name in (*dir(torch.Tensor), *vars(nn.Module())) if name.startswith("_")}
MOST_LINES, MOST_MODULES, LONGEST_CHAIN = 400, 16, 9
OF_OTHERS = "habana_frameworks"  # mirrors a package that is not ours, with its private names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def definitions(tree: ast.AST) -> set[str]:
    """Private names that a module gives to functions, classes, variables, and attributes of its own objects."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)  # slots
    return {name for name in found if is_private(name)}


def _is_own(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Private names that a module takes from something that is not itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not _is_own(node.value):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and _is_ours(node):
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))


def _is_ours(node: ast.ImportFrom) -> bool:
    return node.level > 0 or (node.module or "").split(".")[0] == "dropbp"


def reaches(sources: Mapping[str, str]) -> list[str]:
    """Each use of a name that only other modules define, as `file:line name`."""
    trees = {file: ast.parse(text) for file, text in sources.items()}
    defined = {file: definitions(tree) for file, tree in trees.items()}
    everywhere: set[str] = set().union(*defined.values())
    files = {Path(file).stem for file in sources}  # `from . import _build` takes a module
    return [
        f"{file}:{line} {name}"
        for file, tree in trees.items()
        for line, name in uses(tree)
        if name in everywhere - defined[file] - OF_TORCH - files
    ]


def test_private_names_stay_in_their_module() -> None:
    files = [
        path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if OF_OTHERS not in path.parts
    ]
    assert reaches({str(path.relative_to(ROOT)): path.read_text() for path in files}) == []


def test_a_reach_into_another_module_is_caught() -> None:
    owner = "class Owner:\n    def __init__(self):\n        self._own = 1\n\ndef _helper(): ...\n"
    sources = {
        "owner.py": owner,
        "reader.py": "from dropbp.owner import _helper\n\ndef read(owner):\n    return owner._own\n",
    }
    assert reaches(sources) == ["reader.py:1 _helper", "reader.py:4 _own"]


def test_the_picture_of_the_architecture_is_drawn_from_the_code() -> None:
    """`python -m tests.common.picture` redraws it."""
    assert page_with(mermaid(imports())) == PAGE.read_text(encoding="utf-8")


def test_an_arrow_that_follows_from_others_is_left_out() -> None:
    assert reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}


def too_long(files: Mapping[str, str]) -> list[str]:
    """Files with more lines than a reader takes in at once."""
    return [file for file, text in files.items() if len(text.splitlines()) > MOST_LINES]


def test_files_are_short_and_few_lie_beside_the_folders() -> None:
    files = {str(path): path.read_text() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert too_long(files) == []
    assert len(list((ROOT / "dropbp").glob("*.py"))) <= MOST_MODULES


def test_a_file_that_is_too_long_is_named() -> None:
    assert too_long({"short.py": "x\n" * MOST_LINES, "long.py": "x\n" * (MOST_LINES + 1)}) == ["long.py"]


def test_the_longest_chain_of_imports_is_short() -> None:
    assert longest_chain(imports()) <= LONGEST_CHAIN


def test_a_chain_is_counted_by_its_parts() -> None:
    assert longest_chain({"a": {"b", "d"}, "b": {"c"}, "c": {"d"}, "d": set()}) == 4
