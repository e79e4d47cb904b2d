"""`docs/recipes.md`, from `bench/results/recipes.json` alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..common.markdown import table

Result = Mapping[str, Any]
TRAINERS = {
    "gaudi": "optimum-habana's `GaudiTrainer`, bf16, fused AdamW, fused clipping",
    "transformers": "`transformers.Trainer`, float32",
    "compiled": "A plain loop in eager mode",
}
DESIGNS = {
    "no-drop": "no dropping",
    "detach": "the reference's `detach`, trainer's marks alone",
    "naive": "host-side branching, trainer's marks alone",
    "layer": "marks at layers",
    "layer-zero": "marks at layers, zeros for gradients",
    "groups": "optimizer and clipping by branch, no marks at layers",
    "layer-groups": "marks at layers, optimizer and clipping by branch",
    "layer-groups-rehearsed": "**the same, graphs warmed up** (default, `exact` masks)",
    "sublayer-groups-rehearsed": "the same, marks at sublayers",
    "pool": "pool of 8 masks, trainer's marks alone",
    "pool-zero": "pool of 8 masks, zeros for gradients, trainer's marks alone",
    "nested-bare": "`nested` masks, trainer's marks alone",
    "nested": "**all defaults** (`nested` masks)",
    "whole-exact": "whole model, `exact` masks",
    "whole-pool": "whole model, pool of 8 masks",
    "whole-nested": "whole model, `nested` masks",
    "region-exact": "**block by block**, `exact` masks",
    "region-nested": "**block by block**, `nested` masks (default)",
}
INTRODUCTION = """\
# Recipes on a Gaudi, as the simulated HPU counts them

The [simulated HPU](hpu_simulator.md) counts what Gaudi's software would compile and launch while tiny Llamas train.
A *recipe* is a compiled graph; compiling one takes seconds on the device. A recompilation is *late* if it happens in
the second half of the steps. Times are not simulated: only hardware can tell what a launch costs.

`dropbp bench recipes` writes this page from `bench/results/recipes.json` alone.
"""
LAZY = """\
## Lazy mode: designs

A dropped branch changes the recording. With random masks and only the trainer's marks, nearly every step therefore
compiles a new graph.

- *Marks at layers* bound the graphs of forward and backward.
- *Optimizer and clipping by branch* bound the remaining graphs, and do not move skipped parameters.
- *Zeros for gradients* bound the remaining graphs with fewer launches, but change the optimizer's behaviour.
- *Graphs warmed up* (`rehearse`): the first steps use the rare masks, which otherwise would compile late.

See [devices](devices.md).
"""
DEPTH = """\
## Lazy mode: depth

The table gives the number of recipes with GaudiTrainer and, in brackets, the last step that compiled one.
"""
COMPILED = """\
## Eager mode: torch.compile

The table counts the graphs, forward and backward, that `torch.compile(backend="hpu_backend")` passes to the device's
compiler. An enabled model has a graph break at each block. So the whole model has the graphs of one block, and some for
the code around the blocks.
"""


def render(record: Result) -> str:
    """Render the page."""
    cases = record["cases"]
    parts = [INTRODUCTION, *_designs(cases), *_depths(cases), *_compiled(cases), *_memory(cases), *_versions(record)]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _designs(cases: Sequence[Result]) -> Iterable[str]:
    shown = _of(cases, table="designs")
    if shown:
        yield LAZY
    for trainer, title in TRAINERS.items():
        rows = sorted(_of(shown, trainer=trainer), key=_order)
        if rows:
            case = rows[0]["case"]
            yield f"{title}; {case['layers']} layers, {case['steps']} steps:\n"
            head = ("design", "method", "p", "recipes", "last step that compiled", "late per step", "launches per step")
            yield _table(head, map(_design_row, rows))


def _design_row(result: Result) -> tuple[str, ...]:
    case, compiled = result["case"], result["recompiles"]
    late, launches = fmean(_late(compiled)), fmean(_late(result["launches"]))
    return (*_labels(case), str(result["recipes"]), str(last_compilation(compiled)), f"{late:.2f}", f"{launches:.1f}")


def _depths(cases: Sequence[Result]) -> Iterable[str]:
    shown = _of(cases, table="depth")
    if not shown:
        return
    yield DEPTH
    depths = sorted({result["case"]["layers"] for result in shown})
    rows = []
    for key, group in _grouped(shown):
        found = {result["case"]["layers"]: result for result in group}
        cells = [f"{found[n]['recipes']} ({last_compilation(found[n]['recompiles'])})" for n in depths if n in found]
        rows.append((*key, *cells))
    yield _table(("design", "method", "p", *(f"{layers} layers" for layers in depths)), rows)


def _compiled(cases: Sequence[Result]) -> Iterable[str]:
    shown = sorted(_of(cases, table="compiled"), key=_order)
    if not shown:
        return
    yield COMPILED
    head = ("design", "layers", "steps", "graphs", "last step that compiled", "late per step")
    yield _table(head, [_compiled_row(result) for result in shown])


def _compiled_row(result: Result) -> tuple[str, ...]:
    case, graphs = result["case"], result["graphs"]
    counts = str(sum(graphs)), str(last_compilation(graphs)), f"{fmean(_late(graphs)):.2f}"
    return (DESIGNS[case["design"]], str(case["layers"]), str(case["steps"]), *counts)


def _memory(cases: Sequence[Result]) -> Iterable[str]:
    shown = _of(cases, table="memory")
    if not shown:
        return
    rates = sorted({result["case"]["drop_rate"] for result in shown})
    case = shown[0]["case"]
    yield (
        "## Peak memory\n\n"
        "Peak bytes in use on the device during training, weights and optimizer included: GaudiTrainer, "
        f"{case['layers']} layers of width {case['width']}, {case['batch_size']} x {case['sequence_length']} tokens, "
        f"{case['steps']} steps.\n"
    )
    rows = []
    for key, group in _grouped(shown, with_rate=False):
        found = {result["case"]["drop_rate"]: result["peak_bytes"] for result in group}
        rows.append((*key, *(f"{found[p]:,}" if p in found else "" for p in rates)))
    yield _table(("design", "method", *(f"p = {rate:g}" for rate in rates)), rows)


def _versions(record: Result) -> Iterable[str]:
    lines = (
        f"- `{trainer}`: " + ", ".join(f"{name} {version}" for name, version in found.items() if version)
        for trainer, found in record["versions"].items()
    )
    yield "## Versions\n\n" + "\n".join(lines)


def last_compilation(counts: Sequence[int]) -> int:
    """The number of the last step that compiled something, counted from 1; 0 if none did."""
    return max((step for step, count in enumerate(counts, 1) if count), default=0)


def _late(values: Sequence[int]) -> Sequence[int]:
    return values[len(values) // 2 :]


def _of(cases: Iterable[Result], **wanted: Any) -> list[Result]:
    return [result for result in cases if all(result["case"][key] == value for key, value in wanted.items())]


def _labels(case: Result) -> tuple[str, str, str]:
    return DESIGNS[case["design"]], case["method"], f"{case['drop_rate']:g}"


def _order(result: Result) -> tuple[Any, ...]:
    case = result["case"]
    return case["method"], list(DESIGNS).index(case["design"]), case["drop_rate"], case["layers"]


def _grouped(cases: Iterable[Result], *, with_rate: bool = True) -> Iterable[tuple[tuple[str, ...], list[Result]]]:
    """Cases grouped by design, method and, if `with_rate`, drop rate."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in sorted(cases, key=_order):
        groups.setdefault(_labels(result["case"])[: 3 if with_rate else 2], []).append(result)
    return groups.items()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return table(head, rows, "l") + "\n"
