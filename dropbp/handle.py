"""The handle that `enable` returns: a façade over discovery, schedule and engine.

Discovery finds the branches. The schedule draws the mask of each forward and keeps the counts. The engine applies the
mask to the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
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
from dropbp.engine.trained import remarks, resolve_auto, training_report
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
    """Shows and controls which branches are dropped, and removes DropBP from the model. Also a context manager.

    Attributes:
        model: the enabled model.
        device: the adapter of its device.
        config: the options; `auto` is resolved where it depends on the trained parameters.
        engine: applies each mask to the model.
        schedule: draws the mask of each training forward.
        cache: the activation cache; None if it is off.
    """

    def __init__(self, model: nn.Module, config: Config, device: Device, findings: Findings) -> None:
        self.model, self.device, self._findings = model, device, findings
        self.engine = engine = Engine(model, findings.structure, findings.call_signature, config, device)
        weights = findings.weights
        self._weights = weights.of_truncated_backward() if engine.prefixes and engine.may_truncate else weights
        self.config = resolve_auto(config, engine.trained, lambda config: self._scheduled(config).rates)
        self.schedule = self._scheduled(self.config, trains=engine.parameters.trains_any)
        self._labelled = LabelledLogits(model) if config.logits == "labelled" else None  # the engine wraps around it
        engine.start(self.schedule, owner=self, refresh_weights=self._weights.refresh)
        self.cache: ActivationCache | None = None
        where = self.config.activation_cache
        if where:
            self.cache = ActivationCache(engine, where, self.config.activation_cache_limit)
            self.cache.start()

    # -- state

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches, from the input upwards, with their current rates and their FLOPs at the latest input shape."""
        each = zip(self.engine.structure.branches, self.schedule.at_batch_shape.flops, self.rates, strict=True)
        return tuple(replace(branch, flops=flops, rate=rate) for branch, flops, rate in each)

    @property
    def mask(self) -> Mask | None:
        """The mask of the latest training forward, True = backward skipped; None before the first."""
        return self.schedule.mask

    @property
    def rates(self) -> tuple[float, ...]:
        """The drop rate of each branch."""
        return self.schedule.rates

    @property
    def enabled(self) -> bool:
        """Whether the model is still enabled through this handle."""
        return self.engine.running

    @property
    def fills_gradients(self) -> bool:
        """Whether skipped parameters get gradients of zeros."""
        return self.engine.fills_gradients

    # -- control

    @contextlib.contextmanager
    def fixed(self, mask: Sequence[bool]) -> Iterator[Handle]:
        """Use this mask for all training forwards inside the `with` block; no mask is drawn.

        Raises:
            ConfigError: the mask does not have one entry per branch.
        """
        self.schedule.fixed.append(self.schedule.checked(mask))
        try:
            yield self
        finally:
            self.schedule.fixed.pop()

    def set_rates(self, rates: Sequence[float]) -> None:
        """Set the drop rate of each branch, from 0 to 1; the next mask is drawn from them.

        Under `nested` masks, parallel branches are dropped together: each gets the mean of their rates.

        Raises:
            ConfigError: the number of rates is wrong, a rate is outside 0..1, or nothing would train at these rates.
        """
        self._check_enabled()
        checked = checked_rates(rates)
        check_lengths("rates", checked, self.schedule.at_batch_shape.flops)
        self.schedule.check_trains(checked)
        self.schedule.set_rates(checked)

    def progress(self, share: float, *, dropping: bool = True) -> None:
        """Report how much of the training is done. Call it as often as you like, equally on every rank.

        In a run of known length (`steps`), masks follow this share from then on, instead of the number of forwards. The
        run then meets its budget whatever the number of micro-batches in a step, and wherever it was resumed. The
        callback for transformers calls this for you.

        Args:
            share: finished share of the training, from 0 to 1, without the warm-up that `dropping` reports.
            dropping: whether the coming forwards drop branches; False during a warm-up.

        Raises:
            ConfigError: the share is outside 0..1.
        """
        self._check_enabled()
        checked = checked_share("share", share, "a share of the training from 0 to 1", lambda x: 0 <= x <= 1)
        self.schedule.progress(checked, dropping)

    def note_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Count only the parameters of this optimizer as trained. Each mask then gives some of them a gradient.

        Without this call, every parameter that requires a gradient counts. The callback for transformers calls this for
        you.

        Raises:
            ConfigError: every step would drop all parameters of the optimizer.
        """
        self._check_enabled()
        self.engine.parameters.restrict_to(p for group in optimizer.param_groups for p in group["params"])
        self.schedule.clear_trains_cache()
        if self.cache is not None:
            self.cache.note_optimizer(optimizer)

    def calibrate(
        self, closure: Closure | Sequence[Closure], *, method: str = "one-pass", set_rates: bool = True
    ) -> Calibration:
        """Measure how much each branch matters, and set the drop rates that follow from it under the FLOPs budget.

        Args:
            closure: runs one forward and returns the loss, always on the same batch. The results of several closures
                (batches) are averaged: sensitivities differ more between batches than between the two methods.
            method: `one-pass` (one backward, two forwards) or `exact` (the paper's N+1 passes).
            set_rates: whether to set the rates, or only return them.

        Under `nested` masks the rates are a distribution over depths, so they do not change. Parameters, gradients,
        random state, training mode and buffers are restored, and the report does not count these passes. Reentrant
        checkpointing in transformers models runs as non-reentrant during the measurement.

        Raises:
            ConfigError: the closure does not return a loss, or the method is unknown.
            StateError: the loss or a sensitivity is not finite; nothing is changed.
        """
        self._check_enabled()
        closures = [closure] if callable(closure) else listed("closure", closure)
        if not all(callable(each) for each in closures):
            raise ConfigError(f"closure is {short(closure)}; pass a function that runs a forward, or a list of them.")
        with self.engine.bypass.non_reentrant():
            estimate, seconds = measure(self.model, self.engine.structure, closures, self._measured, method)
        schedule, done = self.schedule, self.schedule.statistics
        rates = schedule.allocated(estimate.sensitivities)
        if set_rates:
            self._set_measured(rates)
            schedule.sensitivities, schedule.own = estimate.sensitivities, estimate.own
            schedule.online = Online.new(len(rates), done.forwards, done.counts)
        return Calibration(estimate.sensitivities, rates, estimate.own, method, estimate.passes, seconds)

    def observe(self, *, every: int = 100, decay: float = 0.95) -> bool:
        """Track the sensitivities during training. Call it after the backward, before gradient clipping and the
        optimizer step.

        It needs no extra pass: it reads the gradients of the branches that the step kept. Every `every` calls it
        allocates new rates. Calibrate once beforehand, because a training step shows only a part of the sensitivities.

        Args:
            every: calls between two allocations, at least 1.
            decay: decay of the exponential average, 0 <= decay < 1.

        Returns:
            Whether this call set new rates.

        Raises:
            ConfigError: `every` or `decay` has a value that is not allowed.
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
        """Set the rates only if they changed, so that unchanged rates keep following their profile."""
        if rates != self.rates:
            self.set_rates(rates)

    def _measured(self, mask: Sequence[bool]) -> contextlib.AbstractContextManager[None]:
        return self.engine.measuring(self.schedule.checked(mask))

    def resample(self) -> None:
        """Draw a new mask at the next training forward. With `resample="step"`, call it once per optimizer step."""
        self._check_enabled()
        self.schedule.resample()

    def reduce_kept(self, replica: DistributedDataParallel) -> None:
        """Make the `DistributedDataParallel` wrapper of this model send only the gradients of kept branches.

        This registers a communication hook, of which a replica can have only one. The hook stays after `remove` and
        then sends all gradients.

        Raises:
            StateError: the replica does not wrap this model.
        """
        self._check_enabled()
        wrapped = isinstance(replica, DistributedDataParallel)
        if not wrapped or not any(module is self.model for module in replica.modules()):
            raise StateError(
                f"reduce_kept needs the DistributedDataParallel around this handle's model; {short(replica)} is not "
                "one, or wraps another model."
            )
        self.engine.reduce_kept(replica)

    def group_parameters(self, groups: Iterable[ParameterGroup] | None = None) -> list[ParameterGroup]:
        """Parameter groups for an optimizer in which a step skips either all parameters of a group or none.

        The work on a group then does not depend on the mask, as a lazy device requires; see `dropbp.lazy.grouping`.

        Args:
            groups: the groups to split; their options are kept. None: one group with all trained parameters.
        """
        return self.engine.parameters.grouped(groups)

    def remove(self) -> None:
        """Restore the model exactly; warn if the run missed its budget. A second call does nothing."""
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

    def __exit__(self, *_: object) -> None:
        self.remove()

    # -- results

    def report(self) -> dict[str, Any]:
        """What was dropped so far, and how often each part trains: plain numbers, lists and strings, ready for JSON.

        `realised_drop_rate` is the share of the branches' backward FLOPs skipped over all training forwards.
        `flops_skipped` counts them in forward FLOPs; a full backward costs twice the forward. A branch's `weight` is
        what dropping it saves, in the same unit. It is 0 if the branch has no backward, because neither it nor anything
        below it is trained. `never_trained`, `seldom_trained`, `at_rest` and `not_seen` name parameters
        (docs/training.md). `branch_flops_share` is the branches' share of the FLOPs of the forward used for discovery;
        `not_recorded` names the parts of the model, trained or frozen, that this forward did not run. `not_recomputed`
        names the blocks that keep all activations in deep steps, each with the reason.
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
            **training_report(self.engine.trained, self.config, self.rates),
            **({} if self.cache is None else {"activation_cache": self.cache.report()}),
            "branches": [
                {**done.of_branch(i, branch), "weight": weight}
                for i, (branch, weight) in enumerate(zip(self.branches, schedule.at_batch_shape.weights, strict=True))
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

        With the same options, this handle draws the masks that the other would have drawn. `drop_rate`, `max_rate`,
        `rates`, `steps`, `resample` and `warmup` may differ: the new values apply to the rest of the training, and the
        finished share of the run is kept. A warning says so.

        Raises:
            StateError: the state is damaged, or belongs to another version, model, mask sampler or seed; nothing is
                changed.
        """
        self._check_enabled()
        self.schedule.load(state)

    # -- internal

    def _check_enabled(self) -> None:
        if not self.enabled:
            raise StateError("This handle was removed from its model. Call dropbp.enable(model, ...) for a new one.")

    def fresh_schedule(self, shape: Shape | None = None) -> Schedule:
        """A schedule as at the start of the run, for forecasts. Drawing from it does not change this handle."""
        schedule = self._scheduled(self.config, trains=self.engine.parameters.trains_any)
        schedule.set_rates(None if self.schedule.profile else self.rates)
        if shape is not None:
            schedule.set_shape(shape)
        return schedule

    def _scheduled(self, config: Config, **options: Any) -> Schedule:
        structure, findings = self._findings.structure, self._findings
        names, blocks = [branch.name for branch in structure.branches], structure.blocks.values()
        given = {"weights": self._weights, "parallel": structure.parallel, **options}
        return Schedule(config, names, blocks, findings.flops, findings.shape, **given)
