"""`mark_step` and what runs after it."""

from dropbp.backends.hpu_simulator._session import extension
from habana_frameworks.torch.utils.internal import lazy_only

_closures = []


@lazy_only
def mark_step(device_str="", sync=False):
    """End the graph recorded so far and launch it."""
    extension().flush("mark_step")
    _run_closures()


@lazy_only
def iter_mark_step(device_str=""):
    mark_step()


@lazy_only
def add_step_closure(closure, args=()):
    """Run `closure(*args)` after the next mark."""
    _closures.append((closure, args))


def _mark_step_if_lazy(device_str=""):
    mark_step(device_str)


def _run_closures():
    waiting = list(_closures)
    _closures.clear()
    for closure, args in waiting:
        closure(*args)
