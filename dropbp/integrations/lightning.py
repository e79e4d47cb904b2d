"""`DropBPLightning`: DropBP in a Lightning trainer, with one line in `callbacks=[…]`."""

from __future__ import annotations

from typing import Any

from torch import nn

from dropbp.errors import ConfigError, MissingDependencyError
from dropbp.handle import Handle
from dropbp.session import enable

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"DropBPLightning needs {error.name}, which is not installed; install it with: pip install lightning."
    ) from error


class DropBPLightning(Callback):
    """Enables DropBP when training begins and removes it when training ends, even by an exception.

    The state is saved in Lightning's checkpoints; a resumed run draws the masks that the uninterrupted one would have
    drawn. Under DDP the strategy must be `ddp_find_unused_parameters_true`.

    Args:
        drop_rate: mean share of the branches' backward FLOPs to skip, in [0, 1).
        module: name of the submodule to enable, the network that `training_step` calls. "" is the LightningModule
            itself, for a `training_step` that calls its `forward`.
        log: log `dropbp_realised_drop_rate` after each batch.
        **options: passed on to `dropbp.enable`, such as `masks` or `example_inputs`.
    """

    def __init__(self, drop_rate: float = 0.5, *, module: str = "model", log: bool = True, **options: Any) -> None:
        self.drop_rate, self.module, self.log, self.options = drop_rate, module, log, options
        self.handle: Handle | None = None
        self._state: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enable DropBP, in the state of the checkpoint if there is one."""
        self._remove()
        state, self._state = self._state, None
        self.handle = enable(self._network(pl_module), self.drop_rate, **self.options)
        if state is not None:
            self.handle.load_state_dict(state)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log what was dropped so far."""
        if self.log and self.handle is not None:
            pl_module.log("dropbp_realised_drop_rate", self.handle.report()["realised_drop_rate"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove DropBP from the model."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """The handle's state, for Lightning's checkpoint."""
        state = self._state if self.handle is None else self.handle.state_dict()
        return {} if state is None else {"handle": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state that Lightning passes before training begins."""
        self._state = state_dict.get("handle")

    def _network(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError as error:
            names = [name for name, _ in pl_module.named_children()]
            raise ConfigError(
                f"module={self.module!r} is not in {type(pl_module).__name__}; its submodules are {', '.join(names)}."
            ) from error

    def _remove(self) -> None:
        if self.handle is not None:
            self._state = self.handle.state_dict()
            self.handle.remove()
            self.handle = None
