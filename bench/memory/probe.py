"""How much memory a training step needs.

Counted: the step runs on the meta device, where only shapes are worked out, and the bytes of its tensors are counted.
That is exact and the same everywhere, and leaves out what an allocator adds. Tried: the step is run on an accelerator,
and either fits or runs out of memory.

Optimizer states are there from the start, and with `accumulated` the gradients of all parameters, as when those of
several micro-batches are summed: what DropBP spares there is activations alone.
"""

from __future__ import annotations

import gc
import math

import torch

import dropbp
from dropbp.device import get_device
from dropbp.memory import track_tensor_bytes

from ..common.models import build_model
from ..common.presets import Training
from ..common.setup import Lane, Variant, build_batch, build_optimizer, loss_of

TRIED_STEPS = 3
Mask = tuple[bool, ...] | None  # None: drawn by the model


class Workplace:
    """A model and its optimizer, for one variant after another: weights, gradients and states are the same for all."""

    def __init__(self, model: str, training: Training, device: str = "meta") -> None:
        self.model_name, self.device = model, get_device(device)
        self.model = build_model(model, training, device)
        self.optimizer = build_optimizer(self.model, training.tuning)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._update_bytes: dict[tuple[bool, ...], int] = {}
        self.give_gradients(True)
        self.optimizer.step()  # makes its states

    def give_gradients(self, given: bool) -> None:
        """Gradients for all that is trained, or none. Of ones, as those of zeros count as none and are let go of."""
        for parameter in self.trained:
            parameter.grad = torch.ones_like(parameter) if given else None

    def update_bytes(self) -> int:
        """What a step of the optimizer needs for itself at its peak, with the gradients there are. On the meta device.

        It depends on which parameters have one and on nothing else, so it is counted once for each such set.
        """
        given = tuple(parameter.grad is not None for parameter in self.trained)
        if given not in self._update_bytes:
            with track_tensor_bytes(self.model, self.optimizer) as tracked:
                before_bytes = tracked.live_bytes
                self.optimizer.step()
            self._update_bytes[given] = tracked.peak_bytes - before_bytes
        return self._update_bytes[given]


class Probe:
    """One variant of a training; its memory can be asked for at any size of the input.

    `peak_bytes` and `fits` change the gradients of the workplace: its probes take turns.
    """

    def __init__(
        self, place: Workplace, variant: Variant, *, accumulated: bool = True, masks: int = TRIED_STEPS
    ) -> None:
        self.place, self.accumulated, self.masks = place, accumulated, masks
        self.lane = Lane(variant, place.model, place.device)
        self._start = self.lane.handle.state_dict() if isinstance(self.lane.handle, dropbp.Handle) else None
        self._ordered_masks: list[Mask] | None = None

    def peak_bytes(self, batch_size: int, sequence_length: int, enough_bytes: float = math.inf) -> int:
        """The most tensor bytes of the steps with the masks that need most memory, counted. On the meta device.

        Masks are left out once one needs more than `enough_bytes`; the answer is then above that, and may be too small.
        """
        peak = 0
        for mask in self._masks(batch_size, sequence_length):
            peak = max(peak, self._peak_with(mask, batch_size, sequence_length))
            if peak > enough_bytes:
                break
        return peak

    def rough_peak_bytes(self, batch_size: int, sequence_length: int) -> int:
        """The same with one mask, that which needs most memory at the first size that was asked about."""
        return self._peak_with(self._masks(batch_size, sequence_length)[0], batch_size, sequence_length)

    def _masks(self, batch_size: int, sequence_length: int) -> list[Mask]:
        """Those of all sizes, in front the one that needs most at the first size."""
        if self._ordered_masks is None:
            self._rewind()
            peaks = []
            for mask in self.lane.peak_memory_masks(self.masks):
                peak = self._peak_with(mask, batch_size, sequence_length)
                drawn = self.lane.handle.mask if mask is None and self.lane.handle is not None else mask
                peaks.append((peak, drawn))
            self._ordered_masks = [mask for _, mask in sorted(peaks, key=lambda pair: -pair[0])]
        return self._ordered_masks

    def _peak_with(self, mask: Mask, batch_size: int, sequence_length: int) -> int:
        place, ids_BS = self.place, self._batch(batch_size, sequence_length)
        place.give_gradients(self.accumulated)
        with self.lane.masked(mask), track_tensor_bytes(self.lane.model, place.optimizer, ids_BS) as tracked:
            loss_of(self.lane.model, ids_BS).backward()
        return max(tracked.peak_bytes, tracked.live_bytes + place.update_bytes())

    def fits(self, batch_size: int, sequence_length: int) -> bool:
        """Whether steps with the masks that need most memory run through. On an accelerator."""
        place, ids_BS = self.place, self._batch(batch_size, sequence_length)
        self._rewind()
        try:
            for mask in self.lane.peak_memory_masks(self.masks):
                place.give_gradients(self.accumulated)
                with self.lane.masked(mask):
                    loss_of(self.lane.model, ids_BS).backward()
                    place.optimizer.step()
            place.device.synchronize()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            place.optimizer.zero_grad(set_to_none=True)
            release_memory()
        return True

    def _batch(self, batch_size: int, sequence_length: int) -> torch.Tensor:
        return build_batch(self.place.model_name, batch_size, sequence_length, self.place.device.name)

    def _rewind(self) -> None:
        """The same masks for every size."""
        if isinstance(self.lane.handle, dropbp.Handle) and self._start is not None:
            self.lane.handle.load_state_dict(self._start)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory is what was missing; some devices say so in the message alone."""
    words = ("out of memory", "allocation failed", "oom")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)


def release_memory() -> None:
    """Give back what earlier runs of this process left in its allocator, so that the other process has all of it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
