"""What trains in a forward although no module of the model holds it has its plain gradient or none, and is told of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropbp
from tests.common.engine_models import (
    PlainNet,
    llama_loss,
    plain_batch,
    plain_loss,
    plain_net,
    take_gradients,
    tiny_llama,
)
from tests.test_stream_check import TIED, assert_exact_or_none

STEPS = 40
TOLD = "uses a parameter of shape (8,) that no module of it holds"
KINDS = [None, "non-reentrant", "reentrant"]


def steer(model: nn.Module, where: str, how: Callable[[Tensor], Tensor]) -> Any:
    return model.get_submodule(where).register_forward_hook(lambda module, args, output: how(output))


def gradient_of(parameter: Tensor, model: nn.Module, loss: Callable[[nn.Module], Any]) -> Tensor | None:
    parameter.grad = None
    take_gradients(model, loss(model))
    return parameter.grad


def assert_plain_or_none(parameter: Tensor, model: nn.Module, loss: Callable[[nn.Module], Any] = plain_loss) -> int:
    """Returns in how many of `STEPS` steps the parameter has a gradient."""
    model.eval()
    plain = gradient_of(parameter, model, loss)
    model.train()
    found = [gradient_of(parameter, model, loss) for _ in range(STEPS)]
    for gradient in found:
        if gradient is not None:
            torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-6)
    return sum(gradient is not None for gradient in found)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["stem", "blocks.0", "blocks.1", "blocks.1.mlp", "blocks.3", "norm"])
def test_a_parameter_of_a_hook_has_its_plain_gradient_or_none(where, kind, before, caplog):
    model = plain_net(blocks=4, kind=kind)
    vector = nn.Parameter(torch.randn(8))
    if before:
        steer(model, where, lambda x: x + vector)
    dropbp.enable(model, 0.5, example_inputs=plain_batch())
    for _ in range(3):
        plain_loss(model).backward()
    if not before:
        steer(model, where, lambda x: x + vector)
    trained = assert_plain_or_none(vector, model)
    told = [message for message in caplog.messages if TOLD in message]
    if where in ("blocks.3", "norm"):
        assert trained == STEPS and not told
    else:
        assert trained < STEPS
        assert len(told) == 1 and told[0].startswith("PlainNet") and "before dropbp.enable" in told[0]


@pytest.mark.parametrize("registered", [False, True])
def test_it_trains_in_the_steps_that_drop_no_branch_after_its_use(registered):
    """As a parameter that the model holds does."""
    model = plain_net(blocks=4)
    vector = nn.Parameter(torch.randn(8))
    steer(model, "blocks.1", lambda x: x + vector)
    if registered:
        model.blocks[1].vector = vector
    handle = dropbp.enable(model, 0.5, example_inputs=plain_batch())
    for _ in range(STEPS):
        found = gradient_of(vector, model, plain_loss) is not None
        assert found == (not any(handle.mask[4:]))


def test_so_does_one_that_comes_into_the_model_after_enabling():
    model = plain_net(blocks=4)
    handle = dropbp.enable(model, 0.5, example_inputs=plain_batch())
    model.extra = nn.Parameter(torch.randn(8))
    steer(model, "blocks.1", lambda x: x + model.extra)
    for _ in range(STEPS):
        found = gradient_of(model.extra, model, plain_loss) is not None
        assert found == (not any(handle.mask[4:]))


def test_a_layer_that_no_module_holds_has_its_plain_gradient_or_none(caplog):
    class Hidden(PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [nn.Linear(8, 8)]

        def _run(self, block: nn.Module, x_BSD: Tensor) -> Tensor:
            return super()._run(block, self.hidden[0](x_BSD) if block is self.blocks[1] else x_BSD)

    model = Hidden().train()
    dropbp.enable(model, 0.5, example_inputs=plain_batch())
    assert assert_plain_or_none(model.hidden[0].weight, model) < STEPS
    assert sum("that no module of it holds" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("computed", ["in the hook", "before the forward"])
def test_another_model_whose_output_is_added_has_its_plain_gradient_or_none(computed, caplog):
    model, control = plain_net(), nn.Linear(8, 8)
    outputs: list[Tensor] = []
    steer(model, "blocks.0", lambda x: x + (outputs[0] if outputs else control(plain_batch(5))))
    dropbp.enable(model, 0.5, example_inputs=plain_batch())

    def loss(model: nn.Module) -> Tensor:
        outputs[:] = [control(plain_batch(5))] if computed == "before the forward" else []
        return plain_loss(model)

    assert assert_plain_or_none(control.weight, model, loss) < STEPS
    told = [message for message in caplog.messages if "its forward uses" in message]
    assert len(told) == 1 and ("computed before it" in told[0]) == (computed == "before the forward")


def test_a_plain_tensor_of_a_hook_has_its_plain_gradient_or_none(caplog):
    model = plain_net()
    vector = torch.randn(8, requires_grad=True)
    steer(model, "blocks.0", lambda x: x + vector)
    dropbp.enable(model, 0.5, example_inputs=plain_batch())
    assert assert_plain_or_none(vector, model) < STEPS
    assert sum("uses a tensor of shape (8,)" in message for message in caplog.messages) == 1


def test_what_begins_to_be_used_later_is_found(caplog):
    model = plain_net()
    vector = nn.Parameter(torch.randn(8))
    steering: list[int] = []
    steer(model, "blocks.0", lambda x: x + vector if steering else x)
    dropbp.enable(model, 0.5, example_inputs=plain_batch())
    for _ in range(STEPS):
        plain_loss(model).backward()
    steering.append(1)
    for _ in range(2 * STEPS):
        plain_loss(model).backward()
    assert_plain_or_none(vector, model)
    assert sum(TOLD in message for message in caplog.messages) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_inputs_marked_for_checkpointing_are_nothing_foreign(reentrant, caplog):
    model = tiny_llama(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    plain = copy.deepcopy(model)
    handle = dropbp.enable(model, 0.5)
    assert_exact_or_none(model, plain, llama_loss)
    assert not any("its forward uses" in message for message in caplog.messages)
    assert not handle.engine._stray.found


@pytest.mark.parametrize("tie", TIED)
def test_weights_tied_after_enabling_have_their_plain_gradient_or_none_under_reentrant_checkpoints(tie):
    model = tiny_llama(3)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    plain = copy.deepcopy(model)
    dropbp.enable(model, 0.5)
    for _ in range(3):
        llama_loss(model).backward()
    tie(model)
    tie(plain)
    assert_exact_or_none(model, plain, llama_loss)
