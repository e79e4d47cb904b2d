"""The handle that `enable` returns: a façade.

Discovery finds the branches, a schedule draws what each forward drops and keeps count, and an engine makes the model
run that way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dropbp.cache.cache import ActivationCache
from dropbp.checks import check_lengths, checked_rates, checked_share, listed, short
from dropbp.config import Config
from dropbp.device import Device
from dropbp.discovery.discover import Findings
from dropbp.discovery.structure import Branch
from dropbp.engine.engine import Engine
from dropbp.engine.labelled import LabelledLogits
from dropbp.engine.trained import figures, remarks, settled
from dropbp.errors import ConfigError, StateError
from dropbp.flops import Shape
from dropbp.lazy.grouping import ParameterGroup
from dropbp.masks.budget import shortfall
from dropbp.masks.online import Online
from dropbp.masks.registry import Mask
from dropbp.masks.schedule import Schedule
from dropbp.masks.statistics import table
from dropbp.sensitivity.measure import Calibration, Closure, mean_over_ranks, measure, own_squares

logger = logging.getLogger(__name__)


class Handle:
    """Shows and controls what is dropped, and removes DropBP from the model. Also a context manager.

    Attributes:
        model: the model that is enabled.
        device: the adapter of its device.
        config: the options, with `auto` settled where it depends on what is trained.
        engine: makes the model run as scheduled.
        schedule: what each training forward drops.
        cache: the activation cache; None if it is off.
    """

    def __init__(self, model: nn.Module, config: Config, device: Device, findings: Findings) -> None:
        self.model, self.device, self._findings = model, device, findings
        self.engine = engine = Engine(model, findings.structure, findings.asked, config, device)
        weights = findings.weights
        self._weights = weights.counted_from_the_top() if engine.prefixes and engine.may_truncate else weights
        self.config = settled(config, engine.trained, lambda config: self._scheduled(config).rates)
        self.schedule = self._scheduled(self.config, trains=engine.parameters.train)
        self.is_abandoned: Callable[[], bool] | None = None
        self._labelled = LabelledLogits(model) if config.logits == "labelled" else None  # the engine goes around it
        engine.abandoned = self.abandoned
        engine.others_train = self._weights.renew
        engine.start(self.schedule, owner=self)
        self.cache: ActivationCache | None = None
        where = self.config.activation_cache
        if where:
            self.cache = ActivationCache(engine, where, self.config.activation_cache_limit)
            self.cache.start()

    # -- what is there

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches, nearest the input first, with their current rates and their FLOPs for the last shape."""
        each = zip(self.engine.structure.branches, self.schedule.seen.flops, self.rates, strict=True)
        return tuple(replace(branch, flops=flops, rate=rate) for branch, flops, rate in each)

    @property
    def mask(self) -> Mask | None:
        """The mask of the latest training forward, True = backward dropped; None before the first."""
        return self.schedule.mask

    @property
    def rates(self) -> tuple[float, ...]:
        """Each branch's drop rate."""
        return self.schedule.rates

    @property
    def enabled(self) -> bool:
        """Whether the model is still enabled through this handle."""
        return self.engine.running

    @property
    def fills_gradients(self) -> bool:
        """Whether skipped parameters get gradients of zeros."""
        return self.engine.fills_gradients

    # -- what can be done

    @contextlib.contextmanager
    def fixed(self, mask: Sequence[bool]) -> Iterator[Handle]:
        """Training forwards inside the `with` use this mask and no other; nothing is drawn.

        Raises:
            ConfigError: the mask does not have one entry per branch.
        """
        self.schedule.fixed.append(self.schedule.checked(mask))
        try:
            yield self
        finally:
            self.schedule.fixed.pop()

    def set_rates(self, rates: Sequence[float]) -> None:
        """Set each branch's drop rate, 0..1; the next mask is drawn from them.

        Under `nested` masks parallel branches are dropped together: each gets the mean of their rates.

        Raises:
            ConfigError: wrong number of rates, one outside 0..1, or rates with which nothing would train.
        """
        checked = checked_rates(rates)
        check_lengths("rates", checked, self.schedule.seen.flops)
        self.schedule.check_trains(checked)
        self.schedule.set_rates(checked)

    def progress(self, share: float, *, dropping: bool = True) -> None:
        """Tell how much of the training is done. Call it as often as you like, on every rank alike.

        In a run of known length (`steps`) masks follow this share from then on, instead of counted forwards. So the
        budget is met whatever the number of forwards in a step, and wherever the training was resumed. The callback for
        transformers calls it for you.

        Args:
            share: of the training, 0 at its beginning and 1 at its end; a warm-up told by `dropping` does not count.
            dropping: whether the forwards to come drop branches; False in a warm-up.

        Raises:
            ConfigError: the share is outside 0..1.
        """
        checked = checked_share("share", share, "a share of the training from 0 to 1", lambda x: 0 <= x <= 1)
        self.schedule.progress(checked, dropping)

    def note_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Count only the parameters of this optimizer as trained; each mask gives a gradient to some of them.

        Otherwise every parameter that requires a gradient counts. The callback for transformers calls it for you.

        Raises:
            ConfigError: every step would drop all that the optimizer holds.
        """
        self.engine.parameters.hold(p for group in optimizer.param_groups for p in group["params"])
        self.schedule.forget_what_trains()
        if self.cache is not None:
            self.cache.note_optimizer(optimizer)

    def calibrate(
        self, closure: Closure | Sequence[Closure], *, method: str = "one-pass", set_rates: bool = True
    ) -> Calibration:
        """Measure how much each branch matters, and set the drop rates that follow from it under the FLOPs budget.

        Args:
            closure: runs one forward and returns the loss, always on the same batch. Several closures (batches) are
                averaged: sensitivities differ more between batches than between the two methods.
            method: `one-pass` (one backward, two forwards) or `exact` (the paper's N+1 passes).
            set_rates: whether to set the rates, or only return them.

        Under `nested` masks the rates are a distribution over depths, and stay as they are. Parameters, gradients,
        random state, training mode and buffers are restored, and the report does not count these passes. Reentrant
        checkpointing of transformers models runs as non-reentrant meanwhile.

        Raises:
            ConfigError: the closure does not return a loss, or the method is unknown.
            StateError: the loss or a sensitivity is not finite; nothing is changed.
        """
        self._check_enabled()
        closures = [closure] if callable(closure) else listed("closure", closure)
        if not all(callable(each) for each in closures):
            raise ConfigError(f"closure is {short(closure)}; pass a function that runs a forward, or a list of some.")
        with self.engine.bypass.without_reentry():
            estimate, seconds = measure(self.model, self.engine.structure, closures, self._measured, method)
        schedule, done = self.schedule, self.schedule.statistics
        rates = schedule.allocated(estimate.sensitivities)
        if set_rates:
            self._set_measured(rates)
            schedule.sensitivities, schedule.own = estimate.sensitivities, estimate.own
            schedule.online = Online.new(len(rates), done.forwards, done.counts)
        return Calibration(estimate.sensitivities, rates, estimate.own, method, estimate.passes, seconds)

    def observe(self, *, every: int = 100, decay: float = 0.95) -> bool:
        """Follow the sensitivities during training. Call it after the backward, before clipping and optimizer step.

        It needs no pass of its own, but reads the gradients of the branches that the step kept. Every `every` calls it
        allocates the rates anew. Calibrate once before, for the part of the sensitivities that a step cannot show.

        Args:
            every: calls between two allocations, at least 1.
            decay: of the exponential average, 0 <= decay < 1.

        Returns:
            Whether the rates were set anew.

        Raises:
            ConfigError: `every` or `decay` is outside what is allowed.
        """
        self._check_enabled()
        every = int(checked_share("every", every, "a number of calls of at least 1", lambda x: 1 <= x < math.inf))
        decay = checked_share("decay", decay, "a number from 0 to below 1", lambda x: 0 <= x < 1)
        schedule, done = self.schedule, self.schedule.statistics
        squares = own_squares(self.model, self.engine.structure.parameters, len(self.rates))
        schedule.online.observe(squares, done.forwards, done.counts, decay)
        if schedule.online.calls % every:
            return False
        own = torch.tensor(schedule.online.own(), dtype=torch.float64)
        means = mean_over_ranks(own, next(self.model.parameters()).device).tolist()
        sensitivities = schedule.online.sensitivities(means, schedule.sensitivities, schedule.own)
        if sensitivities is not None:
            self._set_measured(schedule.allocated(sensitivities))
        return sensitivities is not None

    def _set_measured(self, rates: tuple[float, ...]) -> None:
        """Unchanged rates are not set, so that they go on following their profile."""
        if rates != self.rates:
            self.set_rates(rates)

    @contextlib.contextmanager
    def _measured(self, mask: Sequence[bool]) -> Iterator[None]:
        with self.engine.measuring(self.schedule.checked(mask)):
            yield

    def resample(self) -> None:
        """Draw a new mask at the next training forward (with `resample="step"`: call once per optimizer step)."""
        self.schedule.resample()

    def reduce_kept(self, replica: DistributedDataParallel) -> None:
        """Make `DistributedDataParallel` around this model send the gradients of kept branches only.

        This registers a communication hook; a replica can have one. The hook stays when the handle is removed, and then
        sends everything.

        Raises:
            StateError: the replica is not one of this model.
        """
        wrapped = isinstance(replica, DistributedDataParallel)
        if not wrapped or not any(module is self.model for module in replica.modules()):
            raise StateError(
                f"reduce_kept takes the DistributedDataParallel around the model of this handle; {short(replica)} is "
                "none, or holds another model."
            )
        self.engine.reduce_kept(replica)

    def group_parameters(self, groups: Iterable[ParameterGroup] | None = None) -> list[ParameterGroup]:
        """Parameter groups for an optimizer: a step skips either all parameters of a group or none.

        So the work on a group does not depend on the mask, as a lazy device needs; see `dropbp.lazy.grouping`.

        Args:
            groups: the groups without DropBP, whose options are kept; None stands for one group of all trained
                parameters.
        """
        return self.engine.parameters.grouped(groups)

    def remove(self) -> None:
        """Remove DropBP from the model exactly; warn if the run missed its budget. A second call does nothing."""
        missed = shortfall(self.schedule) if self.enabled else None
        if missed is not None:
            logger.warning("DropBP missed its budget: %s", missed)
        if self.cache is not None:
            self.cache.stop()
        self.engine.stop()
        if self._labelled is not None:
            self._labelled.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # -- what was dropped

    def report(self) -> dict[str, Any]:
        """What was dropped so far, and what trains how often: plain numbers, lists and strings, ready for JSON.

        `realised_drop_rate` is the share of the branches' backward FLOPs skipped in all training forwards.
        `flops_skipped` counts them in forward FLOPs, of which a whole backward takes two each. A branch's `weight` is
        what dropping it saves, in the same unit; it is 0 if the branch has no backward, because neither it nor anything
        below it is trained. `never_trained`, `seldom_trained`, `at_rest` and `not_seen` name parameters
        (docs/training.md). `branch_flops_share` is the branches' share of the forward that found them; `not_recorded`
        names the parts of the model, trained or frozen, that this forward did not run. `not_recomputed` names the
        blocks that keep all activations in deep steps, with the reason.
        """
        schedule, done = self.schedule, self.schedule.statistics
        return {
            "drop_rate": self.config.drop_rate,
            "realised_drop_rate": done.drop_rate,
            "flops_skipped": done.flops_dropped,
            "branch_flops_share": self.engine.structure.coverage,
            "masks": self.config.masks,
            "seed": self.config.seed,
            "forwards": done.forwards,
            "draws": schedule.draws,
            "not_recomputed": dict(self.engine.recomputation.reasons),
            "device": self.device.name,
            "shape": dataclasses.asdict(schedule.shape),
            **figures(self.engine.trained, self.config, self.rates),
            **({} if self.cache is None else {"activation_cache": self.cache.report()}),
            "branches": [
                {**done.of_branch(i, branch), "weight": weight}
                for i, (branch, weight) in enumerate(zip(self.branches, schedule.seen.weights, strict=True))
            ],
        }

    def summary(self) -> str:
        """A table of the branches with FLOPs, rates and realised rates, and a line for what trains seldom or never."""
        return "\n".join([table(self.report()), *remarks(self.engine.trained, self.config, self.rates)])

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to draw the same masks: plain numbers, lists and strings."""
        return self.schedule.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another handle of the same model stopped.

        With the same options the masks are those that the other would have drawn. `drop_rate`, `max_rate`, `rates`,
        `steps`, `resample` and `warmup` may change: the new ones hold for the rest of the training, which stays the
        same share of the run. A warning says so.

        Raises:
            StateError: the state is of another version, model, mask sampler or seed, or is damaged; nothing is changed.
        """
        self.schedule.load(state)

    # -- inside

    def abandoned(self) -> bool:
        """Whether the run of this handle ended without removing it. Whoever made the handle may tell."""
        return False if self.is_abandoned is None else self.is_abandoned()

    def _check_enabled(self) -> None:
        if not self.enabled:
            raise StateError("This handle was removed from its model. Call dropbp.enable(model, ...) for a new one.")

    def fresh_schedule(self, shape: Shape | None = None) -> Schedule:
        """A schedule as at the beginning of the run, for forecasts. Drawing from it changes nothing here."""
        schedule = self._scheduled(self.config, trains=self.engine.parameters.train)
        schedule.set_rates(None if self.schedule.profile else self.rates)
        if shape is not None:
            schedule.see(shape)
        return schedule

    def _scheduled(self, config: Config, **options: Any) -> Schedule:
        structure, findings = self._findings.structure, self._findings
        names, blocks = [branch.name for branch in structure.branches], structure.blocks.values()
        given = {"weights": self._weights, "together": structure.together, **options}
        return Schedule(config, names, blocks, findings.flops, findings.shape, **given)
