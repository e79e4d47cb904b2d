"""Blocks are recomputed by default only where that changes nothing: not the gradients, not what a forward leaves."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import random

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, spectral_norm

import dropbp
from dropbp.memory import track_tensor_bytes
from tests.common.engine_models import assert_same_gradients, gradients, llama_loss, tiny_llama

WIDTH, DEPTH, ROWS = 8, 4, 6
SEEN = []
COUNTS = {"forwards": 0}


class Block(nn.Module):
    """A pure residual block, which counts its forwards where it can't be seen."""

    runs = None

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x_BD):
        return x_BD + self.branch(x_BD)

    def branch(self, x_BD):
        return self.mlp(self.norm(x_BD))


class Net(nn.Module):
    """Blocks one after another, each called as `call` says."""

    def __init__(self, make=Block) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(make() for _ in range(DEPTH))

    def forward(self, x_BD):
        x_BD = self.stem(x_BD)
        self.start(x_BD)
        for block in self.blocks:
            x_BD = self.call(block, x_BD)
        return self.head(x_BD)

    def start(self, x_BD):
        """Before the blocks."""

    def call(self, block, x_BD):
        return block(x_BD)


# -- blocks that change something


class BatchNormed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)


class InstanceNormed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.InstanceNorm1d(4, track_running_stats=True)

    def branch(self, x_BD):
        return self.mlp(self.wide(self.norm(x_BD).unflatten(1, (4, 2))).flatten(1))


class SpectralHook(Block):
    def __init__(self) -> None:
        super().__init__()
        spectral_norm(self.mlp[0])


class SpectralParametrization(Block):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.mlp[0])


class WithBuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(()))


class CountsInBuffer(WithBuffer):
    def branch(self, x_BD):
        self.level += 1
        return self.mlp(self.norm(x_BD)) * (1 + 0.1 * self.level)


class WritesData(WithBuffer):
    def branch(self, x_BD):
        self.level.data.mul_(0.9).add_(x_BD.detach().mean())
        return self.mlp(self.norm(x_BD)) + self.level


class ReplacesBuffer(WithBuffer):
    def branch(self, x_BD):
        self.level = 0.9 * self.level + x_BD.detach().mean()
        return self.mlp(self.norm(x_BD)) + self.level


class CountsInAttribute(Block):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def branch(self, x_BD):
        self.count += 1
        return self.mlp(self.norm(x_BD)) * (1 + 0.1 * self.count)


class Appends(Block):
    def __init__(self) -> None:
        super().__init__()
        self.held = {"means": []}

    def branch(self, x_BD):
        self.held["means"].append(x_BD.detach().mean())
        return self.mlp(self.norm(x_BD)) * len(self.held["means"])


class CountsInObject(Block):
    class Counter:
        def __init__(self) -> None:
            self.value = 0

    def __init__(self) -> None:
        super().__init__()
        self.counter = self.Counter()

    def branch(self, x_BD):
        self.counter.value += 1
        return self.mlp(self.norm(x_BD)) / self.counter.value


class CountsInClass(Block):
    number = 0

    def branch(self, x_BD):
        type(self).number += 1
        return self.mlp(self.norm(x_BD)) * (1 + type(self).number % 3)


class CountsInGlobal(Block):
    def forward(self, x_BD):
        COUNTS["forwards"] += 1
        return x_BD + self.branch(x_BD) * (1 + COUNTS["forwards"] % 3)


class AppendsToGlobal(Block):
    def forward(self, x_BD):
        SEEN.append(1)
        return x_BD + self.branch(x_BD) * (1 + len(SEEN) % 3)


class OwnGenerator(Block):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def branch(self, x_BD):
        return self.mlp(self.norm(x_BD)) * torch.rand(x_BD.shape, generator=self.generator)


class PythonsRandom(Block):
    def branch(self, x_BD):
        return self.mlp(self.norm(x_BD)) * (1 + random.random())


class UsersHook(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(()))
        self.mlp[0].register_forward_hook(lambda module, args, output: output + self.level.add_(0.1))


class ChangesWeights(Block):
    def branch(self, x_BD):
        with torch.no_grad():
            self.mlp[2].bias.add_(0.01)
        return self.mlp(self.norm(x_BD))


# -- what lies outside of the block


class Looped(Net):
    def forward(self, x_BD):
        for _ in range(8):
            x_BD = self.blocks[0](x_BD)
        return self.head(x_BD)


class TwoTowers(Net):
    """One encoder for two inputs."""

    def forward(self, x_BD):
        one, other = super().forward(x_BD), super().forward(x_BD.flip(0))
        return one * other


class SharedLayer(Net):
    """Blocks that hold one module in common."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = self.blocks[0].mlp


class Given(Net):
    """Something that can be changed is given to each block."""

    def __init__(self, make_given) -> None:
        super().__init__(Taking)
        self.make_given = make_given

    def start(self, x_BD):
        self.given = self.make_given()

    def call(self, block, x_BD):
        return block(x_BD, self.given)


class Cache:
    def __init__(self) -> None:
        self.entries = {}

    def put(self, value):
        self.entries[len(self.entries)] = value
        return len(self.entries)


class Taking(Block):
    def forward(self, x_BD, given):
        if isinstance(given, torch.Tensor):
            given += 1
            number = given.clone()
        elif isinstance(given, list):
            given.append(x_BD.detach())
            number = len(given)
        elif isinstance(given, dict):
            given[len(given)] = x_BD.detach()
            number = len(given)
        else:
            number = given.put(x_BD.detach())
        return x_BD + self.branch(x_BD) * number


class GivenByName(Given):
    def call(self, block, x_BD):
        return block(x_BD, given=(None, self.given)[1])


class SetsContext(Net):
    """The root leaves something at each block, and takes it away after the forward."""

    def __init__(self) -> None:
        super().__init__(WithContext)

    def forward(self, x_BD):
        for block in self.blocks:
            block.context = 1 + x_BD.detach().abs().mean()
        try:
            return super().forward(x_BD)
        finally:
            for block in self.blocks:
                block.context = None


class WithContext(Block):
    context = None

    def branch(self, x_BD):
        return self.mlp(self.norm(x_BD)) * self.context


class GrowingList(Net):
    """Each block reads a list that the root adds to afterwards."""

    def __init__(self) -> None:
        super().__init__(Reading)

    def forward(self, x_BD):
        stages = [self.stem(x_BD)]
        for block in self.blocks:
            stages.append(block(stages[-1], stages))
        return self.head(stages[-1])


class Reading(Block):
    def forward(self, x_BD, stages):
        return x_BD + self.branch(torch.stack(stages).mean(0))


BLOCKS = [
    BatchNormed, InstanceNormed, SpectralHook, SpectralParametrization, CountsInBuffer, WritesData, ReplacesBuffer,
    CountsInAttribute, Appends, CountsInObject, CountsInClass, CountsInGlobal, AppendsToGlobal, OwnGenerator,
    PythonsRandom, UsersHook, ChangesWeights,
]  # fmt: skip
NETS = {
    **{block.__name__: (lambda block=block: Net(block)) for block in BLOCKS},
    **{net.__name__: net for net in (Looped, TwoTowers, SharedLayer, SetsContext, GrowingList)},
    **{f"Given_{make.__name__}": (lambda make=make: Given(make)) for make in (list, dict, Cache)},
    "Given_tensor": lambda: Given(lambda: torch.zeros(())),
    "GivenByName": lambda: GivenByName(Cache),
    "Dropout": lambda: Net(Dropping),
    "Pure": Net,
}


class Dropping(Block):
    def branch(self, x_BD):
        return nn.functional.dropout(super().branch(x_BD), 0.5, self.training)


def batch(seed=0):
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def made(name):
    torch.manual_seed(1)
    return NETS[name]().train()


def trained(model, handle=None, mask=None, steps=3, forwards=1):
    """Gradients of each step, and the buffers after it."""
    SEEN.clear()
    COUNTS["forwards"] = CountsInClass.number = 0
    random.seed(5)
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        with handle.fixed(mask) if handle else torch.enable_grad():
            loss = sum(model(batch(step * forwards + i)).square().mean() for i in range(forwards))
        loss.backward()
        found.append({**gradients(model), **{name: b.clone() for name, b in model.named_buffers()}})
        optimizer.step()
    return found


def enabled(model, drop_rate=0.9, **options):
    return dropbp.enable(model, drop_rate, example_inputs=batch(7), **options)


def drawn_masks(count):
    """Nothing is dropped, or the lowest branch."""
    return [tuple(i < dropped for i in range(count)) for dropped in (0, 1)]


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("name", NETS)
def test_default_leaves_gradients_and_state_as_without_recomputing(name, forwards):
    for mask in drawn_masks(len(enabled(made(name)).branches)):
        found = []
        for options in ({}, {"max_activations": None}):
            model = made(name)
            found.append(trained(model, enabled(model, **options), mask, forwards=forwards))
        for got, expected in zip(*found, strict=True):
            assert_same_gradients(got, expected)


@pytest.mark.parametrize("name", NETS)
def test_steps_that_drop_nothing_are_plain_steps(name):
    plain, model = made(name), made(name)
    handle = enabled(model)
    plain.load_state_dict(model.state_dict())  # enabling drew from generators of the model's own, and no more
    if name == "OwnGenerator":
        for ours, theirs in zip(plain.blocks, model.blocks, strict=True):
            ours.generator.set_state(theirs.generator.get_state())
    for name_of in ("count", "held", "counter"):
        for ours, theirs in zip(plain.blocks, model.blocks, strict=True):
            if hasattr(theirs, name_of):
                setattr(ours, name_of, copy.deepcopy(getattr(theirs, name_of)))
    for got, expected in zip(trained(model, handle, (False,) * len(handle.branches)), trained(plain), strict=True):
        assert_same_gradients(got, expected)


@pytest.mark.parametrize("name", sorted(set(NETS) - {"Pure", "Dropout"}))
def test_blocks_that_are_not_known_to_be_pure_are_named(name, caplog):
    model = made(name)
    handle = enabled(model)
    trained(model, handle, (False,) * len(handle.branches), steps=1)
    assert handle.report()["not_recomputed"]
    assert "keep all activations" in handle.summary()
    assert len([r for r in caplog.records if "is not recomputed in the backward" in r.message]) == 1


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


def products(model, handle):
    with handle.fixed((False,) * len(handle.branches)):
        loss = model(batch()).square().mean()
    with Counting() as counting:
        loss.backward()
    return counting.count


@pytest.mark.parametrize("name", ["Pure", "Dropout"])
def test_pure_blocks_are_recomputed_from_the_first_step_on(name):
    counts = []
    for options in ({"max_activations": None}, {}):
        model = made(name)
        handle = enabled(model, **options)
        counts.append([products(model, handle) for _ in range(2)])
        assert not handle.report()["not_recomputed"]
    # Of each recomputed block one product at least comes again; the last is not needed for its own backward.
    assert all(again >= plain + DEPTH - 1 for plain, again in zip(*counts, strict=True))


def test_the_memory_is_that_of_recomputed_blocks_from_the_first_step_on():
    peaks = {}
    for limit in (None, "auto"):
        model = made("Pure")
        handle = enabled(model, max_activations=limit)
        x_BD = torch.randn(4096, WIDTH)
        with track_tensor_bytes(model) as tracked, handle.fixed((False,) * DEPTH):
            model(x_BD).square().mean().backward()
        peaks[limit] = tracked.peak_bytes
    assert peaks["auto"] < 0.6 * peaks[None]


def test_other_blocks_make_up_for_those_that_cannot_be_recomputed():
    torch.manual_seed(1)
    model = Net().train()
    model.blocks[0] = BatchNormed()
    handle = dropbp.enable(model, 0.5, example_inputs=batch())
    kept = (False,) * DEPTH
    before = handle.engine.recomputed(0)
    trained(model, handle, kept, steps=1)
    assert before & 1 and not handle.engine.recomputed(0) & 1
    assert handle.engine.recomputed(0).bit_count() == before.bit_count()
    assert list(handle.report()["not_recomputed"]) == ["blocks.0"]


def test_functional_call_is_not_recomputed_with_the_models_own_parameters():
    model = made("Pure")
    handle = enabled(model)
    others = {name: (p.detach() + 0.1).requires_grad_() for name, p in model.named_parameters()}
    with handle.fixed((False,) * DEPTH):
        for _ in range(2):
            loss = torch.func.functional_call(model, others, batch()).square().mean()
            got = torch.autograd.grad(loss, list(others.values()))
    handle.remove()
    expected = torch.autograd.grad(
        torch.func.functional_call(model, others, batch()).square().mean(), list(others.values())
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_cached_parametrizations_are_not_recomputed():
    model = made("Pure")
    for block in model.blocks:
        parametrizations.weight_norm(block.mlp[0])
    handle = enabled(model)
    found = []
    for recomputing in (True, False):
        if not recomputing:
            handle.remove()
        model.zero_grad()
        with parametrize.cached(), handle.fixed((False,) * DEPTH):
            loss = model(batch()).square().mean()
        loss.backward()
        found.append(gradients(model))
    assert_same_gradients(*found)


def test_nothing_is_recomputed_where_hooks_on_saved_tensors_are_disabled():
    plain, model = made("Pure"), made("Pure")
    handle = enabled(model)
    found = []
    for net in (plain, model):
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"), handle.fixed((False,) * DEPTH):
            loss = net(batch()).square().mean()
        loss.backward()
        found.append(gradients(net))
    assert_same_gradients(found[1], found[0])
    assert "disabled" in next(iter(handle.report()["not_recomputed"].values()))


def test_the_mode_of_the_forward_holds_in_the_recomputation():
    plain, model = made("Dropout"), made("Dropout")
    handle = enabled(model)
    found = []
    for net in (plain, model):
        torch.manual_seed(3)
        with handle.fixed((False,) * DEPTH):
            loss = net.train()(batch()).square().mean()
        net.eval()
        loss.backward()
        assert not any(module.training for module in net.modules())
        found.append(gradients(net))
    assert_same_gradients(found[1], found[0])


def test_the_kernels_of_the_forward_serve_in_the_recomputation():
    plain, model = tiny_llama(4), tiny_llama(4)
    found = []
    handle = dropbp.enable(model, 0.9)
    for net in (plain, model):
        with sdpa_kernel(SDPBackend.MATH), handle.fixed((False,) * 8):
            loss = llama_loss(net)
        loss.backward()
        found.append(gradients(net))
    assert handle.engine.recomputed(0) and not handle.report()["not_recomputed"]
    assert_same_gradients(found[1], found[0])


def test_a_change_after_the_forward_raises_instead_of_giving_a_wrong_gradient():
    model = Net(WithBuffer).train()
    handle = enabled(model)
    with handle.fixed((False,) * DEPTH):
        loss = model(batch()).square().mean()
    model.blocks[1].level.add_(1)
    with pytest.raises(dropbp.StateError, match=r"blocks\.1 was to be recomputed .* max_activations=None"):
        loss.backward()


class Scaled(nn.Module):
    """What its attribute is bound to decides what it computes."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp, self.scale = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), [2.0]

    def forward(self, x):
        return x + self.mlp(self.norm(x)) * self.scale[0]


def gradients_if_changed_before_the_backward(block, change):
    """Of the plain net and of the enabled one; `change` is applied to their second block between the two passes."""
    plain = Net(block).train()
    model = copy.deepcopy(plain)
    handle, found = enabled(model), []
    for net in (plain, model):
        with handle.fixed((False,) * DEPTH):
            loss = net(batch()).square().mean()
        change(net.blocks[1])
        loss.backward()
        found.append(gradients(net))
    assert handle.engine.recomputed(0) and not handle.report()["not_recomputed"]
    return plain, model, found


@pytest.mark.parametrize("new", [[3.0], (0.5, 1), torch.tensor([4.0])], ids=["list", "tuple", "tensor"])
def test_an_attribute_rebound_after_the_forward_has_its_old_value_in_the_recomputation(new):
    def change(block):
        block.scale = new

    *nets, (expected, got) = gradients_if_changed_before_the_backward(Scaled, change)
    assert all(net.blocks[1].scale is new for net in nets)
    assert_same_gradients(got, expected)


class Settings:
    def __init__(self):
        self.scale, self.problem_type = 2.0, None


class Configured(nn.Module):
    """What its configuration says decides what it computes."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp, self.config = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), Settings()

    def forward(self, x):
        return x + self.mlp(self.norm(x)) * self.config.scale


def test_a_setting_changed_after_the_forward_has_its_old_value_in_the_recomputation():
    def change(block):
        block.config.scale, block.config.problem_type = 3.0, "single_label_classification"

    *nets, (expected, got) = gradients_if_changed_before_the_backward(Configured, change)
    assert all(net.blocks[1].config.scale == 3.0 and net.blocks[1].config.problem_type for net in nets)
    assert_same_gradients(got, expected)


def off(model):
    return model.disable_adapter()


@contextlib.contextmanager
def other(model):
    model.set_adapter("reference")
    yield
    model.set_adapter("default")


@pytest.mark.parametrize("reference", [off, other])
def test_a_reference_forward_of_the_same_weights_leaves_blocks_recomputed(reference):
    """As preference trainers do with adapters: without them, or with others, the model is its own reference."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian", task_type="CAUSAL_LM")
    found = []
    for enable in (False, True):
        torch.manual_seed(3)
        model = peft.get_peft_model(tiny_llama(4), config)
        model.add_adapter("reference", config)
        handle = dropbp.enable(model, 0.5) if enable else None
        for _ in range(3):
            model.zero_grad()
            with handle.fixed((False,) * 8) if handle else contextlib.nullcontext():
                loss = llama_loss(model.train())
            with torch.no_grad(), reference(model):
                llama_loss(model)
            loss.backward()
            found.append(gradients(model))
    assert handle.engine.recomputed(0) and not handle.report()["not_recomputed"]
    for plain, ours in zip(found[:3], found[3:], strict=True):
        assert_same_gradients(ours, plain)


def test_an_attribute_changed_once_between_steps_costs_one_recomputation():
    model = made("Pure")
    handle = enabled(model)
    kept = (False,) * DEPTH
    trained(model, handle, kept, steps=1)
    model.blocks[0].note = "new"
    trained(model, handle, kept, steps=1)
    assert "attributes have changed" in handle.report()["not_recomputed"]["blocks.0"]
    trained(model, handle, kept, steps=1)
    assert not handle.report()["not_recomputed"]


def test_blocks_under_a_checkpoint_of_the_users_are_not_recomputed_twice():
    class Checkpointed(Net):
        def call(self, block, x_BD):
            return torch.utils.checkpoint.checkpoint(block, x_BD, use_reentrant=False)

    counts = []
    for options in ({"max_activations": None}, {}):
        torch.manual_seed(1)
        model = Checkpointed().train()
        counts.append(products(model, enabled(model, **options)))
    assert counts[0] == counts[1]


def test_two_backwards_of_one_forward():
    plain, model = made("Dropout"), made("Dropout")
    handle = enabled(model)
    found = []
    for net in (plain, model):
        torch.manual_seed(3)
        with handle.fixed((False,) * DEPTH):
            loss = net(batch()).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(gradients(net))
    assert_same_gradients(found[1], found[0])


def test_in_place_changes_of_kept_activations_are_refused_as_without_dropbp():
    class Spoils(Net):
        def call(self, block, x_BD):
            out = block(x_BD)
            block.inner.mul_(2)
            return out

    class Shows(Block):
        def branch(self, x_BD):
            self.inner = self.mlp[1](self.mlp[0](self.norm(x_BD)))
            return self.mlp[2](self.inner)

    model = Spoils(Shows).train()
    with enabled(model, branches=[f"blocks.{i}.mlp.2" for i in range(DEPTH)]) as handle, handle.fixed((False,) * DEPTH):
        loss = model(batch()).square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_plan_follows_what_is_recomputed():
    peaks, options = {}, {"rates": [0.5] * DEPTH, "example_inputs": batch(), "measure": False}
    for name, limit in itertools.product(("Pure", "CountsInBuffer"), (None, 1e-9)):
        found = dropbp.plan(made(name), 512, drop_rates=[0.5], max_activations=limit, **options)
        peaks[name, limit] = found.at(0.5).peak_bytes
    assert peaks["Pure", 1e-9] < 0.8 * peaks["Pure", None]
    assert peaks["CountsInBuffer", 1e-9] == peaks["CountsInBuffer", None]


def test_a_cache_is_named_with_what_to_do(caplog):
    model = tiny_llama(4)
    handle = dropbp.enable(model, 0.9)
    tokens = torch.randint(0, 32, (2, 6))
    with caplog.at_level(logging.WARNING), handle.fixed((False,) * 8):
        model(input_ids=tokens, labels=tokens, use_cache=True).loss.backward()
    assert "use_cache=False" in caplog.text and len(handle.report()["not_recomputed"]) >= 3
    with handle.fixed((False,) * 8):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert not handle.report()["not_recomputed"]


def test_a_trainers_switch_of_checkpointing_leaves_blocks_recomputed():
    """Trainers switch it off before they train, and that leaves a checkpoint function in every block."""
    model = tiny_llama(layers=4)
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    assert all("_gradient_checkpointing_func" in vars(block) for block in model.model.layers)
    with dropbp.enable(model, 0.9) as handle:
        for mask in drawn_masks(len(handle.branches)):
            with handle.fixed(mask):
                llama_loss(model).backward()
            assert not handle.report()["not_recomputed"]
