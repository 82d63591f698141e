"""Find matrices that are routed although no ``nn.Linear`` holds them: stacked experts, fused projections, named parameters."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from molf.errors import MolfError
from molf.setup.discovery import check_not_tied, matches, module_names, routed_linears, unmatched

__all__ = ["RoutedParameter", "routed_parameters", "routed_weights", "unrouted_kinds"]

logger = logging.getLogger(__name__)

# How modules call the number of their experts, if they do not use transformers' interface for experts.
_COUNTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts"),
    *("n_shared_experts", "moe_num_experts", "total_experts"),
)


class RoutedParameter(NamedTuple):
    """A parameter to route: a matrix ``[out, in]``, or a stack ``[n, out, in]`` of them (``[n, in, out]`` if transposed).

    ``bias`` is its bias, ``[out]`` or ``[n, out]``, if there is one that trains.
    """

    weight: Tensor
    bias: Tensor | None
    transposed: bool


def routed_weights(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str],
    target_parameters: Sequence[str] = (),
) -> dict[str, RoutedParameter]:
    """Return everything that is routed in the merged form, by name: linear layers in model order, then other parameters.

    Raises:
        MolfError: If nothing matches, or something that is named matches nothing or cannot be routed.
    """
    parameters = routed_parameters(model, target_modules, exclude_modules, target_parameters)
    modules = module_names(model)
    stacks = [name for name, module, key, p in _raw_parameters(modules) if _is_layer(module, key, p)]
    linears = routed_linears(model, target_modules, exclude_modules, stacks, may_be_none=bool(parameters))
    _check_names(target_modules, exclude_modules, [*modules, *stacks])
    found = {name: RoutedParameter(linear.weight, linear.bias, False) for name, linear in linears.items()}
    return found | parameters


def _check_names(targets: str | Sequence[str], excluded: str | Sequence[str], names: Sequence[str]) -> None:
    """Check that every target in a list matches something, and warn of exclusions that do not; ``lm_head`` is a default."""
    if not isinstance(targets, str) and (missing := unmatched(targets, names)):
        raise MolfError(
            f"target_modules name {', '.join(missing)}, which match nothing in this model: leave them out, or rename"
        )
    if missing := [name for name in unmatched(excluded, names) if not name.startswith("'lm_head'")]:
        logger.warning(
            "exclude_modules name %s, which match nothing in this model and leave nothing out", ", ".join(missing)
        )


def routed_parameters(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str],
    target_parameters: Sequence[str],
) -> dict[str, RoutedParameter]:
    """Return the parameters to route by name, in model order, beside those of ``nn.Linear`` layers.

    "all-linear" means stacks of experts and the fused ``in_proj_weight`` of ``nn.MultiheadAttention``. Other targets, and
    exclusions, find them by the name of the parameter or of its module. ``target_parameters`` are names or their last parts, as
    in PEFT, of any trainable parameter of two or three dimensions.

    Raises:
        MolfError: If a name of ``target_parameters`` matches nothing, or something that cannot be routed.
    """
    if target_parameters is None or isinstance(target_parameters, str):
        raise TypeError(f"target_parameters={target_parameters!r}: give a list of names")
    for option, names in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        single = [] if isinstance(names, str) else [name for name in names if name.endswith("]")]
        if single:
            raise MolfError(
                f"{option} names {single}, single matrices of a stack: a stack is routed whole; name it without []"
            )
    found: dict[str, RoutedParameter] = {}
    modules = module_names(model)
    missing = set(target_parameters)

    def wanted(name: str) -> bool:
        names = (name, name.rpartition(".")[0])
        targeted = target_modules == "all-linear" or any(matches(own, target_modules) for own in names)
        return targeted and not any(matches(own, exclude_modules) for own in names)

    for name, module, key, p in _raw_parameters(modules):
        named = {target for target in target_parameters if matches(name, [target])}
        missing -= named
        if named:
            _check_named(name, p)
        elif not (p.requires_grad and _is_layer(module, key, p) and wanted(name)):
            continue
        bias = _bias(module, key, p)
        check_not_tied(modules, {name: [own for own in (p, bias) if own is not None]})
        found[name] = RoutedParameter(p, bias, p.ndim == 3 and _is_transposed(module))
    if missing:
        names = sorted({re.sub(r"\d+", "*", name) for name, _, _, p in _raw_parameters(modules) if p.ndim in (2, 3)})
        raise MolfError(
            f"target_parameters={sorted(missing)} match no parameter outside of nn.Linear layers; there are {names or 'none'}"
        )
    return found


def _raw_parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield name, module, own name and parameter of everything that is not in an ``nn.Linear`` layer."""
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            for key, p in module.named_parameters(recurse=False):
                yield f"{name}.{key}".lstrip("."), module, key, p


def _is_layer(module: nn.Module, key: str, p: nn.Parameter) -> bool:
    """Return whether a parameter is a stack of experts' matrices or a fused attention projection."""
    if isinstance(module, nn.MultiheadAttention):
        return key == "in_proj_weight"
    counts = {count for name in _COUNTS if isinstance(count := getattr(module, name, None), int)}
    declared = isinstance(getattr(module, "is_transposed", None), bool)  # transformers' interface for experts
    return p.ndim == 3 and p.numel() > 0 and (declared or len(p) in counts) and not hasattr(module, "kernel_size")


def _is_transposed(module: nn.Module) -> bool:
    """Return whether stacks are stored ``[n, in, out]``: by the module's own word, else by where its hidden size stands."""
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
    stacks = {key: p.shape for key, p in module.named_parameters(recurse=False) if p.ndim == 3}
    return hidden is not None and any(shape[1 if "down" in key else 2] != hidden for key, shape in stacks.items())


def _bias(module: nn.Module, key: str, p: nn.Parameter) -> nn.Parameter | None:
    own = dict(module.named_parameters(recurse=False))
    for name in (f"{key}_bias", re.sub("weight$", "bias", key)):
        bias = own.get(name)
        if bias is not None and name != key and bias.requires_grad and bias.ndim == p.ndim - 1:
            return bias
    return None


def _check_named(name: str, p: nn.Parameter) -> None:
    if p.ndim not in (2, 3) or not p.numel():
        raise MolfError(
            f"target_parameters name {name}, which has shape {list(p.shape)}: only matrices [out, in] and stacks of them "
            "[n, out, in] can be routed"
        )
    if not p.requires_grad:
        raise MolfError(
            f"target_parameters name {name}, which is frozen: unfreeze it (requires_grad_(True)) or leave it out"
        )


def unrouted_kinds(model: nn.Module, routed: set[int]) -> dict[str, tuple[list[int], int]]:
    """Return the kinds of trained matrices that are neither routed, nor in linear layers, nor embeddings.

    Args:
        model: The model.
        routed: ``id`` of every routed parameter.

    Returns:
        By name, with a star for every number: the shape of the first one, and the elements of all.
    """
    kinds: dict[str, tuple[list[int], int]] = {}
    for name, module, _, p in _raw_parameters(module_names(model)):
        known = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"  # which has a message of its own
        if p.requires_grad and p.ndim >= 2 and id(p) not in routed and not known:
            kind = re.sub(r"\d+", "*", name)
            shape, numel = kinds.get(kind, (list(p.shape), 0))
            kinds[kind] = shape, numel + p.numel()
    return kinds
