"""The memory that a training step needs.

There are two ways to measure it. Counted: the step runs on the meta device, which computes only shapes, and the bytes
of its tensors are added up. This is exact and the same on every machine, but excludes allocator overhead. Tried: the
step runs on an accelerator, and either fits or runs out of memory.

Optimizer states exist from the start. With `accumulated`, so do the gradients of all parameters, as when several
micro-batches are summed; DropBP then saves activations only.
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
Mask = tuple[bool, ...] | None  # None: the model draws it


class Workplace:
    """A model and its optimizer, shared by the variants: weights, gradients and states are the same for all."""

    def __init__(self, model: str, training: Training, device: str = "meta") -> None:
        self.model_name, self.device = model, get_device(device)
        self.model = build_model(model, training, device)
        self.optimizer = build_optimizer(self.model, training.tuning)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._update_bytes: dict[tuple[bool, ...], int] = {}
        self.give_gradients(True)
        self.optimizer.step()  # creates its states

    def give_gradients(self, given: bool) -> None:
        """Create gradients for all trainable parameters, or remove them. They are ones, as zero gradients count as
        none.
        """
        for parameter in self.trained:
            parameter.grad = torch.ones_like(parameter) if given else None

    def update_bytes(self) -> int:
        """Peak bytes of an optimizer step with the current gradients, on the meta device.

        The value depends only on which parameters have a gradient, so it is counted once per such set.
        """
        given = tuple(parameter.grad is not None for parameter in self.trained)
        if given not in self._update_bytes:
            with track_tensor_bytes(self.model, self.optimizer) as tracked:
                before_bytes = tracked.live_bytes
                self.optimizer.step()
            self._update_bytes[given] = tracked.peak_bytes - before_bytes
        return self._update_bytes[given]


class Probe:
    """One variant of a training, whose memory can be measured at any input size.

    `peak_bytes` and `fits` change the gradients of the workplace, so its probes must take turns.
    """

    def __init__(
        self, place: Workplace, variant: Variant, *, accumulated: bool = True, masks: int = TRIED_STEPS
    ) -> None:
        self.place, self.accumulated, self.masks = place, accumulated, masks
        self.lane = Lane(variant, place.model, place.device)
        self._start = self.lane.handle.state_dict() if isinstance(self.lane.handle, dropbp.Handle) else None
        self._ordered_masks: list[Mask] | None = None

    def peak_bytes(self, batch_size: int, sequence_length: int, enough_bytes: float = math.inf) -> int:
        """Peak tensor bytes over the steps with the most expensive masks, counted on the meta device.

        Once a mask needs more than `enough_bytes`, the remaining masks are skipped. The result is then above
        `enough_bytes`, and may be below the true peak.
        """
        peak = 0
        for mask in self._masks(batch_size, sequence_length):
            peak = max(peak, self._peak_with(mask, batch_size, sequence_length))
            if peak > enough_bytes:
                break
        return peak

    def rough_peak_bytes(self, batch_size: int, sequence_length: int) -> int:
        """The same with one mask: the most expensive one at the first size asked for."""
        return self._peak_with(self._masks(batch_size, sequence_length)[0], batch_size, sequence_length)

    def _masks(self, batch_size: int, sequence_length: int) -> list[Mask]:
        """The masks, the same for all sizes, starting with the most expensive one at the first size."""
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
        """Whether steps with the most expensive masks run on the accelerator."""
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
        """Restart the mask sampler, so every size gets the same masks."""
        if isinstance(self.lane.handle, dropbp.Handle) and self._start is not None:
            self.lane.handle.load_state_dict(self._start)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error means out of memory; some devices say so only in the message."""
    words = ("out of memory", "allocation failed", "oom")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)


def release_memory() -> None:
    """Free memory cached by this process's allocator, so the other process can use it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
