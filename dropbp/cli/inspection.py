"""The command `dropbp inspect`: the residual branches of a model as a tree, with FLOPs and parameters.

Weights are not needed: the model is built from its configuration, of tensors with shapes and no data. These are fake
tensors, not those of the meta device: models read values of masks and positions, and know to skip that for fake ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from dropbp.cli.libraries import quiet
from dropbp.cli.options import check_counts

if TYPE_CHECKING:
    from dropbp.discovery.structure import Branch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model", metavar="MODEL", help="Hub id, model folder, or config.json")
    parser.add_argument("--batch-size", type=int, default=1, help="rows per batch (%(default)s)")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens per row (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the branches. Raises DropBPError if the model cannot be built, or its branches cannot be found."""
    check_counts(args, ("batch_size", "sequence_length"))
    with quiet():
        found = inspect_model(args.model, args.batch_size, args.sequence_length)
    sys.stdout.write((json.dumps(found, indent=1) if args.json else tree(found)) + "\n")
    return 0


def inspect_model(source: str, batch_size: int, sequence_length: int) -> dict[str, Any]:
    """Branches, FLOPs of one forward and parameters of a model, as plain types.

    Raises DropBPError if the model cannot be built, or its branches cannot be found.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dropbp.cli.models import load_config, new_model
    from dropbp.discovery.discover import discover
    from dropbp.inputs import build

    config = load_config(source)
    with FakeTensorMode():
        model = new_model(config)
        branches = discover(model, dict(build(model, batch_size, sequence_length).kwargs))
    return {
        "model": source,
        "class": type(model).__name__,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "branch_flops": sum(branch.flops for branch in branches),
        "branches": [_entry(branch) for branch in branches],
    }


def tree(found: dict[str, Any]) -> str:
    """The branches below the modules that hold them."""
    head = (
        f"{found['class']}  {found['parameters']:,} parameters, {len(found['branches'])} branches; "
        f"batch {found['batch_size']} x {found['sequence_length']} tokens"
    )
    rows = list(_rows(found["branches"], found["branch_flops"]))
    width = max(len(row[0]) for row in rows)
    lines = [
        f"{label:<{width}}  {flops:>9}  {share:>6}  {count:>14}".rstrip()
        for label, flops, share, count in [("branch", "FLOPs", "share", "parameters"), *rows]
    ]
    return "\n".join([head, "", *lines])


def _entry(branch: Branch) -> dict[str, Any]:
    return {
        "name": branch.name,
        "modules": list(branch.modules),
        "flops": branch.flops,
        "parameters": branch.parameters,
    }


def _rows(branches: Sequence[dict[str, Any]], total: int) -> Iterator[tuple[str, str, str, str]]:
    shown: list[str] = []
    for branch in branches:
        *parents, leaf = branch["name"].split(".")
        common = len([*takewhile(lambda pair: pair[0] == pair[1], zip(shown, parents, strict=False))])
        for depth in range(common, len(parents)):
            yield "  " * depth + parents[depth], "", "", ""
        shown = parents
        share = f"{branch['flops'] / total:.1%}"
        yield "  " * len(parents) + leaf, _short(branch["flops"]), share, f"{branch['parameters']:,}"


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {unit}".rstrip()
        number /= 1000
    return f"{number:.3g} P"
