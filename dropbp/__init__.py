"""Cheaper fine-tuning by skipping part of the backward pass; the forward output stays bit-identical.

    handle = dropbp.enable(model, drop_rate=0.5)
    ...                                             # your training loop, unchanged
    handle.remove()

Public names are imported on first use, so that `import dropbp` is fast and loads no vendor software.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dropbp.discovery.discover import discover as discover
    from dropbp.discovery.structure import Branch as Branch
    from dropbp.engine.labelled import labelled_logits as labelled_logits
    from dropbp.errors import ConfigError as ConfigError
    from dropbp.errors import DeviceError as DeviceError
    from dropbp.errors import DiscoveryError as DiscoveryError
    from dropbp.errors import DropBPError as DropBPError
    from dropbp.errors import MissingDependencyError as MissingDependencyError
    from dropbp.errors import ResourceError as ResourceError
    from dropbp.errors import StateError as StateError
    from dropbp.estimate.plan import plan as plan
    from dropbp.handle import Handle as Handle
    from dropbp.masks.rates import allocate as allocate
    from dropbp.session import compile_blocks as compile_blocks
    from dropbp.session import disable as disable
    from dropbp.session import enable as enable

__version__ = "0.1.0"

_ERRORS = (
    "ConfigError", "DeviceError", "DiscoveryError", "DropBPError", "MissingDependencyError", "ResourceError",
    "StateError",
)  # fmt: skip
_HOMES = {
    **dict.fromkeys(_ERRORS, "dropbp.errors"),
    **dict.fromkeys(("compile_blocks", "disable", "enable"), "dropbp.session"),
    "allocate": "dropbp.masks.rates",
    "Branch": "dropbp.discovery.structure",
    "Handle": "dropbp.handle",
    "discover": "dropbp.discovery.discover",
    "labelled_logits": "dropbp.engine.labelled",
    "plan": "dropbp.estimate.plan",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dropbp' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
