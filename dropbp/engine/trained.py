"""The share of steps in which each trained parameter gets a gradient; defaults and warnings that follow from it.

Masks that drop the bottom of a model train a parameter, with its exact gradient, in the steps that keep the lowest
branch above it. So the bottom trains in few steps, and parameters below all branches train only in steps that drop
nothing. In full fine-tuning this is the price of the saving, and a warning says so. A user who trains a projector, a
soft prompt or new tokens beside adapters has chosen them; then a share of the steps drops nothing. If nothing else is
trained, any dropped branch would change the gradient; then nothing is dropped, and a warning says so.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dropbp.branch_sets import containing, lowest
from dropbp.config import Config
from dropbp.discovery.module_paths import common_prefix, prefixes
from dropbp.discovery.structure import NO_BRANCH_ABOVE, Structure
from dropbp.masks.registry import sampler_kind

logger = logging.getLogger(__name__)

SELDOM = 0.01  # of the steps
NAMED_AT_MOST = 8
_NUMBER = re.compile(r"^((?:\w*[A-Za-z_]\w*\.)*)(\d+)(\..*)?$")


class Trained:
    """The trained parameters of a model, and the branches that their gradients pass through.

    `freezes_stem` says whether the parameters in `structure.stem` are frozen in some steps; otherwise they train in
    all.
    """

    def __init__(self, model: nn.Module, structure: Structure, freezes_stem: bool) -> None:
        self.model, self.structure, self.freezes_stem = model, structure, freezes_stem

    def shares(self, rates: Sequence[float]) -> dict[str, float]:
        """The share of steps in which each trained parameter has a gradient, at these drop rates."""
        lowest_above = {name: self._lowest_above(name) for name in self.names()}
        return {name: 1.0 if branch == NO_BRANCH_ABOVE else 1 - rates[branch] for name, branch in lowest_above.items()}

    def names(self) -> list[str]:
        """Names of the parameters that currently require a gradient."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def _lowest_above(self, name: str) -> int:
        stem = self.structure.stem
        always_trained = name in stem.names and not self.freezes_stem
        return NO_BRANCH_ABOVE if always_trained else stem.lowest_above.get(name, NO_BRANCH_ABOVE)

    def in_stem(self) -> list[str]:
        """Trained parameters outside any single branch that are frozen in some steps."""
        stem = self.structure.stem.names if self.freezes_stem else ()
        return [name for name in self.names() if name in stem]

    def only_in_lower_half(self) -> list[str]:
        """All trained parameters, if none lies in the upper half of the model: shallow steps would train nothing."""
        lowest_above = [self._lowest_above(name) for name in self.names()]
        lower_half = len(self.structure.branches) // 2
        return self.names() if NO_BRANCH_ABOVE not in lowest_above and max(lowest_above) < lower_half else []

    def some_branches_are_frozen(self) -> bool:
        """Whether a branch has a frozen parameter, so that the user has chosen what to train."""
        stem = self.structure.stem
        frozen = [n for n, p in self.model.named_parameters() if not p.requires_grad and n not in stem.names]
        return any(stem.lowest_above.get(name, 0) != NO_BRANCH_ABOVE for name in frozen)

    def nothing_to_save(self) -> bool:
        """Whether a step that drops anything would train nothing, or nothing in the branches.

        This is so if all gradients pass through the lowest branch that has a backward, or if the branches share their
        parameters from the bottom up.
        """
        lowest_above = {name: self._first(self._lowest_above(name)) for name in self.names()}
        lowest = min((branch for branch in lowest_above.values() if branch != NO_BRANCH_ABOVE), default=NO_BRANCH_ABOVE)
        stem, shared = self.structure.stem.names, self.structure.stem.shared
        inside = [name for name in lowest_above if name in shared or name not in stem]
        inside = [name for name in inside if lowest_above[name] != NO_BRANCH_ABOVE]
        lower_half = len(self.structure.branches) // 2
        all_shared = bool(inside) and all(name in shared and lowest_above[name] < lower_half for name in inside)
        return lowest != NO_BRANCH_ABOVE and (all_shared or all(branch == lowest for branch in lowest_above.values()))

    def not_recorded(self) -> list[str]:
        """The parts of the model, trained or not, that the forward used for discovery did not run."""
        return _labels(self.structure.stem.unused, [name for name, _ in self.model.named_parameters()])

    def abbreviated(self, names: Iterable[str]) -> str:
        """Names of trained parameters, abbreviated."""
        return abbreviated(names, self.names())

    def _first(self, branch: int) -> int:
        """The first of the branches that are dropped together with this one."""
        together = containing(self.structure.parallel, 1 << branch) if branch >= 0 else 0
        return lowest(together).bit_length() - 1 if together else branch


def resolve_auto(config: Config, trained: Trained, rates: Callable[[Config], Sequence[float]]) -> Config:
    """Resolve `auto` in the configuration by what is trained; `rates` gives the rates of a configuration."""
    kind = sampler_kind(config.masks)
    if not kind.prefixes or config.stem == "train" or config.rates != "auto" or not config.drop_rate:
        return config
    if trained.nothing_to_save():
        return dataclasses.replace(config, rates=(0.0,) * len(trained.structure.branches))
    chosen = trained.in_stem() if trained.some_branches_are_frozen() else []
    chosen += trained.only_in_lower_half()
    if not chosen or config.mask_options:
        return config
    found = trained.shares(rates(config))
    if min(found[name] for name in chosen) >= _share_of_full_steps(config):
        return config
    cap = 1 - _share_of_full_steps(config) if config.max_rate is None else config.max_rate
    options = {**config.mask_options, "uniform": "golden"}
    return dataclasses.replace(config, rates=kind.rates, max_rate=cap, mask_options=options)


def _share_of_full_steps(config: Config) -> float:
    """Share of steps that drop nothing if parameters below all branches train: half of the backward budget."""
    return (1 - config.drop_rate) / 2


def warn_of_untrained(trained: Trained, config: Config, rates: Sequence[float]) -> None:
    """Warn of parameters that train seldom, never, or only in steps that drop nothing; once, of the learning rate."""
    for line in remarks(trained, config, rates):
        if line == _learning_rate(config):
            _warn_once(line)
        else:
            logger.warning("%s: %s", type(trained.model).__name__, line)


@functools.cache
def _warn_once(line: str) -> None:
    logger.warning(line)


def remarks(trained: Trained, config: Config, rates: Sequence[float]) -> list[str]:
    """One line for each kind of parameter that trains seldom, never, or only in steps that drop nothing."""
    if config.drop_rate and not any(rates) and trained.freezes_stem:
        return [_nothing_saved(trained)]
    found = trained.shares(rates)
    never, seldom, few = *_rare(config, found), _few(config)
    lines = []
    if never:
        lines.append(f"no step of this run trains {trained.abbreviated(never)}. {_REMEDY}")
    if seldom:
        lines.append(f"fewer than one step in {1 / few:.0f} trains {trained.abbreviated(seldom)}. {_REMEDY}")
    below = [name for name in trained.in_stem() if found[name] >= few]
    if below and trained.some_branches_are_frozen():
        lines.append(
            f"{min(found[name] for name in below):.0%} of the steps train {trained.abbreviated(below)}: those that "
            "keep all branches above, so that the gradient is exact."
        )
    unused = [name for name in trained.structure.stem.unused if name in found]
    if unused and trained.freezes_stem:
        lines.append(
            f"the small forward that finds the branches did not use {trained.abbreviated(unused)}, which therefore "
            "counts as lying below all branches. Pass example_inputs=... that use it."
        )
    if config.drop_rate and any(rates):
        lines.append(_learning_rate(config))
    return lines


_REMEDY = (
    "The backward seldom or never reaches that depth. max_rate=0.9 trains every depth in at least a tenth of the "
    "steps; masks='exact' trains all branches alike."
)


def _learning_rate(config: Config) -> str:
    """Advice on the learning rate, from the records in docs/learning.md."""
    if sampler_kind(config.masks).prefixes:
        return (
            "learning rate: on a pretrained model these masks did best at one to three times plain training's best "
            "rate. At equal FLOPs they then learned nearly as much as plain training, and more where plain training "
            "needs gradient checkpointing (docs/learning.md). Compare both on your data."
        )
    return (
        f"masks={config.masks!r} drops branches at any depth. Such masks learned less than plain training at equal "
        "FLOPs, at every learning rate that was tried (docs/learning.md). The default is masks='nested'."
    )


def _nothing_saved(trained: Trained) -> str:
    named = trained.abbreviated(trained.in_stem() or trained.names())
    return (
        f"the gradient of {named} flows through every branch that has a backward, so dropping any of them would change "
        "it. Nothing is dropped or saved. Train parameters of other branches too, for instance with adapters, or "
        "accept the paper's biased gradient with masks='exact'."
    )


def _few(config: Config) -> float:
    """Share of steps below which a parameter trains seldom: one step in 100, or one step of a shorter run."""
    return max(SELDOM, 1 / (config.draws or math.inf))


def _rare(config: Config, shares: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Parameters that no step trains, and those that few train. Under ordered masks half a step counts as none."""
    ordered = sampler_kind(config.masks).annealed_rates is not None and not config.mask_options
    none = (0.5 - 1e-6) / config.draws if config.draws and ordered else 0.0
    never = [name for name, share in shares.items() if share <= none]
    return never, [name for name, share in shares.items() if none < share < _few(config)]


def training_report(trained: Trained, config: Config, rates: Sequence[float]) -> dict[str, Any]:
    """The part of `Handle.report` on how often parameters train."""
    found = trained.shares(rates)
    never, seldom = _rare(config, found)
    return {
        "never_trained": never,
        "seldom_trained": seldom,
        "at_rest": {name: found[name] for name in trained.in_stem()},
        "not_seen": [name for name in trained.structure.stem.unused if name in found],
        "not_recorded": trained.not_recorded(),
    }


# -- names


def abbreviated(names: Iterable[str], among: Iterable[str]) -> str:
    """Abbreviated parameter names: modules that contain no other of `among`, numbered ones as ranges."""
    labels = _labels(names, among)
    more = len(labels) - NAMED_AT_MOST
    return ", ".join(labels[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _labels(names: Iterable[str], among: Iterable[str]) -> list[str]:
    wanted = list(names)
    mine = Counter(path for name in wanted for path in prefixes(name))
    total = Counter(path for name in among for path in prefixes(name))
    groups: dict[str, list[str]] = {}
    for name in wanted:
        groups.setdefault(next((path for path in prefixes(name) if mine[path] >= total[path]), name), []).append(name)
    return _ranges(map(common_prefix, groups.values()))


def _ranges(labels: Iterable[str]) -> list[str]:
    """Write `layers.0.mlp`, `layers.1.mlp` as `layers.0-1.mlp`."""
    runs: dict[tuple[str, str], list[list[int]]] = {}
    for label in dict.fromkeys(labels):
        match = _NUMBER.match(label)
        head, number, tail = match.groups("") if match else (label, "", "")
        ends = runs.setdefault((head, tail), [])
        if number and ends and ends[-1][1] + 1 == int(number):
            ends[-1][1] += 1
        else:
            ends.append([int(number), int(number)] if number else [])
    return [head + (_span(ends) + tail if ends else "") for (head, tail), found in runs.items() for ends in found]


def _span(ends: Sequence[int]) -> str:
    return f"{ends[0]}-{ends[1]}" if ends[0] < ends[1] else str(ends[0])
