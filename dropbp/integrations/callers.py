"""Finds the trainer that calls a callback on the call stack, because an event passes no reference to it."""

from __future__ import annotations

import logging
import sys
from types import FrameType
from typing import Any

from transformers.trainer_callback import CallbackHandler, TrainerCallback

logger = logging.getLogger(__name__)


def put_first(callback: TrainerCallback) -> None:
    """Move the callback before the reporters, which would otherwise log before it adds its figures.

    A trainer runs the callbacks of `callbacks=[…]` last and offers no other order. Its list is found on the call stack,
    because an event passes neither the trainer nor the list. Moving an entry to the front while the list is being
    iterated skips and repeats nothing: the entries before it shift to positions that have already run.
    """
    handler = calling_handler(callback)
    if handler is None:
        logger.debug("not called by a trainer: the reporters will not see the figures of DropBP")
        return
    others = [other for other in handler.callbacks if other is not callback]
    handler.callbacks[:] = [callback, *others]


def calling_handler(callback: TrainerCallback) -> CallbackHandler | None:
    """The handler that runs the trainer's callbacks, this one among them."""
    frame = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler) and any(other is callback for other in caller.callbacks):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def frame_of_train(callback: TrainerCallback) -> FrameType | None:
    """The outermost frame of the trainer that is training: its `train()`."""
    trainer = calling_trainer(calling_handler(callback))
    frame: FrameType | None = sys._getframe() if trainer is not None else None
    found = None
    while frame is not None:
        if frame.f_locals.get("self") is trainer:
            found = frame
        frame = frame.f_back
    return found


def calling_trainer(handler: CallbackHandler | None) -> Any:
    """The trainer whose callbacks are running, found on the call stack."""
    frame: FrameType | None = sys._getframe() if handler is not None else None
    while frame is not None:
        caller = frame.f_locals.get("self")
        if getattr(caller, "callback_handler", None) is handler and hasattr(caller, "accelerator"):
            return caller
        frame = frame.f_back
    return None
