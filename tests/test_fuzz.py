"""Arguments nobody should pass, to everything that is public: an error of ours, or success."""

from __future__ import annotations

from pathlib import Path
from random import Random
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dropbp
from dropbp.errors import ConfigError
from tests.campaigns.reliability import fuzz as fuzzing
from tests.campaigns.reliability.registry import CHECKS, INPUTS

COVERED = {  # by which target each public name is tried
    "allocate": "allocate",
    "compile_blocks": "compile_blocks",
    "disable": "handle",
    "discover": "discover",
    "enable": "enable",
    "Handle": "handle",
    "labelled_logits": "labelled_logits",
    "plan": "plan",
}


@pytest.mark.parametrize("name", [name for name, check in CHECKS.items() if check.part == INPUTS])
def test_input_is_refused_in_our_words_or_works(name: str, tmp_path: Path) -> None:
    CHECKS[name].run(CHECKS[name].few, tmp_path)


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(fuzzing.TARGETS)), random=st.randoms(use_true_random=False))
def test_hypothesis_finds_nothing_that_escapes(name: str, random: Random) -> None:
    fuzzing._survives(name, random, "hypothesis")


def test_every_public_function_is_tried() -> None:
    values = {name: getattr(dropbp, name) for name in dropbp.__all__}
    functions = {
        name
        for name, value in values.items()
        if callable(value) and not isinstance(value, ModuleType) and not _is_plain(value)
    }
    assert functions == COVERED.keys()
    assert set(COVERED.values()) <= fuzzing.TARGETS.keys()


def _is_plain(value: object) -> bool:
    """Errors and values."""
    return isinstance(value, type) and (issubclass(value, BaseException) or value is dropbp.Branch)


def test_the_fuzzer_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(random: Random) -> None:
        raise KeyError("inside")

    monkeypatch.setattr(fuzzing, "TARGETS", {"broken": broken})
    with pytest.raises(fuzzing.Escaped, match=r"broken \(seed 0, call 0\) ended with KeyError"):
        fuzzing.fuzz(1)


def test_a_handle_with_every_branch_always_dropped_and_nothing_else_to_train_is_refused() -> None:
    """Nothing would train, in silence."""
    from tests.common.engine_models import plain_batch, plain_net

    model = plain_net().requires_grad_(False)
    model.blocks.requires_grad_(True)
    for options in ({"masks": "exact"}, {"masks": "nested"}):
        with pytest.raises(ConfigError, match="nothing would train"):
            dropbp.enable(model, rates=[1.0] * 6, example_inputs=plain_batch(), **options)
        assert "forward" not in model.__dict__
    handle = dropbp.enable(model, example_inputs=plain_batch())
    with pytest.raises(ConfigError, match="nothing would train"):
        handle.set_rates([1.0] * 6)
    assert handle.rates != (1.0,) * 6


def test_a_plan_keeps_to_the_positions_that_a_model_has() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes))
    assert dropbp.plan(model, drop_rates=(0.0,)).sequence_length == 24
    with pytest.raises(ConfigError, match="that it has positions for"):
        dropbp.plan(model, sequence_length=25, drop_rates=(0.0,))
