"""The imports of the commands, done once. Nothing here may start a thread, or forked processes could hang."""

from __future__ import annotations

import os

os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})

import matplotlib.backends.backend_agg  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.trainer  # noqa: F401

import tests.common.engine_models  # noqa: F401

torch.set_num_threads(1)
