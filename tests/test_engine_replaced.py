"""What takes a branch's place after `enable` is refused by name; what only passes calls on is let be."""

from __future__ import annotations

import functools
import types

import peft
import pytest
import torch
from torch import nn

import dropbp
from tests.common.engine_models import (
    assert_same_gradients,
    detached,
    llama_loss,
    plain_batch,
    plain_loss,
    plain_net,
    take_gradients,
    tiny_llama,
)

DROPPED = [True, False, True, False]
MLP = "model.layers.1.mlp"


class Around(nn.Module):
    """Passes calls on, and can have a parameter of its own."""

    def __init__(self, inner: nn.Module, parameters: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.gate = nn.Parameter(torch.ones(())) if parameters else None

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        return output if self.gate is None else output * self.gate


def enabled(**options):
    model = tiny_llama()
    return model, dropbp.enable(model, **options)


def put(model, name, new):
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, new)


def assert_refused(model, *words):
    with pytest.raises(dropbp.StateError) as error:
        llama_loss(model)
    for word in (*words, "after dropbp.enable", "handle.remove(), then dropbp.enable(model, ...)"):
        assert word in str(error.value)


def assert_drops(model, handle):
    """Gradients are those of branches that are detached."""
    names = [branch.name for branch, dropped in zip(handle.branches, DROPPED, strict=True) if dropped]
    plain = tiny_llama()
    with detached(plain, names):
        expected = take_gradients(plain, llama_loss(plain))
    with handle.fixed(DROPPED):
        got = take_gradients(model, llama_loss(model))
    assert_same_gradients({name.replace(".inner.", "."): gradient for name, gradient in got.items()}, expected)


@pytest.mark.parametrize("steps_before", [0, 3, 70])
def test_a_module_put_in_a_branchs_place_is_refused_in_the_next_forward(steps_before):
    model, _ = enabled()
    for _ in range(steps_before):
        llama_loss(model).backward()
    put(model, MLP, tiny_llama().model.layers[1].mlp)
    assert_refused(model, MLP, "was replaced", "LlamaMLP by LlamaMLP")


def test_a_block_put_in_anothers_place_is_refused():
    model, _ = enabled()
    model.model.layers[1] = tiny_llama().model.layers[1]
    assert_refused(model, "model.layers.1 in LlamaForCausalLM was replaced", "model.layers.1.self_attn")


def test_a_block_taken_out_is_refused():
    model, _ = enabled()
    del model.model.layers[1]
    assert_refused(model, "model.layers.1", "was taken out")


def test_blocks_that_changed_places_are_refused():
    model, _ = enabled()
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    assert_refused(model, "model.layers.0", "was replaced")


def test_an_adapter_put_around_a_branch_is_refused_and_accepted_after_enabling_anew():
    model = tiny_llama(num_key_value_heads=2)
    handle = dropbp.enable(model)
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert_refused(adapted, "self_attn", "was wrapped", "AdaptedAttention", "trains parameters of its own")
    handle.remove()
    with dropbp.enable(adapted):
        llama_loss(adapted).backward()


def test_an_adapter_in_the_place_of_a_branch_that_is_one_layer_is_refused():
    model = plain_net()
    for block in model.blocks:
        block.mix, block.mlp = nn.Linear(8, 8), nn.Linear(8, 8)
    dropbp.enable(model, example_inputs=plain_batch())
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["mlp"]), model)
    with pytest.raises(dropbp.StateError, match=r"blocks\.0\.mlp in PlainNet was wrapped .* by Linear, which trains"):
        plain_loss(model)


def test_adapters_inside_of_branches_are_let_be():
    model, handle = enabled()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up_proj", "q_proj"]), model)
    with handle.fixed([True] * 4):
        llama_loss(model).backward()
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" in name)


def test_a_forward_that_replaces_ours_is_refused():
    model, _ = enabled()
    mlp = model.get_submodule(MLP)
    mlp.forward = types.MethodType(type(mlp).forward, mlp)
    assert_refused(model, f"The forward of {MLP}", "LlamaMLP.forward")


def with_partial(forward):
    return functools.partial(lambda inner, *args, **kwargs: inner(*args, **kwargs), forward)


def with_closure(forward):
    def outer(*args, **kwargs):
        return forward(*args, **kwargs)

    return outer


@pytest.mark.parametrize("wrap", [with_partial, with_closure])
def test_a_forward_that_calls_ours_is_let_be_and_may_go_again(wrap):
    model, handle = enabled()
    mlp = model.get_submodule("model.layers.1.self_attn")
    ours = mlp.forward
    mlp.forward = wrap(ours)
    assert_drops(model, handle)
    mlp.forward = ours
    assert_drops(model, handle)


def test_hooks_of_accelerate_are_let_be_and_may_go_again():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, handle = enabled()
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn, ModelHook())
    assert_drops(model, handle)
    for layer in model.model.layers:
        remove_hook_from_module(layer.self_attn)
    assert_drops(model, handle)


def test_wrappers_without_parameters_are_let_be_and_may_go_again():
    model, handle = enabled()
    mlp, block = model.get_submodule(MLP), model.model.layers[0]
    put(model, MLP, Around(mlp))
    assert_drops(model, handle)
    model.model.layers[0].self_attn = Around(block.self_attn)
    assert_drops(model, handle)
    put(model, MLP, mlp)
    assert_drops(model, handle)


def test_a_wrapper_with_a_parameter_is_refused():
    model, _ = enabled()
    put(model, MLP, Around(model.get_submodule(MLP), parameters=True))
    assert_refused(model, MLP, "was wrapped", "Around, which trains parameters of its own")


def test_evaluation_and_the_handles_own_end_are_not_hindered():
    model, handle = enabled()
    put(model, MLP, tiny_llama().model.layers[1].mlp)
    model.eval()
    llama_loss(model)
    handle.remove()
    llama_loss(model.train()).backward()
