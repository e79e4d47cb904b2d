"""Every error this library raises on purpose.

One root, so that a caller can catch all of them; each message says what was asked, what was found, what is
allowed and what to do next.
"""

from __future__ import annotations


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
