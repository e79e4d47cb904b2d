"""Run the matrix and record it: `python -m tests.campaigns.compatibility [--engines …] [--stacks …] [--write-docs]`.

Engines of one process run here, the others in two processes each. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Collection
from typing import Any

import torch

from tests.campaigns.compatibility import page
from tests.campaigns.compatibility.cells import ALONE, SPREAD, names, try_cell
from tests.campaigns.compatibility.stacks import COMPILER, STACKS, STEPS
from tests.distributed.launch import launch

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "deepspeed")
LIMIT_S = 500


def main(arguments: list[str] | None = None) -> int:
    """Run the cells of the given engines and stacks, keep the other records, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.compatibility", description=__doc__)
    parser.add_argument("--engines", nargs="+", choices=page.ENGINES, default=list(page.ENGINES))
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--write-docs", action="store_true", help="write docs/compatibility.md too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells: dict[str, Any] = page.read()["cells"] if page.RESULTS.exists() else {}
    for engine in options.engines:
        cells |= _cells_of(engine, options.stacks)
        _write(cells)
    if options.write_docs:
        page.PAGE.write_text(page.render(page.read()), encoding="utf-8")
    return int(any(cell["status"] == "fails" for cell in cells.values()))


def _cells_of(engine: str, stacks: Collection[str]) -> dict[str, Any]:
    wanted = [cell for cell in names(engine) if cell[0] in stacks]
    if engine in ALONE or not wanted:
        return {" | ".join(cell): try_cell(*cell) for cell in wanted}
    assert engine in SPREAD
    module = f"tests.campaigns.compatibility.{'spread_zero' if engine == 'ZeRO-3' else 'spread'}"
    first, *_ = launch(module, tuple(" | ".join(cell) for cell in wanted), limit_s=LIMIT_S)
    return {name: found["result"] for name, found in first.items()}


def _write(cells: dict[str, Any]) -> None:
    record = {
        "kind": "compatibility",
        "command": "python -m tests.campaigns.compatibility --write-docs",
        "steps": STEPS,
        "compiler": COMPILER,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | {"torch": str(torch.__version__)},
        "cells": cells,
    }
    page.RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
