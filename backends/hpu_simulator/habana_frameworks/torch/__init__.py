"""Importing this gives PyTorch its `torch.hpu`, as on Gaudi."""

from dropbp.backends.hpu_simulator._session import extension as _extension

_extension()

from habana_frameworks.torch import core, hpex, hpu, utils  # noqa: E402
from habana_frameworks.torch.utils.internal import is_lazy  # noqa: E402

__all__ = ["core", "hpex", "hpu", "is_lazy", "utils"]

if not is_lazy():
    from dropbp.backends.hpu_simulator._compile import register as _register

    _register()
