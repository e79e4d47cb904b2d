"""`python -m tests.distributed.record`: bytes that each engine sends in a step, and how close it stays to one process.

`--parts accelerate` runs what `accelerate launch` starts and keeps the rest as recorded, `--parts engines` the rest.

Writes bench/results/distributed.json and docs/distributed.md's tables from it. Two processes on gloo; a Llama of four
blocks; bytes are those of the collectives' unsharded tensors, per step, with nothing, half (the last two blocks) and
all of the branches dropped.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.distributed.compare import reference
from tests.distributed.launch import LAUNCHERS, PROCESSES, launch
from tests.distributed.training import LAYERS, make_model

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "distributed.json"
PAGE = ROOT / "docs" / "distributed.md"
BEGIN, END = "<!-- made by python -m tests.distributed.record -->", "<!-- end -->"
BEGIN_ACCELERATE = "<!-- made by python -m tests.distributed.record --parts accelerate -->"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")
RUNS = {
    "DDP": ("ddp", "before", False),
    "DDP, kept gradients only": ("ddp", "kept", False),
    "FSDP2": ("fsdp2", "before", False),
    "ZeRO-2": ("zero", "trained 2", True),
    "ZeRO-3": ("zero", "trained 3", True),
}
ACCELERATED = {  # name -> launcher, case, and what it is compared with: a case run alone, or one process's own loop
    "loop, DDP": ("accelerate", "loop", None),
    "loop with accumulation, DDP": ("accelerate", "loop, accumulated", "loop, accumulated"),
    "Trainer, DDP": ("accelerate", "trainer", "trainer"),
    "Trainer with accumulation, DDP": ("accelerate", "trainer, accumulated", "trainer, accumulated"),
    "loop, ZeRO-3": ("accelerate, ZeRO-3", "loop", None),
    "Trainer, ZeRO-3": ("accelerate, ZeRO-3", "trainer", "trainer, zeros"),
}
STEPS = 50
SHARES = ("0.0", "0.5", "1.0")


_launched = functools.partial(launch, limit_s=900, steps=STEPS)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for, keep the other, and write what came out."""
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.record")
    parser.add_argument("--parts", nargs="+", choices=("engines", "accelerate"), default=["engines", "accelerate"])
    parts = parser.parse_args(arguments).parts
    torch.set_num_threads(1)
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    record |= {
        "kind": "distributed",
        "command": "python -m tests.distributed.record",
        "processes": PROCESSES,
        "steps": STEPS,
        "blocks": LAYERS,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in make_model().parameters()),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    record |= _engines() if "engines" in parts else {}
    record |= _accelerated() if "accelerate" in parts else {}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
    return 0


def _engines() -> dict[str, Any]:
    ddp, *_ = _launched("ddp", ("before", "kept", "traffic"))
    fsdp2, *_ = _launched("fsdp2", ("before", "traffic"))
    zero, *_ = _launched("zero", ("trained 2", "trained 3", "traffic 2", "traffic 3"))
    ranks = {"ddp": ddp, "fsdp2": fsdp2, "zero": zero}
    losses = {name: _difference(ranks[module][case]["result"], zeros) for name, (module, case, zeros) in RUNS.items()}
    return {"largest_loss_difference": losses, "bytes_per_step": _traffic(ranks)}


def _accelerated() -> dict[str, Any]:
    """Largest difference of the loss to one process, of what `accelerate launch` starts."""
    alone = tuple(case for _, _, case in ACCELERATED.values() if case)
    runs = {"alone": _launched("accelerated", alone, **LAUNCHERS["accelerate, one process"])[0]}
    for by in ("accelerate", "accelerate, ZeRO-3"):
        cases = tuple(case for launcher, case, _ in ACCELERATED.values() if launcher == by)
        runs[by] = _launched("accelerated", cases, **LAUNCHERS[by])[0]
    found = {}
    for name, (by, case, other) in ACCELERATED.items():
        run = runs[by][case]["result"]
        assert run[2] == PROCESSES
        expected = runs["alone"][other]["result"] if other else reference(STEPS, zeros="ZeRO" in by)
        assert run[1] == [list(mask) for mask in expected[1]]
        found[name] = _largest(run[0], expected[0])
    return {"accelerate_launch_loss_difference": found}


def _difference(run: list[Any], zeros: bool) -> float:
    expected, _ = reference(STEPS, zeros=zeros)
    return _largest(run[0], expected)


def _largest(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, expected, strict=True))


def _traffic(ranks: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Bytes by engine and share of the branches dropped, summed over collectives."""
    ddp, fsdp2 = (ranks[name]["traffic"]["result"] for name in ("ddp", "fsdp2"))
    found = {
        "DDP": {share: ddp[f"all {share}"] for share in SHARES},
        "DDP, kept gradients only": {share: ddp[f"kept {share}"] for share in SHARES},
        "FSDP2": {share: sum(fsdp2[f"blocks {share}"].values()) for share in SHARES},
    }
    for stage in (2, 3):
        sent = ranks["zero"][f"traffic {stage}"]["result"]
        found[f"ZeRO-{stage}"] = {share: sum(sent[share].values()) for share in SHARES}
    return found


def with_tables(page: str, record: dict[str, Any]) -> str:
    """The page with its tables rewritten."""
    page = _with(page, BEGIN, _table(record))
    return _with(page, BEGIN_ACCELERATE, _accelerate_table(record))


def _with(page: str, begin: str, table: str) -> str:
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(END)
    return f"{head}{begin}\n\n{table}\n\n{END}{tail}"


def _accelerate_table(record: dict[str, Any]) -> str:
    head = "| started by `accelerate launch` | largest difference of the loss |\n|---|---|"
    found = record["accelerate_launch_loss_difference"]
    return "\n".join([head, *(f"| {name} | {difference:.1e} |" for name, difference in found.items())])


def _table(record: dict[str, Any]) -> str:
    head = (
        "| engine | largest difference of the loss | bytes per step, nothing dropped | half | all |\n"
        + "|---" * 5
        + "|"
    )
    rows = []
    for name, sent in record["bytes_per_step"].items():
        whole = sent["0.0"]
        shares = " | ".join(f"{sent[share]:,} ({sent[share] / whole:.0%})" for share in SHARES[1:])
        rows.append(f"| {name} | {record['largest_loss_difference'][name]:.1e} | {whole:,} | {shares} |")
    return "\n".join([head, *rows])


if __name__ == "__main__":
    sys.exit(main())
