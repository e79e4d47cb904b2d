"""The forward stays as it was, and the backward is that of the paper: `x + f(x).detach()`."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dropbp
from tests.common import reference
from tests.common.engine_models import (
    assert_same_gradients,
    gradients,
    llama_loss,
    masks,
    paper_gradients,
    plain_batch,
    plain_loss,
    plain_net,
    take_gradients,
    tiny_llama,
    tokens,
)


def test_forward_is_bit_identical_with_every_mask():
    model = tiny_llama()
    expected = model(input_ids=tokens()).logits
    with dropbp.enable(model) as handle:
        for mask in masks(4):
            with handle.fixed(mask):
                assert torch.equal(model(input_ids=tokens()).logits, expected), mask


def test_forward_with_dropout_draws_the_same_random_numbers():
    model = tiny_llama(attention_dropout=0.3)
    torch.manual_seed(3)
    expected = model(input_ids=tokens()).logits
    after = torch.get_rng_state()
    with dropbp.enable(model) as handle, handle.fixed((True, False, True, True)):
        torch.manual_seed(3)
        assert torch.equal(model(input_ids=tokens()).logits, expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_gradients_are_those_of_detached_branches_in_a_llama():
    plain, model = tiny_llama(), tiny_llama()
    with dropbp.enable(model) as handle:
        names = [branch.name for branch in handle.branches]
        for mask in masks(4):
            with handle.fixed(mask):
                got = take_gradients(model, llama_loss(model))
            assert_same_gradients(got, _without_dropped(handle, mask, paper_gradients(plain, names, mask, llama_loss)))


def test_gradients_are_those_of_detached_branches_in_a_users_model():
    plain, model = plain_net(blocks=2), plain_net(blocks=2)
    with dropbp.enable(model, example_inputs=plain_batch()) as handle:
        names = [branch.name for branch in handle.branches]
        assert names == ["blocks.0.mix", "blocks.0.mlp", "blocks.1.mix", "blocks.1.mlp"]
        for mask in masks(4):
            with handle.fixed(mask):
                got = take_gradients(model, plain_loss(model))
            assert_same_gradients(got, _without_dropped(handle, mask, paper_gradients(plain, names, mask, plain_loss)))


class Stemmed(nn.Module):
    """The reference's net behind a layer of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.stem, self.net = nn.Linear(8, 8), reference.ResidualNet(4, seed=seed)

    def forward(self, x_BD, mask=()):
        return self.net(self.stem(x_BD), mask)


@settings(max_examples=20)
@given(mask=st.lists(st.booleans(), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_equals_the_papers_formula_written_out(mask, seed):
    model = Stemmed(seed)
    twin = copy.deepcopy(model)
    x_BD = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    expected = twin(x_BD, mask)
    expected.square().sum().backward()
    with dropbp.enable(model, example_inputs=x_BD) as handle, handle.fixed(mask):
        output = model(x_BD)
        assert torch.equal(output, expected)
        output.square().sum().backward()
    assert_same_gradients(gradients(model), gradients(twin))


def test_gradient_to_the_input_passes_dropped_branches():
    model, x = plain_net(blocks=2), plain_batch().requires_grad_()
    with dropbp.enable(model, example_inputs=plain_batch()) as handle, handle.fixed([True] * 4):
        plain_loss(model, x).backward()
    expected = plain_batch().requires_grad_()
    model.head(model.norm(model.stem(expected) + _sum_of_branches(model, expected))).square().mean().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_enable_and_discover_and_draws_leave_global_random_states_alone():
    numpy = pytest.importorskip("numpy")
    random.seed(5)
    numpy.random.seed(5)
    torch.manual_seed(5)
    model = tiny_llama()
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    dropbp.discover(model)
    with dropbp.enable(model):
        for _ in range(3):
            llama_loss(model).backward()
    assert random.getstate() == before[0]
    assert numpy.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_parameters_of_a_dropped_branch_do_not_move_under_adamw():
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    with dropbp.enable(model) as handle, handle.fixed((True, False, False, False)):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        llama_loss(model).backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    still = {name for name in before if name not in moved}
    assert still == {name for name in before if name.startswith(("model.layers.0.self_attn", "model.layers.0.input_"))}


def test_a_loss_may_be_scaled_in_place_though_everything_is_dropped():
    """As transformers' Trainer does. With nothing trained but adapters, no gradient is left."""
    model = tiny_llama().requires_grad_(False)
    for layer in model.model.layers:
        layer.requires_grad_(True)
    with dropbp.enable(model) as handle, handle.fixed((True,) * 4):
        loss = llama_loss(model)
        loss *= 2
        loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_zeros_are_filled_in_for_all_that_a_step_skips():
    """The stem as well, in steps that freeze it."""
    model = tiny_llama()
    with dropbp.enable(model, rates=[1.0, 1.0, 0.0, 0.0], fill="zero"):
        llama_loss(model).backward()
    skipped = [p.grad for p in [*model.model.layers[0].parameters(), *model.model.embed_tokens.parameters()]]
    assert all(gradient is not None and not gradient.any() for gradient in skipped)
    assert all(p.grad is not None for p in model.parameters())


def _without_dropped(handle, mask, expected):
    """Detaching leaves the branch's norm without gradient too, None there as here."""
    own = [name for branch, dropped in zip(handle.branches, mask, strict=True) if dropped for name in branch.modules]
    for name in own:
        assert all(gradient is None for key, gradient in expected.items() if key.startswith(f"{name}."))
    return expected


def _sum_of_branches(model, x):
    with torch.no_grad():
        stream = start = model.stem(x)
        for block in model.blocks:
            stream = block(stream)
    return stream - start


# -- a branch whose last module returns its input


class Mixer(nn.Module):
    """Also returns the bias that all later mixers use, so that the whole module cannot run without recording."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Parameter(torch.randn(width, width) / 3)
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x_BSD, bias_D):
        bias_D = 2 * self.bias if bias_D is None else bias_D
        return (self.first(x_BSD) + bias_D).tanh() @ self.last, bias_D


class SharedBias(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(Mixer() for _ in range(3))
        self.dropout = nn.ModuleList(nn.Dropout(rate) for _ in range(3))
        self.head = nn.Linear(8, 8)

    def forward(self, x_BSD):
        bias_D = None
        for mixer, dropout in zip(self.mixers, self.dropout, strict=True):
            added_BSD, bias_D = mixer(x_BSD, bias_D)
            x_BSD = x_BSD + dropout(added_BSD)
        return self.head(x_BSD)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_branch_that_ends_in_dropout_is_dropped_whether_dropout_is_on_or_not(rate, training):
    torch.manual_seed(0)
    model = SharedBias(rate)
    plain = copy.deepcopy(model)
    handle = dropbp.enable(model, 0.5, masks="exact", stem="train", example_inputs=plain_batch())
    for module in (model, plain):
        module.dropout.train(training)

    def loss(module):
        torch.manual_seed(3)
        return plain_loss(module)

    assert [branch.name for branch in handle.branches] == [f"mixers.{i}" for i in range(3)]
    for mask in masks(3):
        with handle.fixed(mask):
            found = take_gradients(model, loss(model))
        ends = [f"dropout.{i}" for i in range(3)]
        assert_same_gradients(found, paper_gradients(plain, ends, mask, loss))
    handle.remove()
    assert_same_gradients(take_gradients(model, loss(model)), take_gradients(plain, loss(plain)))
