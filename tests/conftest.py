"""What every test stands on: one thread, no network, a fixed seed."""

import os
import random
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled before the test, and nothing that it compiled is left."""
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
