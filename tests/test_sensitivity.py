"""Sensitivities: the paper's, written literally; one pass against them; and that measuring leaves no trace."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dropbp.bench.analysis import sensitivity as bench
from scipy.stats import spearmanr
from torch import nn

import dropbp
from dropbp.errors import ConfigError, StateError
from dropbp.sensitivity.onepass import Observation
from tests.common import trained
from tests.common.engine_models import llama_loss, plain_batch, plain_net, tiny_llama, tokens
from tests.common.reference import ResidualNet, gradient_norm_sensitivities

METHODS = ("one-pass", "exact")


# -- against the paper's algorithm


class Wrapped(nn.Module):
    """The reference's residual net as a user's model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResidualNet(branches=4, width=6)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.net(x_BD)


def test_exact_method_equals_n_plus_one_passes():
    model, x_BD = Wrapped(), torch.randn(5, 6)
    literal = gradient_norm_sensitivities(model, lambda mask: model.net(x_BD, mask).square().mean(), 4)
    with dropbp.enable(model, example_inputs=x_BD) as handle:
        found = handle.calibrate(lambda: model(x_BD).square().mean(), method="exact")
    assert found.sensitivities == pytest.approx(literal, rel=1e-5)
    assert (found.passes, found.method) == (5, "exact")


def literal_sensitivities(handle: dropbp.Handle, model: nn.Module, closure: Callable[[], torch.Tensor]) -> list[float]:
    """The paper's, from masks fixed by hand; norms of what has no gradient are 0."""
    count = len(handle.branches)

    def norms(dropped: int) -> list[float]:
        model.zero_grad(set_to_none=True)
        with handle.fixed([place == dropped for place in range(count)]):
            closure().backward()
        found = [0.0 if p.grad is None else p.grad.norm().item() for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        return found

    full = norms(-1)
    return [sum((a - b) ** 2 for a, b in zip(full, norms(place), strict=True)) for place in range(count)]


def test_exact_method_equals_n_plus_one_passes_with_dropout():
    model = trained.gpt2(layers=2, width=16, dropout=0.3)
    handle, batch = dropbp.enable(model, masks="exact"), tokens()

    def closure() -> torch.Tensor:
        torch.manual_seed(3)
        return trained.loss_of(model, batch)

    literal = literal_sensitivities(handle, model, closure)
    found = handle.calibrate(closure, method="exact")
    assert found.sensitivities == pytest.approx(literal, rel=1e-4)


def test_rates_are_the_allocation_of_the_sensitivities():
    model = tiny_llama(layers=3)
    with dropbp.enable(model, 0.5, masks="exact", max_rate=0.8) as handle:
        found = handle.calibrate(lambda: llama_loss(model))
        assert handle.rates == found.rates
        flops = [b.flops for b in handle.branches]
        assert found.rates == dropbp.allocate(found.sensitivities, flops, 0.5, 0.8)


def test_set_rates_false_leaves_the_rates_unchanged():
    model = tiny_llama()
    with dropbp.enable(model, 0.5, masks="exact") as handle:
        before = handle.rates
        assert handle.calibrate(lambda: llama_loss(model), set_rates=False).rates != before
        assert handle.rates == before


def test_nested_rates_do_not_fall_toward_the_input():
    model = tiny_llama(layers=3)
    with dropbp.enable(model, 0.5, masks="nested") as handle:
        rates = handle.calibrate(lambda: llama_loss(model)).rates
    assert list(rates) == sorted(rates, reverse=True)


def test_several_closures_are_averaged():
    model = tiny_llama(layers=3)
    batches = [tokens(seed) for seed in (2, 3)]
    with dropbp.enable(model) as handle:
        single = [handle.calibrate(lambda b=b: llama_loss(model, b)).sensitivities for b in batches]
        both = handle.calibrate([lambda b=b: llama_loss(model, b) for b in batches])
    assert both.sensitivities == pytest.approx([statistics.mean(pair) for pair in zip(*single, strict=True)])
    assert both.passes == 2


# -- one pass against exact


@pytest.fixture(scope="session")
def models() -> dict[str, Any]:
    llama = trained.train(trained.llama(), trained.text(), 60)
    gpt2 = trained.train(trained.gpt2(), trained.text(), 60)
    adapted = trained.with_lora(copy.deepcopy(llama))
    trained.train(adapted, trained.text(1), 15)
    return {"llama": llama, "gpt2": gpt2, "lora": adapted}


def objective(sensitivities: Any, rates: Any) -> float:
    return math.fsum(s * p * p for s, p in zip(sensitivities, rates, strict=True))


def agreement(handle: dropbp.Handle, closure: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Spearman correlation of one-pass and exact, and how far from the best objective one-pass's allocation is."""
    quick = handle.calibrate(closure, set_rates=False)
    exact = handle.calibrate(closure, method="exact", set_rates=False)
    ratio = objective(exact.sensitivities, quick.rates) / objective(exact.sensitivities, exact.rates)
    return float(spearmanr(quick.sensitivities, exact.sensitivities).statistic), ratio


@pytest.mark.parametrize("name", ["llama", "gpt2", "lora"])
def test_one_pass_agrees_with_exact_on_every_batch(models, name):
    model = copy.deepcopy(models[name])
    text = trained.text(7, rows=12)
    with dropbp.enable(model) as handle:
        batches = [text.batch() for _ in range(3)]
        found = [agreement(handle, lambda b=b: trained.loss_of(model, b)) for b in batches]
    correlations, ratios = zip(*found, strict=True)
    assert statistics.mean(correlations) >= 0.95 and min(correlations) >= 0.9
    assert max(ratios) <= 1.02


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_one_pass_agrees_with_exact_in_low_precision(models, how):
    model = copy.deepcopy(models["llama"]).to(torch.bfloat16 if how == "bfloat16" else torch.float32)
    batch = trained.text(7, rows=12).batch()

    def closure() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return trained.loss_of(model, batch)

    with dropbp.enable(model) as handle:
        correlation, ratio = agreement(handle, closure)
    assert correlation >= 0.9 and ratio <= 1.03


def test_one_pass_agrees_with_exact_inside_an_open_autocast_that_caches_casts(models):
    model = copy.deepcopy(models["llama"])
    batch = trained.text(7, rows=12).batch()
    with dropbp.enable(model) as handle, torch.autocast("cpu", torch.bfloat16):
        correlation, ratio = agreement(handle, lambda: trained.loss_of(model, batch))
    assert correlation >= 0.9 and ratio <= 1.03


def test_dropout_is_repeated_in_the_second_forward(models):
    model = copy.deepcopy(models["gpt2"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    batch = trained.text(7, rows=12).batch()
    with dropbp.enable(model) as handle:
        correlation, ratio = agreement(handle, lambda: trained.loss_of(model, batch))
    assert correlation >= 0.9 and ratio <= 1.02


def test_norms_replace_inner_products_that_were_not_observed():
    seen = Observation(
        own=(1.0, 1.0, 2.0), below=(4.0, 4.0, 0.0), inner_products=(1.0, math.nan, math.nan), ratios=(0.5,) * 3
    )
    assert seen.sensitivities() == (1.25, 2.0, 2.0)


def test_norms_replace_inner_products_if_the_second_forward_gets_another_batch(models):
    model = copy.deepcopy(models["llama"])
    first, second = (trained.text(seed, rows=12).batch() for seed in (7, 8))
    both = iter((first, second))
    with dropbp.enable(model) as handle:
        quick = handle.calibrate(lambda: trained.loss_of(model, next(both)))
        exact = handle.calibrate(lambda: trained.loss_of(model, first), method="exact")
    assert float(spearmanr(quick.sensitivities, exact.sensitivities).statistic) >= 0.9


# -- nothing is changed


class Snapshot:
    """All that a calibration must leave alone."""

    def __init__(self, model: nn.Module, handle: dropbp.Handle) -> None:
        self.parameters = [p.detach().clone() for p in model.parameters()]
        self.versions = [p._version for p in model.parameters()]
        self.gradients = [p.grad for p in model.parameters()]
        self.values = [None if g is None else g.clone() for g in self.gradients]
        self.buffers = [b.clone() for b in model.buffers()]
        self.modes = [m.training for m in model.modules()]
        self.asked = [p.requires_grad for p in model.parameters()]
        self.random, self.report, self.mask = torch.get_rng_state(), handle.report(), handle.mask

    def assert_same(self, model: nn.Module, handle: dropbp.Handle) -> None:
        now = Snapshot(model, handle)
        assert all(map(torch.equal, now.parameters, self.parameters)) and now.versions == self.versions
        assert all(a is b for a, b in zip(now.gradients, self.gradients, strict=True))
        assert all(a is b or torch.equal(a, b) for a, b in zip(now.values, self.values, strict=True))
        assert all(map(torch.equal, now.buffers, self.buffers))
        assert (now.modes, now.asked, now.mask) == (self.modes, self.asked, self.mask)
        assert torch.equal(now.random, self.random)
        assert now.report == self.report


class Normed(nn.Module):
    """A net with running statistics, which a forward in training mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = plain_net(blocks=2)
        self.statistics = nn.BatchNorm1d(8)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.statistics(self.inner(x_BSD).flatten(0, 1))


@pytest.fixture
def normed() -> Iterator[tuple[nn.Module, dropbp.Handle]]:
    model = Normed().train()
    with dropbp.enable(model, 0.5, example_inputs=plain_batch()) as handle:
        model(plain_batch()).square().mean().backward()  # accumulation is in progress
        yield model, handle


def normed_loss(model: nn.Module, factor: float = 1.0) -> torch.Tensor:
    noise = torch.randn(2, 4, 8)
    return (model(plain_batch() + 0.1 * noise) - 1).square().mean() * factor


@pytest.mark.parametrize("method", METHODS)
def test_calibration_restores_the_training_state(normed, method):
    model, handle = normed
    model.inner.blocks[0].eval()
    before = Snapshot(model, handle)
    handle.calibrate(lambda: normed_loss(model), method=method, set_rates=False)
    before.assert_same(model, handle)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_and_changes_nothing(normed, method, factor):
    model, handle = normed
    before = Snapshot(model, handle)
    with pytest.raises(StateError, match=r"not finite.*Nothing was changed"):
        handle.calibrate(lambda: normed_loss(model, factor), method=method)
    before.assert_same(model, handle)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", [0, 1])
def test_an_error_in_the_closure_restores_the_training_state(normed, method, call):
    model, handle = normed
    calls = iter(range(10))
    before = Snapshot(model, handle)

    def closure() -> torch.Tensor:
        loss = normed_loss(model)
        if next(calls) == call:
            raise RuntimeError("out of data")
        return loss

    with pytest.raises(RuntimeError, match="out of data"):
        handle.calibrate(closure, method=method)
    before.assert_same(model, handle)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [None, 1.0, torch.zeros(2), torch.zeros(())])
def test_a_closure_that_returns_no_loss_is_refused(normed, method, wrong):
    model, handle = normed
    before = Snapshot(model, handle)
    with pytest.raises(ConfigError, match="must run one forward and return the loss"):
        handle.calibrate(lambda: wrong, method=method)
    before.assert_same(model, handle)


def test_unknown_method_no_closure_and_removed_handle_are_refused():
    model = tiny_llama()
    handle = dropbp.enable(model)
    with pytest.raises(ConfigError, match="allowed: one-pass, exact"):
        handle.calibrate(lambda: llama_loss(model), method="guess")
    with pytest.raises(ConfigError, match="No closure"):
        handle.calibrate([])
    handle.remove()
    with pytest.raises(StateError, match="was removed"):
        handle.calibrate(lambda: llama_loss(model))


def test_an_optimizer_that_steps_in_backward_is_refused():
    model = tiny_llama()
    next(model.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    with dropbp.enable(model) as handle, pytest.raises(StateError, match="step during the backward"):
        handle.calibrate(lambda: llama_loss(model))


def test_calibration_does_not_change_later_losses():
    def losses(calibrating: bool) -> list[float]:
        model = trained.gpt2(layers=2, width=16, dropout=0.1)
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        found = []
        with dropbp.enable(model, 0.5) as handle:
            for step in range(4):
                loss = trained.loss_of(model, tokens(step))
                loss.backward()
                if calibrating and step == 1:
                    handle.calibrate(lambda: trained.loss_of(model, tokens(9)), set_rates=False)
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
        return found

    assert losses(True) == losses(False)


def test_calibration_frees_its_activations():
    model = tiny_llama()
    seen: list[weakref.ref[Any]] = []

    def closure() -> torch.Tensor:
        output = model(input_ids=tokens(), labels=tokens())
        seen.extend(weakref.ref(t) for t in (output.logits, output.logits.untyped_storage()))
        return output.loss

    with dropbp.enable(model) as handle:
        handle.calibrate(closure)
        gc.collect()
        assert [ref() for ref in seen] == [None] * len(seen)


def test_calibration_trains_the_stem_although_it_is_frozen_in_steps():
    found = {}
    for stem in ("rest", "train"):
        model = tiny_llama(layers=2)
        with dropbp.enable(model, masks="exact", stem=stem) as handle:
            found[stem] = [
                handle.calibrate(lambda model=model: llama_loss(model), method=m).sensitivities for m in METHODS
            ]
            with handle.fixed((True, False, False, False)):
                llama_loss(model).backward()
            assert (model.model.embed_tokens.weight.grad is None) is (stem == "rest")
    assert found["rest"] == found["train"]


# -- kinds of models and of training


def assert_sensible(model: nn.Module, closure: Callable[[], torch.Tensor], least: float = 0.8, **options: Any) -> None:
    """Untrained and tiny models are the worst case for an estimate; agreement is asked of trained ones above."""
    with dropbp.enable(model, **options) as handle:
        correlation, ratio = agreement(handle, closure)
    assert correlation >= least and ratio <= 1.1


def test_frozen_embeddings():
    model = trained.llama(layers=4)
    model.get_input_embeddings().requires_grad_(False)
    assert_sensible(model, lambda: trained.loss_of(model, tokens()))


def test_only_upper_blocks_are_trained():
    model = trained.llama(layers=4)
    for layer in model.model.layers[:2]:
        layer.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    with dropbp.enable(model, 0.3) as handle:
        found = handle.calibrate(lambda: trained.loss_of(model, tokens()), set_rates=False)
        exact = handle.calibrate(lambda: trained.loss_of(model, tokens()), method="exact", set_rates=False)
    assert found.sensitivities[:4] == exact.sensitivities[:4] == (0.0,) * 4
    assert min(found.sensitivities[4:]) > 0


def test_tied_weights():
    model = trained.llama(layers=4)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert_sensible(model, lambda: trained.loss_of(model, tokens()))


def test_mixture_of_experts():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, use_cache=False, output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config).train()
    assert_sensible(model, lambda: trained.loss_of(model, tokens()))


def test_parallel_branches_that_share_a_norm():
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, use_cache=False, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = CohereForCausalLM(config).train()
    assert_sensible(model, lambda: trained.loss_of(model, tokens()))


def test_encoder_and_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_ff=32, d_kv=8, num_layers=3, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).train()
    assert_sensible(model, lambda: model(input_ids=tokens(), labels=tokens(3)).loss)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_sensitivity(reentrant, method):
    model = tiny_llama(layers=3)
    with dropbp.enable(model) as handle:
        plain = handle.calibrate(lambda: llama_loss(model), method=method, set_rates=False)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        functions = [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]
        if reentrant:
            model.enable_input_require_grads()
        found = handle.calibrate(lambda: llama_loss(model), method=method, set_rates=False)
        assert functions == [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]
    assert found.sensitivities == pytest.approx(plain.sensitivities, rel=2e-3)


def test_checkpointing_of_adapters_on_frozen_embeddings():
    model = trained.with_lora(trained.llama(layers=3))
    with dropbp.enable(model) as handle:
        plain = handle.calibrate(lambda: trained.loss_of(model, tokens()), set_rates=False)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        found = handle.calibrate(lambda: trained.loss_of(model, tokens()), set_rates=False)
    assert found.sensitivities == pytest.approx(plain.sensitivities, rel=2e-3)


def test_one_pass_refuses_reentrant_checkpoints_of_the_models_own():
    model = plain_net(kind="reentrant")
    with dropbp.enable(model, example_inputs=plain_batch()) as handle:
        closure = lambda: model(plain_batch().requires_grad_()).square().mean()  # noqa: E731
        with pytest.raises(StateError, match="use_reentrant=False"):
            handle.calibrate(closure)
        assert min(handle.calibrate(closure, method="exact").sensitivities) > 0


@pytest.mark.parametrize("method", METHODS)
def test_calibration_keeps_evaluation_mode(method):
    model = trained.gpt2(layers=3, width=16, dropout=0.5)
    with dropbp.enable(model) as handle:
        model.eval()
        evaluated = handle.calibrate(lambda: trained.loss_of(model, tokens()), method=method)
        assert not model.training
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        without = handle.calibrate(lambda: trained.loss_of(model, tokens()), method=method)
    assert evaluated.sensitivities == pytest.approx(without.sensitivities, rel=1e-3)


@pytest.mark.parametrize("scope", ["blocks", "model"])
def test_compiled_models(scope):
    model = tiny_llama(layers=2)
    with dropbp.enable(model) as handle:
        plain = handle.calibrate(lambda: llama_loss(model), set_rates=False)
        if scope == "blocks":
            for layer in model.model.layers:
                layer.compile(backend="eager")
        else:
            model.compile(backend="eager")
        llama_loss(model).backward()
        found = handle.calibrate(lambda: llama_loss(model), set_rates=False)
    assert found.sensitivities == pytest.approx(plain.sensitivities, rel=2e-3)


def test_branches_given_by_name():
    model = tiny_llama(layers=3)
    names = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")]
    assert_sensible(model, lambda: llama_loss(model), branches=names)


def test_a_closure_may_run_the_model_more_than_once():
    model = trained.llama(layers=4)
    assert_sensible(model, lambda: trained.loss_of(model, tokens(1)) + trained.loss_of(model, tokens(2)))


def test_a_stream_changed_in_place_uses_norms():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(8, 8)
            self.parts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4))

        def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
            x_BD = self.stem(x_BD)
            for part in self.parts:
                x_BD = x_BD.clone()
                x_BD += part(x_BD.tanh())
            return x_BD

    model, x_BD = InPlace(), torch.randn(6, 8)
    assert_sensible(model, lambda: model(x_BD).square().mean(), least=0.7, example_inputs=x_BD)


# -- ordinary training steps


def test_observed_averages_follow_the_gradients_of_kept_branches():
    model = tiny_llama()
    with dropbp.enable(model, 0.5) as handle:
        with handle.fixed((False, True, False, True)):
            llama_loss(model).backward()
        squares = [sum(p.grad.square().sum().item() for p in own_parameters(model, b)) for b in (0, 2)]
        assert not handle.observe(every=2)
        own = handle.state_dict()["online"]
        assert [s / w for s, w in zip(own["sums"], own["weights"], strict=True) if w] == pytest.approx(squares)
        assert [w > 0 for w in own["weights"]] == [True, False, True, False]


def own_parameters(model: nn.Module, branch: int) -> Iterator[nn.Parameter]:
    layer = model.model.layers[branch // 2]
    parts = (layer.self_attn, layer.input_layernorm) if branch % 2 == 0 else (layer.mlp, layer.post_attention_layernorm)
    for part in parts:
        yield from part.parameters()


def test_observe_updates_the_rates_every_so_many_calls():
    model = tiny_llama(layers=3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with dropbp.enable(model, 0.5, masks="exact") as handle:
        handle.calibrate(lambda: llama_loss(model))
        before, renewed = handle.rates, []
        for step in range(8):
            llama_loss(model, tokens(step)).backward()
            renewed.append(handle.observe(every=4))
            optimizer.step()
            optimizer.zero_grad()
        flops = [b.flops for b in handle.branches]
        saved = sum(f * p for f, p in zip(flops, handle.rates, strict=True)) / sum(flops)
    assert renewed == [False, False, False, True] * 2
    assert handle.rates != before and saved == pytest.approx(0.5)


def test_without_calibration_observe_updates_rates_once_every_branch_was_kept():
    model = tiny_llama()
    with dropbp.enable(model, 0.5) as handle:
        for mask, renewed in (((True, True, False, False), False), ((False, False, True, True), True)):
            with handle.fixed(mask):
                llama_loss(model).backward()
            assert handle.observe(every=1) is renewed
            model.zero_grad()


def test_observed_squares_are_weighted_by_how_often_a_branch_was_kept():
    model = tiny_llama()
    with dropbp.enable(model, 0.5) as handle:
        for mask in ((False,) * 4, (True, False, False, False)):
            with handle.fixed(mask):
                llama_loss(model).backward()
        handle.observe()
        own = handle.state_dict()["online"]
        kept_once = sum(p.grad.square().sum().item() for p in own_parameters(model, 0))
    assert own["sums"][0] / own["weights"][0] == pytest.approx(2 * kept_once)


def test_state_dict_holds_sensitivities_and_observed_averages():
    def run(resumed: bool) -> tuple[Any, ...]:
        model = tiny_llama(layers=3)
        handle = dropbp.enable(model, 0.5)
        handle.calibrate(lambda: llama_loss(model))
        for step in range(6):
            if resumed and step == 3:
                state = copy.deepcopy(handle.state_dict())
                handle.remove()
                handle = dropbp.enable(model, 0.5)
                handle.load_state_dict(state)
            llama_loss(model, tokens(step)).backward()
            handle.observe(every=2)
            model.zero_grad()
        return handle.rates, handle.state_dict()

    assert run(resumed=True) == run(resumed=False)


@pytest.mark.parametrize("key", ["sensitivities", "online"])
def test_a_damaged_state_is_refused(key):
    model = tiny_llama()
    with dropbp.enable(model, 0.5) as handle:
        state = {**handle.state_dict(), key: [1.0] if key == "sensitivities" else {"sums": [1.0]}}
        with pytest.raises(StateError, match="damaged"):
            handle.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0; allowed is a number of calls of at least 1"),
        ({"decay": 1.0}, r"decay is 1\.0; allowed is a number from 0 to below 1"),
    ],
)
def test_observe_refuses_values_out_of_range(options, message):
    with dropbp.enable(tiny_llama()) as handle, pytest.raises(ConfigError, match=message):
        handle.observe(**options)


# -- several processes


def calibrate_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save([sensitivities_of_rank(rank, wrapped) for wrapped in (False, True)], Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def sensitivities_of_rank(rank: int, wrapped: bool) -> tuple[Any, ...]:
    model: Any = trained.llama(layers=3, width=16)
    handle = dropbp.enable(model)
    replica = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
    batch = tokens(rank)
    found = {m: handle.calibrate(lambda: trained.loss_of(replica, batch), method=m).sensitivities for m in METHODS}
    trained.loss_of(replica, batch).backward()  # the replica still works
    handle.observe(every=1)
    return found, handle.rates


@pytest.mark.distributed
def test_ranks_find_the_same_sensitivities(tmp_path):
    torch.multiprocessing.spawn(calibrate_on_rank, (str(tmp_path),), nprocs=2)
    plain, wrapped = zip(*(torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)), strict=True)
    assert plain[0] == plain[1] and wrapped[0] == wrapped[1]
    model = trained.llama(layers=3, width=16)
    both = torch.cat([tokens(0), tokens(1)])
    found, _ = wrapped[0]
    with dropbp.enable(model) as handle:  # wrapped, gradients are those of both ranks' batches together
        for method in METHODS:
            whole = handle.calibrate(lambda: trained.loss_of(model, both), method=method)
            assert found[method] == pytest.approx(whole.sensitivities, rel=5e-3)


# -- the committed measurement


def test_the_committed_measurement_meets_its_targets():
    record = bench.read()
    for model in record["models"].values():
        assert model["one-pass passes"] == {"forward": 2, "backward": 1}
        for rate in bench.DROP_RATES:
            found = bench.derived(model, rate)
            ranks = [one["spearman"] for one in found["single"]]
            assert statistics.mean(ranks) >= 0.95 and min(ranks) >= 0.9
            assert max(one["objective_ratio"] for one in [*found["single"], found["averaged"]]) <= 1.02
    overhead = record["overhead"]
    assert overhead["layers"] == 80
    assert statistics.median(overhead["calibration_cpu_s"]) < 3 * statistics.median(overhead["step_cpu_s"])


def test_the_table_is_derived_from_the_measurement():
    record = bench.read()
    lines = bench.table(record).splitlines()
    assert sum(line.startswith("| gpt2 |") for line in lines) == 2 * len(bench.DROP_RATES)
    assert "Spearman" in lines[0] and "80 layers" in lines[-1]


def test_agreement_is_with_the_exact_objective():
    flops, exact = [1.0, 1.0], [1.0, 3.0]
    same = bench.agreement(exact, exact, flops, 0.5)
    assert same["objective_ratio"] == 1.0 and same["rates"] == pytest.approx([0.75, 0.25])
    assert same["uniform_ratio"] == pytest.approx(1.0 / 0.75)
    assert bench.agreement([3.0, 1.0], exact, flops, 0.5)["objective_ratio"] > same["uniform_ratio"]


class EarlyExits(nn.Module):
    """Runs the lowest `depth` blocks of a net, or all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain_net(blocks=4)

    def forward(self, x_BSD, depth=None):
        x_BSD = self.net.stem(x_BSD)
        for block in self.net.blocks[:depth]:
            x_BSD = block(x_BSD)
        return self.net.head(self.net.norm(x_BSD))


@pytest.mark.parametrize("method", METHODS)
def test_branches_that_a_closure_does_not_run_have_no_sensitivity(method, caplog):
    model = EarlyExits().train()
    with dropbp.enable(model, masks="exact", example_inputs=plain_batch()) as handle:
        closure = lambda: model(plain_batch(), depth=3).square().mean()  # noqa: E731
        alone = handle.calibrate(closure, method=method)
        assert alone.sensitivities[6:] == (0, 0) and min(alone.sensitivities[:6]) > 0
        reference = handle.calibrate(closure, method="exact", set_rates=False)
        assert alone.sensitivities == pytest.approx(reference.sensitivities, rel=0.5)
        together = handle.calibrate([closure, lambda: model(plain_batch(3)).square().mean()], method=method)
        assert min(together.sensitivities) > 0
        model(plain_batch()).square().mean().backward()
    told = [message for message in caplog.messages if "did not run" in message]
    assert method == "exact" or "net.blocks.3.mix, net.blocks.3.mlp" in told[0]


def test_one_pass_names_a_branch_that_it_could_not_observe():
    model = EarlyExits().train()
    model.net.stem = nn.Identity()
    named = pytest.raises(StateError, match=r"1 of them ran without being shown, first net\.blocks\.0\.mix")
    with dropbp.enable(model, masks="exact", example_inputs=plain_batch()) as handle, named:
        handle.calibrate(lambda: model(plain_batch(), depth=3).square().mean())
