"""One of two ranks that train under DDP; rank 1 is killed in its sixth step."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

import torch
from torch.nn.parallel import DistributedDataParallel

import dropbp
from tests.common.engine_models import assert_same_gradients, plain_batch, plain_loss, plain_net, take_gradients

DIES_AT, STEPS, TIMEOUT_S = 5, 50, 30
PLACES = ("forward", "backward", "optimizer")
ENDED_WITH_AN_ERROR = 3


def main(rank: int, port: int, where: str) -> None:
    """Train until the other rank is gone. It never returns, as threads of the group would wait for that rank."""
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"})
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    model = plain_net()
    handle = dropbp.enable(model, example_inputs=plain_batch())
    status = 0
    try:
        _train(model, rank, where)
    except RuntimeError as error:  # torch has no other type for a lost peer
        print(f"rank {rank}: {error}", file=sys.stderr)
        _assert_consistent(model, handle)
        status = ENDED_WITH_AN_ERROR
    os._exit(status)


def _train(model: torch.nn.Module, rank: int, where: str) -> None:
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(STEPS):
        dies_in = where if rank == 1 and step == DIES_AT else ""
        _die_if(dies_in == "forward")
        loss = wrapped(plain_batch(step)).square().mean()
        _die_if(dies_in == "backward")
        loss.backward()
        _die_if(dies_in == "optimizer")
        optimizer.step()
        optimizer.zero_grad()


def _die_if(now: bool) -> None:
    if now:
        os.kill(os.getpid(), signal.SIGKILL)


def _assert_consistent(model: torch.nn.Module, handle: dropbp.Handle) -> None:
    """The model of the surviving rank can be restored, and trained on alone."""
    handle.remove()
    plain = plain_net()
    plain.load_state_dict(model.state_dict())
    assert_same_gradients(take_gradients(model, plain_loss(model)), take_gradients(plain, plain_loss(plain)))
