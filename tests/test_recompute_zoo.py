"""Architectures whose blocks hold caches, states or statistics train under the default as they train without us."""

from __future__ import annotations

import copy

import pytest
import torch

import dropbp
from dropbp import inputs as example
from tests.common.engine_models import assert_same_gradients, gradients

pytest.importorskip("transformers")

RECOMPUTED = ("BertForMaskedLM", "ViTForImageClassification")
CACHES = (
    "LlamaForCausalLM", "T5ForConditionalGeneration", "WhisperForConditionalGeneration", "FalconH1ForCausalLM",
    "NemotronHForCausalLM", "Zamba2ForCausalLM", "RecurrentGemmaForCausalLM", "LEDForConditionalGeneration",
    "SeamlessM4TForTextToText", "GraniteMoeHybridForCausalLM", "Lfm3ForCausalLM", "PegasusXForConditionalGeneration",
)  # fmt: skip
REPEATED = ("AlbertForMaskedLM", "HrmTextForCausalLM")
STATISTICS = (
    "CvtForImageClassification", "LevitForImageClassification", "SwiftFormerForImageClassification", "IBertForMaskedLM",
)  # fmt: skip


def stepped(model, inputs, step):
    """Gradients and buffers after one training step, and the random state."""
    from tests.campaigns.zoo.check import _loss

    torch.manual_seed(step)
    model.zero_grad()
    _loss(model(*inputs.args, **{k: v for k, v in inputs.kwargs.items() if k != "use_cache"})).backward()
    buffers = {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return {**gradients(model), **buffers, "random state": torch.get_rng_state()}


@pytest.mark.parametrize("name", [*RECOMPUTED, *CACHES, *REPEATED, *STATISTICS])
def test_deepest_steps_of_the_default_are_plain_steps(name):
    from tests.campaigns.zoo import tiny

    case = tiny.case(name, "")
    plain = case.build().train()
    model = copy.deepcopy(plain)
    inputs = case.inputs(plain) or example.build(plain, 2, 16)
    handle = dropbp.enable(model, 0.9, example_inputs=None if case.inputs(plain) is None else dict(inputs.kwargs))
    for step in range(2):
        with handle.fixed((False,) * len(handle.branches)):
            got = stepped(model, inputs, step)
        assert_same_gradients(got, stepped(plain, inputs, step))
    assert bool(handle.report()["not_recomputed"]) == (name not in RECOMPUTED)
