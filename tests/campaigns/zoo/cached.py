"""Is a model trained with the activation cache as without it, or is the cache refused by name?

Two copies run the same batches: rows that meet others each time, under a mask that trains the last block. One has the
cache. Outputs and gradients must agree to rounding.

    python -m tests.campaigns.zoo.cached LlamaForCausalLM MoshiForCausalLM    # no name: all decoders
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn

import dropbp
from dropbp import inputs as example
from dropbp.tensors import tensors_in
from tests.campaigns.zoo.tiny import case, cases

TOLERANCE = 1e-3  # for gradients and outputs: some layers amplify rounding
ORDERS = ((0, 1), (2, 3), (0, 2), (1, 3), (3, 0), (2, 1), (1, 0))
FIRST_THAT_COUNTS = 2  # earlier batches contain no known row


def check(model: nn.Module, plain: nn.Module) -> tuple[str, str]:
    """The verdict (`right`, `refused`, `unused` or `wrong`) and the reason.

    Args:
        model: gets the cache.
        plain: a copy of it.
    """
    rows = example.build(model, len(ORDERS[0]) * 2, 12).kwargs
    batches = [_of(rows, order) for order in ORDERS]
    for each in (model, plain):
        each.train()
        _without_dropout(each)
    with _enabled(model, True) as handle, _enabled(plain, None):
        for batch in batches:
            problem = _differ(_step(model, batch), _step(plain, batch))
            if problem:
                return "wrong", problem
        report = handle.report()["activation_cache"]
    reasons = [report["refused"], *report["objections"], handle.cache.interfaces.reason]
    if report["forwards_shortened"]:
        return "right", f"border {report['border']}, difference {report['largest_difference']:.1e}"
    return ("refused" if any(reasons) else "unused"), "; ".join(filter(None, reasons))


def _enabled(model: nn.Module, where: bool | None) -> Any:
    handle = dropbp.enable(model, 0.5, steps=None, activation_cache=where)
    count = len(handle.branches)
    last = list(handle.engine.structure.blocks.values() or [1 << count - 1])[-1]
    rates = [0.0 if last >> place & 1 else 1.0 for place in range(count)]
    handle.set_rates(rates)
    return handle


def _of(rows: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    count = len(ORDERS[0]) * 2
    return {
        name: value[list(order)].clone() if isinstance(value, torch.Tensor) and value.shape[0] == count else value
        for name, value in rows.items()
    }


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)


def _step(model: nn.Module, batch: Mapping[str, Any]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    model.zero_grad()
    outputs = [tensor for tensor in tensors_in(model(**batch)) if tensor.is_floating_point()]
    loss = torch.zeros((), dtype=torch.float64)
    for tensor in outputs:
        weights = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64)).reshape(tensor.shape)
        loss = loss + (tensor.double() * weights).sum() * tensor.requires_grad
    loss.backward()
    return [o.detach() for o in outputs], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _differ(got: Any, expected: Any) -> str:
    if got[1].keys() != expected[1].keys():
        return f"other parameters have gradients: {sorted(got[1].keys() ^ expected[1].keys())[:3]}"
    pairs = [("an output", *pair) for pair in zip(got[0], expected[0], strict=True)]
    pairs += [(name, got[1][name], expected[1][name]) for name in got[1]]
    for name, one, other in pairs:
        error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-9)
        if not error <= TOLERANCE:
            return f"{name} differs by {error:.1e}"
    return ""


def verdict_of(name: str) -> tuple[str, str]:
    """The verdict on one class; `unbuilt` and `not enabled` do not concern the cache."""
    chosen = case(name, "decoder")
    try:
        models = chosen.build(), chosen.build()
    except Exception as error:
        return "unbuilt", str(error)[:200]
    try:
        return check(*models)
    except dropbp.DropBPError as error:
        return "not enabled", str(error)[:200]
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error}"[:300]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the named classes, or all decoders; print a line of JSON per class. 1 if one is wrong or crashed."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.zoo.cached", description=__doc__)
    parser.add_argument("name", nargs="*")
    names = parser.parse_args(arguments).name or [each.name for each in cases("causal-lm")]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    counts: collections.Counter[str] = collections.Counter()
    for name in names:
        verdict, detail = verdict_of(name)
        counts[verdict] += 1
        sys.stdout.write(json.dumps({"name": name, "verdict": verdict, "detail": detail}) + "\n")
        sys.stdout.flush()
    sys.stdout.write(json.dumps(dict(counts)) + "\n")
    return int(bool(counts["wrong"] or counts["crashed"]))


if __name__ == "__main__":
    sys.exit(main())
