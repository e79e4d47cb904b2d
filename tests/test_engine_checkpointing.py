"""Gradient checkpointing: a recomputation sees the mask of its own forward; dropped blocks are not recomputed."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dropbp
from tests.common.engine_models import (
    Block,
    assert_same_gradients,
    llama_loss,
    masks,
    paper_gradients,
    plain_batch,
    plain_loss,
    plain_net,
    take_gradients,
    tiny_llama,
    tokens,
)

KINDS = ["reentrant", "non-reentrant"]
both_kinds = pytest.mark.parametrize("kind", KINDS)


def checkpointed_llama(kind, **options):
    model = tiny_llama(**options)
    _switch_on(model, kind)
    return model


def _switch_on(model, kind):
    _checkpointing(model, kind)
    model.enable_input_require_grads()


def _checkpointing(model, kind):
    """Under its name of transformers 5.23, and under that of before."""
    options, name = {"use_reentrant": kind == "reentrant"}, "activation_checkpointing"
    if not hasattr(model, f"{name}_enable"):
        name = "gradient_checkpointing"
    if kind is None:
        getattr(model, f"{name}_disable")()
    else:
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": options})


def _counted(modules):
    """How often each module was called."""
    counts = [0] * len(modules)
    for i, module in enumerate(modules):
        module.register_forward_pre_hook(functools.partial(_count, counts, i))
    return counts


def _count(counts, i, module, args):
    counts[i] += 1


@both_kinds
def test_llama_gradients_are_right_for_every_mask(kind):
    plain, model = tiny_llama(), checkpointed_llama(kind)
    handle = dropbp.enable(model)
    names = [branch.name for branch in handle.branches]
    for mask in masks(4):
        with handle.fixed(mask):
            got = take_gradients(model, llama_loss(model))
        assert_same_gradients(got, paper_gradients(plain, names, mask, llama_loss))


@both_kinds
def test_users_model_gradients_are_right_for_every_mask(kind):
    plain, model = plain_net(blocks=2), plain_net(blocks=2, kind=kind)
    handle = dropbp.enable(model, example_inputs=plain_batch())
    names = [branch.name for branch in handle.branches]
    for mask in (*masks(4), *masks(4)):  # twice: short cuts are learned in the first round
        with handle.fixed(mask):
            got = take_gradients(model, plain_loss(model))
        assert_same_gradients(got, paper_gradients(plain, names, mask, plain_loss))


@both_kinds
@pytest.mark.parametrize("make", ["llama", "plain"])
def test_several_forwards_before_one_backward_recompute_with_their_own_masks(kind, make):
    if make == "llama":
        plain, model, loss = tiny_llama(), checkpointed_llama(kind), llama_loss
        batches, handle = [tokens(seed) for seed in range(3)], dropbp.enable(model)
    else:
        plain, model, loss = plain_net(blocks=2), plain_net(blocks=2, kind=kind), plain_loss
        batches, handle = [plain_batch(seed) for seed in range(3)], dropbp.enable(model, example_inputs=plain_batch())
    names = [branch.name for branch in handle.branches]
    drawn = [(True, True, False, False), (False, False, True, True), (True, False, False, True)]
    losses = []
    for mask, batch in zip(drawn, batches, strict=True):
        with handle.fixed(mask):
            losses.append(loss(model, batch))
    with torch.no_grad():
        loss(model)  # an evaluation in between changes nothing
    got = take_gradients(model, sum(losses))
    parts = [
        paper_gradients(plain, names, mask, lambda m, b=batch: loss(m, b))
        for mask, batch in zip(drawn, batches, strict=True)
    ]
    for name, gradient in got.items():
        expected = sum(part[name] for part in parts if part[name] is not None)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@both_kinds
def test_a_fully_dropped_llama_block_is_not_recomputed(kind):
    model = checkpointed_llama(kind, layers=3)
    counts = _counted([layer.mlp for layer in model.model.layers])
    handle = dropbp.enable(model)
    counts[:] = [0] * 3
    with handle.fixed((True, True, False, False, True, True)):
        take_gradients(model, llama_loss(model))
    assert counts == [1, 2, 1]


@both_kinds
def test_checkpointing_switched_on_and_off_after_enable_is_seen(kind):
    model = tiny_llama(layers=2)
    counts = _counted([layer.mlp for layer in model.model.layers])
    handle = dropbp.enable(model)
    _switch_on(model, kind)
    counts[:] = [0] * 2
    with handle.fixed((True, True, False, False)):
        take_gradients(model, llama_loss(model))
        assert counts == [1, 2]
        _checkpointing(model, None)
        take_gradients(model, llama_loss(model))
        assert counts == [2, 3]


@both_kinds
def test_a_fully_dropped_block_of_a_users_model_is_not_recomputed(kind):
    model = plain_net(kind=kind)
    counts = _counted([block.mlp for block in model.blocks])
    handle = dropbp.enable(model, example_inputs=plain_batch())
    with handle.fixed((True, True, False, False, True, True)):
        take_gradients(model, plain_loss(model))  # a reentrant checkpoint runs the block once to see that it only adds
        counts[:] = [0] * 3
        take_gradients(model, plain_loss(model))
    assert counts == [1, 2, 1]


def test_a_half_dropped_block_stops_recomputing_where_it_can():
    model = plain_net(blocks=2, kind="non-reentrant")
    attention, mlp = (_counted([getattr(block, name) for block in model.blocks]) for name in ("mix", "mlp"))
    handle = dropbp.enable(model, example_inputs=plain_batch())
    attention[:], mlp[:] = [0, 0], [0, 0]
    with handle.fixed((False, True, True, False)):
        take_gradients(model, plain_loss(model))
    assert mlp == [1, 2]  # the first block's MLP comes after all that its backward needs
    assert attention == [2, 2]  # the second block's attention makes what its MLP needs


class PostNormBlock(Block):
    def forward(self, x_BSD):
        x_BSD = self.norm1(x_BSD + self.mix(x_BSD))
        return self.norm2(x_BSD + self.mlp(x_BSD))


@both_kinds
def test_blocks_that_do_more_than_add_are_recomputed(kind):
    torch.manual_seed(1)
    plain, model = plain_net(blocks=0), plain_net(blocks=0, kind=kind)
    plain.blocks, model.blocks = (nn.ModuleList(PostNormBlock(8) for _ in range(2)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    handle = dropbp.enable(model, example_inputs=plain_batch())
    names = [branch.name for branch in handle.branches]
    for mask in (*masks(4), *masks(4)):
        with handle.fixed(mask):
            got = take_gradients(model, plain_loss(model))
        assert_same_gradients(got, paper_gradients(plain, names, mask, plain_loss))


class Segments(nn.Module):
    """Checkpoints two blocks together, and each of them again inside, in any kinds."""

    def __init__(self, outer, inner) -> None:
        super().__init__()
        self.net, self.outer, self.inner = plain_net(blocks=4), outer, inner

    def forward(self, x_BSD):
        x_BSD = self.net.stem(x_BSD)
        for start in (0, 2):
            segment = functools.partial(self._segment, start)
            x_BSD = self._call(self.outer, segment, x_BSD)
        return self.net.head(self.net.norm(x_BSD))

    def _segment(self, start, x_BSD):
        for block in self.net.blocks[start : start + 2]:
            x_BSD = self._call(self.inner, block, x_BSD)
        return x_BSD

    def _call(self, kind, function, x_BSD):
        if kind is None or not self.training:
            return function(x_BSD)
        return checkpoint(function, x_BSD, use_reentrant=kind == "reentrant")


@both_kinds
@pytest.mark.parametrize("inner", [None, *KINDS])
def test_checkpoints_of_several_blocks_and_in_one_another(kind, inner):
    plain, model = Segments(None, None).train(), Segments(kind, inner).train()
    handle = dropbp.enable(model, example_inputs=plain_batch())
    names = [branch.name for branch in handle.branches]
    cases = [(0, 0, 1, 1, 0, 0, 1, 1), (1, 1, 0, 0, 1, 1, 0, 0), (1, 0, 0, 1, 1, 0, 0, 1), (0, 1, 1, 1, 1, 0, 1, 0)]
    for mask in cases * 2:
        with handle.fixed(mask):
            loss = plain_loss(model)
        with handle.fixed([True] * 8):
            plain_loss(model)  # a later forward must not matter
        got = take_gradients(model, loss)
        assert_same_gradients(got, paper_gradients(plain, names, mask, plain_loss))
    assert not handle.engine.runtime.tasks


@both_kinds
def test_checkpointing_the_whole_model_draws_one_mask(kind):
    model = plain_net(blocks=2)
    handle = dropbp.enable(model, example_inputs=plain_batch())
    outer = nn.Linear(8, 8)
    for forwards in range(1, 4):
        loss = checkpoint(model, outer(plain_batch()), use_reentrant=kind == "reentrant").square().mean()
        model.zero_grad()
        loss.backward()
        assert handle.report()["forwards"] == forwards
        for branch, dropped in zip(handle.branches, handle.mask, strict=True):
            parameters = [p for name in branch.modules for p in model.get_submodule(name).parameters()]
            assert all((p.grad is None) == dropped for p in parameters)


@both_kinds
def test_evaluation_forwards_are_recomputed_whole(kind):
    plain, model = plain_net(blocks=2), plain_net(blocks=2, kind=kind)
    handle = dropbp.enable(model, example_inputs=plain_batch(), scaling="unbiased")
    with handle.fixed([True] * 4):
        take_gradients(model, plain_loss(model))
        model.eval().in_evaluation_too = True
        assert_same_gradients(take_gradients(model, plain_loss(model)), take_gradients(plain, plain_loss(plain)))


def test_checkpoint_functions_are_put_back_by_remove():
    model = checkpointed_llama("non-reentrant")
    before = [layer._gradient_checkpointing_func for layer in model.model.layers]
    handle = dropbp.enable(model)
    llama_loss(model)
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] != before
    handle.remove()
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == before


@both_kinds
def test_random_states_are_as_without_dropping(kind):
    model = checkpointed_llama(kind, attention_dropout=0.4)
    torch.manual_seed(4)
    expected = llama_loss(model)
    expected.backward()
    after = torch.get_rng_state()
    with dropbp.enable(model) as handle, handle.fixed((True, True, False, True)):
        torch.manual_seed(4)
        loss = llama_loss(model)
        loss.backward()
    assert torch.equal(loss, expected) and torch.equal(torch.get_rng_state(), after)


class BranchCheckpoints(nn.Module):
    """Checkpoints each branch, norm and all, rather than the block."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.net, self.kind = plain_net(blocks=2), kind

    def forward(self, x_BSD):
        x_BSD = self.net.stem(x_BSD)
        for block in self.net.blocks:
            x_BSD = x_BSD + self._call(lambda y, b=block: b.mix(b.norm1(y)), x_BSD)
            x_BSD = x_BSD + self._call(block.mlp, block.norm2(x_BSD)) * 0.5
        return self.net.head(self.net.norm(x_BSD))

    def _call(self, function, x_BSD):
        if self.kind is None or not self.training:
            return function(x_BSD)
        return checkpoint(function, x_BSD, use_reentrant=self.kind == "reentrant")


@both_kinds
def test_checkpoints_around_single_branches(kind):
    plain, model = BranchCheckpoints(None).train(), BranchCheckpoints(kind).train()
    handle = dropbp.enable(model, example_inputs=plain_batch())
    names = [branch.name for branch in handle.branches]
    for mask in masks(4):
        with handle.fixed(mask):
            got = take_gradients(model, plain_loss(model))
        assert_same_gradients(got, paper_gradients(plain, names, mask, plain_loss))


@both_kinds
def test_scales_outside_of_modules_are_frozen_in_the_recomputation_too(kind):
    """BEiT's layers multiply branches by parameters of their own."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BeitConfig(
        **sizes, image_size=8, patch_size=4, layer_scale_init_value=0.5, drop_path_rate=0.0,
        out_indices=[1, 2], use_auxiliary_head=False,
    )  # fmt: skip
    models = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = transformers.BeitForImageClassification(config).train()
        models.append(model)
        if checkpointed:
            _checkpointing(model, kind)
    handles = [dropbp.enable(model) for model in models]
    pixels = torch.randn(2, 3, 8, 8)
    for mask in masks(4):
        found = []
        for model, handle in zip(models, handles, strict=True):
            with handle.fixed(mask):
                found.append(take_gradients(model, model(pixel_values=pixels).logits.square().mean()))
        assert_same_gradients(found[1], found[0])
        scales = [gradient for name, gradient in found[1].items() if "lambda_" in name]
        assert [gradient is None for gradient in scales] == list(mask)


def test_a_block_recomputed_for_memory_meets_the_cache_as_it_was():
    """transformers' models make a cache in training too unless told not to; a padded batch shows its length."""
    attention = torch.ones(2, 6, dtype=torch.long)
    attention[1, 4:] = 0

    def loss(model):
        return model(input_ids=tokens(), labels=tokens(), attention_mask=attention, use_cache=True).loss

    plain, model = tiny_llama(4), tiny_llama(4)
    handle = dropbp.enable(model, max_activations=0.3)
    with handle.fixed((False,) * 8):
        got = take_gradients(model, loss(model))
    assert_same_gradients(got, take_gradients(plain, loss(plain)))
