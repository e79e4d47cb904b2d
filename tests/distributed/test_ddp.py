"""DistributedDataParallel on two processes."""

from __future__ import annotations

import pytest

import dropbp
from tests.common.engine_models import llama_loss
from tests.distributed.compare import assert_as_alone, result, sensitivities
from tests.distributed.training import local_batch, make_model


@pytest.mark.parametrize("case", ["before", "after", "kept", "views", "resumed"])
def test_losses_and_masks_are_those_of_one_process(ranks, case):
    assert_as_alone(ranks("ddp"), case)


def test_adapters_train_as_in_one_process(ranks):
    assert_as_alone(ranks("ddp"), "lora", lora=True)


def test_accumulated_gradients_are_the_same_when_only_kept_ones_are_sent(ranks):
    runs = [result(rank, "accumulated") for rank in ranks("ddp")]
    whole, kept = runs[0]
    assert kept == pytest.approx(whole, rel=1e-5, abs=1e-9)
    assert runs[0] == runs[1]
    assert -1.0 in whole  # some gradient was missing in all micro-batches


def test_two_forwards_before_one_backward_take_one_mask_and_train_as_in_one_process(ranks):
    runs = [result(rank, "two forwards") for rank in ranks("ddp")]
    assert runs[0] == runs[1]
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5, stem="rest")
    for step, (first, second, norms) in enumerate(runs[0]):
        assert first == second
        with handle.fixed(first):
            sum(llama_loss(model, local_batch(step % 6 + i)) for i in range(2)).backward()
        expected = [0.0 if p.grad is None else p.grad.norm().item() for p in model.parameters()]
        assert norms[1:] == pytest.approx(expected[1:], rel=1e-4, abs=1e-7)
        model.zero_grad()
    assert len({tuple(first) for first, *_ in runs[0][6:]}) > 1


def test_only_kept_gradients_are_sent_if_asked_for(ranks):
    sent = result(ranks("ddp")[0], "traffic")
    assert sent["all 0.0"] == sent["all 0.5"] == sent["all 1.0"] == sent["kept 0.0"]
    assert sent["kept 0.5"] < 0.6 * sent["kept 0.0"]
    assert sent["kept 1.0"] < 0.1 * sent["kept 0.0"]


@pytest.mark.parametrize("method", ["exact", "one-pass"])
def test_sensitivities_are_those_of_one_process(ranks, method):
    found = [result(rank, "calibrated")[method] for rank in ranks("ddp")]
    assert found[0] == found[1]
    assert found[0] == pytest.approx(sensitivities(method), rel=2e-3)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("wrapper", "wrapped in DistributedDataParallel. Enable the model inside, dropbp.enable(wrapped.module)"),
        ("flag", "find_unused_parameters=True"),
        ("static", "static_graph=True"),
        ("nothing dropped", ""),
        ("one mask", ""),
        ("two masks", "one `with handle.fixed(mask)`"),
    ],
)
def test_what_cannot_work_is_refused_with_the_flag_to_set(ranks, case, says):
    for rank in ranks("ddp"):
        error = result(rank, "refusals")[case]
        assert says in error if says else not error
