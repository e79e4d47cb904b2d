"""Where a model's gradient comes from: by path length, and bias and variance of each way to draw masks."""

from __future__ import annotations

from .command import add_arguments as add_arguments
from .command import run as run
