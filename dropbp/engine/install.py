"""Installs the forward wrappers: which module gets which, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from dropbp.discovery.structure import BranchOutput, ScopedParameter, Stem, Structure
from dropbp.engine.frozen import FrozenScopeState, owner_of
from dropbp.engine.kernels import (
    KERNEL_BY_MODE,
    GroupNormState,
    KernelState,
    MaskState,
    group_norm_forward,
    kernel_forward,
    mask_forward,
)
from dropbp.engine.patch import ForwardPatch, WrapperState
from dropbp.engine.runtime import Runtime
from dropbp.engine.wrappers import (
    BoundaryState,
    BranchModuleState,
    OutputState,
    StemState,
    boundary_after_forward,
    boundary_forward,
    branch_forward,
    frozen_scope_forward,
    identity_forward,
    output_forward,
    shared_branch_forward,
    stem_forward,
)


def install(model: nn.Module, structure: Structure, runtime: Runtime, stem: Stem) -> list[ForwardPatch]:
    """Wrap the modules of branches and of the stem; innermost first, so that removal is exact."""
    return [
        *_install_group_norms(model, structure.group_norms, runtime),
        *_install_branch_modules(model, structure, runtime),
        *_install_stem(model, stem.modules, runtime),
        *_install_scopes(model, structure, stem.parameters, runtime),
    ]


def _install_group_norms(model: nn.Module, names: Iterable[str], runtime: Runtime) -> list[ForwardPatch]:
    """Wrap every `GroupNorm`, and the modules of these names, whose own forward computes a group norm."""
    norms = (module for module in model.modules() if isinstance(module, nn.GroupNorm))
    modules = dict.fromkeys([*map(model.get_submodule, names), *norms])
    return [ForwardPatch(m, "_dropbp_group_norm", GroupNormState(runtime), group_norm_forward) for m in modules]


def _install_branch_modules(model: nn.Module, structure: Structure, runtime: Runtime) -> list[ForwardPatch]:
    made = []
    for entry in structure.branch_modules:
        module = model.get_submodule(entry.name)
        outputs = [output for output in structure.branch_outputs if output.module == entry.name]
        state = BranchModuleState(entry, runtime, outputs)
        if entry.name in structure.identities:
            made.append(ForwardPatch(module, "_dropbp_identity", WrapperState(), identity_forward))
        if entry.learned_mask:
            mask = MaskState(
                [owner_of(model, name) for name in entry.learned_mask], lambda: bool(runtime.plan_now().dropped)
            )
            made.append(ForwardPatch(module, "_dropbp_mask", mask, mask_forward))
        made += [
            ForwardPatch(inner, "_dropbp_kernel", KernelState(state.is_dropped), kernel_forward)
            for inner in module.modules()
            if isinstance(inner, KERNEL_BY_MODE) and not entry.per_call and "_dropbp_kernel" not in inner.__dict__
        ]
        wrap = shared_branch_forward if entry.per_call else branch_forward
        made.append(ForwardPatch(module, "_dropbp_branch", state, wrap))
    return made


def _install_stem(model: nn.Module, modules: Mapping[str, int], runtime: Runtime) -> list[ForwardPatch]:
    return [
        ForwardPatch(model.get_submodule(name), "_dropbp_stem", StemState(branch, runtime), stem_forward)
        for name, branch in modules.items()
    ]


def _install_scopes(
    model: nn.Module, structure: Structure, stem: Iterable[ScopedParameter], runtime: Runtime
) -> list[ForwardPatch]:
    by_scope: dict[str, tuple[list[ScopedParameter], list[ScopedParameter]]] = {}
    for kind, entries in enumerate((structure.scoped_parameters, stem)):
        for entry in entries:
            by_scope.setdefault(entry.scope, ([], []))[kind].append(entry)
    made = []
    for scope, (own, others) in by_scope.items():
        by_weight = any(f"{name}.".startswith(f"{scope}.") for name in structure.kernel_by_weight)
        state = FrozenScopeState(own, others, model, runtime, by_weight)
        made.append(ForwardPatch(model.get_submodule(scope), "_dropbp_scope", state, frozen_scope_forward))
    return made


def install_outputs(model: nn.Module, structure: Structure, runtime: Runtime) -> list[ForwardPatch]:
    """Install the wrappers that scale gradients of kept branches."""
    by_module: dict[str, list[BranchOutput]] = {}
    for entry in structure.branch_outputs:
        by_module.setdefault(entry.module, []).append(entry)
    return [
        ForwardPatch(model.get_submodule(name), "_dropbp_output", OutputState(outputs, runtime), output_forward)
        for name, outputs in by_module.items()
    ]


def install_boundaries(
    model: nn.Module, names: Iterable[str], boundary: Callable[[], None], *, after: bool = False
) -> list[ForwardPatch]:
    """Install the wrappers that tell a lazy device where steps end: before these modules, or after them."""
    attribute = "_dropbp_boundary_after" if after else "_dropbp_boundary"
    wrap = boundary_after_forward if after else boundary_forward
    modules = map(model.get_submodule, names)
    return [ForwardPatch(module, attribute, BoundaryState(boundary), wrap) for module in modules]
