"""Freezes parameters of dropped branches that lie in no module of the branch, so no module can skip them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dropbp._torch import detached, never_compile, transforming, uncompiled
from dropbp.engine.kernels import SameMatmulKernel
from dropbp.engine.patch import WrapperState
from dropbp.tensors import map_tensors, tensors_in

if TYPE_CHECKING:
    from dropbp.discovery.structure import ScopedParameter
    from dropbp.engine.runtime import Runtime


class FrozenScopeState(WrapperState):
    """Parameters that are frozen while their scope runs: those of dropped branches, and of the stem."""

    def __init__(
        self,
        scoped: Iterable[ScopedParameter],
        stem: Iterable[ScopedParameter],
        model: nn.Module,
        runtime: Runtime,
        kernel_by_weight: bool,
    ) -> None:
        self.runtime, self.kernel_by_weight = runtime, kernel_by_weight
        self.entries = [(*owner_of(model, entry.name), entry.need) for entry in scoped]
        self.stem = [(*owner_of(model, entry.name), entry.need) for entry in stem]

    def frozen(self) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
        """The parameters to freeze now, each with the dictionary and the key that hold it."""
        plan = self.runtime.plan_here()
        entries = [*self.entries, *self.stem] if plan.stem_frozen else self.entries
        held = [(m._parameters, a, m._parameters[a]) for m, a, need in entries if not need & plan.trained]
        return [(table, a, p) for table, a, p in held if p is not None and p.requires_grad]


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the name of the attribute."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def run_frozen(state: FrozenScopeState, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function while the parameters of dropped branches are frozen."""
    frozen = uncompiled(state.frozen)
    for table, name, parameter in frozen:
        if _is_own(parameter):
            parameter.requires_grad_(False)
        else:
            table[name] = detached(parameter)
    same = frozen and state.kernel_by_weight
    try:
        with SameMatmulKernel(table[name] for table, name, _ in frozen) if same else contextlib.nullcontext():
            outputs = function(*args, **kwargs)
    finally:
        for table, name, parameter in frozen:
            if _is_own(parameter):
                parameter.requires_grad_(True)
            else:
                table[name] = parameter
    return _without(outputs, [parameter for _, _, parameter in frozen])


def _without(outputs: Any, parameters: Iterable[torch.Tensor]) -> Any:
    """Detach frozen parameters and views of them in the outputs: unfrozen, they would require a gradient."""
    own = set(map(id, parameters))

    def is_own(tensor: torch.Tensor) -> bool:
        return id(tensor) in own or id(tensor._base) in own

    if not own or not any(map(is_own, tensors_in(outputs))):
        return outputs
    return map_tensors(outputs, lambda tensor: detached(tensor) if is_own(tensor) else tensor)


def _is_own(parameter: torch.Tensor) -> bool:
    """Whether it is the model's own parameter. One that `torch.func` has substituted cannot be frozen."""
    return isinstance(parameter, nn.Parameter) and parameter.is_leaf and not transforming()


never_compile(run_frozen)
