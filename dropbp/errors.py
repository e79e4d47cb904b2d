"""All errors that this library raises on purpose, with one root class to catch them all.

Each message says what was asked, what was found, what is allowed and what to do.
"""

from __future__ import annotations

import errno

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left", "File too large", "quota exceeded")
_TORCH_FULL_WORDS = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")
_EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "gguf", "peft", "safetensors", "transformers"), "hf"),
    **dict.fromkeys(("matplotlib", "numpy", "scipy", "tqdm"), "bench"),
}


class DropBPError(Exception):
    """Root of all errors of this library."""


class ConfigError(DropBPError, ValueError):
    """An option or argument has a value that is not allowed."""


class DiscoveryError(DropBPError):
    """The residual branches of a model could not be found, or a block was not understood."""


class StateError(DropBPError):
    """A call does not fit the present state: a model enabled twice, a removed handle, a state file of another model."""


class DeviceError(DropBPError):
    """A device is unknown, not available here, or cannot do what was asked."""


class MissingDependencyError(DropBPError, ImportError):
    """An optional package is missing; the message names the extra that installs it."""


class ResourceError(DropBPError):
    """Memory or disk space ran out; the message says what is kept and what to change."""


def as_resource_error(error: BaseException) -> ResourceError | None:
    """A one-line error for "out of memory" or "disk full" if `error` is one of these, else None.

    >>> as_resource_error(RuntimeError("CUDA out of memory")) is not None, as_resource_error(KeyError("x"))
    (True, None)

    torch and safetensors have no exception type for a full disk, and torch has none for exhausted CPU memory; there the
    text decides.
    """
    text = " ".join(str(error).split())[:200]
    if getattr(error, "errno", None) in _FULL or any(words in text for words in _FULL_WORDS + _TORCH_FULL_WORDS):
        return ResourceError(f"cannot write any more ({text}). Free disk space, or write elsewhere.")
    if isinstance(error, MemoryError) or any(words in text for words in _MEMORY_WORDS):
        return ResourceError(f"out of memory ({text}). Use smaller or shorter batches, or a larger drop_rate.")
    return None


def as_missing_dependency(error: BaseException) -> MissingDependencyError | None:
    """An error that names the package to install if `error` is about a missing package, else None.

    >>> as_missing_dependency(ModuleNotFoundError("No module named 'peft'", name="peft"))
    MissingDependencyError("peft is required but not installed; install it with: pip install 'dropbp[hf]'.")

    transformers raises a plain `ImportError` that names the missing package only in its text.
    """
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        extra = _EXTRAS.get(package)
        hint = "" if extra is None else f"; install it with: pip install 'dropbp[{extra}]'"
        return MissingDependencyError(f"{error.name} is required but not installed{hint}.")
    if isinstance(error, ImportError) and error.name is None and str(error):
        return MissingDependencyError(str(error))
    return None
