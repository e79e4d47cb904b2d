"""`python -m tests.distributed.record`: bytes that each engine sends in a step, and how close it stays to one process.

Writes bench/results/distributed.json and docs/distributed.md's tables from it. Two processes on gloo; a Llama of four
blocks; bytes are those of the collectives' unsharded tensors, per step, with nothing, half (the last two blocks) and
all of the branches dropped.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.distributed.compare import reference
from tests.distributed.launch import PROCESSES, launch
from tests.distributed.training import LAYERS, STEPS, make_model

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "distributed.json"
PAGE = ROOT / "docs" / "distributed.md"
BEGIN, END = "<!-- made by python -m tests.distributed.record -->", "<!-- end -->"
RUNS = {
    "DDP": ("ddp", "before", False),
    "DDP, kept gradients only": ("ddp", "kept", False),
    "FSDP2": ("fsdp2", "before", False),
    "ZeRO-2": ("zero", "trained 2", True),
    "ZeRO-3": ("zero", "trained 3", True),
}
LIMIT_S = 900
SHARES = ("0.0", "0.5", "1.0")


def main() -> int:
    """Run the cases of all engines and write what came out."""
    torch.set_num_threads(1)
    ddp, *_ = launch("ddp", ("before", "kept", "traffic"), limit_s=LIMIT_S)
    fsdp2, *_ = launch("fsdp2", ("before", "traffic"), limit_s=LIMIT_S)
    zero, *_ = launch("zero", ("trained 2", "trained 3", "traffic 2", "traffic 3"), limit_s=LIMIT_S)
    ranks = {"ddp": ddp, "fsdp2": fsdp2, "zero": zero}
    losses = {name: _difference(ranks[module][case]["result"], zeros) for name, (module, case, zeros) in RUNS.items()}
    record = {
        "kind": "distributed",
        "command": "python -m tests.distributed.record",
        "processes": PROCESSES,
        "steps": STEPS,
        "blocks": LAYERS,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in make_model().parameters()),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed")},
        "largest_loss_difference": losses,
        "bytes_per_step": _traffic(ranks),
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
    return 0


def _difference(run: list[Any], zeros: bool) -> float:
    expected, _ = reference(STEPS, zeros=zeros)
    return max(abs(a - b) for a, b in zip(run[0], expected, strict=True))


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
    """The page with its tables written anew."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{_table(record)}\n\n{END}{tail}"


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
