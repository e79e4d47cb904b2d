"""docs/compatibility.md, from bench/results/compatibility.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.campaigns.compatibility.cells import ALONE, BROKEN, FAILS, REFUSED, SPREAD, UNTESTED, WORKS, names
from tests.campaigns.compatibility.models import TUNINGS
from tests.campaigns.compatibility.stacks import STACKS

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "bench" / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
ENGINES = (*ALONE, *SPREAD)
CELLS = [" | ".join(cell) for engine in ENGINES for cell in names(engine)]
SIGNS = {WORKS: "works", REFUSED: "refused", UNTESTED: "not here", BROKEN: "not here", FAILS: "**fails**"}

INTRODUCTION = """# What works with what

Each cell is a real training run of a small Llama: {steps} steps at drop rate .5 on a CPU. The three columns on the
right used two processes (gloo). *Works* means that

- branches were dropped in every training forward;
- the masks were the same on all ranks;
- parameters moved to finite values;
- nothing raised an error.

Other tests compare losses and gradients: tests/distributed, tests/test_peft.py, tests/test_compile_blocks.py,
tests/test_engine_*.py.

*One process* is the stack alone. *Checkpointing* is non-reentrant and covers every block. *Compile* compiles every
block separately (backend `{compiler}`). QLoRA is LoRA on NF4 weights of bitsandbytes, loaded by transformers. *Not
tried*: TRL's other trainers were run only in one process.
"""

OUTSIDE = """
## Not in the matrix

| stack | state |
|---|---|
| optimum-habana's GaudiTrainer | on a simulated HPU, in its own environment: `make test-gaudi`; [devices](devices.md) |
| LoRA on int8 weights of torchao | gradients and saved adapters, if torchao is installed: tests/test_peft.py |
| Lightning, Axolotl, LLaMA-Factory | see [integrations](integrations.md) |
| Liger kernels | not tested on a GPU; rotary embedding and fused loss run in Triton's interpreter, if installed, and \
stand-ins replace the rest: tests/campaigns/compatibility/test_liger.py |
| opacus (`GradSampleModule`, `PrivacyEngine`) | refused in one line: it asks for the gradients of every parameter |
| bitsandbytes and FSDP on CUDA | need a GPU; not tested |
"""


def read() -> dict[str, Any]:
    """The recorded matrix."""
    return dict(json.loads(RESULTS.read_text(encoding="utf-8")))


def render(record: dict[str, Any]) -> str:
    """The page."""
    cells = record["cells"]
    parts = [INTRODUCTION.format(steps=record["steps"], compiler=record["compiler"])]
    parts += [_table(tuning, cells) for tuning in TUNINGS]
    parts += [_notes(cells), OUTSIDE, _foot(record)]
    return "\n".join(parts)


def _table(tuning: str, cells: dict[str, Any]) -> str:
    rows = [
        f"| {stack} | " + " | ".join(_sign(cells, stack, tuning, engine) for engine in ENGINES) + " |"
        for stack in STACKS
    ]
    head = f"| {tuning} | " + " | ".join(ENGINES) + " |\n" + "|---" * (len(ENGINES) + 1) + "|"
    return "\n".join([head, *rows, ""])


def _sign(cells: dict[str, Any], stack: str, tuning: str, engine: str) -> str:
    cell = cells.get(f"{stack} | {tuning} | {engine}")
    if cell is None:
        return "not tried"
    number = _reasons(cells).get(_reason(cell))
    return SIGNS[cell["status"]] + (f" ({number})" if number else "")


def _reason(cell: dict[str, Any]) -> str:
    if cell["status"] == BROKEN:
        return f"The same training without DropBP fails here: `{cell['error']}`"
    return cell["error"][:1].upper() + cell["error"][1:]


def _reasons(cells: dict[str, Any]) -> dict[str, int]:
    """Each distinct reason, in the order of the cells."""
    said = [_reason(cells[name]) for name in CELLS if cells[name]["error"]]
    return {reason: number for number, reason in enumerate(dict.fromkeys(said), 1)}


def _notes(cells: dict[str, Any]) -> str:
    return "\n".join(f"{number}. {reason}." for reason, number in _reasons(cells).items())


def _foot(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"Made by `python -m tests.campaigns.compatibility --write-docs` with {versions}.\n"
