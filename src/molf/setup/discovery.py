"""Find the layers of a model that can be routed, by name, and explain why one cannot be."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from molf.errors import MolfError
from molf.layers.fit import check_not_split

__all__ = [
    "check_not_tied",
    "check_rank",
    "listed_names",
    "matches",
    "module_names",
    "output_embeddings",
    "routed_linears",
    "unmatched",
    "unwrapped",
]

logger = logging.getLogger(__name__)

# Segments that wrappers put into module names (torch.compile, activation checkpointing, DDP).
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


def routed_linears(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str],
    others: Sequence[str] = (),
    may_be_none: bool = False,
) -> dict[str, nn.Linear]:
    """Return the layers to route by name, in model order: targeted, not excluded, with a trainable weight that is not empty.

    Args:
        model: The model.
        target_modules: As in PEFT.
        exclude_modules: As in PEFT.
        others: Names of parameters that are routed although no linear layer holds them; a target may be their module.
        may_be_none: Whether there may be no such layer.

    Raises:
        MolfError: If nothing matches (unless ``may_be_none``), a named target is not a linear layer, or a weight is not 2-D, not
            floating point or shared with another module.
    """
    modules = module_names(model)
    everything = isinstance(target_modules, str) and target_modules == "all-linear"
    output = output_embeddings(model) if everything else ()
    holders = {name.rpartition(".")[0] for name in others}
    matched: dict[str, nn.Linear] = {}
    for name, module in modules.items():
        wanted = isinstance(module, nn.Linear) and module not in output if everything else matches(name, target_modules)
        if not wanted or name in holders or matches(name, exclude_modules):
            continue
        if not isinstance(module, nn.Linear):
            raise MolfError(
                f"target_modules={target_modules!r} matches {name}, a {type(module).__name__}: only nn.Linear layers can be "
                "routed; name them more exactly or exclude this one. A matrix of another module is routed if target_parameters "
                "name it"
            )
        _check_weight(name, module)
        matched[name] = module
    linears = {
        name: linear for name, linear in matched.items() if linear.weight.requires_grad and linear.weight.numel()
    }
    if not linears and not may_be_none:
        raise MolfError(_nothing_to_route(modules, matched, others, target_modules, exclude_modules))
    check_not_tied(modules, {name: list(linear.parameters(recurse=False)) for name, linear in linears.items()})
    if everything:
        _warn_of_transposed(modules)
    return linears


def _warn_of_transposed(modules: Mapping[str, nn.Module]) -> None:
    """Warn of Conv1D layers beside the routed ones."""
    weights = [module.get_parameter("weight") for module in modules.values() if _is_a(module, "Conv1D")]
    trained = sum(p.numel() for p in weights if p.requires_grad)
    if trained:
        everything = sum(p.numel() for p in modules[""].parameters() if p.requires_grad)
        logger.warning(
            "%d Conv1D layers (%s), %.0f %% of the trained parameters, have weights [in, out]: they are not routed and take "
            "plain AdamW; with molf.add_lora_experts(model, freeze_base=False) they are routed",
            *(len(weights), ", ".join(_last_parts(modules, "Conv1D")), 100 * trained / everything),
        )


def module_names(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by their names in the plain model, without the name parts that torch and PEFT wrappers add."""
    plain = unwrapped(model)
    names = {_WRAPPERS.sub("", n).lstrip("."): module for n, module in plain.named_modules()}
    return {n.removeprefix("base_model.model.") if hasattr(plain, "peft_config") else n: m for n, m in names.items()}


def unwrapped(model: Any) -> Any:
    """Return a model without DDP, DataParallel and torch.compile around it, in any order."""
    while True:
        parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
        inner = model.module if parallel else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Return whether a name matches a regular expression as a whole, or is in a list of names or their last parts.

    Raises:
        MolfError: If it is no regular expression.
    """
    if isinstance(patterns, str):
        try:
            return re.fullmatch(patterns, name) is not None
        except re.error as error:
            raise MolfError(
                f"{patterns!r} is no regular expression for module names: {error}; or give a list of names"
            ) from error
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def unmatched(patterns: str | Sequence[str], names: Iterable[str]) -> list[str]:
    """Return those of the patterns that match no name, with what may be meant; a regular expression is one pattern."""
    if isinstance(patterns, str):
        return [] if any(matches(name, patterns) for name in names) else [repr(patterns)]
    parts = [name.split(".") for name in names]
    endings = {".".join(own[i:]) for own in parts for i in range(len(own))}
    missing = [
        (pattern, difflib.get_close_matches(pattern, endings, n=1)) for pattern in patterns if pattern not in endings
    ]
    return [f"{pattern!r}" + (f" (did you mean {near[0]!r}?)" if near else "") for pattern, near in missing]


def listed_names(option: str, given: Any, if_none: Any) -> Any:
    """Return a regular expression as it is, and names as a tuple, which can be looked through twice."""
    if given is None or isinstance(given, str):
        return if_none if given is None else given
    names = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{option}={given!r}: give a list of names")
    return names


def output_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the layers that give logits over a vocabulary: of a model of transformers, or of those in a module around them."""
    getter = getattr(model, "get_output_embeddings", None)
    if getter is None:
        return [output for child in model.children() for output in output_embeddings(child)]
    output = getter()
    return [] if output is None else [output]


def _nothing_to_route(
    modules: dict[str, nn.Module],
    matched: dict[str, nn.Linear],
    others: Sequence[str],
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str],
) -> str:
    if matched:
        return (
            f"the weights of all {len(matched)} matching layers are frozen or empty ({next(iter(matched))}, ...): there is no "
            "base weight to route in the merged form. Unfreeze them (requires_grad_(True)), or keep the base frozen and train "
            "LoRA experts only: molf.add_lora_experts(model)"
        )
    linear = sorted({*_last_parts(modules, "Linear"), *(name.rpartition(".")[2] for name in others)})
    if transposed := _last_parts(modules, "Conv1D"):  # of transformers: GPT-2's
        return (
            f"the layers {', '.join(transposed)} of this model are Conv1D, whose weights [in, out] cannot be routed in the "
            "merged form: use adapters as experts, molf.add_lora_experts(model, freeze_base=False), or "
            "molf.add_lora_experts(model) with a frozen base"
        )
    if not linear:
        kinds = sorted(
            {type(m).__name__ for m in modules.values() if isinstance(getattr(m, "weight", None), nn.Parameter)}
        )
        return f"this model has no nn.Linear layer to route; its layers with weights are {', '.join(kinds) or 'none'}"
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    near = [hit for name in wanted for hit in difflib.get_close_matches(name, linear, n=1)]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if target_modules in linear:
        hint = f"; a string is a regular expression for the whole name, so write [{target_modules!r}]"
    return (
        f"no layer matches target_modules={target_modules!r} with exclude_modules={exclude_modules!r}; the layers "
        f"here are named {', '.join(linear)}{hint}"
    )


def _last_parts(modules: Mapping[str, nn.Module], kind: str) -> list[str]:
    """Return the last name parts of all modules of a class."""
    return sorted({name.rsplit(".", 1)[-1] for name, module in modules.items() if _is_a(module, kind)})


def _is_a(module: nn.Module, kind: str) -> bool:
    """Return whether a module's class, or a base of it, has a name."""
    return any(base.__name__ == kind for base in type(module).__mro__)


def check_not_tied(modules: Mapping[str, nn.Module], routed: Mapping[str, Iterable[nn.Parameter]]) -> None:
    """Check that nothing that is routed together is shared with another module.

    Args:
        modules: All modules by name.
        routed: Weight and bias of what is to be routed, by its name.

    Raises:
        MolfError: If one is.
    """
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key, p in module.named_parameters(recurse=False):
            owners.setdefault(id(p), []).append(f"{name}.{key}".lstrip("."))
    for name, params in routed.items():
        for p in params:
            shared = owners[id(p)]
            if len(shared) > 1:
                own = next((own for own in shared if own.startswith(name)), name)
                raise MolfError(
                    f"the {own.rpartition('.')[2]} of {name} is shared ({' = '.join(shared)}): a routed update would move every "
                    f"user of it; add {name!r} to exclude_modules"
                )


def _check_weight(name: str, linear: nn.Linear) -> None:
    weight = linear.weight
    check_not_split(name, weight)
    if "weight" not in dict(linear.named_parameters(recurse=False)):
        raise MolfError(
            f"the weight of {name} is parametrized (weight norm or the like), so it is no parameter that could be updated: "
            "remove the parametrization or exclude the layer (exclude_modules)"
        )
    if not weight.is_floating_point():
        raise MolfError(
            f"the weight of {name} is {weight.dtype}, not floating point: a quantised base cannot be trained; exclude the "
            "layer, or keep the base frozen and train LoRA experts only: molf.add_lora_experts(model)"
        )
    if weight.ndim != 2:
        raise MolfError(
            f"the weight of {name} has shape {list(weight.shape)}: only 2-D weights [out, in] can be routed"
        )


def check_rank(name: str, shape: Sequence[int], ranks: Sequence[int]) -> None:
    """Check that no rank exceeds ``max(out, in)`` of a layer's weight ``[out, in]``, or of each in a stack ``[n, out, in]``.

    Raises:
        MolfError: If one does.
    """
    largest = max(shape[-2:])
    too_large = [r for r in ranks if r > largest]
    if too_large:
        raise MolfError(
            f"ranks={tuple(ranks)} exceeds the smallest routed layer, {name} {list(shape)}; use r <= "
            f"{largest} or exclude it (exclude_modules)"
        )
