"""What Gaudi's package changes in PyTorch: `torch.manual_seed` seeds the device as well."""

import functools

import torch
from habana_frameworks.torch.hpu import random


def _overwrite_manual_seed():
    original = torch.manual_seed

    @functools.wraps(original)
    def manual_seed(seed):
        random.manual_seed(seed)
        return original(seed)

    torch.manual_seed = manual_seed


_overwrite_manual_seed()
