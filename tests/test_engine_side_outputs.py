"""Outputs asked for in a call: whatever a loss is made of, each step's gradient is that of `x + f(x).detach()`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropbp
from dropbp.errors import StateError
from tests.campaigns.zoo.tiny import case
from tests.common.engine_models import VOCABULARY, detached, gradients, tiny_llama, tokens

LAYERS = 3
LOSSES = ("loss", "router_logits", "attentions", "hidden_states", "all_hidden_states")


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return MixtralForCausalLM(config).train()


def llama() -> Any:
    return tiny_llama(LAYERS, attn_implementation="eager")


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    return BertForMaskedLM(config).train()


def decoder_ends() -> list[str]:
    return [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in ("self_attn", "mlp")]


def bert_ends() -> list[str]:
    return [f"bert.encoder.layer.{i}.{part}.dense" for i in range(LAYERS) for part in ("attention.output", "output")]


MODELS = {"mixtral": (mixtral, decoder_ends()), "llama": (llama, decoder_ends()), "bert": (bert, bert_ends())}


def flags_of(name: str, chosen: random.Random) -> dict[str, bool]:
    known = ["output_attentions", "output_hidden_states"] + ["output_router_logits"] * (name == "mixtral")
    return {flag: chosen.random() < 0.7 for flag in known if chosen.random() < 0.8}


def loss_of(outputs: Any, parts: Sequence[str], depth: int) -> Tensor:
    total = outputs.loss if "loss" in parts else 0.0
    for key in ("router_logits", "attentions"):
        if key in parts and outputs.get(key) is not None:
            total = total + sum(t.square().mean() for t in outputs[key])
    states = outputs.get("hidden_states")
    if states is not None and "hidden_states" in parts:
        total = total + states[depth].square().mean()
    if states is not None and "all_hidden_states" in parts:
        total = total + sum(t.square().mean() for t in states)
    return total if isinstance(total, Tensor) else outputs.loss


def step(model: nn.Module, flags: dict[str, bool], parts: Sequence[str], depth: int) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss_of(model(input_ids=tokens(), labels=tokens(), **flags), parts, depth).backward()
    return gradients(model)


def same(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """None and zero are the same gradient for what is asked here."""
    for name, gradient in expected.items():
        one, other = (torch.zeros(()) if g is None else g for g in (got[name], gradient))
        torch.testing.assert_close(
            one.expand_as(other) if other.dim() else one, other.expand_as(one), rtol=1e-4, atol=1e-7, msg=name
        )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(2))
def test_any_flags_any_loss_any_mask_give_the_gradient_of_detached_branches(name: str, seed: int) -> None:
    """Masks come again, so that forwards that are observed and those that follow are both compared."""
    make, ends = MODELS[name]
    chosen = random.Random(f"{name} {seed}")
    plain, model = make(), make()
    handle = dropbp.enable(model, 0.5, masks="exact")
    assert len(handle.branches) == len(ends)
    kinds = [(flags_of(name, chosen), chosen.sample(LOSSES, 2), chosen.randrange(LAYERS + 1)) for _ in range(3)]
    few = [[chosen.random() < 0.6 for _ in ends] for _ in range(3)]
    for (flags, parts, depth), mask in [*itertools.product(kinds, few)] * 2:
        with detached(plain, [end for end, dropped in zip(ends, mask, strict=True) if dropped]):
            expected = step(plain, flags, parts, depth)
        with handle.fixed(mask):
            same(step(model, flags, parts, depth), expected)


def test_router_scores_asked_for_by_a_setting_after_enabling_train_the_router() -> None:
    plain, model = mixtral(), mixtral()
    handle = dropbp.enable(model, 0.5, masks="exact")
    mask = [i == 1 for i in range(2 * LAYERS)]
    with handle.fixed(mask), detached(plain, ["model.layers.0.mlp"]):
        same(step(model, {}, ["loss"], 0), step(plain, {}, ["loss"], 0))
        plain.config.output_router_logits = model.config.output_router_logits = True
        for _ in range(2):
            got = step(model, {}, ["loss"], 0)
            same(got, step(plain, {}, ["loss"], 0))
            assert got["model.layers.0.mlp.gate.weight"].abs().max() > 0


@pytest.mark.parametrize("asked", ["example", "setting"])
def test_outputs_asked_for_when_enabling_are_trained_likewise(asked: str) -> None:
    plain, model = mixtral(), mixtral()
    plain.config.output_router_logits = model.config.output_router_logits = asked == "setting"
    example = {"input_ids": tokens(), "output_router_logits": True} if asked == "example" else None
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=example)
    assert len(handle.branches) == 2 * LAYERS
    flags = {"output_router_logits": True}
    with handle.fixed([i == 3 for i in range(2 * LAYERS)]), detached(plain, ["model.layers.1.mlp"]):
        for _ in range(2):
            same(step(model, flags, ["loss"], 0), step(plain, flags, ["loss"], 0))


@pytest.mark.parametrize("rate", [0.5, 0.875])
@pytest.mark.parametrize("when", ["call", "setting before", "setting after"])
def test_a_loss_of_inner_states_runs_backward_in_every_step(rate: float, when: str) -> None:
    model = llama()
    model.config.output_hidden_states = when == "setting before"
    handle = dropbp.enable(model, rate, steps=20)
    model.config.output_hidden_states = when != "call"
    for _ in range(20):
        outputs = model(input_ids=tokens(), **({"output_hidden_states": True} if when == "call" else {}))
        outputs.hidden_states[1].square().mean().backward()
    assert handle.report()["realised_drop_rate"] > 0


class Scored(nn.Module):
    """A branch with a score of its own, which the root returns, adds to its loss, or leaves on the module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.gate, self.body = nn.LayerNorm(width), nn.Linear(width, 4), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x_BSD: Tensor) -> Tensor:
        scores = self.gate(self.norm(x_BSD))
        self.penalty = scores.square().mean()
        return self.dropout(self.body(self.norm(x_BSD)) * scores.softmax(-1)[..., :1])


class OwnNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(width, width), nn.Linear(width, width)
        self.layers = nn.ModuleList(Scored(width) for _ in range(4))
        self.extra: str | None = None

    def forward(self, x_BSD: Tensor, target_BSD: Tensor | None = None) -> Any:
        x_BSD, added = self.stem(x_BSD), []
        for layer in self.layers:
            added.append(layer(x_BSD))
            x_BSD = x_BSD + added[-1]
        penalty = sum(layer.penalty for layer in self.layers)
        if self.extra != "held":
            for layer in self.layers:
                del layer.penalty
        y = self.head(x_BSD)
        if self.extra == "added":
            return y, torch.stack([a.mean() for a in added])
        if target_BSD is not None:
            return (y - target_BSD).square().mean() + penalty
        return (y, penalty) if self.extra == "score" else y


def own_pair(extra: str | None = None) -> tuple[OwnNet, OwnNet]:
    nets = []
    for _ in range(2):
        torch.manual_seed(3)
        nets.append(OwnNet().train())
        nets[-1].extra = extra
    return nets[0], nets[1]


def own_loss(net: OwnNet, target: bool = False) -> Tensor:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(11)  # of the dropout
    out = net(x, x) if target else net(x)
    total = sum(part.square().mean() for part in out) if isinstance(out, tuple) else out.square().mean()
    return total + (sum(layer.penalty for layer in net.layers) if net.extra == "held" else 0)


@pytest.mark.parametrize("way", ["score", "held", "held before", "target"])
def test_a_score_inside_a_branch_trains_its_gate_whichever_way_it_comes_out(way: str) -> None:
    plain, model = own_pair("held" if way == "held before" else None)
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=torch.randn(1, 3, 8))
    plain.extra = model.extra = {"score": "score", "target": None}.get(way, "held")
    for mask in [(True, False, True, False), (True, True, True, False)] * 2:
        ends = [f"layers.{i}" for i, dropped in enumerate(mask) if dropped]
        plain.zero_grad(), model.zero_grad()
        with detached(plain, ends), handle.fixed(mask):
            expected, loss = own_loss(plain, way == "target"), own_loss(model, way == "target")
        assert torch.equal(expected, loss)
        expected.backward(), loss.backward()
        same(gradients(model), gradients(plain))
        assert model.layers[0].gate.weight.grad.abs().max() > 0


def test_an_output_of_what_a_branch_adds_to_the_stream_is_refused_by_name() -> None:
    _, model = own_pair()
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=torch.randn(1, 3, 8))
    model.extra = "added"
    with handle.fixed([False, True, False, False]), pytest.raises(StateError, match=r"layers\.1.*branches=\[") as error:
        own_loss(model)
    assert str(error.value).startswith("The output 1 depends on")


def test_the_states_of_an_encoder_that_a_query_reads_may_be_asked_for() -> None:
    """The branch that reads holds the whole encoder, so the encoder, too, may run without recording."""
    model = case("PerceiverForSequenceClassification", "classification").build().train()
    handle = dropbp.enable(model, 0.5, masks="exact")
    with handle.fixed([i % 2 == 0 for i in range(len(handle.branches))]):
        for _ in range(2):
            outputs = model(tokens(), output_hidden_states=True)
            sum(state.square().mean() for state in outputs.hidden_states).backward()
    cross = model.perceiver.encoder.cross_attention
    assert cross.attention.output.dense.weight.grad is None and cross.mlp.dense1.weight.grad.any()


def test_branches_no_output_leads_to_run_without_recording_from_the_second_forward_on() -> None:
    model = llama()
    recorded: list[bool] = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    inner = model.model.layers[1].mlp.act_fn
    inner.register_forward_pre_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    handle = dropbp.enable(model, 0.5, masks="exact")
    recorded.clear()
    with handle.fixed([i == 3 for i in range(2 * LAYERS)]):
        for _ in range(3):
            step(model, {"output_hidden_states": True}, ["loss"], 1)
    assert recorded[1::2] == [True, False, False]


def test_an_ordinary_call_is_not_observed() -> None:
    model = llama()
    recorded: list[bool] = []
    model.model.layers[1].mlp.act_fn.register_forward_pre_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    handle = dropbp.enable(model, 0.5, masks="exact")
    recorded.clear()
    with handle.fixed([i == 3 for i in range(2 * LAYERS)]):
        model(tokens(), attention_mask=torch.ones_like(tokens()), labels=tokens(), use_cache=False, return_dict=True)
    assert recorded == [False]
