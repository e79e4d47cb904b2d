"""DeepSpeed ZeRO on two processes. ZeRO knows no gradient that is None: a dropped branch's is zero there."""

from __future__ import annotations

import importlib.util

import pytest

from tests.distributed.compare import TOLERANCE, assert_as_alone, result
from tests.distributed.training import BATCHES, accumulated_alone

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

stages = pytest.mark.parametrize("stage", [2, 3])


@stages
@pytest.mark.parametrize("case", ["trained", "after"])
def test_losses_and_masks_are_those_of_one_process(ranks, stage, case):
    assert_as_alone(ranks("zero"), f"{case} {stage}", zeros=True)


@stages
def test_adapters_train_as_in_one_process(ranks, stage):
    assert_as_alone(ranks("zero"), f"lora {stage}", lora=True, zeros=True)


def test_a_model_partitioned_from_birth_trains_as_in_one_process(ranks):
    assert_as_alone(ranks("zero"), "partitions", zeros=True)
    assert "dropbp.enable(engine.module)" in result(ranks("zero")[0], "partitions")[2]


def test_a_training_that_calls_other_modules_than_the_forward_that_finds_the_branches(ranks):
    assert_as_alone(ranks("zero"), "head", zeros=True)


@stages
def test_accumulation_with_a_mask_for_each_micro_batch_is_as_in_one_process(ranks, stage):
    expected = accumulated_alone(BATCHES)
    for rank in ranks("zero"):
        losses, _ = result(rank, f"accumulated {stage}")
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < TOLERANCE


@stages
def test_parameters_are_counted_whole_when_enabled_on_partitions(ranks, stage):
    assert result(ranks("zero")[0], f"after {stage}")[2] == [3104, 6176] * 4


@stages
def test_gradients_of_dropped_branches_are_not_sent(ranks, stage):
    sent = result(ranks("zero")[0], f"traffic {stage}")
    reduction = "allreduce" if stage == 2 else "reduce_scatter_base"
    assert sent["0.5"][reduction] < 0.6 * sent["0.0"][reduction]
    assert sent["1.0"][reduction] < 0.1 * sent["0.0"][reduction]
    if stage == 3:
        assert sent["1.0"]["allgather_base"] < 0.6 * sent["0.0"]["allgather_base"]


@stages
def test_the_engine_and_calibration_inside_it_are_refused_with_what_to_do(ranks, stage):
    for rank in ranks("zero"):
        refused = result(rank, f"refusals {stage}")
        assert "wrapped in DeepSpeedEngine" in refused["wrapper"]
        assert "Calibrate before building the engine" in refused["calibrate"]
