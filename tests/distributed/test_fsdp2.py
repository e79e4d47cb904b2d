"""FSDP2, `fully_shard`, on two processes."""

from __future__ import annotations

import pytest

import dropbp
from tests.distributed import fsdp2
from tests.distributed.compare import assert_as_alone, assert_same_run, result, sensitivities
from tests.distributed.training import make_model


@pytest.mark.parametrize("case", ["before", "after", "branches", "checkpointing", "resumed"])
def test_losses_and_masks_are_those_of_one_process(ranks, case):
    assert_as_alone(ranks("fsdp2"), case)


def test_adapters_train_as_in_one_process_and_dropped_blocks_are_not_gathered_again(ranks):
    for rank in ranks("fsdp2"):
        before, before_calls, after, after_calls = result(rank, "lora")
        assert_same_run(*before, lora=True)
        assert_same_run(*after, lora=True)
        assert before_calls == after_calls == 7  # five in the forward, two in the backward


@pytest.mark.parametrize("kind", ["blocks", "branches"])
def test_dropped_blocks_are_neither_gathered_nor_reduced_and_sharded_again(ranks, kind):
    sent = result(ranks("fsdp2")[0], "traffic")
    whole, half, none = (sent[f"{kind} {share}"] for share in (0.0, 0.5, 1.0))
    assert half["reduce_scatter_base"] < 0.6 * whole["reduce_scatter_base"]
    assert none["reduce_scatter_base"] < 0.1 * whole["reduce_scatter_base"]
    assert half["allgather_base"] < 0.8 * whole["allgather_base"]
    assert none["allgather_base"] < 0.55 * whole["allgather_base"]
    assert all(sent[f"{kind} {share} sharded"] for share in (0.0, 0.5, 1.0))


def test_two_forwards_before_one_backward_gather_what_either_keeps(ranks):
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    expected = fsdp2.both_orders(model, handle, len(handle.branches), {})
    for rank in ranks("fsdp2"):
        assert result(rank, "two forwards") == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_dropped_block_that_is_recomputed_all_the_same_is_gathered_for_it(ranks):
    model, batch = fsdp2.squashed_net()
    expected = fsdp2.squashed_norms(model, dropbp.enable(model, example_inputs=batch), batch)
    for rank in ranks("fsdp2"):
        assert result(rank, "recomputed") == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("method", ["exact", "one-pass"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_sensitivities_are_those_of_one_process(ranks, method, when):
    found = [result(rank, "calibrated")[f"{method} {when}"] for rank in ranks("fsdp2")]
    assert found[0] == found[1]
    assert found[0] == pytest.approx(sensitivities(method), rel=2e-3)


@pytest.mark.parametrize("case", ["removed", "broken off"])
def test_blocks_gather_again_after_removal_and_after_a_backward_that_raised(ranks, case):
    assert all(result(rank, case) for rank in ranks("fsdp2"))
