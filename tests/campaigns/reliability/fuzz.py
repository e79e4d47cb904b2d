"""Every public function with invalid arguments: a DropBPError or success, and an unchanged model."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from dropbp.bench.analysis.estimator import analyze
from torch import nn

import dropbp
from dropbp import checks, device
from dropbp.config import Config
from dropbp.errors import DropBPError
from dropbp.masks import Sampler, sampler_kinds
from dropbp.masks import rates as allocation
from tests.campaigns.reliability.values import damaged, hostile
from tests.common.engine_models import plain_batch, plain_loss, plain_net

Call = Callable[[], Any]
FLOPS, RATES = [3.0, 1.0, 2.0, 2.0], [0.5, 0.25, 0.5, 0.75]
SAMPLER_OPTIONS = {"pool_size": 4, "pool_of": "balanced", "uniform": "golden"}
ENABLE = {
    **{field.name: field.default for field in dataclasses.fields(Config) if field.name != "mask_options"},
    "drop_rate": 0.5,
    "device": None,
    "branches": None,
}


class Escaped(AssertionError):
    """A call that neither succeeded nor raised an error of the library; the message says how to repeat it."""


def fuzz(calls: int, seed: int = 0) -> dict[str, Any]:
    """Make `calls` random calls.

    Returns:
        The number of calls, and of those refused, by target.

    Raises:
        Escaped: a call raised an error that is not the library's.
    """
    tried, refused = Counter[str](), Counter[str]()
    names = sorted(TARGETS)
    for number in range(calls):
        random = Random(f"{seed}:{number}")
        name = names[number % len(names)]
        tried[name] += 1
        refused[name] += not _survives(name, random, f"seed {seed}, call {number}")
    return {"calls": calls, "targets": len(names), "refused": sum(refused.values()), "refused_by_target": dict(refused)}


def _survives(name: str, random: Random, which: str) -> bool:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            TARGETS[name](random)
    except DropBPError as error:
        if len(str(error)) < 20:
            raise Escaped(f"{name} ({which}) says too little: {error}") from error
        return False
    except Escaped:
        raise
    except Exception as error:
        raise Escaped(f"{name} ({which}) ended with {type(error).__name__}: {error}") from error
    finally:
        torch.set_num_threads(threads)
    if name not in TRAINS and not state.equal(torch.get_rng_state()):
        raise Escaped(f"{name} ({which}) moved the global random state")
    return True


def _arguments(random: Random, good: dict[str, Any], most: int = 2) -> dict[str, Any]:
    chosen = random.sample(sorted(good), k=random.randint(1, min(most, len(good))))
    return {**good, **{name: hostile(random) for name in chosen}}


def _options(how: str) -> dict[str, Any]:
    return {name: SAMPLER_OPTIONS[name] for name in sampler_kinds()[how].options if name in SAMPLER_OPTIONS}


def _enable(random: Random) -> None:
    name = random.choice(sorted(sampler_kinds()))
    given = _arguments(random, {**ENABLE, "masks": name, **_options(name)})
    model = plain_net(blocks=2)
    before = set(model.__dict__)
    try:
        handle = dropbp.enable(model, example_inputs=plain_batch(), **given)
    except DropBPError:
        if set(model.__dict__) != before:
            raise Escaped(f"a refused enable({given}) left its traces on the model") from None
        raise
    for _ in range(2):
        plain_loss(model).backward()
    handle.report(), handle.summary(), handle.state_dict()
    handle.remove()


def _enable_other(random: Random) -> None:
    """Change the model, the inputs or unknown options."""
    given = {"model": plain_net(blocks=1), "example_inputs": plain_batch()}
    given = {**given, "bogus": 1} if random.random() < 0.2 else _arguments(random, given, 1)
    dropbp.enable(**given).remove()


def _discover(random: Random) -> None:
    good = {"model": plain_net(blocks=1), "example_inputs": plain_batch(), "branches": None}
    dropbp.discover(**_arguments(random, good))


def _allocate(random: Random) -> None:
    good = {"sensitivities": RATES, "flops": FLOPS, "drop_rate": 0.5, "max_rate": None, "method": "exact"}
    allocation.allocate(**_arguments(random, good))


def _depth_rates(random: Random) -> None:
    good = {"flops": FLOPS, "drop_rate": 0.5, "profile": "shelf", "max_rate": 1.0}
    allocation.depth_rates(*_arguments(random, good).values())


def _sampler(random: Random) -> None:
    name = random.choice(sorted(sampler_kinds()))
    given = _arguments(random, {"how": name, "rates": RATES, "flops": FLOPS, "seed": 0, **_options(name)})
    positional = [given.pop(key) for key in ("how", "rates", "flops", "seed")]
    sampler = Sampler(*positional, **given)
    sampler.draw(hostile(random) if random.random() < 0.5 else 3)


def _checks(random: Random) -> None:
    check = random.choice((checks.checked_flops, checks.checked_rates, checks.checked_sensitivities))
    check(hostile(random))


def _get_device(random: Random) -> None:
    device.get_device(*_arguments(random, {"device": "cpu", "model": plain_net(blocks=1)}).values())


def _handle(random: Random) -> None:
    model = plain_net(blocks=2)
    with dropbp.enable(model, masks="exact", example_inputs=plain_batch()) as handle:
        before = handle.state_dict()
        try:
            _call_handle(handle, model, random)
        except DropBPError:
            if handle.state_dict() != before:
                raise Escaped("a refused call changed the handle") from None
            raise
        finally:
            plain_loss(model).backward()


def _call_handle(handle: dropbp.Handle, model: nn.Module, random: Random) -> None:
    calls: dict[str, Call] = {
        "fixed": lambda: handle.fixed(hostile(random)).__enter__(),
        "set_rates": lambda: handle.set_rates(hostile(random)),
        "calibrate": lambda: handle.calibrate(_not_callable(random)),
        "calibrate returns": lambda: handle.calibrate(lambda: hostile(random)),
        "calibrate method": lambda: handle.calibrate(lambda: plain_loss(model), method=hostile(random)),
        "observe": lambda: handle.observe(**_arguments(random, {"every": 1, "decay": 0.5})),
        "reduce_kept": lambda: handle.reduce_kept(hostile(random)),
        "group_parameters": lambda: handle.group_parameters(hostile(random)),
        "load_state_dict": lambda: handle.load_state_dict(hostile(random)),
        "disable": lambda: dropbp.disable(hostile(random)),
    }
    name = random.choice(sorted(calls))
    try:
        calls[name]()
    except DropBPError:
        raise
    except Exception as error:
        raise Escaped(f"handle: {name}: {type(error).__name__}: {error}") from error


def _not_callable(random: Random) -> Any:
    """An error inside a user's function is the user's own, and propagates."""
    value = hostile(random)
    return None if callable(value) else value


def _state(random: Random) -> None:
    model = plain_net(blocks=2)
    with dropbp.enable(model, masks="exact", example_inputs=plain_batch()) as handle:
        for _ in range(3):
            plain_loss(model)
        state = handle.state_dict()
        try:
            handle.load_state_dict(damaged(state, random))
        except DropBPError:
            if handle.state_dict() != state:
                raise Escaped("a refused state changed the handle") from None
            raise
        plain_loss(model).backward()
        handle.report(), handle.summary()


def _compile_blocks(random: Random) -> None:
    dropbp.compile_blocks(hostile(random))


def _labelled_logits(random: Random) -> None:
    with dropbp.labelled_logits(hostile(random)) as labelled:
        labelled.remove()


def _callback(random: Random) -> None:
    from dropbp.integrations.transformers import DropBPCallback

    good = {
        "drop_rate": 0.5,
        "masks": "nested",
        "resample": "forward",
        "calibrate_at": "auto",
        "recalibrate_every": None,
        "warmup_steps": 0,
        "group_parameters": None,
        "log": True,
        "seed": 0,
    }
    DropBPCallback(**_arguments(random, good)).state()


def _plan(random: Random) -> None:
    good = {
        "batch_size": 2,
        "sequence_length": None,
        "drop_rates": (0.0, 0.5),
        "masks": "nested",
        "device": None,
        "precision": None,
        "accumulation": 1,
        "memory_limit": 2**30,
        "example_inputs": plain_batch(),
    }
    given = {"loss": _not_callable(random)} if random.random() < 0.1 else _arguments(random, good)
    print(dropbp.plan(plain_net(blocks=1), measure=False, **{**good, **given}))


def _analyze(random: Random) -> None:
    model = plain_net(blocks=1)
    good = {
        "drop_rates": (0.5,),
        "ways": (("exact", "none"),),
        "samples": 1,
        "draws": 2,
        "seed": 0,
        "example_inputs": plain_batch(),
    }
    value = _not_callable(random)
    closure = random.choice((lambda: plain_loss(model), lambda: plain_loss(model), lambda: value, value))
    analyze(model, closure, **_arguments(random, good)).as_dict()


TARGETS: dict[str, Callable[[Random], None]] = {
    "enable": _enable,
    "enable (model and inputs)": _enable_other,
    "discover": _discover,
    "allocate": _allocate,
    "analyze": _analyze,
    "depth_rates": _depth_rates,
    "Sampler": _sampler,
    "checks": _checks,
    "get_device": _get_device,
    "handle": _handle,
    "plan": _plan,
    "state": _state,
    "compile_blocks": _compile_blocks,
    "labelled_logits": _labelled_logits,
    "DropBPCallback": _callback,
}
TRAINS = {
    "analyze",
    "compile_blocks",
    "discover",
    "enable",
    "enable (model and inputs)",
    "get_device",
    "handle",
    "plan",
    "state",
}
