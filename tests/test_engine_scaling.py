"""Scaling of the kept branches' gradients, and what is left when everything is dropped."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dropbp
from dropbp.errors import ConfigError
from tests.common.engine_models import (
    VOCABULARY,
    assert_same_gradients,
    llama_loss,
    masks,
    plain_batch,
    plain_loss,
    take_gradients,
    tiny_llama,
    tokens,
)

RATES = (0.5, 0.25, 0.8, 0.0)


class Linears(nn.Module):
    """A linear residual net: its gradient under independent masks can be written as an expectation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Linear(4, 4, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in RATES)
        self.kind = None

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + self._run(block, x)
        return x

    def _run(self, block, x):
        if self.kind is None or not self.training:
            return block(x)
        return checkpoint(block, x, use_reentrant=self.kind == "reentrant")


def _linears(kind=None, **options):
    model = Linears().train()
    model.kind = kind
    return model, dropbp.enable(model, example_inputs=_x(), rates=RATES, masks="independent", **options)


def _x():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(7))


def _loss(model):
    return (model(_x()) * torch.linspace(-1, 1, 4)).sum()


def _expected_gradient(model, handle):
    """Every mask, weighted by its probability under independent coins."""
    mean = collections.defaultdict(float)
    for mask in masks(len(RATES)):
        weight = 1.0
        for rate, dropped in zip(RATES, mask, strict=True):
            weight *= rate if dropped else 1 - rate
        with handle.fixed(mask):
            for name, gradient in take_gradients(model, _loss(model)).items():
                mean[name] = mean[name] + (0 if gradient is None else weight * gradient)
    return mean


@pytest.mark.parametrize("kind", [None, "reentrant", "non-reentrant"])
def test_unbiased_scaling_is_unbiased(kind):
    model, handle = _linears(kind, scaling="unbiased")
    mean = _expected_gradient(model, handle)
    handle.remove()
    model.kind = None
    for name, gradient in take_gradients(model, _loss(model)).items():
        torch.testing.assert_close(mean[name], gradient, rtol=1e-5, atol=1e-5)


def test_without_scaling_the_gradient_shrinks():
    model, handle = _linears()
    mean = _expected_gradient(model, handle)
    handle.remove()
    full = take_gradients(model, _loss(model))
    top = "blocks.3.weight"  # nothing lies above it, so only its own coin matters
    torch.testing.assert_close(mean[top], (1 - RATES[3]) * full[top], rtol=1e-5, atol=1e-5)
    assert mean["stem.weight"].norm() < full["stem.weight"].norm()


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("unbiased", 5.0), ("clipped", 2.0)])
def test_factor_of_a_kept_branch(scaling, factor):
    model, handle = _linears(scaling=scaling)
    with handle.fixed((True, True, False, True)):
        got = take_gradients(model, _loss(model))["blocks.2.weight"]
    handle.remove()
    with torch.no_grad():
        model.blocks[3].weight.zero_()
    alone = take_gradients(model, _loss(model))["blocks.2.weight"]  # as if nothing lay above it
    torch.testing.assert_close(got, factor * alone, rtol=1e-4, atol=1e-5)


def test_forward_stays_bit_identical_under_scaling():
    expected = Linears().train()(_x())
    model, handle = _linears(scaling="unbiased")
    with handle.fixed((False, True, False, False)):
        assert torch.equal(model(_x()), expected)


def test_nothing_is_scaled_in_the_warmup_in_evaluation_and_after_remove():
    plain = Linears().train()
    expected = take_gradients(plain, _loss(plain))
    model, handle = _linears(scaling="unbiased", warmup=1)
    assert_same_gradients(take_gradients(model, _loss(model)), expected)
    model.eval()
    assert_same_gradients(take_gradients(model, _loss(model)), expected)
    model.train()
    handle.remove()
    assert_same_gradients(take_gradients(model, _loss(model)), expected)


def test_rates_set_between_forward_and_backward_scale_later_forwards_only():
    def run(change):
        model, handle = _linears("non-reentrant", scaling="unbiased")
        with handle.fixed((False, True, False, False)):
            loss = _loss(model)
        if change:
            handle.set_rates((0.9,) * 4)
        return take_gradients(model, loss)

    assert_same_gradients(run(True), run(False))


class ScaledOutside(nn.Module):
    """A learned scale, multiplied in outside of any module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.gamma = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = self.stem(x)
        return x + self.gamma * self.inner(x)


def test_branches_that_cannot_be_scaled_exactly_are_refused():
    model = ScaledOutside().train()
    before = dict(model.__dict__)
    with pytest.raises(
        ConfigError, match="scaling='unbiased' is not exact for branch inner: a parameter is multiplied"
    ):
        dropbp.enable(model, example_inputs=plain_batch(), scaling="unbiased")
    assert model.__dict__ == before
    with dropbp.enable(model, example_inputs=plain_batch()) as handle, handle.fixed((True,)):
        got = take_gradients(model, plain_loss(model))
    assert {name for name, gradient in got.items() if gradient is not None} == {"stem.weight", "stem.bias"}


def test_head_and_norms_train_when_everything_is_dropped():
    model = tiny_llama()
    with dropbp.enable(model) as handle, handle.fixed((True,) * 4):
        got = take_gradients(model, llama_loss(model))
    kept = {name for name, gradient in got.items() if gradient is not None}
    assert kept == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    count: int = 3


class Frozen(nn.Module):
    """Only a branch can be trained, as with adapters; `shape` says what the forward returns."""

    def __init__(self, shape) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.adapter, self.shape = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8), shape

    def forward(self, x):
        x = self.stem(x)
        x = x + self.adapter(x)
        loss = x.square().mean()
        made = {
            "tensor": lambda: loss,
            "tuple": lambda: (loss, x, None, 3),
            "dict": lambda: {"loss": loss, "hidden": [x, torch.arange(3)]},
            "dataclass": lambda: Output(loss, (x,)),
            "outside": lambda: x,
        }
        return made[self.shape]()


def _loss_of(output):
    if isinstance(output, Output):
        assert isinstance(output.hidden, tuple) and output.count == 3
        return output.loss
    if isinstance(output, dict):
        assert not output["hidden"][1].requires_grad
        return output["loss"]
    if isinstance(output, tuple):
        assert output[2:] == (None, 3)
        return output[0]
    return output.square().mean() if output.dim() else output


@pytest.mark.parametrize("shape", ["tensor", "tuple", "dict", "dataclass", "outside"])
def test_backward_of_a_fully_dropped_adapter_model_does_not_raise(shape):
    model = Frozen(shape).train()
    with dropbp.enable(model, example_inputs=plain_batch()) as handle, handle.fixed((True,)):
        output = model(plain_batch())
        loss = _loss_of(output)
        loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        (_loss_of(model(plain_batch())) * 2 + 1).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
    plain = Frozen(shape)
    assert torch.equal(loss, _loss_of(plain(plain_batch())))


def test_evaluation_of_an_adapter_model_is_not_connected():
    model = Frozen("tensor").train()
    with dropbp.enable(model, example_inputs=plain_batch()) as handle, handle.fixed((True,)):
        with torch.no_grad():
            assert not model(plain_batch()).requires_grad
        model.requires_grad_(False)
        assert not model(plain_batch()).requires_grad  # nothing to train: as the plain model


def test_lora_trains_kept_branches_and_survives_when_all_are_dropped():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
    torch.manual_seed(2)
    model = peft.get_peft_model(tiny_llama(), config).train()
    handle = dropbp.enable(model)
    for mask in [(True,) * 4, (True, True, True, False)]:
        with handle.fixed(mask):
            got = take_gradients(model, llama_loss(model))
        with_gradient = {name for name, gradient in got.items() if gradient is not None}
        assert all("layers.1.mlp" in name and "lora_" in name for name in with_gradient)
        assert bool(with_gradient) == (not all(mask))
    with handle.fixed((True,) * 4):
        output = model(input_ids=tokens())
        nn.functional.cross_entropy(output.logits.view(-1, VOCABULARY), tokens().view(-1)).backward()
    assert type(output).__name__ == "CausalLMOutputWithPast" and output.logits is output[0]
