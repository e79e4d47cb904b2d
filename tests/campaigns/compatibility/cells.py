"""One cell of the matrix: a run, the conditions it must meet, and the reason if it cannot run."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

import dropbp
from tests.campaigns.compatibility.models import TUNINGS, trained_values
from tests.campaigns.compatibility.stacks import IN_ONE_PROCESS, STACKS, STEPS, Run, world

ALONE = ("one process", "checkpointing", "compile")
SPREAD = ("DDP", "FSDP2", "ZeRO-3")
PLAIN = ("one process", "checkpointing")  # tried for every stack
WORKS, REFUSED, FAILS = "works", "refused", "fails"
UNTESTED, BROKEN = "not testable here", "fails without DropBP too"
DROP_RATE = 0.5


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Status of a cell, and the error that explains a failure."""

    status: str
    error: str = ""
    drop_rate: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def try_cell(stack: str, tuning: str, engine: str) -> dict[str, Any]:
    """Run the cell; if it fails, run it without DropBP to see whose limitation it is."""
    try:
        run = _run(stack, tuning, engine, DROP_RATE)
        if not in_effect(run, engine):
            return Outcome(UNTESTED, f"on a CPU {stack} does not set {engine} up and trains without it").as_dict()
        check(run)
        return Outcome(WORKS, drop_rate=round(run.report["realised_drop_rate"], 3)).as_dict()
    except dropbp.DropBPError as error:
        refused = Outcome(REFUSED, f"{type(error).__name__}: {error}")
        return _whose_limit(stack, tuning, engine, refused).as_dict()
    except Exception as error:
        failed = Outcome(FAILS, f"{_first_line(error)}\n{traceback.format_exc()[-1500:]}")
        return _whose_limit(stack, tuning, engine, failed).as_dict()


def _whose_limit(stack: str, tuning: str, engine: str, ours: Outcome) -> Outcome:
    try:
        _run(stack, tuning, engine, None)
    except Exception as error:
        return Outcome(BROKEN, _first_line(error))
    return ours


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _run(stack: str, tuning: str, engine: str, drop_rate: float | None) -> Run:
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    with tempfile.TemporaryDirectory() as folder:
        return STACKS[stack](tuning, engine, Path(folder), drop_rate)


def in_effect(run: Run, engine: str) -> bool:
    """Whether all processes train together, and the engine holds the parameters if it changes them."""
    if run.processes != world():
        return False
    mark = {"FSDP2": "device_mesh", "ZeRO-3": "ds_id"}.get(engine)
    return mark is None or any(hasattr(parameter, mark) for parameter in run.model.parameters())


def check(run: Run) -> None:
    """Branches were dropped in training forwards, the same on all ranks; trained parameters moved and are finite."""
    assert len(run.losses) == STEPS, f"{len(run.losses)} losses in {STEPS} steps"
    assert all(math.isfinite(loss) for loss in run.losses), f"losses are {run.losses}"
    assert run.report["forwards"] >= STEPS, f"{run.report['forwards']} training forwards were seen in {STEPS} steps"
    assert len(set(run.masks)) > 1 and any(map(any, run.masks)), f"the masks were {run.masks}"
    after = trained_values(run.model)
    assert set(after) == set(run.before), f"trained before and after differ: {set(after) ^ set(run.before)}"
    assert all(value.isfinite().all() for value in after.values())
    moved = sum(not torch.equal(value, run.before[name]) for name, value in after.items())
    assert moved > len(after) / 2, f"of {len(after)} parameters {moved} moved"
    _check_ranks(run.masks)


def _check_ranks(masks: list[Any]) -> None:
    if not dist.is_initialized():
        return
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, masks)
    assert all(masks == other for other in everywhere), "the ranks drew different masks"


def names(engine: str) -> list[tuple[str, str, str]]:
    """The cells of an engine."""
    stacks = [stack for stack in STACKS if engine in PLAIN or stack not in IN_ONE_PROCESS]
    return [(stack, tuning, engine) for stack in stacks for tuning in TUNINGS]
