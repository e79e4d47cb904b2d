"""The backward is truncated at the lowest kept branch where nothing needs its gradient below, and only there."""

import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dropbp
from tests.common.engine_models import (
    assert_same_gradients,
    gradients,
    llama_loss,
    plain_batch,
    plain_loss,
    plain_net,
    take_gradients,
    tiny_llama,
    tokens,
)

BLOCKS = 4
MODELS = {"plain": (lambda: plain_net(blocks=BLOCKS), plain_loss), "llama": (lambda: tiny_llama(BLOCKS), llama_loss)}


def bottom_dropped(count, of=2 * BLOCKS):
    return (True,) * count + (False,) * (of - count)


def enabled(model, **options):
    inputs = None if hasattr(model, "config") else plain_batch()
    return dropbp.enable(model, 0.5, stem="rest", example_inputs=inputs, **{"max_activations": 1.0, **options})


def enabled_after_one_forward(model, loss, **options):
    """Enabled, and past the first forward, in which the stream keeps its gradient."""
    handle = enabled(model, **options)
    take_gradients(model, loss(model))
    return handle


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", range(1, 2 * BLOCKS + 1))
def test_kept_parameters_have_the_gradient_of_a_plain_step(name, count):
    make, loss = MODELS[name]
    plain, model = make(), make()
    expected = take_gradients(plain, loss(plain))
    handle = enabled_after_one_forward(model, loss)
    frozen = {n for b in handle.branches[:count] for m in b.modules for n in names_under(model, m)}
    frozen |= {n for stem in handle.engine.structure.stem.modules for n in names_under(model, stem)}
    with handle.fixed(bottom_dropped(count)):
        found = take_gradients(model, loss(model))
    assert_same_gradients(found, {n: None if n in frozen else gradient for n, gradient in expected.items()})


def names_under(model, module):
    return [f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters()]


def flops_of(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("count", range(1, 2 * BLOCKS))
def test_a_step_costs_what_freezing_costs(count):
    model, frozen = plain_net(blocks=BLOCKS), plain_net(blocks=BLOCKS)
    handle = enabled_after_one_forward(model, plain_loss)
    for branch in handle.branches[:count]:
        for module in branch.modules:
            frozen.get_submodule(module).requires_grad_(False)
    frozen.stem.requires_grad_(False)
    with handle.fixed(bottom_dropped(count)):
        cost = flops_of(lambda: plain_loss(model).backward())
    assert cost == flops_of(lambda: plain_loss(frozen).backward())


def stream_asks_for_gradients(model, handle):
    """Whether the stream does so where it enters the blocks, in a step that drops what lies below."""
    asked = []
    hook = model.blocks[0].register_forward_pre_hook(lambda module, args: asked.append(args[0].requires_grad))
    with handle.fixed(bottom_dropped(5, of=len(handle.branches))):
        plain_loss(model).backward()
    hook.remove()
    return asked == [True]


def test_the_first_forward_keeps_the_gradient():
    model = plain_net(blocks=BLOCKS)
    handle = enabled(model)
    assert stream_asks_for_gradients(model, handle)
    assert not stream_asks_for_gradients(model, handle)


GIVEN_OUT = {
    "itself": lambda latents_BSD, rows: latents_BSD,
    "expanded": lambda latents_BSD, rows: latents_BSD[0].expand(rows, -1, -1),
    "a slice": lambda latents_BSD, rows: latents_BSD[:rows],
    "in a tuple": lambda latents_BSD, rows: (latents_BSD[:rows], None),
}


class Latents(torch.nn.Module):
    def __init__(self, way):
        super().__init__()
        self.latents_BSD, self.way = torch.nn.Parameter(torch.randn(2, 4, 8)), GIVEN_OUT[way]

    def forward(self, x_BSD):
        return self.way(self.latents_BSD, len(x_BSD))


class FromLatents(torch.nn.Module):
    """A stream that begins with a parameter, as Perceiver's. `query`: a second one reads it in one branch."""

    def __init__(self, way, query):
        super().__init__()
        self.query_D = torch.nn.Parameter(torch.randn(8)) if query else None
        self.latents, inner = Latents(way), plain_net(blocks=BLOCKS)
        self.reads, self.blocks, self.head = torch.nn.Linear(8, 8), inner.blocks, inner.head

    def forward(self, x_BSD):
        given = self.latents(x_BSD)
        h_BSD = given[0] if isinstance(given, tuple) else given
        h_BSD = h_BSD + self.reads(x_BSD)
        for block in self.blocks:
            h_BSD = block(h_BSD)
        if self.query_D is None:
            return self.head(h_BSD)
        query_D = self.query_D * 1.0
        return query_D + self.head(h_BSD + query_D)


@pytest.mark.parametrize("query", [False, True])
@pytest.mark.parametrize("way", GIVEN_OUT)
def test_a_frozen_module_that_returns_a_parameter_requires_no_gradient(way, query):
    model = FromLatents(way, query).train()
    handle = enabled_after_one_forward(model, plain_loss)
    assert not stream_asks_for_gradients(model, handle)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_checkpointed_blocks_get_their_gradients(kind):
    plain, model = plain_net(blocks=BLOCKS), plain_net(blocks=BLOCKS, kind=kind)
    expected = take_gradients(plain, plain_loss(plain))
    handle = enabled_after_one_forward(model, plain_loss)
    with handle.fixed(bottom_dropped(4)):
        found = take_gradients(model, plain_loss(model))
    kept = [name for name in expected if name.startswith(("blocks.2", "blocks.3", "norm", "head"))]
    assert_same_gradients({n: found[n] for n in kept}, {n: expected[n] for n in kept})


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_switched_on_between_steps(reentrant):
    plain, model = tiny_llama(BLOCKS), tiny_llama(BLOCKS)
    expected = take_gradients(plain, llama_loss(plain))
    handle = enabled_after_one_forward(model, llama_loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with handle.fixed(bottom_dropped(4)):
        found = take_gradients(model, llama_loss(model))
    kept = [name for name in expected if name.startswith(("model.layers.2", "model.layers.3"))]
    assert kept
    assert_same_gradients({n: found[n] for n in kept}, {n: expected[n] for n in kept})


def test_a_reentrant_checkpoint_switched_on_late_warns_and_costs_one_step(caplog):
    model = plain_net(blocks=BLOCKS)
    handle = enabled_after_one_forward(model, plain_loss)
    model.kind = "reentrant"
    with handle.fixed(bottom_dropped(4)):
        with caplog.at_level(logging.WARNING, "dropbp"):
            take_gradients(model, plain_loss(model))
        assert [r.message for r in caplog.records if "ran without recording" in r.message]
        later = take_gradients(model, plain_loss(model))
    assert later["blocks.2.mlp.0.weight"] is not None


def test_random_steps_equal_those_with_the_whole_stream():
    """Losses and parameters over steps of drawn masks, to the bit, against a model whose stream never ends."""
    ended, whole = plain_net(blocks=BLOCKS), plain_net(blocks=BLOCKS)
    handles = [enabled(model, seed=3) for model in (ended, whole)]
    handles[1].engine.runtime.unrecorded_block = True
    ends = set()
    for model in (ended, whole):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for step in range(20):
            loss = plain_loss(model, plain_batch(step))
            loss.backward()
            ends.add((model is ended, handles[0 if model is ended else 1].engine.truncation.is_allowed()))
            optimizer.step()
            optimizer.zero_grad()
    assert ends == {(True, True), (False, False)}
    assert handles[0].mask == handles[1].mask
    for one, other in zip(ended.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_compiled_model_keeps_its_number_of_graphs():
    torch._dynamo.reset()
    model = tiny_llama(BLOCKS)
    handle = enabled(model)
    dropbp.compile_blocks(handle, backend="eager")
    for count in (0, 3, 4, 8):
        with handle.fixed(bottom_dropped(count)):
            llama_loss(model, tokens()).backward()
    assert not handle.engine.truncation.is_allowed()
    torch._dynamo.reset()


def test_a_stream_that_requires_gradients_itself_is_left_alone():
    model = tiny_llama(BLOCKS)
    model.enable_input_require_grads()
    handle = enabled_after_one_forward(model, llama_loss)
    with handle.fixed(bottom_dropped(8)):
        llama_loss(model).backward()
    assert gradients(model)["lm_head.weight"] is not None
