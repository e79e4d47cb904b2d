"""The activation cache: rows seen before start at the border, exactly, or it says by name why they do not."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
import torch
from dropbp.backends.cpu import CpuDevice
from torch import nn

import dropbp
from dropbp.memory import track_tensor_bytes
from dropbp.session import Handle
from tests.common.engine_models import (
    Block,
    PlainNet,
    assert_same_gradients,
    llama_loss,
    plain_net,
    take_gradients,
    tiny_llama,
    tokens,
)

BLOCKS = 6
ROWS = 8


def llama(**changes: Any) -> Any:
    return tiny_llama(layers=BLOCKS, **changes)


def cached(model: nn.Module, drop_rate: float = 0.75, **options: Any) -> Handle:
    return dropbp.enable(model, drop_rate=drop_rate, **{"steps": 12, "activation_cache": True, **options})


def found(handle: Handle) -> dict[str, Any]:
    return handle.report()["activation_cache"]


def padded(rows: list[torch.Tensor], side: str, length: int | None = None) -> dict[str, torch.Tensor]:
    """A batch as a collator makes it: padded to its longest row, or to a length."""
    length = length or max(map(len, rows))
    ids, mask, labels = [], [], []
    for row in rows:
        gap = length - len(row)
        before, after = (gap, 0) if side == "left" else (0, gap)
        ids.append(torch.cat([torch.zeros(before), row, torch.zeros(after)]).long())
        mask.append(torch.cat([torch.zeros(before), torch.ones(len(row)), torch.zeros(after)]).long())
        labels.append(torch.where(mask[-1] == 0, -100, ids[-1]))
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask), "labels": torch.stack(labels)}


def data(rows: int = ROWS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 12, (rows,), generator=generator).tolist()
    return [torch.randint(1, 32, (length,), generator=generator) for length in lengths]


def epoch_order(epoch: int, rows: int = ROWS) -> list[int]:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(epoch)).tolist()


def train(model: nn.Module, handle: Handle, side: str, epochs: int = 3, size: int = 2) -> list[float]:
    """A loop as anyone writes it: shuffled, padded to the longest row of each batch."""
    optimizer, rows, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), data(), []
    for epoch in range(epochs):
        order = epoch_order(epoch)
        for start in range(0, ROWS, size):
            loss = model(**padded([rows[i] for i in order[start : start + size]], side)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("side", ["left", "right"])
def test_from_the_second_epoch_every_row_is_found_and_the_training_is_the_same(side):
    runs = {}
    for where in (None, True):
        model = llama()
        with cached(model, activation_cache=where) as handle:
            runs[where] = train(model, handle, side), model
            report = found(handle) if where else {}
    assert report["looked_up"] == 3 * ROWS and report["hits"] == 2 * ROWS and report["rows"] == ROWS
    assert report["refused"] is None and not report["objections"]
    assert report["forwards_shortened"] >= 5
    torch.testing.assert_close(runs[True][0], runs[None][0], rtol=1e-4, atol=1e-5)
    for one, other in zip(runs[True][1].parameters(), runs[None][1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def calls_of(model: nn.Module) -> list[int]:
    """How often each block's attention has run."""
    counts = [0] * len(model.model.layers)

    def count(place: int) -> None:
        counts[place] += 1

    for place, layer in enumerate(model.model.layers):
        original = layer.self_attn.q_proj.forward
        layer.self_attn.q_proj.forward = lambda x, p=place, o=original: (count(p), o(x))[1]
    return counts


def test_blocks_below_the_border_do_not_run():
    model = llama()
    counts = calls_of(model)
    with cached(model) as handle:
        for _ in range(3):  # stored, run both ways, shortened
            llama_loss(model)
        before = list(counts)
        llama_loss(model)
        border = found(handle)["border"]
    assert 0 < border < BLOCKS
    assert [now - then for now, then in zip(counts, before, strict=True)] == [0] * border + [1] * (BLOCKS - border)


@pytest.mark.parametrize("mode", ["plain", "reentrant", "not reentrant", "compiled"])
def test_a_shortened_step_has_the_gradients_of_a_whole_one(mode):
    losses, grads = {}, {}
    for where in (None, True):
        model = llama()
        if "reentrant" in mode:
            model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        with cached(model, activation_cache=where) as handle:
            if mode == "compiled":
                dropbp.compile_blocks(handle, backend="eager")
            for _ in range(5):
                loss = llama_loss(model)
                grads[where] = take_gradients(model, loss)
            losses[where] = loss.item()
            shortened = found(handle)["forwards_shortened"] if where else 0
    assert shortened == 3
    assert losses[True] == pytest.approx(losses[None], rel=1e-6)
    assert_same_gradients(grads[True], grads[None])


def test_a_row_moves_from_an_old_border_to_the_new_one():
    model = llama()
    with cached(model, drop_rate=0.5, steps=40) as handle:
        borders = []
        for _ in range(40):
            llama_loss(model).backward()
            borders.append(found(handle)["border"])
        report = found(handle)
    assert borders == sorted(borders) and borders[-1] > borders[0] > 0
    assert report["rows"] == 2 and report["hits"] == 78 and report["refused"] is None


def test_a_compiled_model_runs_in_full_and_says_why(fresh_compiler, caplog):
    model = llama()
    with cached(model) as handle:
        compiled = torch.compile(model, backend="eager")
        for _ in range(3):
            llama_loss(compiled).backward()
        assert found(handle)["forwards_shortened"] == 0
        assert any("compile_blocks" in reason for reason in found(handle)["objections"])
    assert caplog.text.count("dropbp.compile_blocks(handle)") == 1


def test_weights_under_zero_3_switch_the_cache_off():
    model = llama()
    with cached(model) as handle:
        for _ in range(3):
            llama_loss(model).backward()
        assert found(handle)["forwards_shortened"] == 1
        next(model.parameters()).ds_id = 0  # DeepSpeed's mark
        llama_loss(model).backward()
        assert "ZeRO-3" in found(handle)["refused"] and found(handle)["rows"] == 0


def test_a_lazy_device_is_refused():
    class Lazy(CpuDevice):
        name = "hpu"

        def is_lazy(self):
            return True

    with pytest.raises(dropbp.ConfigError, match="activation_cache does not work on hpu"):
        dropbp.enable(llama(), device=Lazy(), activation_cache=True)


def test_rows_of_one_batch_may_enter_at_different_borders():
    rows = data(4)
    model, plain = llama(), llama()
    with cached(model, steps=20) as handle, cached(plain, steps=20, activation_cache=None):
        for step in range(20):  # the first two rows come early, the others late
            batch = padded(rows[:2] if step < 8 else rows[2:] if step < 14 else rows, "right")
            losses = [each(**batch).loss for each in (model, plain)]
            assert_same_gradients(take_gradients(model, losses[0]), take_gradients(plain, losses[1]))
        report = found(handle)
    assert report["rows"] == 4 and report["refused"] is None and report["forwards_shortened"] > 10


def test_optimizer_states_of_parameters_that_never_train_again_are_freed():
    model, plain = llama(), llama()
    with cached(model, drop_rate=0.5, steps=40) as handle, cached(plain, 0.5, steps=40, activation_cache=None):
        optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (model, plain)]
        handle.note_optimizer(optimizers[0])
        for _ in range(40):
            for each, optimizer in zip((model, plain), optimizers, strict=True):
                llama_loss(each).backward()
                optimizer.step()
                optimizer.zero_grad()
        report = found(handle)
    held = [sum(t.nbytes for state in o.state.values() for t in state.values()) for o in optimizers]
    assert report["optimizer_bytes_freed"] > 0 and held[0] + report["optimizer_bytes_freed"] == held[1]
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_take_the_bytes_that_plan_foretold(dtype):
    model = llama().to(dtype)
    row_bytes = dropbp.plan(model, 2, 24, drop_rates=(0.75,), measure=False).cache_row_bytes
    with cached(model) as handle:
        for ids in tokens(rows=ROWS, length=24).split(2):
            llama_loss(model, ids).backward()
        report = found(handle)
    assert report["rows"] == ROWS and report["bytes"] == pytest.approx(ROWS * row_bytes, rel=0.05)


@pytest.mark.parametrize("lora", [False, True])
def test_no_step_needs_more_device_memory_than_without_the_cache(lora, tmp_path):
    peaks: dict[bool, list[int]] = {False: [], True: []}
    for uses_cache, each in peaks.items():
        model = with_lora(llama()) if lora else llama()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with cached(model, activation_cache=tmp_path if uses_cache else None):  # a file is no memory of the device
            for order in map(epoch_order, range(3)):
                for ids in tokens(rows=ROWS, length=24)[order].split(2):
                    with track_tensor_bytes(model, optimizer) as tracked:
                        llama_loss(model, ids).backward()
                        optimizer.step()
                        optimizer.zero_grad()
                    each.append(tracked.peak_bytes)
    assert all(here <= there for here, there in zip(peaks[True], peaks[False], strict=True))


# -- what changes below the border


def test_states_are_dropped_when_weights_below_the_border_change():
    model = llama()
    with cached(model) as handle:
        for _ in range(3):
            llama_loss(model)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
        changed = llama_loss(model).item()
        hits = found(handle)["hits"]
    assert hits == 4
    assert changed == llama_loss(model).item()


@pytest.mark.parametrize("change", ["load_state_dict", "data", "embedding", "parameter", "bias"])
def test_other_changes_of_weights_are_noticed(change):
    model, other = llama(), llama()
    up, other_up = model.model.layers[0].mlp.up_proj, other.model.layers[0].mlp.up_proj
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    with cached(model):
        for _ in range(3):
            known = llama_loss(model).item()
        if change == "load_state_dict":
            model.load_state_dict(other.state_dict())
        elif change == "data":
            up.weight.data = other_up.weight.data
        elif change == "parameter":
            up.weight = other_up.weight
        elif change == "bias":
            up.bias = nn.Parameter(torch.ones(up.out_features), requires_grad=False)
        else:
            model.model.embed_tokens.weight.data = other.model.embed_tokens.weight.data
        changed = llama_loss(model).item()
    assert known != changed == llama_loss(model).item()


def test_weights_above_the_border_may_change_until_the_border_passes_them():
    handle = cached(llama())
    prefix, blocks = handle.cache.prefix, handle.cache.prefix.blocks

    def change(place: int) -> None:
        with torch.no_grad():
            next(blocks[place].parameters()).add_(1)

    def changed(border: int) -> int | None:
        return prefix.changed(prefix.current_tensors(), border)

    changed(2)
    change(3)
    assert changed(2) is None, "it lies above"
    assert changed(4) is None, "nothing was stored above it before"
    change(3)
    assert changed(2) is None and changed(4) == 3, "a look at less forgets nothing"
    change(1), change(3)
    assert changed(4) == 1 and changed(4) is None


def test_nothing_trains_below_the_border_and_something_trains_at_it(monkeypatch):
    """Whatever is frozen in the meantime, and whatever a step drops."""
    model, chance, floors = llama(), random.Random(0), []
    with cached(model, steps=60) as handle:
        prefix = handle.cache.prefix
        original = prefix.frozen_border
        monkeypatch.setattr(prefix, "frozen_border", lambda *args: floors.append(original(*args)) or floors[-1])
        for _ in range(60):
            for parameter in prefix.blocks[chance.randrange(BLOCKS)].parameters():
                parameter.requires_grad_(chance.random() < 0.3)
            floors.clear()
            gradients = take_gradients(model, llama_loss(model))
            trained = [p for p, block in enumerate(prefix.blocks) if any_gradient(block, gradients, model)]
            stem = gradients["model.embed_tokens.weight"] is not None
            assert floors[0] == (0 if stem else min(trained, default=BLOCKS))


def any_gradient(block: nn.Module, gradients: Any, model: nn.Module) -> bool:
    inside = set(map(id, block.parameters()))
    return any(gradients[name] is not None for name, p in model.named_parameters() if id(p) in inside)


def test_a_given_mask_that_trains_the_bottom_runs_in_full_with_its_gradients():
    model, plain = llama(), llama()
    with cached(model) as handle, cached(plain, activation_cache=None) as other:
        for _ in range(3):
            llama_loss(model), llama_loss(plain)
        none = [False] * len(handle.branches)
        with handle.fixed(none), other.fixed(none):
            got, expected = (take_gradients(each, llama_loss(each)) for each in (model, plain))
    assert all(gradient is not None for gradient in expected.values())
    assert_same_gradients(got, expected)


def test_new_rates_lower_the_border():
    model = llama()
    with cached(model, steps=None, rates=[1.0] * 8 + [0.0] * 4, drop_rate=2 / 3) as handle:
        for _ in range(3):
            llama_loss(model)
        assert found(handle)["border"] == 4 and found(handle)["forwards_shortened"] == 1
        handle.set_rates([1.0] * 4 + [0.0] * 8)
        take_gradients(model, llama_loss(model))
        assert found(handle)["border"] == 2
        assert model.model.layers[2].mlp.up_proj.weight.grad is not None


def test_a_part_frozen_by_the_user_lies_below_the_border_until_it_is_unfrozen():
    model = llama()
    for module in (model.model.embed_tokens, *model.model.layers[:3]):
        module.requires_grad_(False)
    with cached(model, drop_rate=0.0, steps=None) as handle:
        for _ in range(3):
            take_gradients(model, llama_loss(model))
        assert found(handle)["border"] == 3 and found(handle)["forwards_shortened"] == 1
        model.model.layers[1].requires_grad_(True)
        grads = take_gradients(model, llama_loss(model))
        assert grads["model.layers.1.mlp.up_proj.weight"] is not None
        assert found(handle)["border"] == 1


def test_calibration_is_not_shortened():
    measured = {}
    for where in (None, True):
        model = llama()
        with cached(model, activation_cache=where) as handle:
            for _ in range(3):
                llama_loss(model)
            measured[where] = handle.calibrate(lambda model=model: llama_loss(model), method="exact").sensitivities
    assert measured[True] == pytest.approx(measured[None], rel=1e-4)


# -- evaluation and generation


def test_evaluation_finds_rows_and_a_recorded_one_trains_everything():
    model = llama()
    with cached(model) as handle:
        llama_loss(model)
        model.eval()
        with torch.no_grad():
            losses = [llama_loss(model).item() for _ in range(4)]
        assert found(handle)["forwards_shortened"] >= 2
        recorded = take_gradients(model, llama_loss(model))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    plain = llama().eval()
    assert_same_gradients(recorded, take_gradients(plain, llama_loss(plain)))


def test_generation_is_as_without_the_cache():
    model = llama(use_cache=True)
    prompt = tokens(rows=1)
    expected = model.eval().generate(prompt, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(prompt))
    model.train()
    with cached(model):
        for _ in range(3):
            llama_loss(model, prompt)
        model.eval()
        got = model.generate(prompt, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(prompt))
        with torch.no_grad():
            caches = model(input_ids=prompt).past_key_values
    assert torch.equal(got, expected)
    assert all(layer.keys.shape[-2] == prompt.shape[1] for layer in caches.layers)


def test_requested_hidden_states_equal_those_of_a_full_forward(caplog):
    model = llama()
    batch = tokens()
    expected = llama()(input_ids=batch, output_hidden_states=True).hidden_states
    with cached(model) as handle:
        for _ in range(3):
            llama_loss(model)
        for _ in range(6):
            states = model(input_ids=batch, labels=batch, output_hidden_states=True).hidden_states
            for state, plain in zip(states, expected, strict=True):
                torch.testing.assert_close(state, plain)
        hits = found(handle)["forwards_shortened"]
        llama_loss(model)
        assert found(handle)["forwards_shortened"] == hits + 1, "other calls still use the cache"
    assert "hidden_states" in caplog.text


# -- refusals


class NetWithMemory(PlainNet):
    """Every block above the first also reads what the first one made."""

    def forward(self, x_BSD):
        x_BSD = self.stem(x_BSD)
        memory = None
        for block in self.blocks:
            x_BSD = block(x_BSD) if memory is None else block(x_BSD) + 0.1 * memory.detach().tanh()
            memory = x_BSD if memory is None else memory
        return self.head(self.norm(x_BSD))


class BlockOfNeighbours(Block):
    """Looks at the other rows of its batch."""

    def forward(self, x_BSD):
        return super().forward(x_BSD - 0.5 * x_BSD.mean(dim=0, keepdim=True))


class BlockWithDropout(Block):
    def __init__(self, width):
        super().__init__(width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x_BSD):
        return super().forward(self.drop(x_BSD))


class BlockWithStatistics(Block):
    def __init__(self, width):
        super().__init__(width)
        self.whiten = nn.BatchNorm1d(4)

    def forward(self, x_BSD):
        return super().forward(self.whiten(x_BSD))


def net_of(kind: type[nn.Module], at: int = 1) -> PlainNet:
    net = plain_net(blocks=BLOCKS)
    net.blocks[at] = kind(8)
    return net.train()


def batches_of_rows(count: int = 6) -> list[torch.Tensor]:
    rows = torch.randn(8, 4, 8, generator=torch.Generator().manual_seed(4))
    return [rows[torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:3]] for seed in range(count)] * 3


REFUSED = {
    "memory": (lambda: _filled(NetWithMemory(blocks=BLOCKS)), "its output output comes from there"),
    "neighbours": (lambda: net_of(BlockOfNeighbours), "mix the rows of a batch"),
    "dropout": (lambda: net_of(BlockWithDropout), "blocks.1.drop draws random numbers"),
    "statistics": (lambda: net_of(BlockWithStatistics), "blocks.1 holds a BatchNorm1d"),
}


def _filled(net: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.train()


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_states_depend_on_more_than_the_row_is_refused_by_name(name, caplog):
    make, said = REFUSED[name]
    losses = {}
    for where in (None, True):
        torch.manual_seed(7)
        net = make()
        torch.manual_seed(8)
        with cached(net, activation_cache=where, example_inputs=batches_of_rows()[0]) as handle:
            losses[where] = [net(batch).square().mean().item() for batch in batches_of_rows()]
            report = found(handle) if where else {}
    assert said in caplog.text
    assert report["forwards_shortened"] == 0
    assert losses[True] == pytest.approx(losses[None], rel=1e-5)


def test_dropout_is_refused_in_training_only():
    net = net_of(BlockWithDropout)
    batch = batches_of_rows()[0]
    with cached(net, example_inputs=batch) as handle:
        for _ in range(3):
            net(batch)
        assert found(handle)["rows"] == 0
        net.eval()
        with torch.no_grad():
            outputs = [net(batch) for _ in range(4)]
        assert found(handle)["forwards_shortened"] >= 2
    torch.testing.assert_close(outputs[-1], outputs[0])


def test_a_forward_that_exits_below_the_border_runs_whole(caplog):
    class EarlyExit(PlainNet):
        depth = BLOCKS

        def forward(self, x_BSD):
            x_BSD = self.stem(x_BSD)
            for block in self.blocks[: self.depth]:
                x_BSD = block(x_BSD)
            return self.head(self.norm(x_BSD))

    net, batch = EarlyExit(blocks=BLOCKS).train(), batches_of_rows()[0]
    net.depth = 1
    exited = net(batch)
    net.depth = BLOCKS
    with cached(net, example_inputs=batch) as handle:
        for _ in range(4):
            net(batch)
        assert found(handle)["forwards_shortened"] >= 2 and found(handle)["border"] > 1
        net.depth = 1
        torch.testing.assert_close(net(batch), exited)
    assert "in an early exit" in caplog.text


def test_a_hook_of_the_user_sees_every_forward():
    model = llama()
    seen = []
    with cached(model) as handle:
        for _ in range(3):
            llama_loss(model)
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
        for _ in range(3):
            llama_loss(model)
        hook.remove()
        before = found(handle)["forwards_shortened"]
        llama_loss(model)
        assert found(handle)["forwards_shortened"] == before + 1
    assert len(seen) == 3


def test_an_input_that_requires_a_gradient_gets_it():
    model = llama()
    embeds = model.model.embed_tokens(tokens()).detach()
    with cached(model) as handle:
        for _ in range(3):
            model(inputs_embeds=embeds, labels=tokens())
        assert found(handle)["forwards_shortened"] == 1
        asking = embeds.clone().requires_grad_()
        model(inputs_embeds=asking, labels=tokens()).loss.backward()
    assert asking.grad is not None and asking.grad.abs().sum() > 0


# -- the store


def test_a_limit_in_bytes_holds_and_what_is_stored_is_used():
    model = llama()
    batches = [tokens(seed=seed) for seed in range(4)]
    one = tokens().numel() * 16 * 4  # width 16 in float32
    with cached(model, activation_cache_limit=2 * one, drop_rate=0.8, rates="freeze") as handle:
        for _ in range(3):
            for batch in batches:
                llama_loss(model, batch)
        report = found(handle)
    assert report["bytes"] == 2 * one and report["rows"] == 4
    assert report["hits"] == 2 * 4


def test_rows_that_are_not_finite_are_not_stored():
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    batch = tokens().clone()
    batch[0, 0], batch[1] = 5, batch[1].clamp(min=6)
    with cached(model) as handle:
        for _ in range(4):
            llama_loss(model, batch)
        report = found(handle)
    assert report["rows"] == 1 and report["hits"] == 0


def test_remove_leaves_no_trace():
    model = llama()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    handle = cached(model)
    for _ in range(3):
        llama_loss(model)
    handle.remove()
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
    assert handle.cache is not None and handle.cache.store.rows == 0


def test_without_the_option_nothing_is_there():
    model = llama()
    with cached(model, activation_cache=None) as handle:
        llama_loss(model)
        assert "activation_cache" not in handle.report()
        assert not any("_dropbp_cache" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("value", ["", 3, 1.5, []])
def test_a_wrong_place_is_refused(value):
    with pytest.raises(dropbp.ConfigError, match="activation_cache"):
        cached(llama(), activation_cache=value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_wrong_limit_is_refused(value):
    with pytest.raises(dropbp.ConfigError, match="activation_cache_limit"):
        cached(llama(), activation_cache_limit=value)


# -- adapters, precision, forms of blocks


def with_lora(model: nn.Module, dropout: float = 0.0) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    options = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(lora_dropout=dropout, **options)).train()


def test_a_forward_without_adapters_does_not_use_states_of_one_with_them():
    model = with_lora(llama())
    with cached(model) as handle:
        for _ in range(4):
            known = llama_loss(model).item()
        assert found(handle)["forwards_shortened"] >= 2
        with model.disable_adapter(), torch.no_grad():
            plain = [llama_loss(model).item() for _ in range(4)]
        assert llama_loss(model).item() == pytest.approx(known, rel=1e-6)
    assert abs(plain[0] - known) > 1e-4 and plain == pytest.approx([plain[0]] * 4, rel=1e-6)


@pytest.mark.parametrize("kind", ["IA3Config", "LNTuningConfig", "HRAConfig"])
def test_adapters_of_every_kind_have_states_of_their_own(kind):
    """Some kinds have no `scaling`."""
    import peft

    targets = ["input_layernorm"] if kind == "LNTuningConfig" else ["k_proj", "down_proj"]
    options = {"IA3Config": {"feedforward_modules": ["down_proj"]}, "HRAConfig": {"r": 2}}
    config = getattr(peft, kind)(target_modules=targets, **options.get(kind, {}))
    model = peft.get_peft_model(llama(), config).train()
    model.add_adapter("second", config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    with cached(model, steps=16) as handle:
        losses = {}
        for step in range(12):
            name = "second" if step % 3 == 2 else "default"
            model.set_adapter(name)
            losses.setdefault(name, []).append(llama_loss(model).item())
        with model.disable_adapter():
            losses["none"] = [llama_loss(model).item() for _ in range(4)]
        assert found(handle)["refused"] is None and found(handle)["forwards_shortened"] > 6
    assert len({round(each[0], 4) for each in losses.values()}) == 3
    for each in losses.values():
        assert each == pytest.approx([each[0]] * len(each), rel=1e-6)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_hook_on_what_feeds_the_blocks_keeps_forwards_whole(tuning):
    """It may add what the cache does not know, here a vector that changes by hand."""
    model = llama() if tuning == "full" else with_lora(llama())
    vector, losses = torch.zeros(1), {}

    def add_vector(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + vector

    for name in ("none", "cached"):
        vector.zero_()
        with cached(model) if name == "cached" else contextlib.nullcontext() as handle:
            for _ in range(3):
                llama_loss(model)
            hook = model.get_input_embeddings().register_forward_hook(add_vector)
            losses[name] = []
            for _ in range(3):
                losses[name].append(llama_loss(model).item())
                vector += 1
            hook.remove()
            if handle is not None:
                before = found(handle)["forwards_shortened"]
                assert any("embed_tokens" in each for each in found(handle)["objections"])
                llama_loss(model)
                assert found(handle)["forwards_shortened"] == before + 1
    assert losses["cached"] == pytest.approx(losses["none"], rel=1e-6)
    assert len(set(losses["none"])) == 3


def test_every_module_that_runs_below_the_border_is_inspected():
    model, ran = with_lora(llama()), []
    hooks = [module.register_forward_hook(lambda module, *_: ran.append(module)) for module in model.modules()]
    llama_loss(model)
    for hook in hooks:
        hook.remove()
    with cached(model) as handle:
        prefix = handle.cache.prefix
        inside = [module for module in prefix.blocks[0].modules() if module in ran]
        assert len(inside) > 20, "a block with adapters"
        for module in inside:
            modes = prefix.modes()
            module.training = False
            assert prefix.modes() != modes
            module.training = True
            for register in (module.register_forward_hook, module.register_forward_pre_hook):
                hook = register(lambda *_: None)
                assert "hook" in prefix.objection(1)
                hook.remove()
            assert prefix.objection(1) is None


def test_dropout_of_adapters_is_refused_by_name(caplog):
    model = with_lora(llama(), dropout=0.1)
    with cached(model) as handle:
        for _ in range(4):
            llama_loss(model)
        assert found(handle)["forwards_shortened"] == 0
    assert "lora_dropout=0" in caplog.text and "layers.0" in caplog.text


def test_rows_under_autocast_have_states_of_their_own():
    model = llama()
    losses = {}
    with cached(model) as handle:
        for mixed in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                losses.setdefault(mixed, []).extend(llama_loss(model).item() for _ in range(4))
        report = found(handle)
    assert report["refused"] is None and report["rows"] == 4
    assert losses[False] == pytest.approx([losses[False][0]] * 8, rel=1e-6)
    assert losses[True] == pytest.approx([losses[True][0]] * 8, rel=1e-2)


class BlockOfTwo(Block):
    """Returns its stream with attention maps beside it, as some blocks of transformers do."""

    def forward(self, x_BSD):
        x_BSD = super().forward(x_BSD)
        return x_BSD, x_BSD.detach().softmax(-1)


class NetOfTwo(PlainNet):
    def forward(self, x_BSD):
        x_BSD = self.stem(x_BSD)
        for block in self.blocks:
            x_BSD = block(x_BSD)[0]
        return self.head(self.norm(x_BSD))


def test_a_block_may_return_unused_values_beside_the_stream():
    losses = {}
    for where in (None, True):
        torch.manual_seed(1)
        net = NetOfTwo(blocks=0)
        net.blocks.extend(BlockOfTwo(8) for _ in range(BLOCKS))
        with cached(net.train(), activation_cache=where, example_inputs=batches_of_rows()[0]) as handle:
            losses[where] = [net(batch).square().mean().item() for batch in batches_of_rows()]
            report = found(handle) if where else {}
    assert report["forwards_shortened"] > 2 and not report["objections"]
    assert losses[True] == pytest.approx(losses[None], rel=1e-5)


@pytest.mark.parametrize("kind", ["learnt", "rotary"])
def test_left_padding_matters_with_learned_positions(kind):
    """GPT-2 counts positions from the left edge, padding included."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make() -> Any:
        torch.manual_seed(1)
        if kind == "rotary":
            return llama()
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.3}
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=BLOCKS, n_head=2, **dropouts)).train()

    rows, losses = data(2), {}
    for where in (None, True):
        model = make()
        with cached(model, activation_cache=where, steps=40) as handle:
            lengths = [12, 12, 12, 16, 16, 20, 20]
            losses[where] = [model(**padded(rows, "left", length)).loss.item() for length in lengths]
            report = found(handle) if where else {}
    assert report["refused"] is None
    assert report["hits"] == (12 if kind == "rotary" else 2 * (2 + 1 + 1))
    assert losses[True] == pytest.approx(losses[None], rel=1e-4)


def loop(packed: bool, epochs: int, evaluations: bool = False, forwards: int = 6, **options: Any) -> dict[str, Any]:
    """A loop of one's own over rows that are the same in each epoch, or packed anew; the cache's report."""
    model, generator = llama(), torch.Generator().manual_seed(5)
    rows = kept = torch.randint(1, 32, (2 * forwards, 8), generator=generator)
    with cached(model, **{"steps": epochs * forwards, **options}) as handle:
        for _ in range(epochs):
            rows = torch.randint(1, 32, rows.shape, generator=generator) if packed else rows
            for batch in rows[torch.randperm(len(rows), generator=generator)].split(2):
                model(input_ids=batch, labels=batch).loss.backward()
            if evaluations:
                with torch.no_grad():
                    model.eval()(input_ids=kept[:2], labels=kept[:2])
                model.train()
        return found(handle)


@pytest.mark.parametrize("epochs", [2, 3, 8])
def test_rows_that_never_recur_are_noticed_in_a_custom_loop(epochs, caplog):
    report = loop(packed=True, epochs=epochs)
    assert "packs rows anew" in report["refused"] and report["bytes"] == 0
    assert caplog.text.count("packs rows anew") == 1
    report = loop(packed=False, epochs=epochs)
    assert (report["refused"], report["objections"]) == (None, []) and report["hits"] == (epochs - 1) * 12


def test_evaluations_keep_the_cache_when_training_rows_never_recur():
    report = loop(packed=True, epochs=8, evaluations=True)
    assert report["refused"] is None and "packs rows anew" in report["objections"][0]
    assert report["hits"] == 2 * 6, "one of the eight finds nothing yet, one stores its rows anew"


def test_a_folder_keeps_the_rows_of_a_single_epoch_for_later_runs(tmp_path):
    first = loop(packed=False, epochs=1, activation_cache=tmp_path)
    second = loop(packed=False, epochs=1, activation_cache=tmp_path)
    assert first["refused"] is None and "stored for later runs" in first["objections"][0]
    assert second["hits"] == 12 and second["objections"] == []


def test_a_full_cache_is_not_mistaken_for_rows_packed_anew(caplog):
    report = loop(packed=False, epochs=3, activation_cache_limit=3000)
    assert report["refused"] is None
    assert "activation_cache_limit" in report["objections"][0] and caplog.text.count("activation_cache_limit") == 1


@pytest.mark.parametrize("options", [{"masks": "exact"}, {"drop_rate": 0.0}, {"steps": None}])
def test_a_run_in_which_every_block_may_still_train_says_so(options, caplog):
    report = loop(packed=False, epochs=2, **options)
    assert report["looked_up"] == 0 and "may train the lowest block" in report["objections"][0]
    assert caplog.text.count("may train the lowest block") == 1


def two_numbers(model: Any) -> list[tuple[Any, str]]:
    return [(model.model.layers[0].input_layernorm, "variance_epsilon"), (model.model.layers[0].self_attn, "scaling")]


@pytest.mark.parametrize("which", [0, 1])
def test_a_number_of_a_module_that_is_changed_by_hand_has_states_of_its_own(which):
    model, losses = llama(), {}
    module, name = two_numbers(model)[which]
    before = getattr(module, name)
    with cached(model, steps=16) as handle:
        for step in range(12):
            setattr(module, name, before * (1 + 3 * (step % 3 == 2)))
            losses.setdefault(step % 3 == 2, []).append(llama_loss(model).item())
        assert found(handle)["refused"] is None and found(handle)["forwards_shortened"] > 6
    assert abs(losses[True][0] - losses[False][0]) > 1e-6
    for each in losses.values():
        assert each == pytest.approx([each[0]] * len(each), rel=1e-6)


def test_a_number_of_an_adapter_has_states_of_its_own():
    import peft

    options = {"n_frequency": 8, "target_modules": ["v_proj"], "init_weights": False}
    model = peft.get_peft_model(llama(), peft.FourierFTConfig(**options)).train()
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    losses: dict[int, list[float]] = {}
    with cached(model, steps=16) as handle:
        for step in range(12):
            layer.fourierft_scaling["default"] = 150.0 * (1 + step % 2)
            losses.setdefault(step % 2, []).append(llama_loss(model).item())
        assert found(handle)["refused"] is None and found(handle)["forwards_shortened"] > 6
    assert abs(losses[0][0] - losses[1][0]) > 1e-6
    for each in losses.values():
        assert each == pytest.approx([each[0]] * len(each), rel=1e-6)


def test_a_counter_that_the_forward_changes_itself_does_not_hinder():
    model = llama()
    attention = model.model.layers[0].self_attn
    attention.calls, plain = 0, attention.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        attention.calls += 1
        attention.last = {"call": attention.calls}
        return plain(*args, **kwargs)

    attention.forward = counting
    with cached(model) as handle:
        for _ in range(6):
            llama_loss(model)
        assert found(handle)["forwards_shortened"] >= 3


def test_a_number_that_keeps_changing_rules_the_cache_out_by_name(caplog):
    model = llama()
    with cached(model, steps=64) as handle:
        for step in range(40):
            model.model.layers[0].self_attn.scaling = 1 / (step + 1)
            llama_loss(model)
        assert any("model.layers.0.self_attn.scaling keeps changing" in x for x in found(handle)["objections"])
