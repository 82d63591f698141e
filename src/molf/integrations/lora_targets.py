"""What a model's LoRA experts are put on: its linear layers and stacked experts, and what gets none.

Mixtures of experts keep their weights in stacks ``[experts, out, in]`` or ``[experts, in, out]``, which PEFT adapts as parameters
(``target_parameters``). Routers get no experts, and neither do layers whose weight another module reads: a LoRA layer would not
run there.
"""

import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from molf.errors import MolfError
from molf.setup.discovery import matches, output_embeddings, unmatched

logger = logging.getLogger(__name__)

_ROUTER = re.compile(r"Router|Gating|MoE\w*Gate$", re.IGNORECASE)  # names of classes
_SHOWN = 6  # how many names a message lists


@dataclass(frozen=True)
class LoraTargets:
    """Names for PEFT, and what is left out.

    Attributes:
        modules: Full names of the layers to adapt.
        parameters: Full names of the parameters to adapt.
        left_out: Names of other weights (two dimensions or more; no embedding, no output layer, nothing excluded) with what
            they are. Numbers of layers are replaced by ``*``.
        share: Part of the model's parameters that is adapted, from 0 to 1.
        left_share: Part that ``left_out`` has.
    """

    modules: list[str]
    parameters: list[str]
    left_out: dict[str, str]
    share: float
    left_share: float

    def __str__(self) -> str:
        """Return a sentence on the shares that names what is left out."""
        names = [f"{name} ({kind})" for name, kind in self.left_out.items()]
        more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
        return (
            f"LoRA adapts {100 * self.share:.1f} % of the parameters; {100 * self.left_share:.1f} % are weights without it: "
            f"{', '.join([*names[:_SHOWN], *more]) or 'none'}"
        )

    def log(self) -> None:
        """Log the sentence, as a warning if anything is left out."""
        logger.log(logging.WARNING if self.left_out else logging.INFO, "%s", self)


def find_targets(
    model: nn.Module,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] = ("lm_head",),
    *,
    stacks: bool = True,
) -> LoraTargets:
    """Find the layers and stacked experts of a model that LoRA can adapt.

    Args:
        model: A plain model.
        target_modules: ``"all-linear"``, or as in PEFT; names of stacked tensors are understood, too.
        exclude_modules: As in PEFT.
        stacks: Whether parameters can be adapted, which needs LoRA without dropout.

    Raises:
        MolfError: Nothing that can be adapted matches.
    """
    everything = target_modules == "all-linear"
    if not isinstance(target_modules, str):
        _warn_of_unmatched(model, target_modules)
    heads = output_embeddings(model)
    modules, parameters = _wanted(model, target_modules, exclude_modules, heads)
    unfit = {name: reason for name, module in modules.items() if (reason := _unfit(model, name, module))}
    fit = {name: module for name, module in modules.items() if name not in unfit}
    renamed = _renamed({name.rpartition(".")[2] for name in fit}, model)
    for name in [name for name in fit if name.rpartition(".")[2] in renamed]:
        weight = fit.pop(name).get_parameter("weight")
        if weight.is_floating_point():
            parameters[f"{name}.weight"] = weight
        else:
            unfit[name] = f"{weight.dtype}, with a name that PEFT takes for stacked experts"
    if not stacks:
        unfit |= {name.removesuffix(".weight"): "which takes plain LoRA without dropout only" for name in parameters}
        parameters = {}
    if not fit and not parameters:
        raise MolfError(_nothing(model, target_modules, exclude_modules, unfit))
    adapted = {id(getattr(module, "weight", None)) for module in fit.values()} | {id(p) for p in parameters.values()}
    left = _left(model, adapted, heads, exclude_modules) if everything else _named(model, unfit)
    total = sum(p.numel() for p in model.parameters())
    return LoraTargets(
        modules=list(fit),
        parameters=list(parameters),
        left_out={_any_layer(name): unfit.get(name) or kind for name, (kind, _) in left.items()},
        share=sum(p.numel() for p in model.parameters() if id(p) in adapted) / total,
        left_share=sum(numel for _, numel in left.values()) / total,
    )


def task_type(model: nn.Module) -> str | None:
    """Return PEFT's task for a model: CAUSAL_LM or SEQ_2_SEQ_LM if it generates from text, else None.

    PEFT's classes for these tasks prepare generation and pass ``input_ids`` on. Without a task it records the model's class
    itself. Its tasks for classifiers would train a head for each adapter.
    """
    if not hasattr(model, "prepare_inputs_for_generation") or getattr(model, "main_input_name", "") != "input_ids":
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def _wanted(
    model: nn.Module, target: str | Sequence[str], exclude: str | Sequence[str], heads: Sequence[nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
    """Return the targeted modules and stacks by name."""

    def wanted(name: str, linear: bool) -> bool:
        return (linear if target == "all-linear" else matches(name, target)) and not matches(name, exclude)

    stacks = dict(_stacks(model))
    holders = {name.rpartition(".")[0] for name in stacks}
    modules = {
        name: module
        for name, module in model.named_modules()
        if name not in holders and wanted(name, isinstance(module, nn.Linear | Conv1D) and module not in heads)
    }
    read = None if isinstance(target, str) else _as_peft_reads(target, model)
    older = list(read.target_parameters or ()) if read is not None else []

    def stack_wanted(name: str) -> bool:
        names = (name, name.rpartition(".")[0])  # a module stands for its stacks
        targeted = target == "all-linear" or matches(name, older) or any(matches(own, target) for own in names)
        return targeted and not any(matches(own, exclude) for own in names)

    return modules, {name: p for name, p in stacks.items() if stack_wanted(name)}


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights of stacked experts ``[experts, ., .]``."""
    for name, module in model.named_modules():
        if "expert" in f"{name.rpartition('.')[2]} {type(module).__name__}".lower() and name:
            for key, p in module.named_parameters(recurse=False):
                if p.ndim == 3 and p.is_floating_point():
                    yield f"{name}.{key}", p


def _unfit(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Return why a layer cannot have LoRA, or None."""
    parent, _, child = name.rpartition(".")
    if _reads_weight(model.get_submodule(parent), child):
        return f"{type(module).__name__}, whose weight is read by its parent"
    if isinstance(module, nn.Linear | Conv1D) and not _is_plain(module):
        return type(module).__name__
    return f"{type(module).__name__}, of a router" if _in_router(model, name) else None


def _in_router(model: nn.Module, name: str) -> bool:
    """Return whether a layer is a router of experts or part of one, by the names of classes and attributes."""
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))]
    return "router" in parts or any(_ROUTER.search(type(module).__name__) for module in around)


def _is_plain(module: Any) -> bool:
    """Return whether a layer computes ``x W^T + b``; subclasses with a forward of their own, such as routers, are tried."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward) or not module.weight.is_floating_point():
        return True  # PEFT knows the quantised layers
    weight = module.weight.detach()
    x = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
    with torch.no_grad():
        try:
            found = type(module).forward(module, x)
        except Exception:  # whatever it computes, it is not of one input
            return False
        expected = linear(x, weight, module.bias)
    alike = isinstance(found, torch.Tensor) and found.shape == expected.shape
    return alike and (weight.is_meta or torch.allclose(found, expected, rtol=1e-2, atol=1e-3))


def _reads_weight(parent: nn.Module, child: str) -> bool:
    """Return whether a module uses the weight of a layer in it instead of calling the layer, as fused state-space kernels do."""
    if isinstance(parent, nn.MultiheadAttention):
        return True
    if not hasattr(parent, "A_log"):
        return False
    try:
        source = inspect.getsource(type(parent))
    except OSError:
        return True  # unknown: an expert that nothing runs would be worse
    return re.search(rf"self\.{child}\.weight\b(?!\.(?:dtype|device|shape))", source) is not None


def _renamed(endings: set[str], model: nn.Module) -> set[str]:
    """Return the names that PEFT takes for an older transformers' names of stacked experts, whatever they are in this model."""
    read = {ending: _as_peft_reads([ending], model) for ending in endings}
    return {ending for ending, config in read.items() if config is None or ending not in config.target_modules}


def _as_peft_reads(names: Sequence[str], model: nn.Module) -> LoraConfig | None:
    """Return targets as PEFT will read them: names that older versions had for stacked experts become those of the stacks.

    None if one of two projections is named that became one stack.
    """
    config = LoraConfig(target_modules=list(names))
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return None
    return config


def _warn_of_unmatched(model: nn.Module, target_modules: Sequence[str]) -> None:
    known = [name for name, _ in model.named_modules()] + [name for name, _ in _stacks(model)]
    # Names that older versions had for stacked experts match nothing, and PEFT knows them.
    new = [name for name in target_modules if not _is_older(name, model)]
    if missing := unmatched(new, known):
        logger.warning("target_modules name %s, which match nothing in this model", ", ".join(missing))


def _is_older(name: str, model: nn.Module) -> bool:
    read = _as_peft_reads([name], model)
    return read is None or bool(read.target_parameters)


def _left(
    model: nn.Module, adapted: set[int], heads: Sequence[nn.Module], exclude: str | Sequence[str]
) -> dict[str, tuple[str, int]]:
    """Return kind and size of the weights without experts that are no embeddings, nor left out on purpose."""
    known = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) or m in heads for p in m.parameters()}
    left = {}
    for name, module in model.named_modules():
        for key, p in module.named_parameters(recurse=False):
            full = f"{name}.{key}".lstrip(".")
            excluded = matches(name, exclude) or matches(full, exclude)
            if p.ndim >= 2 and id(p) not in adapted | known and not excluded:
                left[full.removesuffix(".weight")] = (type(module).__name__, p.numel())
    return left


def _named(model: nn.Module, names: dict[str, str]) -> dict[str, tuple[str, int]]:
    sizes = dict(model.named_parameters())
    return {
        name.removesuffix(".weight"): (kind, sizes[name if name in sizes else f"{name}.weight"].numel())
        for name, kind in names.items()
    }


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _nothing(model: nn.Module, target: str | Sequence[str], exclude: str | Sequence[str], unfit: dict[str, str]) -> str:
    listed = [names if isinstance(names, str) else list(names) for names in (target, exclude)]
    what = "no layer for LoRA experts matches target_modules={!r} and exclude_modules={!r}".format(*listed)
    if unfit:
        name, reason = next(iter(unfit.items()))
        return f"{what}: {name} is left out ({reason})"
    linears = {n.rpartition(".")[2] for n, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    stacks = {name.rpartition(".")[2] for name, _ in _stacks(model)}
    return f"{what}; those of this model are named {', '.join(sorted(linears | stacks)) or 'nothing: it has none'}"
