"""Which mode the process is in; Gaudi's own code asks here."""

import functools

from dropbp.backends.hpu_simulator._session import is_lazy

__all__ = ["is_lazy", "lazy_only"]


def lazy_only(func):
    """Turn a function into one that does nothing in eager mode."""

    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        return func(*args, **kwargs) if is_lazy() else None

    return wrapper
