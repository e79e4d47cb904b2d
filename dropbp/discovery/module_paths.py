"""Qualified names of modules as paths: containers, numbered elements, common prefixes."""

from __future__ import annotations

import re
from collections.abc import Sequence


def container(name: str) -> str:
    """The list that a numbered element belongs to: `model.layers` for `model.layers.3`; empty for other modules."""
    head, _, tail = name.rpartition(".")
    return head if tail.isdigit() else ""


def prefixes(name: str) -> list[str]:
    """The path and all paths above it, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def element_of(modules: Sequence[str]) -> str:
    """The innermost numbered element that contains all modules of a branch, or is the only one."""
    return _innermost_element(common_prefix(modules))


def block_of(modules: Sequence[str]) -> str:
    """The innermost numbered element that contains all modules of a branch without being one of them."""
    return _innermost_element(common_prefix(modules) if len(modules) > 1 else modules[0].rpartition(".")[0])


def _innermost_element(path: str) -> str:
    match = re.match(r"^(.*\.)?\d+(?=\.|$)", path)
    return match.group(0) if match else ""


def common_prefix(names: Sequence[str]) -> str:
    """The longest path that contains all of them; empty if there is none."""
    split = [name.split(".") for name in names]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
