"""Per-sample gradients of opacus, which asks for one of every parameter: refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import dropbp
from tests.common.engine_models import plain_batch, plain_loss, plain_net


def collect_per_sample_gradients(model: nn.Module) -> list[Any]:
    """As opacus' GradSampleModule begins to."""
    for parameter in model.parameters():
        parameter.grad_sample = None  # type: ignore[attr-defined]
    return [module.register_forward_hook(lambda *_: None) for module in model.modules() if not list(module.children())]


def test_a_model_with_per_sample_gradients_is_refused():
    model = plain_net()
    collect_per_sample_gradients(model)
    with pytest.raises(dropbp.StateError, match=r"opacus collects a gradient of each row.*to_standard_module"):
        dropbp.enable(model, 0.5, example_inputs=plain_batch())
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("steps_before", [0, 3])
def test_per_sample_gradients_after_enabling_are_refused(steps_before):
    model = plain_net()
    handle = dropbp.enable(model, 0.5, example_inputs=plain_batch())
    for _ in range(steps_before):
        plain_loss(model).backward()
    hooks = collect_per_sample_gradients(model)
    with pytest.raises(dropbp.StateError, match=r"opacus.*handle\.remove\(\)"):
        plain_loss(model)
    for parameter in model.parameters():
        del parameter.grad_sample
    for hook in hooks:
        hook.remove()
    plain_loss(model).backward()
    assert handle.report()["forwards"] == steps_before + 1
