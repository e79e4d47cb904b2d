"""`torch.compile` of the model or of its layers: right gradients for every mask, and a bounded number of graphs."""

from __future__ import annotations

import contextlib
import random
import shutil

import pytest
import torch
from torch import nn

import dropbp
from dropbp.device import dynamo_graph_count
from tests.common.engine_models import (
    PlainNet,
    assert_same_gradients,
    llama_loss,
    masks,
    paper_gradients,
    plain_batch,
    plain_loss,
    plain_net,
    take_gradients,
    tiny_llama,
)

BACKEND = "aot_eager"
EARLY = 3  # steps within which every graph is there
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


def compiled_whole(model):
    return torch.compile(model, backend=BACKEND)


def compiled_in_place(model):
    model.compile(backend=BACKEND)
    return model


def compiled_layers(model):
    for block in model.blocks:
        block.compile(backend=BACKEND, fullgraph=True)
    return model


def compiled_layers_replaced(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend=BACKEND)
    return model


def compiled_branches(model):
    for block in model.blocks:
        block.mlp.compile(backend=BACKEND)
        block.mix.compile(backend=BACKEND)
    return model


WAYS = [compiled_whole, compiled_in_place, compiled_layers, compiled_layers_replaced, compiled_branches]


def _check(model, run, handle, plain, loss, steps=14, least=1):
    """Right gradients for a row of masks in which every block has every combination early; no graph after that."""
    names = [branch.name for branch in handle.branches]
    rng, row, counts = random.Random(0), list(masks(len(names))), []
    row = [row[0], row[-1], row[len(row) // 3], row[2 * len(row) // 3], *rng.sample(row, steps - 4)]
    start = dynamo_graph_count()
    for mask in row:
        with handle.fixed(mask):
            got = take_gradients(model, loss(run))
        got = {name.replace("_orig_mod.", ""): gradient for name, gradient in got.items()}
        assert_same_gradients(got, paper_gradients(plain, names, mask, loss))
        counts.append(dynamo_graph_count() - start)
    assert counts[-1] >= least, "nothing was compiled"
    assert counts[EARLY] == counts[-1], counts
    return counts[-1]


@pytest.mark.parametrize(("when", "way"), [("before", compiled_whole), *(("after", way) for way in WAYS)])
def test_compiled_users_model(way, when):
    plain, model = plain_net(blocks=2), plain_net(blocks=2)
    run = way(model) if when == "before" else model
    handle = dropbp.enable(run, example_inputs=plain_batch())
    run = way(model) if when == "after" else run
    # A block of two branches has four masks. Compiled on their own, the branches share two graphs with gradients each.
    assert _check(model, run, handle, plain, plain_loss) <= 6


def test_compiled_llama():
    plain, model = tiny_llama(), tiny_llama()
    handle = dropbp.enable(model)
    graphs = _check(model, torch.compile(model, backend=BACKEND), handle, plain, llama_loss, steps=10)
    assert graphs <= 8  # four of a block; embedding, rotary table, norm with head, loss


def test_compiled_llama_layers_without_a_graph_break():
    plain, model = tiny_llama(), tiny_llama()
    handle = dropbp.enable(model)
    for layer in model.model.layers:
        layer.compile(backend=BACKEND, fullgraph=True)
    assert _check(model, model, handle, plain, llama_loss, steps=10) <= 4


def test_masks_are_drawn_outside_of_compiled_code():
    model = plain_net(blocks=2)
    handle = dropbp.enable(model, example_inputs=plain_batch())
    run = torch.compile(model, backend=BACKEND)
    seen = {(plain_loss(run).backward(), handle.mask)[1] for _ in range(12)}
    assert len(seen) > 3 and handle.report()["draws"] == 12


def test_evaluation_of_a_compiled_model_is_plain():
    plain, model = plain_net(blocks=2).eval(), plain_net(blocks=2).eval()
    handle = dropbp.enable(model, example_inputs=plain_batch())
    run = torch.compile(model, backend=BACKEND)
    with torch.no_grad():
        torch.testing.assert_close(run(plain_batch()), plain(plain_batch()))
    assert_same_gradients(take_gradients(model, plain_loss(run)), take_gradients(plain, plain_loss(plain)))
    assert handle.mask is None


def test_an_evaluation_between_compiled_training_steps_leaves_no_flags_behind():
    plain, model = plain_net(blocks=2), plain_net(blocks=2)
    handle = dropbp.enable(model, example_inputs=plain_batch())
    compiled_layers(model)
    names = [branch.name for branch in handle.branches]
    for mask in [(True, False, True, True), (True, False, True, True), (False, True, True, False)]:
        with handle.fixed(mask):
            got = take_gradients(model, plain_loss(model))
        assert_same_gradients(got, paper_gradients(plain, names, mask, plain_loss))
        with torch.no_grad():
            plain_loss(model)
        model.eval()
        plain_loss(model)
        model.train()


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_compiled_layers_under_checkpointing_with_several_forwards_before_one_backward(kind):
    plain, model = plain_net(blocks=2), plain_net(blocks=2, kind=kind)
    handle = dropbp.enable(model, example_inputs=plain_batch())
    compiled_layers(model)
    names = [branch.name for branch in handle.branches]
    first, second = (True, True, False, False), (False, True, True, True)
    for a, b in [(first, second), (second, first)] * 2:
        with handle.fixed(a):
            one = plain_loss(model, plain_batch(3))
        with handle.fixed(b):
            two = plain_loss(model, plain_batch(4))
        got = take_gradients(model, one + two)
        of_one = paper_gradients(plain, names, a, lambda m: plain_loss(m, plain_batch(3)))
        of_two = paper_gradients(plain, names, b, lambda m: plain_loss(m, plain_batch(4)))
        for name, gradient in got.items():
            parts = [g for g in (of_one[name], of_two[name]) if g is not None]
            torch.testing.assert_close(gradient, sum(parts) if parts else None, rtol=1e-5, atol=1e-7)


def test_compiled_llama_layers_that_checkpoint_inside():
    plain, model = tiny_llama(), tiny_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    handle = dropbp.enable(model)
    for layer in model.model.layers:
        layer.compile(backend=BACKEND)
    assert _check(model, model, handle, plain, llama_loss) <= 4


def test_checkpointing_in_a_users_compiled_model_is_right_though_not_compiled():
    plain, model = plain_net(blocks=2), plain_net(blocks=2, kind="non-reentrant")
    handle = dropbp.enable(model, example_inputs=plain_batch())
    _check(model, torch.compile(model, backend=BACKEND), handle, plain, plain_loss, steps=6, least=0)


class SharedNorm(nn.Module):
    """One norm for the two branches of a block, a scale outside of any module, a stream that passes through both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.7))

    def forward(self, x_BSD):
        x_BSD = x_BSD + self.gamma * self.a(self.norm(x_BSD))
        return x_BSD + self.b(self.norm(x_BSD))


def _shared_norm_net():
    torch.manual_seed(1)
    net = PlainNet(blocks=0)
    net.blocks = nn.ModuleList(SharedNorm() for _ in range(2))
    return net.train()


@pytest.mark.parametrize("way", [None, compiled_whole, compiled_in_place])
def test_modules_shared_by_branches_and_parameters_outside_of_modules(way):
    plain, model = _shared_norm_net(), _shared_norm_net()
    handle = dropbp.enable(model, example_inputs=plain_batch())
    run = model if way is None else way(model)
    for mask in list(masks(4)):
        with handle.fixed(mask):
            got = take_gradients(model, plain_loss(run))
        assert_same_gradients(got, _shared_norm_expected(plain, mask))


def _shared_norm_expected(plain, mask):
    x_BSD = plain.stem(plain_batch())
    for i, block in enumerate(plain.blocks):
        for dropped, branch in zip(mask[2 * i : 2 * i + 2], ("a", "b"), strict=True):
            with torch.no_grad() if dropped else contextlib.nullcontext():
                out_BSD = getattr(block, branch)(block.norm(x_BSD))
                out_BSD = block.gamma * out_BSD if branch == "a" else out_BSD
            x_BSD = x_BSD + out_BSD
    return take_gradients(plain, plain.head(plain.norm(x_BSD)).square().mean())


def test_scaling_of_compiled_layers():
    plain, model = plain_net(blocks=2), plain_net(blocks=2)
    options = {"example_inputs": plain_batch(), "scaling": "unbiased"}
    other = dropbp.enable(plain, **options)
    handle = dropbp.enable(model, **options)
    for block in model.blocks:
        block.compile(backend=BACKEND)
    for mask in [(False, True, False, False), (True, False, True, False), (False,) * 4]:
        with handle.fixed(mask), other.fixed(mask):
            assert_same_gradients(take_gradients(model, plain_loss(model)), take_gradients(plain, plain_loss(plain)))


def test_discovery_of_a_compiled_model_compiles_nothing():
    model = plain_net(blocks=2)
    compiled_layers(model)
    before = dynamo_graph_count()
    dropbp.discover(model, plain_batch())
    assert dynamo_graph_count() == before


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a compiler")
@pytest.mark.slow
def test_layers_compiled_by_inductor():
    plain, model = plain_net(blocks=1), plain_net(blocks=1)
    handle = dropbp.enable(model, example_inputs=plain_batch())
    for block in model.blocks:
        block.compile()
    names = [branch.name for branch in handle.branches]
    for mask in [(False, True), (True, False)]:
        with handle.fixed(mask):
            got = take_gradients(model, plain_loss(model))
        assert_same_gradients(got, paper_gradients(plain, names, mask, plain_loss))
