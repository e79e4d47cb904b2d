"""When masks are drawn, and which one a forward sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dropbp
from dropbp.errors import ConfigError
from dropbp.masks import register_sampler, registry, samplers
from tests.common.engine_models import (
    assert_same_gradients,
    llama_loss,
    paper_gradients,
    plain_batch,
    plain_loss,
    plain_net,
    take_gradients,
    tiny_llama,
    tokens,
)


def enabled(model=None, **options):
    model = plain_net() if model is None else model
    return model, dropbp.enable(model, **{"masks": "exact", "example_inputs": plain_batch(), **options})


def test_a_mask_is_drawn_once_for_each_training_forward():
    model, handle = enabled()
    seen = []
    for _ in range(20):
        model(plain_batch())
        seen.append(handle.mask)
    assert handle.report()["draws"] == handle.report()["forwards"] == 20
    assert len(set(seen)) > 5


def test_the_same_seed_draws_the_same_masks_and_another_does_not():
    def drawn(seed):
        model, handle = enabled(seed=seed)
        return [(model(plain_batch()), handle.mask)[1] for _ in range(10)]

    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_nothing_is_drawn_or_dropped_without_gradients(guard):
    model, handle = enabled()
    with guard():
        model(plain_batch())
    assert handle.mask is None and handle.report()["forwards"] == 0


def test_evaluation_mode_trains_everything_and_draws_nothing():
    plain, (model, handle) = plain_net().eval(), enabled()
    model.eval()
    assert_same_gradients(take_gradients(model, plain_loss(model)), take_gradients(plain, plain_loss(plain)))
    assert handle.mask is None
    model.train()
    plain_loss(model)
    assert handle.mask is not None


def test_a_model_in_evaluation_mode_can_be_enabled_and_drops_after_train():
    model, handle = enabled(plain_net().eval())
    assert not model.training
    plain_loss(model)
    assert handle.mask is None
    model.train()
    plain_loss(model)
    assert handle.mask is not None


def test_forwards_without_gradients_between_training_ones_change_no_mask():
    def drawn(evaluate):
        model, handle = enabled()
        for _ in range(10):
            plain_loss(model).backward()
            if evaluate:
                with torch.no_grad():
                    model.eval()(plain_batch())
                model.train()
            yield handle.mask

    assert list(drawn(False)) == list(drawn(True))


class CallsItself(nn.Module):
    """Its forward runs itself again, as models do that score their own samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain_net()

    def forward(self, x_BSD, depth=1, record=True):
        if depth:
            with torch.set_grad_enabled(torch.is_grad_enabled() and record):
                x_BSD = self(x_BSD, depth - 1)
        return self.net(x_BSD)


@pytest.mark.parametrize("record", [True, False])
def test_a_nested_forward_of_the_root_draws_no_mask_of_its_own(record):
    model = CallsItself().train()
    plain = CallsItself().train()
    plain.load_state_dict(model.state_dict())
    handle = dropbp.enable(model, example_inputs=(plain_batch(), 0))
    mask = (True, False, False, True, True, False)
    names = [branch.name for branch in handle.branches]
    with handle.fixed(mask):
        got = take_gradients(model, model(plain_batch(), 1, record).square().mean())
    loss = lambda net: net(plain_batch(), 1, record).square().mean()  # noqa: E731
    assert_same_gradients(got, paper_gradients(plain, names, mask, loss))
    assert handle.report()["forwards"] == 1


def test_several_forwards_before_one_backward_each_keep_their_own_mask():
    model, plain = tiny_llama(), tiny_llama()
    handle = dropbp.enable(model)
    names = [branch.name for branch in handle.branches]
    first, second = (True, True, False, False), (False, False, True, True)
    with handle.fixed(first):
        a = llama_loss(model)
    with handle.fixed(second):
        b = llama_loss(model, tokens(seed=9))
    got = take_gradients(model, a + b)
    one = paper_gradients(plain, names, first, llama_loss)
    two = paper_gradients(plain, names, second, lambda m: llama_loss(m, tokens(seed=9)))
    for name, gradient in got.items():
        parts = [g for g in (one[name], two[name]) if g is not None]
        torch.testing.assert_close(gradient, sum(parts), rtol=1e-5, atol=1e-7)


def test_fixed_masks_nest_and_end_with_their_block():
    model, handle = enabled(drop_rate=0.0)
    with handle.fixed([True] * 6):
        with handle.fixed([False, True] * 3):
            plain_loss(model)
            assert handle.mask == (False, True) * 3
        plain_loss(model)
        assert handle.mask == (True,) * 6
    plain_loss(model)
    assert handle.mask == (False,) * 6


def test_fixed_masks_leave_the_sequence_of_drawn_masks_alone():
    def drawn(between):
        model, handle = enabled()
        for _ in range(8):
            plain_loss(model)
            yield handle.mask
            if between:
                with handle.fixed([True] * 6):
                    plain_loss(model)

    assert list(drawn(False)) == list(drawn(True))


@pytest.mark.parametrize("mask", [[True] * 5, [True] * 7, []])
def test_a_mask_of_the_wrong_length_is_refused(mask):
    _, handle = enabled()
    message = (
        f"The mask has {len(mask)} entries, but the model has 6 branches. Pass one bool per entry of handle.branches"
    )
    with pytest.raises(ConfigError, match=message), handle.fixed(mask):
        pass


def test_resample_step_keeps_the_mask_until_it_is_asked_for_another():
    model, handle = enabled(resample="step")
    seen = []
    for step in range(12):
        if step % 3 == 0:
            handle.resample()
        plain_loss(model).backward()
        seen.append(handle.mask)
    assert all(len(set(seen[i : i + 3])) == 1 for i in range(0, 12, 3))
    assert len(set(seen)) > 2 and handle.report()["draws"] == 4


def test_resample_every_k_forwards():
    model, handle = enabled(resample=4)
    seen = [(plain_loss(model), handle.mask)[1] for _ in range(16)]
    assert all(len(set(seen[i : i + 4])) == 1 for i in range(0, 16, 4))
    assert handle.report()["draws"] == 4


@pytest.mark.parametrize("resample", ["forward", "step", 3])
def test_nothing_is_dropped_during_the_warmup(resample):
    model, handle = enabled(warmup=5, resample=resample)
    for _ in range(5):
        plain_loss(model)
        assert handle.mask == (False,) * 6
    assert handle.report()["draws"] == 0
    plain_loss(model)
    assert any(handle.mask)


def test_set_rates_determines_the_next_mask():
    model, handle = enabled()
    handle.set_rates([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    plain_loss(model)
    assert handle.mask == (True, False, True, False, False, True)
    assert [branch.rate for branch in handle.branches] == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("rates", "message"),
    [([0.5] * 5, "rates has 5 entries and flops has 6"), ([0.5] * 5 + [1.5], "1.5"), ([float("nan")] * 6, "nan")],
)
def test_rates_that_do_not_fit_are_refused_and_change_nothing(rates, message):
    _, handle = enabled()
    with pytest.raises(ConfigError, match=message):
        handle.set_rates(rates)
    assert handle.rates == (0.5,) * 6


def test_masks_weigh_branches_by_the_flops_of_the_lengths_seen():
    model = tiny_llama()
    handle = dropbp.enable(model)
    llama_loss(model, tokens(length=4))
    short = [branch.flops for branch in handle.branches]
    llama_loss(model, tokens(length=64))
    long = [branch.flops for branch in handle.branches]
    assert long[1] == 16 * short[1]  # an MLP is linear in the length
    assert long[0] > 16 * short[0]  # attention is not


@pytest.mark.parametrize(("resample", "draws"), [("forward", 24), ("step", 24), (3, 8)])
def test_nested_masks_anneal_over_a_run_whose_length_is_known(resample, draws):
    model, handle = enabled(masks="nested", steps=24, warmup=2, resample=resample)
    masks = []
    for _ in range(26):
        if resample == "step":
            handle.resample()
        plain_loss(model)
        masks.append(handle.mask)
    assert masks[:2] == [(False,) * 6] * 2
    kept = [mask.count(False) for mask in masks[2:]]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]
    assert handle.report()["draws"] == draws
    realised = sum(sum(mask) for mask in masks[2:]) / (24 * 6)
    assert realised == pytest.approx(0.5, abs=1 / draws)


def test_the_length_of_the_run_changes_nothing_for_other_masks():
    drawn = []
    for steps in (50, None):
        model, handle = enabled(masks="exact", steps=steps)
        drawn.append([(plain_loss(model), handle.mask)[1] for _ in range(8)])
    assert drawn[0] == drawn[1]


def test_a_custom_sampler_that_drops_prefixes_is_treated_like_nested(monkeypatch):
    """What `nested` asks of the engine and the schedule it says itself; no one asks for its name."""
    monkeypatch.setattr(registry, "_SAMPLERS", dict(registry._SAMPLERS))
    register_sampler("twin", rates="shelf", annealed_rates="band", prefixes=True)(samplers.nested)
    runs = []
    for masks in ("nested", "twin"):
        model, handle = enabled(masks=masks, steps=12)
        with handle:
            drawn = [(plain_loss(model).backward(), handle.mask)[1] for _ in range(12)]
            report = handle.report()
        runs.append((drawn, handle.rates, report["never_trained"], report["at_rest"], handle.engine.recomputes))
    assert runs[0] == runs[1] and len(set(runs[0][0])) > 2
