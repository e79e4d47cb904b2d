"""`enable`: one line on a model, and the handle that comes back.

The session ties the parts together: branches from discovery, rates from allocation, masks from a coupling, the
interceptions that act on them, and the books: what was dropped, how often, and what can be saved and loaded.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dropbp import inputs as example
from dropbp.allocation import allocate, depth_rates
from dropbp.blocks import CheckpointBypass, install_blocks
from dropbp.branches import Branch, Structure, analyse, analyse_named
from dropbp.checks import check_lengths, checked_rates
from dropbp.config import Config, make_config
from dropbp.device import Device, get_device
from dropbp.distributed import NEEDED, Gathering, KeptReduction, ReplicaGuard, clear_partitioned, refuse_wrapper
from dropbp.errors import ConfigError, DiscoveryError, StateError
from dropbp.flops import FlopsModel, Shape, counted_once, fitted, shape_of
from dropbp.grouping import ParameterGroup, split_groups
from dropbp.intercept import Interception
from dropbp.masks import Sampler, couplings
from dropbp.online import Online, own_squares
from dropbp.rehearsal import LOOKAHEAD, Layer, Rehearsal
from dropbp.runtime import Plan, RootState, Runtime, install, install_boundaries, install_exits, install_stems
from dropbp.sensitivity import Calibration, Closure, measure
from dropbp.trace import record

logger = logging.getLogger(__name__)

Mask = tuple[bool, ...]
STATE_VERSION = 1
SHORT, LONG = 16, 32
MAX_SAMPLERS = 32


def enable(
    model: nn.Module,
    drop_rate: float = 0.5,
    *,
    device: str | torch.device | Device | None = None,
    masks: str = "nested",
    seed: int = 0,
    example_inputs: Any = None,
    branches: Sequence[str | Sequence[str]] | None = None,
    **options: Any,
) -> Handle:
    """Make every training step skip the backward of a random `drop_rate` share of the residual branches.

    The forward stays equal to the bit. A skipped branch is not recorded: nothing of it is stored for backward and its
    parameters keep `grad is None`. Only this instance is changed; `handle.remove()`, or leaving `with`, undoes it.
    Forwards in evaluation mode or under `no_grad` are untouched.

    Args:
        model: any module with residual branches, in any mode, on any device (meta included), with or without adapters.
        drop_rate: share of the branches' FLOPs whose backward is skipped, 0 <= drop_rate < 1.
        device: name of the device adapter (`cpu`, `cuda`, `hpu`), a torch.device, or an adapter; None takes the
            model's own, so move the model first. The model is not moved.
        masks: how branches fall together. `nested`: each step trains the top of the model down to a random depth, with
            exact gradients; the budget holds on average. `exact`: any set of branches, within one branch of the budget
            in every step. `independent` (the paper's), `cyclic`, `pool`: see `dropbp.masks`.
        seed: of the masks.
        example_inputs: a dict of keyword arguments, a tuple of positional ones, or one tensor, that the model accepts.
            Not needed where the model says what it takes (transformers); FLOPs are then counted for these shapes.
        branches: names of the branches instead of those discovered: module names, or lists of names that are skipped
            together.
        **options: see `dropbp.config.Config`.

    Raises:
        ConfigError: an option is outside what is allowed.
        DiscoveryError: no residual branch was found, or a block was not understood.
        StateError: the model is enabled already, or is a wrapper around the model to enable.
        DeviceError: the device is unknown or not available.

    Source: Woo et al., DropBP, NeurIPS 2024, https://arxiv.org/abs/2402.17812.
    """
    known = {name: entry.options for name, entry in couplings().items()}
    config = make_config(drop_rate, masks, seed, options, known)
    model = _checked_model(model)
    adapter = get_device(device, model)
    adapter.check_model(model)
    structure, flops, shape = _understand(model, example_inputs, branches)
    return Handle(model, config, adapter, structure, flops, shape)


def disable(model: nn.Module) -> None:
    """Remove DropBP from a model, whoever enabled it. Does nothing to a model that is not enabled."""
    handle = _handle_of(_unwrapped(model))
    if handle is not None:
        handle.remove()


def discover(
    model: nn.Module, example_inputs: Any = None, branches: Sequence[str | Sequence[str]] | None = None
) -> tuple[Branch, ...]:
    """The residual branches of a model, nearest the input first; the model is not changed.

    Raises:
        DiscoveryError: none was found, a block was not understood, or the forward needs `example_inputs`.
    """
    structure, flops, shape = _understand(_unwrapped(model), example_inputs, branches)
    return _with_flops(structure.branches, flops.at(shape))


def _understand(
    model: nn.Module, example_inputs: Any, named: Sequence[str | Sequence[str]] | None
) -> tuple[Structure, FlopsModel, Shape]:
    if example_inputs is not None:
        given = example.as_inputs(example_inputs)
        structure = _structure(model, given, named)
        shape = shape_of(given.args, given.kwargs)
        return structure, counted_once([b.flops for b in structure.branches], shape), shape
    short = _structure(model, example.build(model, 1, SHORT), named)
    counts = [b.flops for b in short.branches]
    if not example.takes_text(model):
        return short, counted_once(counts, Shape(1)), Shape(1)
    return short, _flops_by_length(model, counts, named), Shape(1, SHORT)


def _flops_by_length(
    model: nn.Module, counts: Sequence[int], named: Sequence[str | Sequence[str]] | None
) -> FlopsModel:
    try:
        long = _structure(model, example.build(model, 1, LONG), named)
    except DiscoveryError as error:
        logger.debug("FLOPs are taken as proportional to the length: %s", error)
        return fitted(counts, [2 * c for c in counts], Shape(1, SHORT), Shape(1, 2 * SHORT))
    return fitted(counts, [b.flops for b in long.branches], Shape(1, SHORT), Shape(1, LONG))


def _structure(model: nn.Module, given: example.Inputs, named: Sequence[str | Sequence[str]] | None) -> Structure:
    trace = record(model, given.args, given.kwargs)
    if named is None:
        return analyse(trace, model)
    return analyse_named(trace, model, [[n] if isinstance(n, str) else list(n) for n in named])


def _with_flops(branches: Sequence[Branch], flops: Sequence[int]) -> tuple[Branch, ...]:
    return tuple(replace(b, flops=f) for b, f in zip(branches, flops, strict=True))


def _checked_model(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is {type(model).__name__}; dropbp.enable takes a torch.nn.Module.")
    refuse_wrapper(model)
    model = _unwrapped(model)
    if _handle_of(model) is not None or any(m.__dict__.get("_dropbp_site") is not None for m in model.modules()):
        raise StateError(
            f"{type(model).__name__} is enabled already. Change it through its handle (set_rates, fixed), or call "
            "handle.remove() or dropbp.disable(model) first."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise StateError(
            f"No parameter of {type(model).__name__} requires a gradient, so there is nothing to train and no backward "
            "to skip. Unfreeze parameters or add adapters first."
        )
    return cast(nn.Module, model)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module behind `torch.compile(model)`."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _handle_of(model: nn.Module) -> Handle | None:
    root = model.__dict__.get("_dropbp_root")
    return root.begin.__self__ if isinstance(root, RootState) else None  # type: ignore[attr-defined]


class Handle:
    """What `enable` returns: the branches, the masks, the books, and the way back. Also a context manager."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        device: Device,
        structure: Structure,
        flops: FlopsModel,
        shape: Shape,
    ) -> None:
        self.model, self.config, self.device = model, config, device
        self._structure, self._flops_model, self._shape = structure, flops, shape
        self._flops = flops.at(shape)
        self._samplers: dict[Shape, Sampler] = {}
        self._rates = self._initial_rates()
        self._fixed = _FixedMasks()
        self._lock = threading.Lock()
        self._measuring: Mask | None = None
        self._sensitivities: tuple[float, ...] | None = None
        self._own: tuple[float, ...] | None = None
        self._online = Online.new(len(structure.branches))
        self._mask: Mask | None = None
        self._current: Mask | None = None
        self._forwards = self._draws = self._dropped_forwards = 0
        self._counts = [0] * len(structure.branches)
        self._flops_dropped = self._flops_seen = 0.0
        self._check_scaling()
        self._scales = self._factors()
        self._runtime = Runtime(model)
        self._bypass = CheckpointBypass(model, structure, self._runtime)
        self._blocks = [model.get_submodule(name) for name in structure.blocks]
        self._replicas, self._gathering = ReplicaGuard(), Gathering(model, self._need_of_parameter)
        self._runtime.watchers.append(self._gathering.watch)
        self._sampler()  # options of the coupling are checked before anything is put in place
        self._interceptions = self._install()
        self._rehearsal = self._new_rehearsal()

    # -- what is there

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches, nearest the input first, with FLOPs for the shapes last seen and present rates."""
        each = zip(self._structure.branches, self._flops, self._rates, strict=True)
        return tuple(replace(branch, flops=flops, rate=rate) for branch, flops, rate in each)

    @property
    def mask(self) -> Mask | None:
        """The mask of the latest training forward, True = backward dropped; None before the first."""
        return self._mask

    @property
    def rates(self) -> tuple[float, ...]:
        """Each branch's drop rate."""
        return self._rates

    @property
    def enabled(self) -> bool:
        """Whether the model is still enabled through this handle."""
        return bool(self._interceptions)

    @property
    def fills_gradients(self) -> bool:
        """Whether skipped parameters get gradients of zeros."""
        return self._fills()

    # -- what can be done

    @contextlib.contextmanager
    def fixed(self, mask: Sequence[bool]) -> Iterator[Handle]:
        """Training forwards inside the `with` use this mask and no other; nothing is drawn meanwhile.

        Raises:
            ConfigError: the mask has not one entry per branch.
        """
        self._fixed.masks.append(self._checked_mask(mask))
        try:
            yield self
        finally:
            self._fixed.masks.pop()

    def set_rates(self, rates: Sequence[float]) -> None:
        """Set each branch's drop rate, 0..1; the next mask is drawn from them.

        Raises:
            ConfigError: wrong number of rates, or one outside 0..1.
        """
        checked = checked_rates(rates)
        check_lengths("rates", checked, self._flops)
        self._rates = checked
        self._samplers.clear()
        self._scales = self._factors()

    def calibrate(
        self, closure: Closure | Sequence[Closure], *, method: str = "one-pass", set_rates: bool = True
    ) -> Calibration:
        """Measure how much each branch matters and set the drop rates that follow under the FLOPs budget.

        Args:
            closure: runs one forward and returns the loss, each time of the same batch; several closures (batches)
                are averaged: sensitivities differ from batch to batch more than one-pass and exact ones do.
            method: `one-pass` (one backward, two forwards) or `exact` (the paper's N+1 passes).
            set_rates: whether the rates are set, or only returned.

        Under `nested` masks sensitivities are measured and the rates, a distribution over depths, stay as they are.
        Parameters, gradients, random state, training mode and buffers are as before afterwards; the books do not count
        it. Reentrant checkpoint functions of transformers models run as non-reentrant ones meanwhile.

        Raises:
            ConfigError: the closure does not return a loss, or the method is unknown.
            StateError: the loss or a sensitivity is not finite; nothing is changed.
        """
        self._check_enabled()
        closures = [closure] if callable(closure) else list(closure)
        with self._bypass.without_reentry():
            estimate, seconds = measure(self.model, self._structure, closures, self._unbooked, method)
        rates = self._rates_from(estimate.sensitivities)
        if set_rates:
            self.set_rates(rates)
            self._sensitivities, self._own = estimate.sensitivities, estimate.own
            self._online = Online.new(len(rates), self._forwards, self._counts)
        return Calibration(estimate.sensitivities, rates, estimate.own, method, estimate.passes, seconds)

    def observe(self, *, every: int = 100, decay: float = 0.95) -> bool:
        """Follow the sensitivities in ordinary training: call after the backward, before clipping and optimizer step.

        Needs no pass of its own: it reads the gradients of the branches that the step kept. Every `every` calls the
        rates are allocated anew; calibrate once before, for the part of the sensitivities that a step cannot show.

        Args:
            every: calls from one allocation to the next, at least 1.
            decay: of the exponential average, 0 <= decay < 1.

        Returns:
            Whether the rates were set anew.

        Raises:
            ConfigError: `every` or `decay` is outside what is allowed.
        """
        self._check_enabled()
        if every < 1 or not 0 <= decay < 1:
            raise ConfigError(f"every is {every!r} and decay {decay!r}; allowed: every >= 1 and 0 <= decay < 1.")
        squares = own_squares(self.model, self._structure.parameters, len(self._counts))
        self._online.observe(squares, self._forwards, self._counts, decay)
        if self._online.calls % every:
            return False
        sensitivities = self._online.sensitivities(self.model, self._sensitivities, self._own)
        if sensitivities is not None:
            self.set_rates(self._rates_from(sensitivities))
        return sensitivities is not None

    def _rates_from(self, sensitivities: Sequence[float]) -> tuple[float, ...]:
        """Under the nested coupling rates are a distribution over depths and stay so.

        Sensitivities mostly rise toward the input, where rates of nested masks may not fall: the nearest rates that do
        not are all equal, and a nested mask of equal rates drops everything or nothing.
        """
        if self.config.masks == "nested":
            return self._rates
        return allocate(sensitivities, self._flops, self.config.drop_rate, self.config.max_rate)

    @contextlib.contextmanager
    def _unbooked(self, mask: Sequence[bool]) -> Iterator[None]:
        """What feeds the stream stays awake: its gradients say how the first branch matters to others, not to it."""
        self._measuring = self._checked_mask(mask)
        stems = [self.model.get_submodule(name) for name in self._structure.stems] if self._stem_rests() else []
        sites = [module.__dict__["_dropbp_site"] for module in stems]
        try:
            for module in stems:
                module.__dict__["_dropbp_site"] = None
            yield
        finally:
            self._measuring = None
            for module, site in zip(stems, sites, strict=True):
                module.__dict__["_dropbp_site"] = site

    def resample(self) -> None:
        """Draw a new mask at the next training forward (with `resample="step"`: call once per optimizer step)."""
        self._current = None

    def reduce_kept(self, replica: DistributedDataParallel) -> None:
        """Make `DistributedDataParallel` around this model send gradients of kept branches only.

        Registers a communication hook, of which a replica can have one; it stays when the handle is removed, and then
        sends everything.

        Raises:
            StateError: the replica is not one of this model.
        """
        if not any(module is self.model for module in replica.module.modules()):
            raise StateError("The DistributedDataParallel does not hold the model of this handle.")
        reduction = KeptReduction(self._needs_by_parameter(), replica.process_group)
        self._runtime.watchers.append(reduction.watch)
        replica.register_comm_hook(None, lambda _, bucket: reduction(bucket))

    def group_parameters(self, groups: Iterable[ParameterGroup] | None = None) -> list[ParameterGroup]:
        """Parameter groups for an optimizer, in each of which either all parameters are skipped in a step or none.

        On a lazy device the work on each group is then the same whatever the mask; see `dropbp.grouping`.

        Args:
            groups: the groups as they would be without DropBP, whose options are kept; None makes one of all
                parameters that are trained.
        """
        if groups is None:
            groups = [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}]
        keys: dict[int, tuple[int, int]] = {id(p): (0, need) for p, need in self._needs_by_parameter().items()}
        for name, need in self._structure.stems.items():
            for parameter in self.model.get_submodule(name).parameters():
                keys.setdefault(id(parameter), (1, need))
        return split_groups(groups, lambda parameter: keys.get(id(parameter), (-1, 0)))

    def _needs_by_parameter(self) -> dict[nn.Parameter, int]:
        return {self.model.get_parameter(name): need for name, need in self._structure.parameters.items()}

    def remove(self) -> None:
        """Take DropBP off the model, exactly. A second call does nothing."""
        for interception in reversed(self._interceptions):
            interception.remove()
        self._interceptions = []
        self._bypass.remove()
        self._gathering.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # -- the books

    def report(self) -> dict[str, Any]:
        """What was dropped so far: plain numbers, lists and strings, ready for JSON.

        `realised_drop_rate` and `flops_saved_share` are shares of the branches' forward FLOPs over all training
        forwards and over those after the warm-up; `flops_skipped` counts forward FLOPs whose backward was skipped.
        """
        seen = max(self._flops_seen, 1.0)
        return {
            "drop_rate": self.config.drop_rate,
            "realised_drop_rate": self._flops_dropped / seen,
            "flops_skipped": self._flops_dropped,
            "branch_flops_share": self._structure.coverage,
            "masks": self.config.masks,
            "seed": self.config.seed,
            "forwards": self._forwards,
            "draws": self._draws,
            "device": self.device.name,
            "shape": {"batch_size": self._shape.batch_size, "sequence_length": self._shape.sequence_length},
            "branches": [self._branch_report(i, b) for i, b in enumerate(self.branches)],
        }

    def _branch_report(self, i: int, branch: Branch) -> dict[str, Any]:
        realised = self._counts[i] / self._forwards if self._forwards else 0.0
        return {
            "name": branch.name,
            "modules": list(branch.modules),
            "flops": branch.flops,
            "parameters": branch.parameters,
            "rate": branch.rate,
            "dropped": self._counts[i],
            "realised_rate": realised,
        }

    def summary(self) -> str:
        """A table of the branches with FLOPs, rates and how often each was dropped."""
        width = max(len("branch"), *(len(b.name) for b in self._structure.branches))
        report, total = self.report(), sum(self._flops)
        head = f"{'branch':<{width}}  {'share of FLOPs':>14}  {'parameters':>12}  {'rate':>6}  {'realised':>8}"
        rows = [
            f"{entry['name']:<{width}}  {entry['flops'] / total:>14.2%}  {entry['parameters']:>12,}  "
            f"{entry['rate']:>6.3f}  {entry['realised_rate']:>8.3f}"
            for entry in report["branches"]
        ]
        foot = (
            f"{len(self._counts)} branches hold {self._structure.coverage:.1%} of the forward's FLOPs; target drop "
            f"rate {self.config.drop_rate:g}, realised {report['realised_drop_rate']:.4f} in {self._forwards} forwards"
        )
        return "\n".join([head, *rows, foot])

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to draw the same masks: plain numbers, lists and strings."""
        return {
            "version": STATE_VERSION,
            "branches": [branch.name for branch in self._structure.branches],
            "masks": self.config.masks,
            "seed": self.config.seed,
            "drop_rate": self.config.drop_rate,
            "rates": list(self._rates),
            "forwards": self._forwards,
            "draws": self._draws,
            "mask": None if self._mask is None else list(self._mask),
            "current": None if self._current is None else list(self._current),
            "counts": list(self._counts),
            "flops_dropped": self._flops_dropped,
            "flops_seen": self._flops_seen,
            "sensitivities": None if self._sensitivities is None else list(self._sensitivities),
            "own": None if self._own is None else list(self._own),
            "online": self._online.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another handle of the same model stopped.

        Raises:
            StateError: the state is of another version, model, coupling or seed, or is damaged; nothing is changed.
        """
        self._check_state(state)
        try:
            rates = [float(r) for r in state["rates"]]
            counts = [_loaded_count(c) for c in state["counts"]]
            masks = [self._loaded_mask(state[k]) for k in ("mask", "current")]
            numbers = [_loaded_count(state[k]) for k in ("forwards", "draws")]
            flops = [_loaded_sum(state[k]) for k in ("flops_dropped", "flops_seen")]
            check_lengths("counts", counts, self._flops)
            parts = [self._loaded_part(state.get(k)) for k in ("sensitivities", "own")]
            online = self._loaded_online(state, counts)
            self.set_rates(rates)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise StateError(f"The DropBP state is damaged ({error}); nothing was loaded.") from error
        self._counts, (self._mask, self._current) = counts, masks
        if self._forwards < numbers[0]:
            self._rehearsal = None  # the run that is continued had its own
        (self._forwards, self._draws), (self._flops_dropped, self._flops_seen) = numbers, flops
        (self._sensitivities, self._own), self._online = parts, online

    def _loaded_mask(self, mask: Any) -> Mask | None:
        if mask is None:
            return None
        if not all(isinstance(drop, bool) for drop in mask):
            raise ValueError(f"a mask is {_short(mask)}, not a list of bools")
        return self._checked_mask(mask)

    def _loaded_part(self, values: Sequence[float] | None) -> tuple[float, ...] | None:
        """States of earlier versions have none."""
        if values is None:
            return None
        check_lengths("sensitivities", values, self._flops)
        return tuple(float(value) for value in values)

    def _loaded_online(self, state: Mapping[str, Any], counts: Sequence[int]) -> Online:
        if state.get("online") is None:
            return Online.new(len(self._flops), int(state["forwards"]), counts)
        return Online.from_state(state["online"], len(self._flops))

    def _check_state(self, state: Any) -> None:
        if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
            found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise StateError(f"The DropBP state is of version {found!r}; this library reads version {STATE_VERSION}.")
        mine = {**self.state_dict(), "drop_rate": None}
        for key in ("branches", "masks", "seed"):
            if state.get(key) != mine[key]:
                raise StateError(
                    f"The DropBP state belongs to another run: its {key} are {_short(state.get(key))}, this "
                    f"model's are {_short(mine[key])}. Enable the same model with the same options before loading."
                )

    # -- inside

    def _check_enabled(self) -> None:
        if not self.enabled:
            raise StateError("This handle was removed from its model. Call dropbp.enable(model, ...) for a new one.")

    def _install(self) -> list[Interception]:
        root = RootState(self._begin, self._runtime)
        made = install(self.model, self._structure, self._runtime, root)
        if self._stem_rests():
            made += install_stems(self.model, self._structure.stems, self._runtime)
        made += install_blocks(self.model, self._structure.blocks, self._runtime)
        if self.config.scaling != "none":
            made += install_exits(self.model, self._structure, self._runtime)
        boundary = self._boundary()
        if boundary != "none":
            made += install_boundaries(self.model, self._boundary_names(boundary), self.device.step_boundary)
            made += install_boundaries(self.model, self._last_blocks(), self.device.step_boundary, after=True)
        return made

    def _boundary(self) -> str:
        return self.device.defaults().boundary if self.config.boundary == "auto" else self.config.boundary

    def _boundary_names(self, boundary: str) -> list[str]:
        names = list(self._structure.blocks)
        if boundary == "sublayer":
            names += [branch.modules[0] for branch in self._structure.branches if branch.modules]
        return list(dict.fromkeys(names))

    def _last_blocks(self) -> list[str]:
        """The last block of each list: what comes after, the head and the loss, gets a graph of its own."""
        return list({name.rpartition(".")[0]: name for name in self._structure.blocks}.values())

    def _new_rehearsal(self) -> Rehearsal | None:
        if not self.config.rehearse or self._boundary() == "none" or not self.device.is_lazy():
            return None
        stems = self._structure.stems if self._stem_rests() else {}
        parts = [*stems.items(), *self._structure.blocks.items()]
        layers = [Layer(_kind(self.model.get_submodule(name)), need) for name, need in parts]
        return Rehearsal(layers, (1 << len(self._counts)) - 1, self._checkpointed)

    def _initial_rates(self) -> tuple[float, ...]:
        rates = self.config.rates
        if not isinstance(rates, str):
            checked = checked_rates(rates)
            check_lengths("rates", checked, self._flops)
            return checked
        profile = ("shelf" if self.config.masks == "nested" else "uniform") if rates == "auto" else rates
        if profile == "uniform":
            return (float(self.config.drop_rate),) * len(self._flops)
        cap = 1.0 if self.config.max_rate is None else self.config.max_rate
        return depth_rates(self._flops, self.config.drop_rate, profile, cap)

    def _check_scaling(self) -> None:
        reasons = self._structure.unscalable
        if self.config.scaling != "none" and reasons:
            name, reason = next(iter(reasons.items()))
            raise ConfigError(
                f"scaling={self.config.scaling!r} is not exact for branch {name}: {reason}. Use scaling='none'."
            )

    def _factors(self) -> tuple[float, ...]:
        if self.config.scaling == "none":
            return ()
        top = self.config.max_scale if self.config.scaling == "clipped" else float("inf")
        return tuple(min(top, 1 / (1 - rate)) if rate < 1 else 1.0 for rate in self._rates)

    def _checked_mask(self, mask: Sequence[bool]) -> Mask:
        checked = tuple(bool(m) for m in mask)
        if len(checked) != len(self._structure.branches):
            raise ConfigError(
                f"The mask has {len(checked)} entries, the model {len(self._structure.branches)} branches. Give one "
                "bool per entry of handle.branches, True to drop its backward."
            )
        return checked

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
        """Called before every training forward of the root: what it drops, and how kept gradients are scaled."""
        if self._measuring is not None:
            return Plan(_bits(self._measuring))
        with self._lock:
            self._see(shape_of(args, kwargs))
            warm, mask = self._forwards >= self.config.warmup, self._next_mask()
            self._mask = mask
            if self._rehearsal is not None and not self._rehearsal.done:
                self._rehearsal.note(_bits(mask), self._with_gradient())
            self._book(mask)
            self._bypass.refresh()
            self._refresh_engines(mask)
        dropped = _bits(mask)
        if dropped and self._fills():
            self._fill(dropped)
        return Plan(dropped, self._scales if warm else (), self._checkpointed(dropped), self._rests_now())

    def _checkpointed(self, dropped: int) -> int:
        """Blocks nearest the input whose kept branches are more than a step may keep, as a bit mask of branches."""
        limit = self._activations_limit()
        if limit is None or self._bypass.is_on():
            return 0
        chosen, kept = 0, self._flops_of(~dropped)
        allowed = limit * sum(self._flops) + max(self._flops)
        for need in self._structure.blocks.values():
            if kept <= allowed:
                break
            share = self._flops_of(need & ~dropped)
            chosen, kept = chosen | (need if share else 0), kept - share
        return chosen

    def _flops_of(self, branches: int) -> int:
        return sum(flops for i, flops in enumerate(self._flops) if branches >> i & 1)

    def _activations_limit(self) -> float | None:
        limit = self.config.max_activations
        if not isinstance(limit, str):
            return limit
        return 1 - self.config.drop_rate if self.config.masks == "nested" else None

    def _rests_now(self) -> bool:
        """A mask that was given names branches only: under it the stem trains, unless it was told to rest."""
        return self.config.stem == "rest" or not self._fixed.masks

    def _stem_rests(self) -> bool:
        return self.config.stem == "rest" or (self.config.stem == "auto" and self.config.masks == "nested")

    def _refresh_engines(self, mask: Mask) -> None:
        self._replicas.check(mask)
        self._gathering.refresh(self._blocks)
        if any(mask) and "deepspeed" in sys.modules:
            clear_partitioned(self.model.parameters())

    def _need_of_parameter(self, name: str) -> int:
        return self._structure.parameters.get(name, NEEDED)

    def _see(self, shape: Shape) -> None:
        if shape != self._shape:
            self._shape, self._flops = shape, self._flops_model.at(shape)

    def _next_mask(self) -> Mask:
        if self._fixed.masks:
            return self._fixed.masks[-1]
        if self._forwards < self.config.warmup:
            return (False,) * len(self._counts)
        if self._keeps_mask() and self._current is not None:
            return self._current
        self._current = self._rehearsed() or self._drawn()
        return self._current

    def _drawn(self) -> Mask:
        mask = self._sampler().draw(self._draws)
        self._draws += 1
        return mask

    def _rehearsed(self) -> Mask | None:
        """A mask for a graph that is not compiled yet: see `dropbp.rehearsal`."""
        if self._rehearsal is None or self._rehearsal.done:
            return None
        dropped = self._rehearsal.next(self._with_gradient(), self._upcoming)
        return None if dropped is None else tuple(bool(dropped >> i & 1) for i in range(len(self._counts)))

    def _upcoming(self) -> list[int]:
        sampler = self._sampler()
        return [_bits(sampler.draw(draw)) for draw in range(self._draws, self._draws + LOOKAHEAD)]

    def _with_gradient(self) -> int:
        """The branches whose parameters have gradients now, from an earlier micro-batch of this step."""
        needs = self._structure.parameters.items()
        held = (need for name, need in needs if self.model.get_parameter(name).grad is not None)
        return functools.reduce(operator.or_, held, 0)

    def _keeps_mask(self) -> bool:
        every = self.config.resample
        if isinstance(every, int):
            return (self._forwards - self.config.warmup) % every != 0
        return every == "step"

    def _sampler(self) -> Sampler:
        """One per shape: with other lengths the branches weigh differently."""
        if self._shape not in self._samplers:
            if len(self._samplers) >= MAX_SAMPLERS:
                self._samplers.clear()
            self._samplers[self._shape] = Sampler(
                self.config.masks, self._rates, self._flops, self.config.seed, **self.config.mask_options
            )
        return self._samplers[self._shape]

    def _book(self, mask: Mask) -> None:
        self._forwards += 1
        for i, drop in enumerate(mask):
            if drop:
                self._counts[i] += 1
                self._flops_dropped += self._flops[i]
        self._flops_seen += sum(self._flops)

    def _fills(self) -> bool:
        fill = self.device.defaults().fill if self.config.fill == "auto" else self.config.fill
        return fill == "zero"

    def _fill(self, dropped: int) -> None:
        """Zero gradients for parameters that this step skips, so that optimizers see the same set in every step."""
        for name, need in self._structure.parameters.items():
            if need & dropped == need:
                parameter = self.model.get_parameter(name)
                if parameter.requires_grad and parameter.grad is None and not hasattr(parameter, "ds_id"):
                    parameter.grad = torch.zeros_like(parameter)


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Blocks of one kind record the same graphs."""
    return type(block), tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in block.parameters())


def _loaded_count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"a count is {_short(value)}, not a number of 0 and above")
    return value


def _loaded_sum(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise ValueError(f"a sum of FLOPs is {_short(value)}, not a number of 0 and above")
    return float(value)


def _bits(mask: Mask) -> int:
    return sum(1 << i for i, drop in enumerate(mask) if drop)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


class _FixedMasks(threading.local):
    """The masks of the `with handle.fixed(...)` that are open in this thread, the innermost last."""

    def __init__(self) -> None:
        self.masks: list[Mask] = []
