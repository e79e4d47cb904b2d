"""Branches named by the user: their modules determine the cut edges, and the graph tells whether the cut is exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from dropbp.discovery.branches import edges_leaving
from dropbp.discovery.build import structure_of, trained_outputs
from dropbp.discovery.cuts import Cut, exact_cuts
from dropbp.discovery.graph import Graph
from dropbp.discovery.structure import Structure
from dropbp.discovery.trace import Trace
from dropbp.discovery.walks import reached
from dropbp.errors import DiscoveryError


def analyse_named(trace: Trace, model: nn.Module, named: Sequence[Sequence[str]]) -> Structure:
    """The structure of branches given by name: each entry lists the modules that are skipped if it is dropped."""
    graph = Graph(trace, model)
    _check_names(model, named)
    cuts = exact_cuts(graph, [edges_leaving(graph, names) for names in named])
    _check_exact(named, cuts)
    structure = structure_of(graph, model, [group for group in cuts if group is not None])
    _check_stream_survives(graph, named)
    modules = tuple(tuple(names) for names in named)
    held = trace.modules_hold_tensors
    return dataclasses.replace(structure, named=modules, outputs=trained_outputs(trace), side_outputs=held)


def _check_names(model: nn.Module, named: Sequence[Sequence[str]]) -> None:
    known = {name for name, _ in model.named_modules()}
    for names in named:
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise DiscoveryError(
                f"branches= names {unknown or 'an empty branch'}, which {type(model).__name__} does not have. Each "
                "entry is a module name as in model.named_modules(), or a list of such names."
            )


def _check_exact(named: Sequence[Sequence[str]], cuts: Sequence[Cut | None]) -> None:
    lost = [list(names) for names, group in zip(named, cuts, strict=True) if group is None]
    if lost:
        raise DiscoveryError(
            f"{len(named)} branches were named, but {len(lost)} of them cannot be dropped exactly, first {lost[0]}: "
            "they share tensors with the residual stream. Name only modules whose outputs are added to the stream."
        )


def _check_stream_survives(graph: Graph, named: Sequence[Sequence[str]]) -> None:
    """Raises DiscoveryError if dropping a branch would cut the gradient to everything below it."""
    for names in named:
        calls = [c for c in graph.calls if c.name in names]
        first = min(c.start for c in calls)
        inside = {n for c in calls for n in graph.nodes_in_call[c.index]}
        if _feeds(graph, inside, first) and not _reaches_below(graph, inside, first):
            raise DiscoveryError(
                f"Branch {', '.join(names)} carries the residual stream: dropping it would cut the gradient to "
                "everything before it. Name the branch's modules (attention, MLP), not the whole block."
            )


def _feeds(graph: Graph, inside: set[int], first: int) -> bool:
    sources = (s for n in inside for s in graph.tensors_into(graph.nodes[n]))
    return any(graph.nodes[s].sequence < first for s in sources)


def _reaches_below(graph: Graph, inside: set[int], first: int) -> bool:
    around = reached(graph.trace.roots - inside, lambda n: set(graph.nodes[n].inputs) - inside)
    return any(not graph.nodes[n].is_leaf and graph.nodes[n].sequence < first for n in around)
