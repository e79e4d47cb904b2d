"""What one step costs in FLOPs and memory, counted after training on a batch of the run.

Counting slows a step down, so it must not happen in the steps that are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dropbp.device import get_device, known_bytes
from dropbp.flops import count_flops
from dropbp.memory import track_tensor_bytes

if TYPE_CHECKING:
    from transformers import Trainer

    from dropbp.integrations.transformers import DropBPCallback

_MASKS = 4  # memory depends on the mask: the largest of a few counts


def probe_step(trainer: Trainer, callback: DropBPCallback | None) -> dict[str, Any]:
    """FLOPs per token, for this run and for plain training, and the peak memory of a step in bytes.

    The saving is counted, not assumed: FLOPs of a step without dropping, less those of a step with everything
    dropped, times the share that the run really dropped.
    """
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    def step() -> None:
        trainer.model.train()
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        trainer.model.zero_grad()

    tokens = batch["input_ids"].numel()
    plain = count_flops(step)
    if callback is None:
        return _costs(tokens, plain, plain, peak_bytes(trainer, step))
    with callback.enabled(trainer.model) as handle:
        with handle.fixed((True,) * len(handle.branches)):
            dropped = count_flops(step)
        peak = max(peak_bytes(trainer, step) for _ in range(_MASKS))
    return _costs(tokens, plain, plain - callback.report()["realised_drop_rate"] * (plain - dropped), peak)


def peak_bytes(trainer: Trainer, step: Callable[[], None]) -> int:
    """Peak memory of a step, as the device reports it; on CPU, or without such a report, exact bytes of tensors."""
    device = get_device(trainer.args.device)
    if device.name == "cpu" or device.max_memory_allocated_bytes() is None:
        with track_tensor_bytes(trainer.model, trainer.optimizer) as tracked:
            step()
        return tracked.peak_bytes
    device.reset_peak_memory()
    step()
    device.synchronize()
    return known_bytes(device.max_memory_allocated_bytes(), device)


def _costs(tokens: int, plain: int, run: float, peak: int) -> dict[str, Any]:
    return {"flops_per_token": run / tokens, "plain_flops_per_token": plain / tokens, "peak_bytes": peak}
