"""The diagram of docs/architecture.md, drawn from the imports. `python -m tests.common.picture` regenerates it.

A node is a folder of `dropbp/`, or all files of one layer that are outside the folders. An arrow means "imports";
arrows that follow from two others are omitted.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- picture: python -m tests.common.picture -->\n", "<!-- end of picture -->"
BASE = "base"
OWN_NODE = {"session": "session", "handle": "session"}  # files that are parts of their own, and those parts
FACES = ("__init__", "__main__")
Graph = Mapping[str, set[str]]

IDEAS = {
    "bench": "measures: speed, memory, learning",
    "cli": "the command `dropbp`",
    "integrations": "trainers: transformers, Gaudi, Lightning",
    "estimate": "time and memory, before training",
    "session": "enable, Handle",
    "sensitivity": "how much each branch matters",
    "cache": "starts known rows where training begins",
    "engine": "acts on a mask: what runs around modules",
    "discovery": "finds the branches in one recorded forward",
    "masks": "draws what a step drops, and keeps count",
    "lazy": "devices that compile recorded graphs",
    "backends": "one adapter for each kind of device",
    BASE: "errors, config, devices, FLOPs, inputs, memory",
}


def imports(package: Path = ROOT / "dropbp") -> dict[str, set[str]]:
    """For each part, the parts it imports."""
    folders = {"bench": ROOT / "bench", "backends": ROOT / "backends"}
    found: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        _note(found, part_of(path.relative_to(package).with_suffix("").parts), path)
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            _note(found, name, path)
    found.pop("", None)
    return found


def _note(found: dict[str, set[str]], part: str, path: Path) -> None:
    targets = {part_of(tuple(module.split(".")[1:])) for module in imported(ast.parse(path.read_text()))}
    found.setdefault(part, set()).update(targets - {part, ""})


def imported(tree: ast.Module) -> Iterable[str]:
    """Modules of `dropbp` that a file imports, except those for type checkers only."""
    hidden = {id(inner) for node in ast.walk(tree) if _is_for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("dropbp"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("dropbp"))


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def part_of(names: tuple[str, ...]) -> str:
    """The part that a module of `dropbp` belongs to; none for the package's `__init__`."""
    if not names or names[0] in FACES:
        return ""
    head = names[0]
    if head in IDEAS or head in OWN_NODE:
        return OWN_NODE.get(head, head)
    return BASE if (ROOT / "dropbp" / f"{head}.py").is_file() else ""


def reduced(graph: Graph) -> dict[str, set[str]]:
    """The graph without arrows that follow from others."""
    return {
        part: {target for target in targets if not any(target in _reach(graph, other) for other in targets - {target})}
        for part, targets in graph.items()
    }


def longest_chain(graph: Graph) -> int:
    """Number of parts on the longest path along the arrows."""
    return max(1 + max((_chain(graph, target) for target in targets), default=0) for targets in graph.values())


def _chain(graph: Graph, start: str) -> int:
    return 1 + max((_chain(graph, target) for target in graph[start]), default=0)


def _reach(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    pending = [start]
    while pending:
        fresh = graph.get(pending.pop(), set()) - seen
        seen |= fresh
        pending.extend(fresh)
    return seen


def mermaid(graph: Graph) -> str:
    """The diagram as Mermaid text."""
    order = [part for part in IDEAS if part in graph]
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {part}["<b>{part}</b><br>{IDEAS[part]}"]' for part in order]
    arrows = reduced(graph)
    lines += [f"    {part} --> {target}" for part in order for target in order if target in arrows[part]]
    return "\n".join([*lines, "```", ""])


def page_with(picture: str) -> str:
    """The page with this diagram."""
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{picture}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(mermaid(imports())), encoding="utf-8")
