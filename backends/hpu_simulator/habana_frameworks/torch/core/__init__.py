"""`htcore`: the marks that end a lazy graph."""

from habana_frameworks.torch import hpu
from habana_frameworks.torch.core import step_closure, torch_overwrites
from habana_frameworks.torch.core.step_closure import add_step_closure, iter_mark_step, mark_step

__all__ = ["add_step_closure", "hpu", "iter_mark_step", "mark_step", "step_closure", "torch_overwrites"]
