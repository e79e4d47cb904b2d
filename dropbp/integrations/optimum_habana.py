"""DropBP in the `GaudiTrainer` of optimum-habana, on Intel Gaudi.

A GaudiTrainer, like any other trainer, needs only `DropBPCallback` in `callbacks=[…]`. This module offers a trainer
that creates the callback itself and refuses unsupported options at once.

    from dropbp.integrations.optimum_habana import DropBPGaudiTrainer

    trainer = DropBPGaudiTrainer(model, args=args, gaudi_config=gaudi_config, train_dataset=data, drop_rate=0.875)
    trainer.train()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dropbp.errors import ConfigError, MissingDependencyError
from dropbp.integrations.transformers import DropBPCallback

if TYPE_CHECKING:
    DropBPGaudiTrainer: type  # made by __getattr__

__all__ = ["DropBPCallback", "DropBPGaudiTrainer", "with_dropbp"]


def with_dropbp(trainer_class: type) -> type:
    """A subclass of any Gaudi trainer (`GaudiSFTTrainer`, `GaudiSeq2SeqTrainer`, ...) that drops branches.

    Its constructor takes two more arguments: `drop_rate`, and `dropbp_options`, a mapping of arguments for
    `DropBPCallback`. Its attribute `dropbp` is the callback.
    """

    class DropBPTrainer(trainer_class):  # type: ignore[misc]
        """The trainer, with DropBP."""

        def __init__(
            self, *args: Any, drop_rate: float = 0.5, dropbp_options: Mapping[str, Any] | None = None, **kwargs: Any
        ) -> None:
            refuse_graphs(kwargs.get("args") or next((a for a in args if hasattr(a, "output_dir")), None))
            super().__init__(*args, **kwargs)
            self.dropbp = DropBPCallback(drop_rate, **dict(dropbp_options or {}))
            self.add_callback(self.dropbp)

    DropBPTrainer.__name__ = DropBPTrainer.__qualname__ = f"DropBP{trainer_class.__name__}"
    return DropBPTrainer


def refuse_graphs(arguments: Any) -> None:
    """Refuse training arguments that do not work with DropBP.

    Raises ConfigError if HPU graphs are enabled for training.
    """
    if getattr(arguments, "use_hpu_graphs_for_training", False):
        raise ConfigError(
            "use_hpu_graphs_for_training=True replays one recorded sequence of operations, so every step would use the "
            "same mask. Set use_hpu_graphs_for_training=False (graphs for inference may stay), or train without DropBP."
        )


def __getattr__(name: str) -> Any:
    """Create `DropBPGaudiTrainer` on first use, because optimum-habana takes seconds to import."""
    if name != "DropBPGaudiTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from optimum.habana import GaudiTrainer
    except ImportError as error:
        raise MissingDependencyError(
            f"DropBPGaudiTrainer needs optimum-habana ({error}); install it with: pip install 'dropbp[gaudi]'."
        ) from error
    made = globals()[name] = with_dropbp(GaudiTrainer)
    return made
