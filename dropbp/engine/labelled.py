"""Computes logits only at positions with a label, since no loss reads the others.

In instruction tuning most positions carry no label. With a large vocabulary and a small model, their logits take a
large part of a step. So `logits_to_keep` asks the model for the positions whose next token has a label in any row of
the batch, and `shift_labels` gives its loss the labels of these positions. Both are arguments of transformers, so
everything else that a model does with its logits and its loss is unchanged. The loss is the same sum in another order.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from dropbp.discovery.discover import checked_module, unwrapped
from dropbp.engine.patch import Forward, ForwardPatch, WrapperState
from dropbp.errors import ConfigError, StateError
from dropbp.inputs import IGNORED

_ATTRIBUTE = "_dropbp_labelled"
_LOSS = "ForCausalLMLoss"


def labelled_logits(model: nn.Module, *, evaluation: bool = False) -> LabelledLogits:
    """Make a causal language model compute logits only at labelled positions when it is called with `labels`.

    Loss and gradients stay the same, up to rounding. `outputs.logits` then holds only the positions with a label in
    some row of the batch, so do not use this with a trainer that reads the logits of training steps (TRL's SFTTrainer
    does, for its accuracy). Calls without labels, or with their own `logits_to_keep` or `shift_labels`, are unchanged.
    It also works with PEFT and `dropbp.enable`: call it before them, or pass `logits="labelled"` to `enable`.

    Args:
        model: a causal language model of transformers, or a wrapper that holds one.
        evaluation: whether to do the same in evaluation mode and without gradients. Leave it off if metrics are
            computed from logits.

    Returns:
        A handle: `remove()`, or leaving the `with` block, undoes it.

    Raises:
        ConfigError: the model's forward does not take `logits_to_keep`, or computes its loss in its own way.
        StateError: the model does so already.
    """
    return LabelledLogits(model, evaluation)


class LabelledLogits:
    """The handle of `labelled_logits`, which removes the wrapper around the model's forward. Also a context manager."""

    def __init__(self, model: nn.Module, evaluation: bool = False) -> None:
        module = _with_head(unwrapped(checked_module(model)))
        if module.__dict__.get(_ATTRIBUTE) is not None:
            raise StateError(f"{type(module).__name__} already computes logits only at labelled positions.")
        settings = _Settings(evaluation, inspect.signature(module.forward))
        self._patch: ForwardPatch | None = ForwardPatch(module, _ATTRIBUTE, settings, _wrap)

    def remove(self) -> None:
        """Make the model compute all logits again. A second call does nothing."""
        if self._patch is not None:
            self._patch.remove()
            self._patch = None

    def __enter__(self) -> LabelledLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Settings(WrapperState):
    __slots__ = ("evaluation", "signature")

    def __init__(self, evaluation: bool, signature: inspect.Signature) -> None:
        self.evaluation, self.signature = evaluation, signature


def _wrap(original: Forward) -> Forward:
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        settings: Any = self.__dict__.get(_ATTRIBUTE)
        on = settings is not None and settings.original is original
        if on and (settings.evaluation or (self.training and torch.is_grad_enabled())):
            kwargs = {**kwargs, **_positions(settings.signature, args, kwargs)}
        return original(self, *args, **kwargs)

    return forward


def _positions(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The two extra arguments for a call; none if the call has no labels or nearly every position is needed."""
    if kwargs.get("shift_labels") is not None:
        return {}
    given = signature.bind_partial(*args, **kwargs).arguments
    labels = given.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or "logits_to_keep" in given:
        return {}
    following = labels[:, 1:]
    wanted = (following != kwargs.get("ignore_index", IGNORED)).any(0).nonzero().squeeze(1)
    if not 0 < len(wanted) < labels.shape[1] - 1:
        return {}
    return {"logits_to_keep": wanted, "shift_labels": following[:, wanted].contiguous()}


def _with_head(model: nn.Module) -> nn.Module:
    """The module that computes logits and loss. Raises ConfigError if there is none, or it uses another loss."""
    found = next((module for module in model.modules() if _takes_positions(module)), None)
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} cannot compute logits only at labelled positions: no forward in it takes both "
            "labels and logits_to_keep, as causal language models of transformers do. Leave it out."
        )
    if not _uses_the_known_loss(found):
        raise ConfigError(
            f"{type(found).__name__} cannot compute logits only at labelled positions: its forward does not pass "
            f"shift_labels on to transformers' {_LOSS}, so its loss would differ. Leave it out."
        )
    return found


def _takes_positions(module: nn.Module) -> bool:
    return {"labels", "logits_to_keep"} <= inspect.signature(module.forward).parameters.keys()


def _uses_the_known_loss(module: nn.Module) -> bool:
    """Whether the forward passes unknown keywords on to its `loss_function`, and that is the shifted loss."""
    function = inspect.unwrap(cast(Any, module.forward))
    code = getattr(function, "__code__", None)
    takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    loss = getattr(module, "loss_function", None)
    return takes_more and "loss_function" in getattr(code, "co_names", ()) and getattr(loss, "__name__", "") == _LOSS
