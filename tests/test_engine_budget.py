"""The budget: what share of the FLOPs is dropped, in each step and over many."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import dropbp
from tests.campaigns.zoo.tiny import case
from tests.campaigns.zoo.training import counted_backward, flops_of_backward, untie
from tests.common.engine_models import tiny_llama, tokens

STEPS = 400


@pytest.mark.parametrize("drop_rate", [0.5, 0.75, 0.875])
def test_the_share_of_dropped_flops_is_the_drop_rate(drop_rate):
    model = tiny_llama(layers=4)
    handle = dropbp.enable(model, drop_rate, masks="exact")
    shares, counts = _train(model, handle)
    largest = max(branch.flops for branch in handle.branches) / sum(branch.flops for branch in handle.branches)
    assert abs(sum(shares) / STEPS - drop_rate) < 0.005 * drop_rate
    assert all(abs(share - drop_rate) < largest for share in shares)
    assert handle.report()["realised_drop_rate"] == pytest.approx(sum(shares) / STEPS)
    # Masks are fair coins for each branch: 4.5 standard deviations of a binomial, over 8 branches and 3 rates 1e-4.
    error = 4.5 * math.sqrt(drop_rate * (1 - drop_rate) / STEPS)
    assert all(abs(count / STEPS - drop_rate) < error for count in counts)


def test_unequal_rates_are_kept_branch_by_branch_and_in_sum():
    model = tiny_llama(layers=4)
    handle = dropbp.enable(model, masks="exact")
    rates = [0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.0]
    handle.set_rates(rates)
    shares, counts = _train(model, handle)
    flops = [branch.flops for branch in handle.branches]
    target = sum(r * f for r, f in zip(rates, flops, strict=True)) / sum(flops)
    assert abs(sum(shares) / STEPS - target) < 0.005
    assert all(abs(share - target) < max(flops) / sum(flops) for share in shares)
    for count, rate in zip(counts, rates, strict=True):
        assert abs(count / STEPS - rate) <= 4.5 * math.sqrt(rate * (1 - rate) / STEPS)


def test_report_counts_what_was_dropped():
    model = tiny_llama()
    handle = dropbp.enable(model)
    for mask in [(True, False, False, False), (True, True, False, False)]:
        with handle.fixed(mask):
            model(input_ids=tokens())
    report = handle.report()
    flops = [branch["flops"] for branch in report["branches"]]
    assert [branch["dropped"] for branch in report["branches"]] == [2, 1, 0, 0]
    assert [branch["realised_rate"] for branch in report["branches"]] == [1.0, 0.5, 0.0, 0.0]
    assert report["flops_skipped"] == 2 * flops[0] + flops[1]
    assert report["realised_drop_rate"] == pytest.approx((2 * flops[0] + flops[1]) / (2 * sum(flops)))
    assert "model.layers.1.mlp" in handle.summary() and "2 forwards" in handle.summary()


def _train(model, handle):
    shares, counts = [], [0] * len(handle.branches)
    batch = tokens(rows=1, length=2)
    for _ in range(STEPS):
        with torch.enable_grad():
            model(input_ids=batch)
        flops = [branch.flops for branch in handle.branches]
        shares.append(sum(f for f, drop in zip(flops, handle.mask, strict=True) if drop) / sum(flops))
        counts = [count + drop for count, drop in zip(counts, handle.mask, strict=True)]
    return shares, counts


@pytest.mark.parametrize("length", [4, 16, 96])
def test_nested_masks_meet_the_budget_at_lengths_other_than_the_one_discovered(length):
    """Attention weighs more in long sequences, so rates over depth depend on the length."""
    model = tiny_llama(8)
    handle = dropbp.enable(model, 0.5, masks="nested")
    ids = torch.randint(32, (2, length), generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        model(input_ids=ids, labels=ids)
    flops = [branch.flops for branch in handle.branches]
    expected = sum(f * branch.rate for f, branch in zip(flops, handle.branches, strict=True)) / sum(flops)
    assert expected == pytest.approx(0.5, rel=1e-9)
    assert handle.report()["realised_drop_rate"] == pytest.approx(0.5, abs=0.005)


def test_rates_that_were_set_stay_at_any_length():
    model = tiny_llama(2)
    handle = dropbp.enable(model, 0.5, masks="nested")
    handle.set_rates([0.9, 0.6, 0.3, 0.1])
    ids = torch.randint(32, (1, 24))
    model(input_ids=ids, labels=ids)
    assert handle.rates == (0.9, 0.6, 0.3, 0.1)


def frozen_encoder() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = case("T5ForConditionalGeneration", "encoder-decoder").build()
    model.config.decoder_start_token_id = 0
    model.get_encoder().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    return model, {"input_ids": ids(40), "labels": ids(6)}


def frozen_lower_half() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = tiny_llama(8)
    for module in (model.model.embed_tokens, *model.model.layers[:4]):
        module.requires_grad_(False)
    return model, {"input_ids": ids(12), "labels": ids(12)}


def lora_on_some_layers() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    config = LoraConfig(target_modules=targets, r=2, layers_to_transform=[3, 4, 5, 6, 7])
    return get_peft_model(tiny_llama(8), config), {"input_ids": ids(12), "labels": ids(12)}


def long_source() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return untied("PegasusForConditionalGeneration", "encoder-decoder"), {"input_ids": ids(100), "labels": ids(4)}


def long_target() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return untied("PegasusForConditionalGeneration", "encoder-decoder"), {"input_ids": ids(4), "labels": ids(100)}


def post_norms() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return untied("BertForMaskedLM", "masked-lm"), {"input_ids": ids(12), "labels": ids(12)}


def post_norms_long_source() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return untied("BartForConditionalGeneration", "encoder-decoder"), {"input_ids": ids(100), "labels": ids(4)}


def learned_masks() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = untied("T5ForConditionalGeneration", "encoder-decoder")
    model.config.decoder_start_token_id = 0
    return model, {"input_ids": ids(30), "labels": ids(9)}


def speech() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = untied("WhisperForConditionalGeneration", "speech")
    for convolution in (model.model.encoder.conv1, model.model.encoder.conv2):  # the stem is frozen with it
        convolution.requires_grad_(False)
    frames = torch.randn(2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    return model, {"input_features": frames, "labels": ids(7)}


def parallel_branches() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return untied("GPTJForCausalLM", "causal-lm"), {"input_ids": ids(12), "labels": ids(12)}


def untied(name: str, family: str) -> nn.Module:
    model = case(name, family).build()
    untie(model)
    return model


def ids(length: int) -> torch.Tensor:
    return torch.arange(2 * length).reshape(2, length) % 20 + 5


# Tied heads are given weights of their own: what they save while the embedding is frozen does not count.
MADE = (
    frozen_encoder, frozen_lower_half, lora_on_some_layers, long_source, long_target, post_norms,
    post_norms_long_source, learned_masks, speech, parallel_branches,
)  # fmt: skip
# Any set of branches may save more than each by itself: the gradient of the lowest one's input, or an encoder's whole
# backward where all that looks at it is dropped.
ANY_SET = (frozen_encoder, frozen_lower_half, long_target)


@pytest.mark.parametrize(
    ("made", "masks"), [*((made, "nested") for made in MADE), *((made, "exact") for made in ANY_SET)]
)
def test_the_flops_that_are_really_skipped_are_the_drop_rate(made: Callable[[], Any], masks: str) -> None:
    """Counted in the backward of every step by PyTorch's own counter, against that of plain steps."""
    model, batch = made()
    handle = dropbp.enable(model.train(), 0.5, masks=masks, steps=64, max_activations=None)
    model(**batch)  # the first forward looks whether the stream may end
    steps = [flops_of_backward(model(**batch).loss) for _ in range(64)]
    idle = [branch["weight"] == 0 for branch in handle.report()["branches"]]
    whole, least = (counted_backward(handle, batch, [drop and not none for none in idle]) for drop in (False, True))
    realised = (whole - sum(steps) / len(steps)) / (whole - (least or head(model)))
    assert realised == pytest.approx(0.5, abs=0.02)
    assert handle.report()["realised_drop_rate"] == pytest.approx(realised, abs=0.02)


@pytest.mark.parametrize("made", MADE)
def test_a_mask_skips_as_many_flops_as_its_branches_weigh(made: Callable[[], Any]) -> None:
    """Of masks that train the top of the model down to a border, each saves exactly what it is counted for."""
    model, batch = made()
    handle = dropbp.enable(model.train(), 0.5, masks="nested", max_activations=None)
    model(**batch)  # the first forward looks whether the stream may end
    saved: dict[tuple[bool, ...], int] = {}
    for _ in range(12):
        loss = model(**batch).loss
        saved.setdefault(handle.mask, flops_of_backward(loss))
    whole = counted_backward(handle, batch, [False] * len(handle.branches))
    weights = [branch["weight"] for branch in handle.report()["branches"]]
    for mask, left in saved.items():
        counted = 2 * sum(weight for weight, drop in zip(weights, mask, strict=True) if drop)
        assert whole - left == pytest.approx(counted, rel=1e-6), mask


def head(model: Any) -> int:
    """Where every step that drops all has no backward at all, the head's goes with it."""
    return 2 * 2 * 12 * model.config.hidden_size * model.config.vocab_size


def test_branches_without_a_backward_are_never_dropped_and_reported_as_such() -> None:
    model, batch = frozen_lower_half()
    handle = dropbp.enable(model.train(), 0.5)
    for _ in range(8):
        model(**batch).loss.backward()
    entries = handle.report()["branches"]
    assert [entry["weight"] == 0 for entry in entries] == [True] * 8 + [False] * 8
    assert not any(entry["dropped"] for entry in entries[:8])
    assert "8 branches have no backward to skip" in handle.summary()


def test_the_budget_follows_gradual_unfreezing() -> None:
    model, batch = frozen_lower_half()
    handle = dropbp.enable(model.train(), 0.5, masks="exact")
    model(**batch).loss.backward()
    assert not any(handle.mask[:8])
    for layer in model.model.layers:
        layer.requires_grad_(True)
    seen = []
    for _ in range(20):
        model(**batch).loss.backward()
        seen.append(handle.mask)
    assert any(any(mask[:8]) for mask in seen)
    assert all(entry["weight"] for entry in handle.report()["branches"])


@pytest.mark.parametrize("steps", [None, 96])
@pytest.mark.parametrize(("layers", "drop_rate"), [(None, 0.5), (None, 0.875), ([0, 1], 0.875), ([2, 3], 0.875)])
def test_a_drop_rate_that_would_leave_nothing_to_train_is_told_before_the_first_step(
    layers: list[int] | None, drop_rate: float, steps: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Adapters on queries and values alone: a step that keeps nothing but the last MLP would train nothing."""
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, layers_to_transform=layers)
    model = get_peft_model(tiny_llama(4), config).train()
    handle = dropbp.enable(model, drop_rate, steps=steps)
    told = [record.getMessage() for record in caplog.records if "out of reach" in record.getMessage()]
    for _ in range(96):
        model(input_ids=ids(12), labels=ids(12))
    realised = handle.report()["realised_drop_rate"]
    assert bool(told) == (realised < drop_rate - 0.03)
    if told:
        foreseen = float(told[0].split("About ")[1].split(" of ")[0])
        assert realised == pytest.approx(foreseen, abs=0.03)


@pytest.mark.parametrize("when", ["only the head trains", "an input requires a gradient"])
@pytest.mark.parametrize("at", [range(20, 40), range(0, 80, 4)])
def test_forwards_that_can_drop_nothing_take_up_a_part_of_the_run(when: str, at: range) -> None:
    """Otherwise an annealed run would end before its last masks."""
    model = tiny_llama(4)
    handle = dropbp.enable(model, 0.5, steps=80)
    for step in range(80):
        if when == "only the head trains":
            model.model.requires_grad_(step not in at)
            model(input_ids=ids(12), labels=ids(12)).loss.backward()
        else:
            embedded = model.get_input_embeddings()(ids(12)).detach().requires_grad_(step in at)
            model(inputs_embeds=embedded, labels=ids(12)).loss.backward()
        assert any(handle.mask) <= (step not in at)
    assert handle.schedule.statistics.drawn_rate == pytest.approx(0.5, abs=0.02)
    assert handle.schedule.pace.now == pytest.approx(1.0)
