"""Which device is meant, and whether the machine has it."""

import torch
from dropbp.backends.hpu_simulator._session import DEVICE_COUNT


def device_index(device):
    """The index of a device given as Gaudi's functions take it; the process's own device is 0."""
    if isinstance(device, torch.device | str):
        device = torch.device(device).index
    index = 0 if device in (None, -1) else int(device)
    if not 0 <= index < DEVICE_COUNT:
        raise AssertionError(f"Invalid device id: {index}; there are {DEVICE_COUNT} devices")
    return index
