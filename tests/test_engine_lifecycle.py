"""enable, remove, copies: only the instance is changed, and it is put back exactly."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dropbp
from dropbp.errors import StateError
from tests.common.engine_models import (
    assert_same_gradients,
    llama_loss,
    plain_batch,
    plain_loss,
    plain_net,
    take_gradients,
    tiny_llama,
    tokens,
)

CYCLES = 600


def snapshot(model):
    """Everything an instance holds, by identity, hook dictionaries by content."""
    found = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            found[name, key] = dict(value) if isinstance(value, dict) else value
        found[name, "class"] = type(module)
    for name, parameter in model.named_parameters():
        found[name, "parameter"] = (id(parameter), parameter.requires_grad, parameter._version)
    return found


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        same = after[key] == value if isinstance(value, (dict, tuple, bool, str, int)) else after[key] is value
        assert same or after[key] == value, key
    assert [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("options", [{}, {"scaling": "unbiased"}, {"boundary": "sublayer"}, {"masks": "independent"}])
@pytest.mark.parametrize("train", [False, True])
def test_remove_leaves_everything_as_before(options, train):
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    before, order = snapshot(model), {name: list(module.__dict__) for name, module in model.named_modules()}
    handle = dropbp.enable(model, **options)
    assert snapshot(model).keys() != before.keys()
    if train:
        llama_loss(model).backward()
        model.zero_grad()
    handle.remove()
    assert_unchanged(model, before)
    assert {name: list(module.__dict__) for name, module in model.named_modules()} == order
    handle.remove()  # a second time does nothing
    assert_unchanged(model, before)


@pytest.mark.parametrize("way", ["with", "disable", "error"])
def test_other_ways_to_remove(way):
    model = plain_net()
    before = snapshot(model)
    if way == "disable":
        handle = dropbp.enable(model, example_inputs=plain_batch())
        dropbp.disable(model)
    elif way == "with":
        with dropbp.enable(model, example_inputs=plain_batch()) as handle:
            assert handle.enabled
    else:
        with pytest.raises(KeyError), dropbp.enable(model, example_inputs=plain_batch()) as handle:
            raise KeyError
    assert not handle.enabled
    assert_unchanged(model, before)
    dropbp.disable(model)
    assert_unchanged(model, before)


def test_after_remove_everything_trains_and_nothing_is_drawn():
    model, plain = plain_net(), plain_net()
    handle = dropbp.enable(model, 0.9, example_inputs=plain_batch())
    handle.remove()
    assert_same_gradients(take_gradients(model, plain_loss(model)), take_gradients(plain, plain_loss(plain)))
    assert handle.mask is None and handle.report()["forwards"] == 0


def test_classes_and_other_instances_are_untouched():
    model, other = tiny_llama(), tiny_llama()
    classes = {type(module): dict(type(module).__dict__) for module in model.modules()}
    before = snapshot(other)
    with dropbp.enable(model):
        assert_unchanged(other, before)
        assert all(dict(kind.__dict__) == content for kind, content in classes.items())


def test_state_dict_keys_and_module_names_stay():
    model = tiny_llama()
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    with dropbp.enable(model, scaling="unbiased"):
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_modules()] == names
        model.load_state_dict(tiny_llama().state_dict())


def test_a_forward_set_on_the_instance_before_is_kept_and_put_back():
    """As accelerate does: `model.forward` replaced by a wrapper of itself, on the instance."""
    model, calls = plain_net(), []
    _wrap(model, calls)
    before = snapshot(model)
    with dropbp.enable(model, example_inputs=plain_batch()):
        calls.clear()
        plain_loss(model).backward()
        assert calls == ["wrapper"]
    assert_unchanged(model, before)


@pytest.mark.parametrize("function", ["method", "function"])
def test_someone_elses_wrapper_on_top_survives_remove(function):
    model, plain, calls = plain_net(), plain_net(), []
    handle = dropbp.enable(model, example_inputs=plain_batch())
    _wrap(model, calls, function)
    with handle.fixed([True] * 6):
        plain_loss(model)
    handle.remove()
    assert not handle.enabled
    assert_same_gradients(take_gradients(model, plain_loss(model)), take_gradients(plain, plain_loss(plain)))
    assert calls == ["wrapper"] * 2
    again = dropbp.enable(model, example_inputs=plain_batch())
    with again.fixed([True] * 6):
        assert take_gradients(model, plain_loss(model))["blocks.0.mix.0.weight"] is None
    again.remove()
    assert_same_gradients(take_gradients(model, plain_loss(model)), take_gradients(plain, plain_loss(plain)))


def _wrap(model, calls, kind="method"):
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        calls.append("wrapper")
        return inner(*args, **kwargs)

    if kind == "function":
        model.forward = forward
    else:
        model.forward = types.MethodType(lambda self, *args, **kwargs: forward(*args, **kwargs), model)


def _by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def _by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _by_pickle, _by_torch])
@pytest.mark.parametrize("make", ["plain", "llama", "checkpointed llama"])
def test_copies_of_an_enabled_model_are_plain_models_that_can_be_enabled(copied, make):
    model, loss = (plain_net(), plain_loss) if make == "plain" else (tiny_llama(layers=3), llama_loss)
    options = {"example_inputs": plain_batch()} if make == "plain" else {}
    if make.startswith("checkpointed"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # a hook of transformers that cannot be pickled
    handle = dropbp.enable(model, scaling="unbiased", boundary="layer", **options)
    with handle.fixed((True,) * 6):
        loss(model).backward()
    twin = copied(model)
    handle.remove()
    expected = take_gradients(model, loss(model))
    assert_same_gradients(take_gradients(twin, loss(twin)), expected)
    draws = handle.report()["draws"]
    with dropbp.enable(twin, **options) as other, other.fixed((True,) * 6):
        assert any(gradient is None for gradient in take_gradients(twin, loss(twin)).values())
    assert_same_gradients(take_gradients(twin, loss(twin)), expected)
    assert handle.report()["draws"] == draws and other.report()["forwards"] == 1


def test_a_copy_and_its_original_train_independently():
    model = plain_net()
    handle = dropbp.enable(model, example_inputs=plain_batch())
    twin = copy.deepcopy(model)
    with handle.fixed([True] * 6):
        assert take_gradients(twin, plain_loss(twin))["blocks.0.mix.0.weight"] is not None
        assert take_gradients(model, plain_loss(model))["blocks.0.mix.0.weight"] is None


def test_a_model_moved_and_cast_after_enable_trains():
    model = tiny_llama()
    handle = dropbp.enable(model)
    model.to(torch.float64)
    model.share_memory()
    with handle.fixed((True, False, True, False)):
        got = take_gradients(model, llama_loss(model))
    assert got["model.layers.0.mlp.up_proj.weight"].dtype == torch.float64
    assert got["model.layers.0.self_attn.q_proj.weight"] is None


def test_a_model_without_memory_is_enabled_and_filled_later():
    with torch.device("meta"):
        model = tiny_llama()
    handle = dropbp.enable(model)
    model.to_empty(device="cpu")
    model.load_state_dict(tiny_llama().state_dict())
    model.model.rotary_emb = tiny_llama().model.rotary_emb
    with handle.fixed((True, False, False, False)):
        loss = llama_loss(model)
    torch.testing.assert_close(loss, llama_loss(tiny_llama()))


def test_buffers_are_updated_as_in_the_plain_model():
    plain, model = (nn.Sequential(plain_net(), nn.BatchNorm1d(4)).train() for _ in range(2))
    with dropbp.enable(model, example_inputs=plain_batch()) as handle, handle.fixed([True] * 6):
        plain_loss(model)
    plain_loss(plain)
    assert torch.equal(model[1].running_mean, plain[1].running_mean)


def test_hundreds_of_cycles_leave_nothing_behind():
    """Discovery is most of a cycle, so the structure is found once; the rest is all that `enable` does."""
    model = plain_net(blocks=1)
    before = snapshot(model)
    with dropbp.enable(model, example_inputs=plain_batch()) as first:
        parts = first.config, first.device, first._findings
    objects = []
    for cycle in range(CYCLES):
        handle = dropbp.Handle(model, *parts)
        if cycle % 100 == 0:
            plain_loss(model).backward()
            model.zero_grad()
        handle.remove()
        del handle
        if cycle in (CYCLES // 2, CYCLES - 1):
            gc.collect()
            objects.append(len(gc.get_objects()))
    assert_unchanged(model, before)
    assert objects[1] - objects[0] < 50, objects  # fewer there may be: what earlier tests left goes meanwhile


def test_whole_cycles_leave_nothing_behind():
    model, counts = plain_net(blocks=1), []
    for _ in range(3):
        for _ in range(15):
            with dropbp.enable(model, example_inputs=plain_batch()):
                plain_loss(model).backward()
            model.zero_grad()
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[2] - counts[1] < 50, counts


ACTIONS = st.sampled_from(["enable", "remove", "disable", "train", "fixed", "evaluate", "copy", "wrong"])


@settings(max_examples=25)
@given(actions=st.lists(ACTIONS, max_size=12))
def test_any_sequence_of_calls_leaves_a_right_model(actions):
    model, plain = MODEL, PLAIN
    before, handle = snapshot(model), None
    for action in actions:
        enabled = handle is not None and handle.enabled
        if action == "enable" and not enabled:
            handle = dropbp.enable(model, example_inputs=plain_batch())
        elif action == "enable":
            with pytest.raises(dropbp.StateError):
                dropbp.enable(model, example_inputs=plain_batch())
        elif action == "remove" and handle is not None:
            handle.remove()
        elif action == "disable":
            dropbp.disable(model)
        elif action == "fixed" and handle is not None:
            with handle.fixed([True] * 4):
                got = take_gradients(model, plain_loss(model))
            assert (got["blocks.0.mix.0.weight"] is None) == enabled
        elif action == "wrong" and handle is not None:
            with pytest.raises(dropbp.ConfigError), handle.fixed([True]):
                pass
        elif action == "evaluate":
            with torch.no_grad():
                assert torch.equal(model(plain_batch()), plain(plain_batch()))
        elif action == "copy":
            assert torch.equal(copy.deepcopy(model)(plain_batch()), plain(plain_batch()))
        else:
            assert torch.equal(plain_loss(model), plain_loss(plain))
    dropbp.disable(model)
    model.zero_grad()
    assert_unchanged(model, before)


MODEL, PLAIN = plain_net(blocks=2), plain_net(blocks=2)


def test_generation_works_while_enabled():
    model = tiny_llama()
    expected = model.eval().generate(tokens(), max_new_tokens=3, do_sample=False)
    with dropbp.enable(model.train()):
        got = model.eval().generate(tokens(), max_new_tokens=3, do_sample=False)
    assert torch.equal(got, expected)


ON_A_HANDLE = {
    "set_rates": lambda handle: handle.set_rates([0.5] * 6),
    "progress": lambda handle: handle.progress(0.5),
    "note_optimizer": lambda handle: handle.note_optimizer(torch.optim.SGD(handle.model.parameters())),
    "resample": lambda handle: handle.resample(),
    "load_state_dict": lambda handle: handle.load_state_dict(handle.state_dict()),
    "calibrate": lambda handle: handle.calibrate(lambda: plain_loss(handle.model)),
    "observe": lambda handle: handle.observe(),
}


@pytest.mark.parametrize("call", ON_A_HANDLE.values(), ids=ON_A_HANDLE)
def test_a_removed_handle_refuses_what_would_have_no_effect(call):
    handle = dropbp.enable(plain_net(), 0.5, example_inputs=plain_batch())
    handle.remove()
    with pytest.raises(StateError, match=r"removed from its model. Call dropbp.enable"):
        call(handle)
    assert handle.report()["forwards"] == 0 and handle.summary()
