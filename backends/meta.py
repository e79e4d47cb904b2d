"""Meta: models whose tensors have shapes but no data. Nothing runs, so no memory is used and there is no limit."""

from __future__ import annotations

import torch
from torch import nn

from dropbp.device import JSON, Availability, DeviceDefaults, dynamo_graph_count


def create_device(index: int | None) -> MetaDevice:
    """The adapter; there is one meta device, so the index is not used."""
    return MetaDevice()


class MetaDevice:
    """The device of a model that is planned or inspected before its weights exist."""

    name = "meta"

    def is_available(self) -> Availability:
        """Always available."""
        return Availability(True)

    def synchronize(self) -> None:
        """Does nothing: nothing runs."""

    def step_boundary(self) -> None:
        """Does nothing: nothing runs."""

    def is_lazy(self) -> bool:
        """Always False."""
        return False

    def memory_allocated_bytes(self) -> int:
        """Zero: meta tensors hold no data."""
        return 0

    def max_memory_allocated_bytes(self) -> int:
        """Zero: meta tensors hold no data."""
        return 0

    def memory_limit_bytes(self) -> int:
        """Zero: no data can be held."""
        return 0

    def reset_peak_memory(self) -> None:
        """Does nothing: there is no peak."""

    def describe(self) -> dict[str, JSON]:
        """The name, PyTorch's version, and that tensors are shapes without data."""
        return {
            "name": self.name,
            "generation": "shapes without data",
            "torch": torch.__version__,
            "memory_limit_bytes": 0,
        }

    def compile_count(self) -> int:
        """Graphs that `torch.compile` has captured."""
        return dynamo_graph_count()

    def generator_state(self) -> torch.Tensor:
        """An empty tensor: meta tensors draw no random numbers."""
        return torch.empty(0, dtype=torch.uint8, device="cpu")

    def set_generator_state(self, state: torch.Tensor) -> None:
        """Does nothing: meta tensors draw no random numbers."""

    def defaults(self) -> DeviceDefaults:
        """The defaults of a device that runs eagerly."""
        return DeviceDefaults()

    def check_model(self, model: nn.Module) -> None:
        """Accept every model."""
