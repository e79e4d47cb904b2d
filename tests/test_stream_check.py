"""Parameters that come into the residual stream after `enable` have their plain gradient or none, and are named."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dropbp
from dropbp.engine.stream_check import StreamCheck
from tests.common.engine_models import (
    VOCABULARY,
    Block,
    assert_same_gradients,
    llama_loss,
    paper_gradients,
    plain_batch,
    plain_loss,
    plain_net,
    take_gradients,
    tiny_llama,
)

STEPS = 16


def with_gate_before_a_block(model: Any) -> None:
    block = model.blocks[1]
    block.gate = nn.Parameter(torch.ones(8))
    block.register_forward_pre_hook(lambda module, args: (args[0] * module.gate,))


def with_shift_behind_a_block(model: Any) -> None:
    block = model.blocks[0]
    block.shift = nn.Parameter(torch.zeros(8))
    block.register_forward_hook(lambda module, args, output: output + module.shift)


def with_parameter_of_the_root(model: Any) -> None:
    model.extra = nn.Parameter(torch.zeros(8))
    model.stem.register_forward_hook(lambda module, args, output: output + model.extra)


def with_block_appended(model: Any) -> None:
    torch.manual_seed(6)
    model.blocks.append(Block(8))


def with_stem_replaced(model: Any) -> None:
    torch.manual_seed(5)
    model.stem = nn.Linear(8, 8)


def with_stem_wrapped(model: Any) -> None:
    torch.manual_seed(5)
    model.stem = nn.Sequential(model.stem, nn.Linear(8, 8))


def with_norm_replaced(model: Any) -> None:
    model.norm = nn.RMSNorm(8)


def with_other_dtype_and_back(model: Any) -> None:
    model.double().float()


NAMED = {
    with_gate_before_a_block: "blocks.1.gate",
    with_shift_behind_a_block: "blocks.0.shift",
    with_parameter_of_the_root: "extra",
    with_block_appended: "blocks.3",
}
UNNAMED = [with_stem_replaced, with_stem_wrapped, with_norm_replaced, with_other_dtype_and_back]


def assert_exact_or_none(model: nn.Module, plain: nn.Module, loss: Callable[[nn.Module], Any]) -> set[str]:
    """Compare gradients over some steps; return the parameters that had one."""
    seen: set[str] = set()
    for _ in range(STEPS):
        got, expected = take_gradients(model, loss(model)), take_gradients(plain, loss(plain))
        for name, gradient in got.items():
            if gradient is not None:
                torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
                seen.add(name)
    return seen


@pytest.mark.parametrize("steps_before", [0, 1, 20])
@pytest.mark.parametrize("change", [*NAMED, *UNNAMED])
def test_what_comes_after_enabling_has_its_plain_gradient_or_none(change, steps_before, caplog):
    model = plain_net()
    plain = copy.deepcopy(model)
    dropbp.enable(model, 0.5, example_inputs=plain_batch())
    for _ in range(steps_before):
        plain_loss(model).backward()
    change(model)
    change(plain)
    assert_exact_or_none(model, plain, plain_loss)
    told = [message for message in caplog.messages if "came into the model after dropbp.enable" in message]
    if change in NAMED:
        assert len(told) == 1 and f"PlainNet: {NAMED[change]} came" in told[0] and "handle.remove()" in told[0]
    else:
        assert not told


def test_a_new_head_trains_in_every_step_and_is_not_told(caplog):
    model = plain_net()
    dropbp.enable(model, 0.5, example_inputs=plain_batch())
    model.head = nn.Sequential(model.head, nn.Linear(8, 8))
    for _ in range(STEPS):
        assert take_gradients(model, plain_loss(model))["head.1.weight"] is not None
    assert not any("came into" in message for message in caplog.messages)


@pytest.mark.parametrize("steps_before", [1, 20])
def test_weights_tied_after_enabling_have_their_plain_gradient_or_none(steps_before):
    model = tiny_llama(3)
    plain = copy.deepcopy(model)
    dropbp.enable(model, 0.5)
    for _ in range(steps_before):
        llama_loss(model).backward()
    for each in (model, plain):
        each.lm_head.weight = each.model.embed_tokens.weight
    assert_exact_or_none(model, plain, llama_loss)


def with_weights_of_two_layers_tied(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight


def with_other_weights_of_two_layers_tied(model: Any) -> None:
    model.model.layers[2].mlp.gate_proj.weight = model.model.layers[0].mlp.up_proj.weight


def with_the_head_tied_to_a_layer(model: Any) -> None:
    model.lm_head.weight = model.model.layers[1].mlp.up_proj.weight


TIED = {
    with_weights_of_two_layers_tied: "model.layers.1-2.mlp.up_proj.weight",
    with_other_weights_of_two_layers_tied: "model.layers.0.mlp.up_proj.weight",
    with_the_head_tied_to_a_layer: "lm_head",
}


@pytest.mark.parametrize("steps_before", [0, 20])
@pytest.mark.parametrize("tie", TIED)
def test_weights_of_branches_tied_after_enabling_have_their_plain_gradient_or_none(tie, steps_before, caplog):
    model = tiny_llama(3)
    plain = copy.deepcopy(model)
    dropbp.enable(model, 0.5)
    for _ in range(steps_before):
        llama_loss(model).backward()
    tie(model)
    tie(plain)
    assert_exact_or_none(model, plain, llama_loss)
    told = [message for message in caplog.messages if "share a parameter since dropbp.enable" in message]
    assert len(told) == 1 and TIED[tie] in told[0] and "handle.remove()" in told[0]


@pytest.mark.parametrize("tie", TIED)
def test_weights_tied_after_enabling_get_the_gradient_of_every_kept_branch(tie):
    """Under masks that name branches only."""
    model = tiny_llama(3)
    plain = copy.deepcopy(model)
    handle = dropbp.enable(model, 0.5, masks="exact")
    names = [branch.name for branch in handle.branches]
    tie(model)
    tie(plain)
    for _ in range(STEPS):
        got = take_gradients(model, llama_loss(model))
        assert_same_gradients(got, paper_gradients(plain, names, handle.mask, llama_loss))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_of_a_branch_replaced_after_enabling_counts_as_it_trains(frozen):
    model = plain_net()
    plain = copy.deepcopy(model)
    handle = dropbp.enable(model, 0.5, example_inputs=plain_batch())
    weights = handle.report()["branches"][3]["weight"]
    plain_loss(model).backward()
    linear = model.blocks[1].mlp[0]
    linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=not frozen)
    model.zero_grad()
    assert assert_exact_or_none(model, plain, plain_loss) >= {"blocks.2.mlp.2.weight"}
    assert (handle.report()["branches"][3]["weight"] < weights) == frozen


@pytest.mark.parametrize("change", [*NAMED, *UNNAMED])
def test_enabling_anew_trains_it_again(change):
    model = plain_net()
    handle = dropbp.enable(model, 0.5, example_inputs=plain_batch())
    change(model)
    handle.remove()
    plain = copy.deepcopy(model)
    dropbp.enable(model, 0.5, example_inputs=plain_batch())
    if change not in (with_gate_before_a_block, with_shift_behind_a_block, with_parameter_of_the_root):
        assert_exact_or_none(model, plain, plain_loss)  # a copied hook would use the first model's parameter
    else:
        plain_loss(model).backward()


def test_the_check_sees_changes_once_and_not_those_inside_branches():
    model = plain_net()
    check = StreamCheck(model, [model.blocks[0].mix])
    assert not check.changed()
    model.blocks[0].mix.append(nn.Identity())
    assert not check.changed()
    model.head.bias = None
    assert check.changed() and not check.changed()
    with torch.no_grad():
        values = {name: value.clone() for name, value in model.named_parameters()}
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(check.changed()))
    torch.func.functional_call(model, values, (plain_batch(),))
    assert seen == [False]


@pytest.mark.parametrize("steps_before", [0, 1])
def test_embeddings_resized_after_enabling_train(steps_before):
    """The graph of the recorded forward is gone: its nodes would expect the old shape."""
    model = tiny_llama(3)
    gc.collect()
    gc.disable()
    try:
        dropbp.enable(model, 0.5)
        for _ in range(steps_before):
            llama_loss(model).backward()
        model.resize_token_embeddings(VOCABULARY + 8)
        model.zero_grad()
        plain = tiny_llama(3)
        plain.resize_token_embeddings(VOCABULARY + 8)
        plain.load_state_dict(model.state_dict())
        assert_exact_or_none(model, plain, llama_loss)
    finally:
        gc.enable()
