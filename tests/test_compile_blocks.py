"""`dropbp.compile_blocks`: regional compilation, and whole models with few masks, by the number of graphs they make."""

from __future__ import annotations

import logging

import pytest
import torch

import dropbp
from dropbp.device import dynamo_graph_count
from tests.common.engine_models import (
    assert_same_gradients,
    llama_loss,
    masks,
    paper_gradients,
    plain_batch,
    take_gradients,
    tiny_llama,
    tokens,
)

BACKEND = "aot_eager"
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


def test_every_block_is_compiled_and_named():
    handle = dropbp.enable(tiny_llama(layers=3))
    assert dropbp.compile_blocks(handle, backend=BACKEND) == tuple(f"model.layers.{i}" for i in range(3))
    assert all(layer._compiled_call_impl is not None for layer in handle.model.model.layers)


def test_the_model_is_as_good_as_its_handle_and_keys_stay():
    model = tiny_llama()
    keys = list(model.state_dict())
    dropbp.enable(model)
    assert len(dropbp.compile_blocks(model, backend=BACKEND)) == 2
    assert list(model.state_dict()) == keys


def test_four_graphs_serve_all_masks_of_all_blocks_and_none_comes_late():
    plain, model = tiny_llama(layers=3), tiny_llama(layers=3)
    handle = dropbp.enable(model)
    dropbp.compile_blocks(handle, backend=BACKEND, fullgraph=True)
    names = [branch.name for branch in handle.branches]
    start, counts = dynamo_graph_count(), []
    for mask in [(True, False) * 3, (False, True) * 3, (True,) * 6, (False,) * 6, *list(masks(6))[5::9]]:
        with handle.fixed(mask):
            got = take_gradients(model, llama_loss(model))
        assert_same_gradients(got, paper_gradients(plain, names, mask, llama_loss))
        counts.append(dynamo_graph_count() - start)
    assert counts[3] == counts[-1] == 4


def test_the_number_of_graphs_does_not_grow_with_depth():
    def graphs(layers):
        torch._dynamo.reset()
        model = tiny_llama(layers=layers)
        handle = dropbp.enable(model, drop_rate=0.5, masks="exact")
        dropbp.compile_blocks(handle, backend="eager")  # the graphs are the same, and not compiled
        start = dynamo_graph_count()
        for _ in range(12):
            llama_loss(model).backward()
        return dynamo_graph_count() - start

    assert graphs(2) <= 4 and graphs(5) <= 4


def test_evaluation_between_steps_adds_one_graph():
    model = tiny_llama()
    handle = dropbp.enable(model)
    dropbp.compile_blocks(handle, backend="eager")
    start = dynamo_graph_count()
    for mask in masks(4):
        with handle.fixed(mask):
            llama_loss(model).backward()
        with torch.no_grad():
            model(input_ids=tokens())
    assert dynamo_graph_count() - start <= 5


@pytest.mark.parametrize("options", [{"masks": "nested"}, {"masks": "pool", "pool_size": 3}])
def test_a_whole_model_with_few_masks_makes_no_graph_late(options):
    model = tiny_llama(layers=3)
    dropbp.enable(model, drop_rate=0.5, max_activations=None, **options)
    run = torch.compile(model, backend="eager")
    counts = []
    for _ in range(120):
        llama_loss(run).backward()
        counts.append(dynamo_graph_count())
    assert counts[60] == counts[-1]  # by then every mask has come, the rarest too


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_compiled_blocks_under_gradient_checkpointing(kind):
    plain, model = tiny_llama(), tiny_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind == "reentrant"})
    model.enable_input_require_grads()
    handle = dropbp.enable(model)
    dropbp.compile_blocks(handle, backend=BACKEND)
    names = [branch.name for branch in handle.branches]
    for mask in [(False,) * 4, (True, False, False, True), (True, True, False, True), (True,) * 4]:
        with handle.fixed(mask):
            got = take_gradients(model, llama_loss(model))
        assert_same_gradients(got, paper_gradients(plain, names, mask, llama_loss))


def test_a_model_that_is_not_enabled_is_refused():
    with pytest.raises(dropbp.StateError, match="compile_blocks needs an enabled model"):
        dropbp.compile_blocks(tiny_llama())


class Unnumbered(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x_BSD):
        x_BSD = x_BSD + self.one(x_BSD)
        return self.head(x_BSD + self.two(x_BSD))


def test_a_model_without_repeated_blocks_is_refused():
    handle = dropbp.enable(Unnumbered(), example_inputs=plain_batch())
    with pytest.raises(dropbp.ConfigError, match="no repeated blocks"):
        dropbp.compile_blocks(handle, backend=BACKEND)


def test_too_low_a_limit_of_the_compiler_is_said(caplog):
    handle = dropbp.enable(tiny_llama())
    with torch._dynamo.config.patch(recompile_limit=2), caplog.at_level(logging.WARNING, logger="dropbp"):
        dropbp.compile_blocks(handle, backend=BACKEND)
    assert "Up to 5 graphs are needed, but torch._dynamo.config.recompile_limit is 2" in caplog.text
