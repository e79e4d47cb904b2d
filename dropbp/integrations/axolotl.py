"""DropBP in Axolotl, configured by its YAML file alone.

The entry `dropbp.integrations.axolotl.DropBPPlugin` under `plugins`, and `dropbp:` with the arguments of
`DropBPCallback`, turn it on. Without the second, or with `dropbp: false`, the plugin does nothing.
"""

from __future__ import annotations

from typing import Any

from dropbp.errors import ConfigError, MissingDependencyError

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel, field_validator
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"DropBPPlugin needs {error.name}, which is not installed. It works inside Axolotl: pip install axolotl."
    ) from error

from dropbp.integrations.transformers import DropBPCallback


class DropBPArgs(BaseModel):
    """The fields that the plugin adds to Axolotl's YAML file."""

    dropbp: dict[str, Any] | bool = False

    @field_validator("dropbp")
    @classmethod
    def check(cls, value: dict[str, Any] | bool) -> dict[str, Any] | bool:
        """Create a callback from the value now, so that errors appear before a model is loaded."""
        callback(value)
        return value


class DropBPPlugin(BasePlugin):  # type: ignore[misc]
    """Adds `DropBPCallback` to Axolotl's trainer."""

    def get_input_args(self) -> str:
        """Qualified name of the pydantic model that checks the file."""
        return f"{DropBPArgs.__module__}.{DropBPArgs.__qualname__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[DropBPCallback]:
        """The callback that the file asks for."""
        del trainer
        made = callback(cfg.get("dropbp"))
        return [] if made is None else [made]


def callback(asked: Any) -> DropBPCallback | None:
    """The callback that `dropbp:` asks for; None if it is empty or false, the defaults for `true`.

    Raises ValueError if an argument is unknown to `DropBPCallback`, or its value is not allowed.
    """
    if not asked:
        return None
    try:
        return DropBPCallback(**({} if asked is True else dict(asked)))
    except (ConfigError, TypeError) as error:
        raise ValueError(f"dropbp: {error}") from error
