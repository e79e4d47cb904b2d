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

from dropbp.config import Config
from dropbp.discovery.structure import EXACT, Structure
from dropbp.masks.registry import sampler_kind

logger = logging.getLogger(__name__)

SELDOM = 0.01  # of the steps
NAMED_AT_MOST = 8
_NUMBER = re.compile(r"^((?:\w*[A-Za-z_]\w*\.)*)(\d+)(\..*)?$")


class Trained:
    """The trained parameters of a model, and the branches that their gradients pass through.

    Args:
        model: the root module.
        structure: its branches.
        rests: whether the parameters in `structure.rests` are frozen in some steps; otherwise they train in every step.
    """

    def __init__(self, model: nn.Module, structure: Structure, rests: bool) -> None:
        self.model, self.structure, self.rests = model, structure, rests

    def shares(self, rates: Sequence[float]) -> dict[str, float]:
        """The share of steps in which each trained parameter has a gradient, at these drop rates."""
        borders = {name: self._border(name) for name in self.names()}
        return {name: 1.0 if border == EXACT else 1 - rates[border] for name, border in borders.items()}

    def names(self) -> list[str]:
        """Names of the parameters that currently require a gradient."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def _border(self, name: str) -> int:
        rests = self.structure.rests
        awake = name in rests.resting and not self.rests
        return EXACT if awake else rests.borders.get(name, EXACT)

    def below(self) -> list[str]:
        """Trained parameters outside any single branch that are frozen in some steps."""
        resting = self.structure.rests.resting if self.rests else ()
        return [name for name in self.names() if name in resting]

    def low(self) -> list[str]:
        """All trained parameters, if none lies in the upper half of the model: shallow steps would train nothing."""
        borders = [self._border(name) for name in self.names()]
        return self.names() if EXACT not in borders and max(borders) < len(self.structure.branches) // 2 else []

    def some_branches_are_frozen(self) -> bool:
        """Whether a branch has a frozen parameter, so that the user has chosen what to train."""
        rests = self.structure.rests
        others = [
            name for name, p in self.model.named_parameters() if not p.requires_grad and name not in rests.resting
        ]
        return any(rests.borders.get(name, 0) != EXACT for name in others)

    def nothing_to_save(self) -> bool:
        """Whether a step that drops anything would train nothing, or nothing in the branches.

        This is so if all gradients pass through the lowest branch that has a backward, or if the branches share their
        parameters from the bottom up.
        """
        borders = {name: self._first(self._border(name)) for name in self.names()}
        lowest = min((border for border in borders.values() if border != EXACT), default=EXACT)
        shared = self.structure.rests.shared
        inside = [name for name in borders if name in shared or name not in self.structure.rests.resting]
        inside = [name for name in inside if borders[name] != EXACT]
        lower_half = len(self.structure.branches) // 2
        all_shared = bool(inside) and all(name in shared and borders[name] < lower_half for name in inside)
        return lowest != EXACT and (all_shared or all(border == lowest for border in borders.values()))

    def not_recorded(self) -> list[str]:
        """The parts of the model, trained or not, that the forward used for discovery did not run."""
        return _labels(self.structure.rests.unseen, [name for name, _ in self.model.named_parameters()])

    def compact(self, names: Iterable[str]) -> str:
        """Names of trained parameters, abbreviated."""
        return compact(names, self.names())

    def _first(self, border: int) -> int:
        """The first of the branches that are dropped together with this one."""
        bits = next((bits for bits in self.structure.together if border >= 0 and bits >> border & 1), 0)
        return (bits & -bits).bit_length() - 1 if bits else border


def settled(config: Config, trained: Trained, rates: Callable[[Config], Sequence[float]]) -> Config:
    """Resolve `auto` in the configuration by what is trained; `rates` gives the rates of a configuration."""
    kind = sampler_kind(config.masks)
    if not kind.prefixes or config.stem == "train" or config.rates != "auto" or not config.drop_rate:
        return config
    if trained.nothing_to_save():
        return dataclasses.replace(config, rates=(0.0,) * len(trained.structure.branches))
    chosen = trained.below() if trained.some_branches_are_frozen() else []
    chosen += trained.low()
    if not chosen or config.mask_options:
        return config
    found = trained.shares(rates(config))
    if min(found[name] for name in chosen) >= _whole_steps(config):
        return config
    cap = 1 - _whole_steps(config) if config.max_rate is None else config.max_rate
    options = {**config.mask_options, "uniform": "golden"}
    return dataclasses.replace(config, rates=kind.rates, max_rate=cap, mask_options=options)


def _whole_steps(config: Config) -> float:
    """Share of steps that drop nothing if parameters below all branches train: half of the backward budget."""
    return (1 - config.drop_rate) / 2


def tell(trained: Trained, config: Config, rates: Sequence[float]) -> None:
    """Warn of parameters that train seldom, never, or only in steps that drop nothing; once, of the learning rate."""
    for line in remarks(trained, config, rates):
        if line == _learning_rate(config):
            _tell_once(line)
        else:
            logger.warning("%s: %s", type(trained.model).__name__, line)


@functools.cache
def _tell_once(line: str) -> None:
    logger.warning(line)


def remarks(trained: Trained, config: Config, rates: Sequence[float]) -> list[str]:
    """One line for each kind of parameter that trains seldom, never, or only in steps that drop nothing."""
    if config.drop_rate and not any(rates) and trained.rests:
        return [_nothing_saved(trained)]
    found = trained.shares(rates)
    never, seldom, few = *_rare(config, found), _few(config)
    lines = []
    if never:
        lines.append(f"no step of this run trains {trained.compact(never)}. {_REMEDY}")
    if seldom:
        lines.append(f"fewer than one step in {1 / few:.0f} trains {trained.compact(seldom)}. {_REMEDY}")
    below = [name for name in trained.below() if found[name] >= few]
    if below and trained.some_branches_are_frozen():
        lines.append(
            f"{min(found[name] for name in below):.0%} of the steps train {trained.compact(below)}: those that keep "
            "all branches above, so that the gradient is exact."
        )
    unseen = [name for name in trained.structure.rests.unseen if name in found]
    if unseen and trained.rests:
        lines.append(
            f"the small forward that finds the branches did not use {trained.compact(unseen)}, which therefore counts "
            "as lying below all branches. Pass example_inputs=... that use it."
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
    return (
        f"the gradient of {trained.compact(trained.below() or trained.names())} flows through every branch that has a "
        "backward, so dropping any of them would change it. Nothing is dropped or saved. Train parameters of other "
        "branches too, for instance with adapters, or accept the paper's biased gradient with masks='exact'."
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


def figures(trained: Trained, config: Config, rates: Sequence[float]) -> dict[str, Any]:
    """The part of `Handle.report` on how often parameters train."""
    found = trained.shares(rates)
    never, seldom = _rare(config, found)
    return {
        "never_trained": never,
        "seldom_trained": seldom,
        "at_rest": {name: found[name] for name in trained.below()},
        "not_seen": [name for name in trained.structure.rests.unseen if name in found],
        "not_recorded": trained.not_recorded(),
    }


# -- names


def compact(names: Iterable[str], among: Iterable[str]) -> str:
    """Abbreviated parameter names: modules that contain no other of `among`, numbered ones as ranges."""
    labels = _labels(names, among)
    more = len(labels) - NAMED_AT_MOST
    return ", ".join(labels[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _labels(names: Iterable[str], among: Iterable[str]) -> list[str]:
    wanted = list(names)
    mine = Counter(path for name in wanted for path in _paths(name))
    total = Counter(path for name in among for path in _paths(name))
    groups: dict[str, list[str]] = {}
    for name in wanted:
        groups.setdefault(next((path for path in _paths(name) if mine[path] >= total[path]), name), []).append(name)
    return _ranges(_common_path(group) for group in groups.values())


def _paths(name: str) -> list[str]:
    """The parameter and all modules around it, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _common_path(names: Sequence[str]) -> str:
    shared = set(_paths(names[0])).intersection(*map(_paths, names))
    return max(shared, key=len)


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
