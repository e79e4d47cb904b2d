"""Walks over a graph: a recorded one, whose nodes are numbers, or the autograd graph itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

Node = TypeVar("Node", bound=Hashable)


def reached(starts: Iterable[Node], onward: Callable[[Node], Iterable[Node]]) -> dict[Node, None]:
    """The starts and every node that they lead to, each once; `onward` gives the next nodes of a node."""
    found = dict.fromkeys(starts)
    pending = list(found)
    while pending:
        fresh = {node: None for node in onward(pending.pop()) if node not in found}
        found |= fresh
        pending += fresh
    return found


def sources(function: Any) -> list[Any]:
    """The autograd nodes whose outputs an autograd node uses, once for each use."""
    return [source for source, _ in function.next_functions if source is not None]


def nodes_below(roots: Iterable[Any]) -> dict[Any, None]:
    """Every autograd node that the roots lead to, the roots included; None among them is passed over."""
    return reached((root for root in roots if root is not None), sources)
