"""Every error this library raises on purpose.

One root, so that a caller can catch all of them; each message says what was asked, what was found, what is
allowed and what to do next.
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
    """An option or an argument is outside what is allowed."""


class DiscoveryError(DropBPError):
    """The residual branches of a model could not be found, or a block was not understood."""


class StateError(DropBPError):
    """A call that does not fit the present state: a model enabled twice, a handle removed, a foreign state file."""


class DeviceError(DropBPError):
    """A device is unknown, not available here, or cannot do what was asked."""


class MissingDependencyError(DropBPError, ImportError):
    """An optional package is needed for what was asked; the message names the extra that installs it."""


class ResourceError(DropBPError):
    """Memory or disk space ran out; the message says what is kept and what to change."""


def as_resource_error(error: BaseException) -> ResourceError | None:
    """The error that says in a line that memory or disk space ran out, if that is what this one means, else None.

    >>> as_resource_error(RuntimeError("CUDA out of memory")) is not None, as_resource_error(KeyError("x"))
    (True, None)

    torch and safetensors have no type of their own for a full disk, nor torch for memory of the CPU: there the words
    tell.
    """
    text = " ".join(str(error).split())[:200]
    if getattr(error, "errno", None) in _FULL or any(words in text for words in _FULL_WORDS + _TORCH_FULL_WORDS):
        return ResourceError(f"nothing more can be written ({text}). Free disk space, or write elsewhere.")
    if isinstance(error, MemoryError) or any(words in text for words in _MEMORY_WORDS):
        return ResourceError(f"out of memory ({text}). Make batches smaller or shorter, or drop_rate larger.")
    return None


def as_missing_dependency(error: BaseException) -> MissingDependencyError | None:
    """The error that names the package to install, if that is what this one means, else None.

    >>> as_missing_dependency(ModuleNotFoundError("No module named 'peft'", name="peft"))
    MissingDependencyError("peft is needed and not installed; install it with: pip install 'dropbp[hf]'.")

    transformers names a missing package in the text of an `ImportError` of its own.
    """
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        extra = _EXTRAS.get(package)
        hint = "" if extra is None else f"; install it with: pip install 'dropbp[{extra}]'"
        return MissingDependencyError(f"{error.name} is needed and not installed{hint}.")
    if isinstance(error, ImportError) and error.name is None and str(error):
        return MissingDependencyError(str(error))
    return None
