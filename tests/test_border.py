"""Below the lowest kept branch nothing gets the gradient of the bare stream: it gets all of its own, or none."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dropbp
from dropbp import inputs as example
from dropbp.engine.trained import _warn_once, abbreviated
from dropbp.masks.rates import PROFILES, average_over_parallel, depth_rates
from tests.common.engine_models import take_gradients
from tests.promise import assert_equal, assert_exact_or_none, loss_of
from tests.test_discovery import REPRESENTATIVE, tiny

# Shapes: B batch, S tokens, D width, V vocabulary.

WIDTH, VOCABULARY = 8, 16


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a small model has below its border."""

    blocks: int = 2
    order: str = "pre"  # pre, post, parallel
    class_token: bool = False
    positions: bool = False
    projector: bool = False
    bias: bool = False  # one for all blocks
    tied: bool = False
    skip: bool = False  # from the embedding to the head
    looped: bool = False  # one block for all


class Block(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.norm1 = nn.LayerNorm(WIDTH)
        if order != "parallel":
            self.norm2 = nn.LayerNorm(WIDTH)
        self.mix = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x_BSD: Tensor, bias_D: Tensor | float) -> Tensor:
        if self.order == "parallel":
            y_BSD = self.norm1(x_BSD)
            return x_BSD + self.mix(y_BSD + bias_D) + self.mlp(y_BSD)
        if self.order == "post":
            x_BSD = self.norm1(x_BSD + self.mix(x_BSD + bias_D))
            return self.norm2(x_BSD + self.mlp(x_BSD))
        x_BSD = x_BSD + self.mix(self.norm1(x_BSD) + bias_D)
        return x_BSD + self.mlp(self.norm2(x_BSD))


class Net(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(kind.order) for _ in range(1 if kind.looped else kind.blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if kind.tied:
            self.head.weight = self.embed.weight
        if kind.class_token:
            self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        if kind.positions:
            self.positions = nn.Parameter(torch.randn(32, WIDTH))
        if kind.projector:
            self.tower, self.projector = nn.Linear(4, 4), nn.Linear(4, WIDTH)
        if kind.bias:
            self.bias = nn.Linear(3, WIDTH)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSD = first_BSD = self.embed(ids_BS)
        if self.kind.class_token:
            x_BSD = torch.cat([self.class_token.expand(len(ids_BS), -1, -1), x_BSD], 1)
        if self.kind.projector:
            image_B14 = torch.linspace(-1, 1, 4).expand(len(ids_BS), 1, 4)
            x_BSD = torch.cat([self.projector(self.tower(image_B14).tanh()), x_BSD], 1)
        if self.kind.positions:
            x_BSD = x_BSD + self.positions[: x_BSD.shape[1]]
        bias_D = self.bias(torch.ones(3)) if self.kind.bias else 0.0
        for i in range(self.kind.blocks):
            x_BSD = self.blocks[0 if self.kind.looped else i](x_BSD, bias_D)
        if self.kind.skip:
            x_BSD = x_BSD[:, -first_BSD.shape[1] :] + first_BSD.tanh()
        return self.head(self.norm(x_BSD))


def net(**kind: Any) -> Net:
    torch.manual_seed(3)
    return Net(Kind(**kind)).train()


def ids(seed: int = 4) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, seed: int = 4) -> Tensor:
    return loss_of(model(ids(seed)))


KINDS = st.builds(
    Kind,
    blocks=st.integers(1, 3),
    order=st.sampled_from(["pre", "post", "parallel"]),
    **dict.fromkeys(["class_token", "positions", "projector", "bias", "tied", "skip"], st.booleans()),
)


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(KINDS)
def test_every_gradient_equals_that_of_plain_training_or_is_none(kind: Kind) -> None:
    model = net(**dataclasses.asdict(kind))
    handle = dropbp.enable(model, example_inputs=ids(), stem="rest", max_activations=None)
    counts = assert_exact_or_none(handle, model, loss)
    assert min(counts.values()) == 1  # what is lowest trains where nothing is dropped, what is highest always
    assert counts["norm.weight"] == max(counts.values())


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_representative_architectures(name: str) -> None:
    model = tiny(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = example.build(model, 2, 16)
    handle = dropbp.enable(model, stem="rest", max_activations=None)

    def step(model: nn.Module) -> Tensor:
        torch.manual_seed(1)
        return loss_of(model(*inputs.args, **inputs.kwargs))

    counts = assert_exact_or_none(handle, model, step)
    assert all(
        counts[name] for name in handle.engine.structure.parameters if name not in handle.engine.structure.stem.unused
    )


def test_a_tied_embedding_is_frozen_as_the_head_too() -> None:
    model = net(tied=True)
    handle = dropbp.enable(model, example_inputs=ids(), stem="rest")
    counts = assert_exact_or_none(handle, model, loss)
    assert counts["embed.weight"] == 1
    assert handle.report()["at_rest"]["embed.weight"] == 1 - handle.rates[0]


def test_a_block_applied_repeatedly_gets_its_full_gradient_and_nothing_is_saved(caplog: Any) -> None:
    model = net(looped=True, blocks=4, positions=True)
    handle = dropbp.enable(model, example_inputs=ids(), steps=8, max_activations=None)
    assert "the gradient of positions, embed.weight, blocks.0 flows through every branch" in caplog.text
    counts = run(handle, model, 8)
    assert set(counts.values()) == {8} and handle.report()["realised_drop_rate"] == 0
    handle.remove()
    handle = dropbp.enable(model, example_inputs=ids(), stem="rest", max_activations=None)
    counts = assert_exact_or_none(handle, model, loss)
    assert counts["blocks.0.mix.0.weight"] == counts["positions"] == 1


# -- parallel branches


@pytest.mark.parametrize("name", ["GPTJForCausalLM", "FalconForCausalLM", "CohereForCausalLM", "GPTNeoXForCausalLM"])
@pytest.mark.parametrize("options", [{}, {"steps": 40}, {"rates": [0.9, 0.8, 0.5, 0.5, 0.2, 0.1]}])
def test_parallel_branches_are_dropped_together(name: str, options: dict[str, Any]) -> None:
    handle = dropbp.enable(tiny(name), **options)
    for draw in range(40):
        mask = handle.schedule.at_draw_shape.sampler.draw(draw)
        assert mask[::2] == mask[1::2]
    share = sum(b.rate * b.flops for b in handle.branches) / sum(b.flops for b in handle.branches)
    assert share == pytest.approx(0.5, abs=0.01)


@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=12),
    st.floats(0.05, 0.9),
    st.sampled_from(sorted(PROFILES)),
    st.data(),
)
def test_branches_dropped_together_have_one_rate_and_meet_the_budget(
    flops: list[float], drop_rate: float, profile: str, data: Any
) -> None:
    cuts = data.draw(st.lists(st.integers(1, 3), min_size=len(flops), max_size=len(flops)))
    runs, start = [], 0
    while start < len(flops):
        size = min(cuts[start], len(flops) - start)
        runs.append(range(start, start + size))
        start += size
    parallel = [sum(1 << i for i in run) for run in runs if len(run) > 1]
    rates = depth_rates(flops, drop_rate, profile, 1.0, parallel)
    assert all(rates[run[0]] == rates[i] for run in runs for i in run)
    assert list(rates) == sorted(rates, reverse=True)
    assert sum(f * r for f, r in zip(flops, rates, strict=True)) == pytest.approx(drop_rate * sum(flops))
    assert average_over_parallel(rates, flops, parallel) == rates


def test_rates_that_differ_among_parallel_branches_become_their_mean() -> None:
    assert average_over_parallel([0.9, 0.3, 0.2], [1.0, 2.0, 1.0], [0b11]) == pytest.approx((0.5, 0.5, 0.2))


# -- what enable says and chooses


def run(handle: Any, model: nn.Module, steps: int, loss: Any = loss) -> dict[str, int]:
    """In how many steps of drawn masks each parameter had a gradient; each was exact, or of a part of the uses."""
    with handle.fixed([False] * len(handle.branches)):
        plain = take_gradients(model, loss(model))
    counts = dict.fromkeys(plain, 0)
    for _ in range(steps):
        for name, gradient in take_gradients(model, loss(model)).items():
            if gradient is not None:
                assert_equal(name, handle.mask, gradient, plain)
            counts[name] += gradient is not None
    return counts


def only(model: Net, *parts: str) -> Net:
    """Frozen but for the parameters whose names hold one of these."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    return model


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(KINDS, st.sampled_from([0.3, 0.5, 0.8]), st.booleans())
def test_a_run_trains_every_trained_parameter_or_names_it(kind: Kind, drop_rate: float, annealed: bool) -> None:
    model = net(**dataclasses.asdict(kind))
    options = {"steps": 24} if annealed else {}
    handle = dropbp.enable(model, drop_rate, example_inputs=ids(), max_activations=None, **options)
    counts = run(handle, model, 24)
    report = handle.report()
    assert {name for name, count in counts.items() if not count} >= set(report["never_trained"])
    rare = {name for name, share in handle.engine.trained.shares(handle.rates).items() if share < 2 / 24}
    assert {name for name, count in counts.items() if not count} <= rare


@pytest.mark.parametrize("steps", [3, 7, 16, 40, 90])
@pytest.mark.parametrize("rates", ["auto", "uniform", "decreasing"])
def test_a_run_of_known_length_names_exactly_the_parameters_that_never_train(steps: int, rates: Any) -> None:
    model = net(blocks=12)
    rates = rates if rates != "decreasing" else [1 - (i + 1) / 80 for i in range(24)]
    handle = dropbp.enable(model, 0.5, example_inputs=ids(), max_activations=None, rates=rates, steps=steps)
    counts = run(handle, model, steps)
    idle, report = {name for name, count in counts.items() if not count}, handle.report()
    assert idle <= {*report["never_trained"], *report["seldom_trained"]}
    assert idle >= set(report["never_trained"])
    assert all(counts[name] <= 2 + steps // 50 for name in report["seldom_trained"])


def test_full_fine_tuning_names_what_no_step_reaches(caplog: Any) -> None:
    handle = dropbp.enable(net(blocks=6), example_inputs=ids(), steps=50)
    said = "no step of this run trains embed.weight, blocks.0, blocks.1.norm1, blocks.1.mix. The backward"
    assert [r.message for r in caplog.records if said in r.message]
    assert said in handle.summary()
    assert {"embed.weight", "blocks.0.mix.0.weight"} <= set(handle.report()["never_trained"])


@pytest.mark.parametrize(
    ("chosen", "steps", "drop_rate"),
    [("class_token", None, 0.5), ("class_token", 64, 0.875), ("projector", 64, 0.5), ("embed", 64, 0.5)],
)
def test_what_is_trained_below_beside_little_else_gets_whole_steps(
    chosen: str, steps: int | None, drop_rate: float, caplog: Any
) -> None:
    model = only(net(blocks=10, class_token=True, projector=True), "mix.2", "mlp.2", chosen)
    handle = dropbp.enable(model, drop_rate, example_inputs=ids(), steps=steps)
    counts = run(handle, model, 64)
    below = next(name for name in counts if chosen in name)
    assert counts[below] == pytest.approx(64 * (1 - drop_rate) / 2, abs=2)
    assert handle.report()["realised_drop_rate"] * 65 / 64 == pytest.approx(drop_rate, abs=0.03)
    assert [r for r in caplog.records if f"of the steps train {below}" in r.message or f"train {chosen}" in r.message]


@pytest.mark.parametrize("chosen", ["class_token", "projector", "positions", "embed"])
@pytest.mark.parametrize("order", ["pre", "post", "parallel"])
@pytest.mark.parametrize("tied", [False, True])
def test_if_nothing_else_trains_nothing_is_dropped_and_a_warning_says_so(
    chosen: str, order: str, tied: bool, caplog: Any
) -> None:
    model = only(net(order=order, class_token=True, projector=True, positions=True, tied=tied), chosen)
    handle = dropbp.enable(model, example_inputs=ids(), steps=4)
    assert f"the gradient of {chosen}" in caplog.text and "masks='exact'" in caplog.text
    counts = run(handle, model, 4)
    assert {count for name, count in counts.items() if chosen in name} == {4}
    assert handle.report()["realised_drop_rate"] == 0 and handle.report()["at_rest"]


# -- inputs


class Takes(nn.Module):
    """The stream is the input itself; a tower is used when there is something to see."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block("pre") for _ in range(3))
        self.tower = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BSD: Tensor, seen_BSD: Tensor | None = None) -> Tensor:
        x_BSD = x_BSD if seen_BSD is None else x_BSD + self.tower(seen_BSD)
        for block in self.blocks:
            x_BSD = block(x_BSD, 0.0)
        return x_BSD


def stream(requires_grad: bool = False) -> Tensor:
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(5)).requires_grad_(requires_grad)


def input_gradient(model: nn.Module) -> Tensor:
    x_BSD = stream(requires_grad=True)
    return torch.autograd.grad(loss_of(model(x_BSD)), x_BSD)[0]


def test_an_input_that_requires_a_gradient_gets_its_exact_one(caplog: Any) -> None:
    model = Takes().train()
    handle = dropbp.enable(model, example_inputs=stream())
    with handle.fixed([False] * 6):
        expected = input_gradient(model)
    for _ in range(6):
        assert torch.equal(input_gradient(model), expected)
        assert handle.mask == (False,) * 6
    assert len([r for r in caplog.records if "An input of Takes requires a gradient" in r.message]) == 1
    loss_of(model(stream())).backward()
    assert any(handle.mask) and handle.report()["forwards"] == 8


def test_parameters_unused_by_the_small_forward_are_frozen_and_named(caplog: Any) -> None:
    model = Takes().train()
    handle = dropbp.enable(model, example_inputs=stream())
    assert "did not use tower" in caplog.text and "did not use tower" in handle.summary()
    assert handle.report()["not_seen"] == ["tower.weight", "tower.bias"]
    assert "forward that found them, which did not run tower:" in handle.summary()
    run(handle, model, 12, lambda model: loss_of(model(stream(), stream() + 1)))


@pytest.mark.parametrize("masks", ["nested", "exact"])
def test_frozen_parts_that_were_not_recorded_are_named_beside_the_share_of_the_branches(masks: str) -> None:
    model = Takes().train()
    model.tower.requires_grad_(False)
    with dropbp.enable(model, masks=masks, example_inputs=stream()) as handle:
        assert handle.report()["not_seen"] == [] and handle.report()["not_recorded"] == ["tower"]
        assert "did not run tower:" in handle.summary()
    with dropbp.enable(model, masks=masks, example_inputs=(stream(), stream())) as handle:
        assert handle.report()["not_recorded"] == [] and "did not run" not in handle.summary()


# -- the forward that is called


class ClampedInTraining(nn.Module):
    """Uses some weights without calling their modules, but only in training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(3))

    def clamped(self, layer: nn.Linear, x_BD: Tensor) -> Tensor:
        return nn.functional.linear(x_BD, layer.weight.clamp(-9, 9), layer.bias) if self.training else layer(x_BD)

    def forward(self, x_BD: Tensor, with_states: bool = False) -> tuple[Tensor, ...]:
        states = [self.clamped(self.stem, x_BD)]
        for first, second in self.blocks:
            states.append(states[-1] + second(self.clamped(first, states[-1]).tanh()))
        return self.head(states[-1]), *(states if with_states else ())


@pytest.mark.parametrize("masks", ["nested", "exact"])
def test_a_weight_used_without_its_module_only_in_training_is_skipped_too(masks: str) -> None:
    plain, model = ClampedInTraining().train(), ClampedInTraining().train()
    batch = torch.randn(4, WIDTH)
    handle = dropbp.enable(model, 0.5, masks=masks, example_inputs=batch)
    expected = take_gradients(plain, plain(batch)[0].square().sum())
    for step in range(12):
        got = take_gradients(model, model(batch)[0].square().sum())
        for number, drop in enumerate(handle.mask or ()):
            inside = {name: grad for name, grad in got.items() if name.startswith(f"blocks.{number}.")}
            assert all((grad is None) == drop for grad in inside.values()), (step, inside.keys())
        if masks == "nested":
            for name, gradient in got.items():
                if gradient is not None:
                    assert_equal(name, handle.mask, gradient, expected)


def test_a_weight_used_without_its_module_is_frozen_even_if_later_states_are_requested() -> None:
    plain, model = ClampedInTraining().train(), ClampedInTraining().train()
    batch = torch.randn(4, WIDTH)
    handle = dropbp.enable(model, 0.5, example_inputs=batch)
    expected = take_gradients(plain, sum(t.square().sum() for t in plain(batch, with_states=True)))
    rested = 0
    for _ in range(12):
        got = take_gradients(model, sum(t.square().sum() for t in model(batch, with_states=True)))
        rested += got["stem.weight"] is None
        for name, gradient in got.items():
            if gradient is not None:
                assert_equal(name, handle.mask, gradient, expected)
    assert rested > 6


def test_a_recorded_forward_in_evaluation_mode_warns_once_with_the_remedy(caplog: Any) -> None:
    model = net().eval()
    handle = dropbp.enable(model, example_inputs=ids())
    with torch.no_grad():
        model(ids())
    assert "evaluation mode" not in caplog.text
    for _ in range(3):
        loss(model).backward()
    assert len([r for r in caplog.records if "Call model.train() before training" in r.message]) == 1
    assert handle.report()["forwards"] == 0


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Takes(), nn.Linear(WIDTH, 3)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.head(self.backbone(x_BSD))


def test_a_backbone_called_instead_of_the_root_drops_too(caplog: Any) -> None:
    model = Headed().train()
    handle = dropbp.enable(model, example_inputs=stream())
    forwards = {name: module.__dict__["forward"] for name, module in model.named_modules() if "forward" in vars(module)}
    run(handle, model, 8, lambda model: loss_of(model.backbone(stream())))
    run(handle, model, 8, lambda model: loss_of(model(stream())))
    assert handle.report()["forwards"] == 18 and handle.report()["realised_drop_rate"] > 0.3
    assert "outside the forward" not in caplog.text
    handle.remove()
    assert forwards and not any("forward" in vars(module) for module in model.modules())


def test_if_only_a_part_is_called_a_warning_names_the_module_to_enable(caplog: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Takes(), Takes()

        def forward(self, x_BSD: Tensor) -> Tensor:
            return self.decoder(self.encoder(x_BSD))

    model = Two().train()
    dropbp.enable(model, example_inputs=stream())
    loss_of(model.encoder(stream())).backward()
    assert "your training loop calls: call handle.remove(), then dropbp.enable(model.encoder, ...)" in caplog.text


def test_parameter_names_are_abbreviated() -> None:
    among = [f"layers.{i}.{part}.{leaf}" for i in range(8) for part in ("a", "b") for leaf in ("weight", "bias")]
    names = [name for name in among if name < "layers.5.b"] + ["embed.weight"]
    assert abbreviated(names, [*among, "embed.weight"]) == "layers.0-4, layers.5.a, embed.weight"
    assert abbreviated(["a.weight"], ["a.weight", "b.weight"]) == "a.weight"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "learning rate: on a pretrained model these masks did best at one to three times plain"),
        ({"steps": 20}, "learning rate: on a pretrained model these masks did best at one to three times plain"),
        ({"masks": "exact"}, "masks='exact' drops branches at any depth. Such masks learned less than plain training"),
        ({"drop_rate": 0.0}, ""),
    ],
)
def test_advice_on_learning_with_these_masks_is_given(options: Any, said: str, caplog: Any) -> None:
    _warn_once.cache_clear()
    handle = dropbp.enable(net(blocks=4), example_inputs=ids(), **options)
    for text in (caplog.text, handle.summary()):
        assert said in text
        assert ("docs/learning.md" in text) is bool(said)
    caplog.clear()
    dropbp.enable(net(blocks=4), example_inputs=ids(), **options)
    assert "docs/learning.md" not in caplog.text, "once is enough"
