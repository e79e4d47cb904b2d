"""What each rank does with the activation cache: rows go to another rank in each epoch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dropbp
from dropbp.cache import files
from tests.common.engine_models import tiny_llama
from tests.distributed.ddp import start, stop, wrapped
from tests.distributed.fsdp2 import sharded

__all__ = ["CASES", "start", "stop"]

ROWS, EPOCHS = 8, 3


def run(where: Any, shards: bool) -> tuple[list[float], dict[str, Any]]:
    """Losses of this rank in each step, and what the cache reports."""
    model = tiny_llama(layers=6)
    data = torch.randint(0, 32, (ROWS, 8), generator=torch.Generator().manual_seed(3))
    replica = sharded(model) if shards else wrapped(model)
    handle = dropbp.enable(model, 0.75, steps=EPOCHS * ROWS // 4, activation_cache=where)
    optimizer = torch.optim.AdamW(replica.parameters(), lr=1e-2)
    losses = []
    with handle:
        for epoch in range(EPOCHS):
            order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
            for batch in data[order].split(4):
                ids = batch[dist.get_rank() :: dist.get_world_size()]
                loss = replica(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses, handle.report().get("activation_cache", {})


def compared(where: Any, shards: bool = False) -> dict[str, Any]:
    plain, _ = run(None, shards)
    losses, report = run(where, shards)
    return {"plain": plain, "losses": losses, "report": report}


def in_folder() -> dict[str, Any]:
    """All ranks keep their states in one folder."""
    files.RESCAN_AFTER_S = 0.0
    names: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    return compared(Path(names[0]))


CASES = {
    "ddp": lambda: compared(True),
    "ddp, in a folder": in_folder,
    "fsdp2": lambda: compared(True, shards=True),
}
