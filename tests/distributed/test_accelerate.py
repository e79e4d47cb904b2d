"""`accelerate launch`: its loop and transformers' Trainer, in one process and in two, on DDP and on ZeRO-3."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.distributed.compare import TOLERANCE, assert_same_run, result

LOOPS = ("loop", "loop, accumulated")
TRAINERS = ("trainer", "trainer, accumulated")
ALONE = ("loop, accumulated", *TRAINERS)

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture
def alone(ranks) -> dict[str, Any]:
    (only,) = ranks("accelerated", "accelerate, one process", ALONE)
    return only


@pytest.fixture
def alone_with_zeros(ranks) -> dict[str, Any]:
    (only,) = ranks("accelerated", "accelerate, one process", ("trainer, zeros",))
    return only


@pytest.fixture
def replicas(ranks) -> list[dict[str, Any]]:
    return ranks("accelerated", "accelerate", (*LOOPS, *TRAINERS))


@pytest.fixture
def partitions(ranks) -> list[dict[str, Any]]:
    return ranks("accelerated", "accelerate, ZeRO-3", ("loop", "trainer"))


def assert_same(rank: dict[str, Any], case: str, expected: Any) -> None:
    """Losses and masks of two processes are those of one that `accelerate launch` started."""
    losses, masks, processes = result(rank, case)
    assert processes == 2
    assert expected[2] == 1
    assert masks == expected[1]
    assert len(losses) == len(expected[0])
    assert max(abs(a - b) for a, b in zip(losses, expected[0], strict=True)) < TOLERANCE


def test_the_loop_on_two_processes_has_the_losses_of_a_plain_loop_on_one(replicas):
    for rank in replicas:
        losses, masks, processes = result(rank, "loop")
        assert processes == 2
        assert_same_run(losses, masks)


@pytest.mark.parametrize("case", ["loop, accumulated", *TRAINERS])
def test_two_processes_have_the_losses_and_masks_of_one(alone, replicas, case):
    for rank in replicas:
        assert_same(rank, case, result(alone, case))


@pytest.mark.slow
@needs_deepspeed
def test_the_loop_under_zero_has_the_losses_of_a_plain_loop_on_one(partitions):
    for rank in partitions:
        losses, masks, processes = result(rank, "loop")
        assert processes == 2
        assert_same_run(losses, masks, zeros=True)


@pytest.mark.slow
@needs_deepspeed
def test_the_trainer_under_zero_has_the_losses_of_one_process_with_zeros_for_missing_gradients(
    alone_with_zeros, partitions
):
    for rank in partitions:
        assert_same(rank, "trainer", result(alone_with_zeros, "trainer, zeros"))
