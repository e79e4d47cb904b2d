"""What is saved and loaded: a resumed run draws the masks that the first would have drawn."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dropbp
from dropbp.errors import StateError
from tests.common.engine_models import plain_batch, plain_loss, plain_net, take_gradients, tiny_llama


def enabled(**options):
    model = plain_net()
    return model, dropbp.enable(model, **{"masks": "exact", "example_inputs": plain_batch(), **options})


def _drawn(model, handle, steps, period=3):
    seen = []
    for step in range(steps):
        if step % period == 0:
            handle.resample()
        plain_loss(model)
        seen.append(handle.mask)
    return seen


OPTIONS = [
    {},
    {"masks": "independent", "seed": 7},
    {"masks": "cyclic"},
    {"masks": "nested"},
    {"masks": "pool"},
    {"resample": "step"},
    {"resample": 4},
    {"warmup": 5},
    {"warmup": 3, "resample": 4},
    {"masks": "nested", "steps": 16},
    {"masks": "nested", "steps": 14, "warmup": 2},
    {"masks": "nested", "steps": 12, "resample": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("after", [0, 4, 6])
def test_a_resumed_run_draws_the_same_masks(options, after):
    period = 100  # no call of resample() after the first
    model, handle = enabled(**options)
    expected = _drawn(model, handle, 16, period)
    model, handle = enabled(**options)
    first = _drawn(model, handle, after, period)
    state = json.loads(json.dumps(handle.state_dict()))
    model, handle = enabled(**options)
    handle.load_state_dict(state)
    assert handle.state_dict() == state
    assert first + [(plain_loss(model), handle.mask)[1] for _ in range(16 - after)] == expected
    assert handle.report()["forwards"] == 16


def test_counts_rates_and_gradients_continue_too():
    model, handle = enabled()
    handle.set_rates([0.1, 0.9, 0.3, 0.7, 0.5, 0.5])
    _drawn(model, handle, 5)
    other, resumed = enabled()
    resumed.load_state_dict(handle.state_dict())
    assert resumed.rates == handle.rates
    assert resumed.report()["realised_drop_rate"] == handle.report()["realised_drop_rate"]
    for _ in range(4):
        one, two = take_gradients(model, plain_loss(model)), take_gradients(other, plain_loss(other))
        for name, gradient in one.items():
            assert (gradient is None and two[name] is None) or torch.equal(gradient, two[name])


def test_the_state_passes_through_torch_load_of_weights_only():
    model, handle = enabled()
    _drawn(model, handle, 3)
    file = io.BytesIO()
    torch.save(handle.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == handle.state_dict()


def _foreign(change):
    """A state with parts in the place of others; a pair stands for one entry of a part."""
    state = enabled()[1].state_dict()
    return {**state, **{k: {**state[k], v[0]: v[1]} if isinstance(v, tuple) else v for k, v in change.items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "has version 99; this library reads version"),
        ({"branches": ["a", "b"]}, r"its branches are \['a', 'b'\], this model's are \['blocks.0.mix'"),
        ({"masks": "cyclic"}, "its masks are 'cyclic', this model's are 'exact'"),
        ({"seed": 3}, "its seed are 3, this model's are 0|its seed is 3"),
        ({"given": [0.5] * 5}, "is damaged .*nothing was loaded"),
        ({"given": [2.0] * 6}, "is damaged"),
        ({"given": [1.0] * 6, "draws": None}, "is damaged"),
        ({"options": None}, "is damaged"),
        ({"shape": [2, -1]}, "is damaged"),
        ({"mask": "abcdef"}, "is damaged .a mask is 'abcdef'"),
        ({"mask": [True] * 5}, "is damaged"),
        ({"draws": -1}, "is damaged"),
        ({"draws": float("inf")}, "is damaged"),
        ({"statistics": {"counts": [1] * 6}}, "is damaged"),
        ({"statistics": ("counts", [1] * 5)}, "is damaged"),
        ({"statistics": ("counts", [-1] * 6)}, "is damaged .a count is -1"),
        ({"statistics": ("forwards", 1.5)}, "is damaged .a count is 1.5"),
        ({"statistics": ("flops_seen", float("nan"))}, "is damaged .nan is not a finite number"),
        ({"statistics": ("flops_dropped", 1e30)}, "is damaged .1e.30 of 0 FLOPs were dropped"),
        ({"statistics": ("flops_seen", -5.0)}, "is damaged .0 of -5 FLOPs were dropped"),
        ({"statistics": ("drawn_planned", -5.0)}, "is damaged .-5 of 0 FLOPs were dropped"),
        ({"pace": ("width", 0.0)}, "is damaged .a width of 0"),
        ({"pace": ("share", "all")}, "is damaged .'all' is not a finite number"),
        ({"online": None}, "is damaged"),
    ],
)
def test_a_foreign_or_damaged_state_is_refused_and_changes_nothing(change, message):
    model, handle = enabled()
    _drawn(model, handle, 4)
    before = copy.deepcopy(handle.state_dict())
    with pytest.raises(StateError, match=message):
        handle.load_state_dict(_foreign(change))
    assert handle.state_dict() == before


@pytest.mark.parametrize("state", [None, 3, [], {}, "state"])
def test_a_value_that_is_no_state_is_refused(state):
    _, handle = enabled()
    with pytest.raises(StateError, match="has version"):
        handle.load_state_dict(state)


def test_a_state_without_one_of_its_parts_is_refused():
    _, handle = enabled()
    for key in handle.state_dict():
        state = handle.state_dict()
        del state[key]
        with pytest.raises(StateError):
            handle.load_state_dict(state)


def test_the_state_of_another_model_is_refused():
    _, handle = enabled()
    with pytest.raises(StateError, match="its branches are"):
        handle.load_state_dict(dropbp.enable(tiny_llama()).state_dict())


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)
KEYS = sorted(enabled()[1].state_dict())
FUZZED = enabled()


@settings(max_examples=150)
@given(key=st.sampled_from(KEYS), value=JSONS)
def test_any_damage_is_refused_or_harmless(key, value):
    model, handle = FUZZED
    before = copy.deepcopy(handle.state_dict())
    try:
        handle.load_state_dict({**before, key: value})
    except StateError:
        assert handle.state_dict() == before
    else:
        plain_loss(model)
        handle.load_state_dict(before)
