"""Every method of the learning bench in a few lines, written from its paper: what each training step leaves out.

A `Method` is attached to a fresh model and told of each step and each micro-batch. It reports the share of the blocks'
work in its latest micro-batch as `Work(forward, activations, weights)`, each a pass that costs a block one unit. So
FLOPs of all methods are counted alike. Methods that change blocks work on models that keep them in one `ModuleList`
whose members take and return the residual stream first, like the decoders in transformers.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

import dropbp
from dropbp.discovery.structure import Branch
from dropbp.errors import ConfigError
from dropbp.masks.rates import depth_rates


class Work(NamedTuple):
    """Shares of the blocks' FLOPs that ran: forward, gradients of activations, gradients of weights."""

    forward: float = 1.0
    activations: float = 1.0
    weights: float = 1.0


class Method:
    """Plain training, and the base of all methods. Leaving the `with` block removes the method from the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def begin_step(self, step: int) -> None:
        """Called before each optimizer step, counted from 0."""

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer."""
        return [{"params": list(self.model.parameters()), "lr": learning_rate}]

    def micro_batch(self) -> contextlib.AbstractContextManager[object]:
        """Context of the forward and backward of one micro-batch."""
        return contextlib.nullcontext()

    def deepest(self) -> contextlib.AbstractContextManager[object]:
        """Context of the micro-batch that keeps the most activations, if known; otherwise of an ordinary one."""
        return self.micro_batch()

    def work(self) -> Work:
        """The work of the latest micro-batch."""
        return Work()

    def resting(self) -> Sequence[float]:
        """At each step the share of the blocks' FLOPs that no longer trains, if a cache skips it; else empty."""
        return ()

    def report(self) -> dict[str, Any]:
        """Further entries for a run's record, in JSON types."""
        return {}

    def remove(self) -> None:
        """Restore the model."""

    def __enter__(self) -> Method:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


class DropBP(Method):
    """This library: `dropbp.enable` with a mask sampler and rates, and without a memory limit unless one is given.

    With `slow_deep` the learning rate of each branch is scaled by the share of steps that train it, 1 - rate, and that
    of the modules before the first branch likewise. The reason: AdamW moves a rarely trained parameter as far per step
    as any other.
    """

    def __init__(
        self, model: nn.Module, drop_rate: float, *, seed: int = 0, slow_deep: bool = False, **options: Any
    ) -> None:
        super().__init__(model)
        self.slow_deep = slow_deep
        self.handle = dropbp.enable(model, drop_rate, seed=seed, **{"max_activations": None, **options})

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        if not self.slow_deep:
            return super().groups(learning_rate)
        branches = self.handle.branches
        made = [_group([self.model.get_submodule(m) for m in b.modules], 1 - b.rate) for b in branches]
        made.append(_group(_before_blocks(self.model), 1 - branches[0].rate))
        grouped = {id(p) for group in made for p in group["params"]}
        made.append({"params": [p for p in self.model.parameters() if id(p) not in grouped], "lr": 1.0})
        return [{**group, "lr": learning_rate * group["lr"]} for group in made]

    def begin_step(self, step: int) -> None:
        if self.handle.config.resample == "step":
            self.handle.resample()

    def deepest(self) -> contextlib.AbstractContextManager[object]:
        if self.handle.config.masks != "nested":
            return self.micro_batch()
        return self.handle.fixed([rate == 1.0 for rate in self.handle.rates])

    def work(self) -> Work:
        kept = 1 - _dropped_share(self.handle)
        return Work(1.0, kept, kept)

    def report(self) -> dict[str, Any]:
        found = self.handle.report()
        return {key: found[key] for key in ("realised_drop_rate", "activation_cache") if found.get(key) is not None}

    def remove(self) -> None:
        self.handle.remove()


class PublishedDropBP(DropBP):
    """DropBP as published, with its uniform rates and its masks: a coin per sublayer, then the target as a minimum.

    If fewer than `drop_rate` of the sublayers were dropped, more are, those with the highest rates first. With equal
    rates these are the ones from index 0 on. So the mean is above the target, and the lowest sublayers are dropped most
    often.

    Source: the code published with arXiv:2402.17812.
    """

    def __init__(self, model: nn.Module, drop_rate: float, *, seed: int = 0) -> None:
        super().__init__(model, drop_rate, seed=seed, masks="independent", rates="uniform")
        self._coins = random.Random(seed)

    def micro_batch(self) -> contextlib.AbstractContextManager[object]:
        return self.handle.fixed(floored_mask(self.handle.rates, self.handle.config.drop_rate, self._coins))


def floored_mask(rates: Sequence[float], drop_rate: float, coins: random.Random) -> list[bool]:
    """A coin per sublayer; if these drop too few, also the highest rates, ties from index 0, up to the target."""
    mask = [coins.random() < rate for rate in rates]
    kept = sorted((i for i, dropped in enumerate(mask) if not dropped), key=lambda i: -rates[i])
    missing = math.ceil(drop_rate * len(rates) - 1e-9) - sum(mask)
    for i in kept[: max(0, missing)]:
        mask[i] = True
    return mask


class Freezing(Method):
    """The lowest `drop_rate` of the blocks' FLOPs is never trained, nor is anything before the blocks.

    The backward therefore ends at the border. Branches are whole: the one at the border is trained if it does not fit.
    """

    def __init__(self, model: nn.Module, drop_rate: float) -> None:
        super().__init__(model)
        branches = dropbp.discover(model)
        share = _shares(branches)
        frozen, below = 0, 0.0
        while frozen < len(branches) and below + share[frozen] <= drop_rate + 1e-9:
            below += share[frozen]
            frozen += 1
        self._frozen = _freeze([*_before_blocks(model), *(model.get_submodule(m) for m in _modules(branches[:frozen]))])
        self._kept = 1 - below

    def work(self) -> Work:
        return Work(1.0, self._kept, self._kept)

    def remove(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)


class LISA(Method):
    """Only some blocks, redrawn every `period` steps, are trained, along with everything outside the blocks.

    The embedding is always trained, so the gradient reaches the bottom: only gradients of weights are saved.

    Source: LISA, arXiv:2403.17919, algorithm 1, with uniform sampling.
    """

    def __init__(self, model: nn.Module, drop_rate: float, *, period: int = 5, seed: int = 0) -> None:
        super().__init__(model)
        self.blocks, self.period = blocks_of(model), period
        self.count = max(1, round((1 - drop_rate) * len(self.blocks)))
        self._trainable = [[p for p in block.parameters() if p.requires_grad] for block in self.blocks]
        self._coins = random.Random(seed)

    def begin_step(self, step: int) -> None:
        if step % self.period == 0:
            chosen = self._coins.sample(range(len(self.blocks)), self.count)
            for i, parameters in enumerate(self._trainable):
                _set_trainable(parameters, i in chosen)

    def work(self) -> Work:
        return Work(1.0, 1.0, self.count / len(self.blocks))

    def remove(self) -> None:
        for parameters in self._trainable:
            _set_trainable(parameters, True)


class LayerDrop(Method):
    """Each block is skipped in forward and backward with probability `drop_rate`; evaluation runs all of them.

    Source: LayerDrop, arXiv:1909.11556 ("every other" pruning is not needed here; no scaling, as there).
    """

    def __init__(self, model: nn.Module, drop_rate: float, *, seed: int = 0) -> None:
        super().__init__(model)
        self.skips = [_Skip(block) for block in blocks_of(model)]
        self._coins, self._drop_rate = random.Random(seed), drop_rate

    def micro_batch(self) -> contextlib.AbstractContextManager[object]:
        for skip, keep in zip(self.skips, self.keep_rates(), strict=True):
            skip.skipped, skip.scale = self._coins.random() >= keep, self.scale(keep)
        return contextlib.nullcontext()

    def keep_rates(self) -> list[float]:
        """Probability that each block runs in the current step."""
        return [1 - self._drop_rate] * len(self.skips)

    def scale(self, keep: float) -> float:
        """Factor of a running block's contribution to the residual stream."""
        return 1.0

    def work(self) -> Work:
        kept = sum(not skip.skipped for skip in self.skips) / len(self.skips)
        return Work(kept, kept, kept)

    def remove(self) -> None:
        for skip in self.skips:
            skip.remove()


class ProgressiveLayerDrop(LayerDrop):
    """Blocks are skipped ever more often, the deeper ones first; the output of a kept block is scaled up.

    Keep rate of block i of L at step t: 1 - i/L (1 - theta(t)), theta(t) = (1 - floor) exp(-gamma t) + floor, with
    gamma = 100 / steps. It has no drop rate of its own: the paper's floor of 1/2 skips about a quarter.

    Source: Progressive Layer Dropping, arXiv:2010.13369, equations 5 and 6; whole blocks are gated here.
    """

    def __init__(self, model: nn.Module, *, floor: float = 0.5, steps: int = 100, seed: int = 0) -> None:
        super().__init__(model, 0.0, seed=seed)
        self.floor, self.gamma, self._step = floor, 100 / steps, 0

    def begin_step(self, step: int) -> None:
        self._step = step

    def keep_rates(self) -> list[float]:
        theta = (1 - self.floor) * math.exp(-self.gamma * self._step) + self.floor
        return [1 - (i + 1) / len(self.skips) * (1 - theta) for i in range(len(self.skips))]

    def scale(self, keep: float) -> float:
        return 1 / keep


class _Skip:
    """A block that can be skipped: in training its forward then returns its input."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.inner = block, block.forward
        self.skipped, self.scale = False, 1.0
        block.forward = self._forward

    def _forward(self, x_BSH: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.block.training:
            return self.inner(x_BSH, *args, **kwargs)
        if self.skipped:
            return x_BSH
        out = self.inner(x_BSH, *args, **kwargs)
        return out if self.scale == 1.0 else x_BSH + self.scale * (out - x_BSH)

    def remove(self) -> None:
        del self.block.forward


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of the model's longest ModuleList. Raises ConfigError if it has none."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"{type(model).__name__} has no ModuleList, so its blocks are not known to the rivals.")
    return max(lists, key=len)


def _before_blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def _group(modules: Iterable[nn.Module], share: float) -> dict[str, Any]:
    return {"params": [p for module in modules for p in module.parameters()], "lr": share}


def _freeze(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    frozen = [p for module in modules for p in module.parameters() if p.requires_grad]
    _set_trainable(frozen, False)
    return frozen


def _set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trainable)


def _modules(branches: Iterable[Branch]) -> Iterator[str]:
    return (name for branch in branches for name in branch.modules)


def _shares(branches: Sequence[Branch]) -> list[float]:
    total = sum(branch.flops for branch in branches)
    return [branch.flops / total for branch in branches]


def _dropped_share(handle: dropbp.Handle) -> float:
    mask = handle.mask or ()
    return sum(share for share, dropped in zip(_shares(handle.branches), mask, strict=False) if dropped)


# -- DropBP's variants: a mask sampler and rates, both by name


def plateau(flops: Sequence[float], drop_rate: float, deep: float) -> tuple[float, ...]:
    """Rates 0 at the top and 1 - `deep` below it: a share `deep` of the steps trains everything, the rest the top."""
    return depth_rates(flops, drop_rate, "freeze", max_rate=1 - deep)


def _uniform(masks: str) -> Callable[..., Method]:
    return lambda model, drop_rate, seed, steps: DropBP(model, drop_rate, seed=seed, masks=masks, rates="uniform")


def _default(model: nn.Module, drop_rate: float, seed: int, steps: int, **options: Any) -> Method:
    """`dropbp.enable` as it behaves when given the length of the run, without a memory limit unless one is given."""
    return DropBP(model, drop_rate, seed=seed, steps=steps, resample="step", **options)


def _nested(model: nn.Module, drop_rate: float, seed: int, words: Sequence[str]) -> Method:
    profile, *more = words
    options: dict[str, Any] = {"masks": "nested", "resample": "step"}
    if "biased-stem" in more:
        options["stem"] = "train"
    if "capped" in more:
        options["max_activations"] = 1 - drop_rate
    if "slow-deep" in more:
        options["slow_deep"] = True
    if "per-forward" in more:
        options["resample"] = "forward"
    if "every" in more:
        options["resample"] = int(more[more.index("every") + 1])
    name, _, deep = profile.partition(":")
    flops = [branch.flops for branch in dropbp.discover(model)]
    rates = plateau(flops, drop_rate, float(deep)) if name == "plateau" else depth_rates(flops, drop_rate, name)
    return DropBP(model, drop_rate, seed=seed, rates=rates, **options)


METHODS: dict[str, Callable[..., Method]] = {
    "plain": lambda model, drop_rate, seed, steps: Method(model),
    "lora": lambda model, drop_rate, seed, steps: Method(model),
    "freezing": lambda model, drop_rate, seed, steps: Freezing(model, drop_rate),
    "lisa": lambda model, drop_rate, seed, steps: LISA(model, drop_rate, seed=seed),
    "layerdrop": lambda model, drop_rate, seed, steps: LayerDrop(model, drop_rate, seed=seed),
    "pld": lambda model, drop_rate, seed, steps: ProgressiveLayerDrop(model, steps=steps, seed=seed),
    "published": lambda model, drop_rate, seed, steps: PublishedDropBP(model, drop_rate, seed=seed),
    "default": _default,
    "default capped": functools.partial(_default, max_activations="auto"),
    "exact": _uniform("exact"),
    "independent": _uniform("independent"),
    "cyclic": _uniform("cyclic"),
    "pool": _uniform("pool"),
}


def method(name: str, model: nn.Module, drop_rate: float, seed: int, steps: int) -> Method:
    """The method `name` on a model.

    Args:
        name: one of `METHODS`; or "nested PROFILE", with a profile of `dropbp.masks.rates.depth_rates` or
            "plateau:SHARE". Options may follow: "every K" (keep a mask for K forwards instead of one optimizer step),
            "per-forward", "capped" (no step keeps more than 1 - drop_rate of the activations; deeper blocks are
            checkpointed), "slow-deep" (learning rates in proportion to 1 - rate, see `DropBP`) and "biased-stem" (the
            embedding is trained in every step).
        model: a fresh model.
        drop_rate: share of the blocks' backward FLOPs to save.
        seed: seed of the method's own random choices.
        steps: length of the training, for methods with a schedule.

    Raises:
        ConfigError: the name is not known.
    """
    if name in METHODS:
        return METHODS[name](model, drop_rate, seed, steps)
    first, *words = name.split()
    if first != "nested" or not words:
        raise ConfigError(f"method {name!r} is unknown; known are {', '.join(METHODS)}, nested PROFILE [every K].")
    return _nested(model, drop_rate, seed, words)
