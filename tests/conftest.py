"""What every test stands on: one thread, no network, a fixed seed, Ctrl-C at work."""

import os
import random
import signal
from collections.abc import Iterator
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import pytest
import torch

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, also for what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

if find_spec("hypothesis"):  # the environment for Gaudi has none
    from hypothesis import settings

    # Each run tries the same examples, so that no change fails by chance. Timing never decides a test.
    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.register_profile("random", deadline=None)
    settings.load_profile("repeatable")


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
