"""Finds the trainer that calls a callback on the call stack, because an event passes no reference to it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from transformers.trainer_callback import CallbackHandler, TrainerCallback

logger = logging.getLogger(__name__)


def put_first(callback: TrainerCallback) -> None:
    """Move the callback before the reporters, which would otherwise log before it adds its figures.

    A trainer runs the callbacks of `callbacks=[…]` last and offers no other order. Moving an entry to the front while
    the list is being iterated skips and repeats nothing: the entries before it have already run.
    """
    handler = calling_handler(callback)
    if handler is None:
        logger.debug("not called by a trainer: the reporters will not see the figures of DropBP")
        return
    others = [other for other in handler.callbacks if other is not callback]
    handler.callbacks[:] = [callback, *others]


def calling_handler(callback: TrainerCallback) -> CallbackHandler | None:
    """The handler that runs the trainer's callbacks, this one among them."""
    handlers = (each for each in _callers() if isinstance(each, CallbackHandler))
    return next((each for each in handlers if any(other is callback for other in each.callbacks)), None)


def frame_of_train(callback: TrainerCallback) -> FrameType | None:
    """The outermost frame of the trainer that is training: its `train()`."""
    trainer = calling_trainer(calling_handler(callback))
    own = [frame for frame in _stack() if trainer is not None and frame.f_locals.get("self") is trainer]
    return own[-1] if own else None


def calling_trainer(handler: CallbackHandler | None) -> Any:
    """The trainer whose callbacks are running, found on the call stack."""
    if handler is None:
        return None
    mine = (each for each in _callers() if getattr(each, "callback_handler", None) is handler)
    return next((each for each in mine if hasattr(each, "accelerator")), None)


def _callers() -> Iterator[Any]:
    """The objects whose methods are on the call stack, innermost first; None for other functions."""
    return (frame.f_locals.get("self") for frame in _stack())


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
