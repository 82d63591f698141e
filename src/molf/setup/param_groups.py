"""From a model to flat, plain parameter groups: ordinary ones first, then one per routed layer or stack of matrices.

A routed group holds the layer's parameters (weight and bias, and those of PEFT adapters in the branched form) and scalars: module
name, form, names, ranks and scales of the experts, the ratio of the LoRA rate to ``lr``, and a seed for the LoRA initialisation.
Schedulers, checkpoints and sharding tools treat it like any other group.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from numbers import Integral, Number, Real
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from molf.errors import MolfError
from molf.layers.fit import check_parameter
from molf.setup.discovery import check_rank, listed_names
from molf.setup.parameters import RoutedParameter, routed_weights, unrouted_kinds
from molf.setup.peft_adapters import adapted_groups, is_adapted

__all__ = [
    "check_numbers",
    "checked_ranks",
    "expert_names",
    "is_integer",
    "is_number",
    "alignment",
    "level_scales",
    "lora_scales",
    "param_groups",
]

logger = logging.getLogger(__name__)


def expert_names(ranks: Sequence[int]) -> tuple[str, ...]:
    """Return the experts' names in routing order: ``fft``, then ``lora_r{rank}`` as given."""
    return ("fft", *(f"lora_r{r}" for r in ranks))


def lora_scales(ranks: Sequence[int], alphas: Sequence[float], use_rslora: bool) -> tuple[float, ...]:
    """Return the scale ``s`` of every LoRA expert: ``alpha / sqrt(r)`` rank-stabilised, else ``alpha / r``."""
    power = 0.5 if use_rslora else 1.0
    return tuple(alpha / r**power for alpha, r in zip(alphas, ranks, strict=True))


def level_scales(ranks: Sequence[int], n_in: int, full_rank: bool = True) -> tuple[float, ...]:
    """Return the scale ``s*`` of every LoRA expert of a layer at which its step is as long as it is well aligned.

    The first full-rank step is ``lr sign(g)`` in every row ``g [in]`` of the gradient, ``lr sqrt(in)`` long. That of LoRA is
    ``s lr sign(A g) A``. ``A [r, in]`` has variance ``1 / (3 in)`` (Kaiming-uniform, a = sqrt 5), so it is
    ``s lr sqrt((r + 2 r^2 / (pi in)) / 3)`` long: across ``g``, where ``A`` is noise, and along it. Its cosine with ``g`` is
    that of the full-rank step times ``alignment``, and so is its length at ``s*``. Of all lengths with the same sum of squares,
    these promise most together.

    Args:
        ranks: The ranks of the layer's LoRA experts.
        n_in: Inputs of the layer.
        full_rank: Whether the layer has an ``fft`` expert; if not, the largest rank steps as far as that would.
    """
    best = 1.0 if full_rank else max(alignment(r, n_in) for r in ranks)
    return tuple(math.sqrt(3) / (1 + 2 * r / (math.pi * n_in)) / best for r in ranks)


def alignment(rank: int, n_in: int) -> float:
    """Return the cosine of a first LoRA step and the gradient, as a share of that of a full-rank step.

    ``sqrt(r / (in + 2 r / pi))``, for gradients with normal elements.
    """
    return math.sqrt(rank / (n_in + 2 * rank / math.pi))


def param_groups(
    model: nn.Module,
    *,
    ranks: Sequence[int] | None = None,
    lr: float | torch.Tensor = 5e-5,
    lora_lr: float | str | None = "matched",
    weight_decay: float = 0.1,
    lora_weight_decay: float = 0.01,
    lora_alpha: float | Sequence[float] = 32.0,
    use_rslora: bool = True,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] = ("lm_head",),
    target_parameters: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Build the parameter groups of a model for ``MoLF``: merged experts for a plain model, its adapters for a PEFT model.

    Every trainable parameter is in exactly one group. Targeted linear layers, and stacks of experts' matrices, whose weight
    requires a gradient get a group each; the rest goes to two ordinary AdamW groups, matrices with decay, vectors, norms and
    biases without. The LoRA initialisation depends on torch's seed and the module order only; no random number is drawn here.

    Args:
        model: Any module; torch.compile and DDP wrappers are transparent. A PEFT model's active LoRA adapters are its
            experts, and so is the base weight where it requires a gradient (branched form).
        ranks: Rank of each LoRA expert beside ``fft``; None means ``(128,)``, ``()`` means none. The LoRA options are for
            plain models only.
        lr: Learning rate of ``fft`` experts and of everything that is not routed.
        lora_lr: ``"matched"`` makes the length of a LoRA step follow from ``lr``, whatever ``lora_alpha``: it is shorter than a
            full-rank step as it is less aligned with the gradient (``level_scales``). A number is the rate of the LoRA experts,
            None stands for ``lr``. It is kept as a ratio to ``lr``, so it follows its schedule.
        weight_decay: Decoupled decay of ``fft`` weights and ordinary matrices.
        lora_weight_decay: Decoupled decay of A and B.
        lora_alpha: LoRA's alpha, one for all or one per rank.
        use_rslora: Scale by ``alpha / sqrt(r)`` instead of ``alpha / r``.
        target_modules: ``"all-linear"``, a regular expression for the whole module name, or names or their last parts, each of
            which must match something. None means ``"all-linear"``.
        exclude_modules: Modules never routed, in the same notation; None means none. "all-linear" excludes the output
            embedding, too.
        target_parameters: More parameters to route that are in no ``nn.Linear`` layer, as in PEFT: names or their last parts, for
            example ``["router.weight"]``. Matrices ``[out, in]`` and stacks ``[n, out, in]``, of which each matrix is routed on
            its own. Stacks of a mixture's experts are routed as layers are, without being named here.

    Raises:
        MolfError: If nothing matches, a rank is too large, or a weight is tied, has no shape yet, or an unsupported one or dtype.
        TypeError: If ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups needs the model (an nn.Module), got {type(model).__name__}")
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise MolfError(f"{lazy[0]} has no shape yet, as in nn.LazyLinear: run one forward pass of the model first")
    target_modules = listed_names("target_modules", target_modules, "all-linear")
    exclude_modules = listed_names("exclude_modules", exclude_modules, ())
    target_parameters = listed_names("target_parameters", target_parameters, None)
    matched = _is_matched(lora_lr)
    fixed_lora_lr = None if isinstance(lora_lr, str) else lora_lr
    check_numbers(lr=lr, lora_lr=fixed_lora_lr, weight_decay=weight_decay, lora_weight_decay=lora_weight_decay)
    rates = {
        "weight_decay": float(weight_decay),
        "lora_lr_ratio": _ratio(lr, fixed_lora_lr),
        "lora_weight_decay": float(lora_weight_decay),
    }
    if not isinstance(use_rslora, bool):
        raise TypeError(f"use_rslora={use_rslora!r}: give True or False")
    if is_adapted(model):
        lora = {"ranks": ranks, "lora_alpha": lora_alpha, "use_rslora": use_rslora}
        targets = {"target_modules": target_modules, "exclude_modules": exclude_modules}
        _refuse_lora_options({**lora, **targets, "target_parameters": target_parameters})
        routed = adapted_groups(model)
        if matched:
            routed = [{**group, "b_factors": _b_factors(group)} for group in routed]
    else:
        ranks, alphas = checked_ranks(ranks, lora_alpha)
        scales = None if matched else lora_scales(ranks, alphas, use_rslora)
        found = routed_weights(model, target_modules, exclude_modules, target_parameters)
        routed = _merged_groups(found, ranks, scales)
    for name, p in model.named_parameters():
        if p.requires_grad:
            check_parameter(name, p)
    seed = torch.initial_seed() * 1_000_003
    routed = [{**group, **rates, "lora_seed": (seed + i) % 2**63} for i, group in enumerate(routed)]
    groups = [*_ordinary_groups(model, routed, rates["weight_decay"]), *routed]
    for group in groups:
        group["lr"] = lr.clone() if isinstance(lr, torch.Tensor) else float(lr)
    _check_coverage(model, groups)
    _say_what_is_not_routed(model, groups)
    if ranks != () and {len(group["experts"]) for group in routed} == {1}:
        logger.warning(
            "Every routed layer has one expert, %s: there is nothing to choose, and the steps are AdamW's. Give several, as by "
            "molf.add_lora_experts(model, ranks=(8, 32)), or train the plain model.",
            routed[0]["experts"][0],
        )
    return groups


def _merged_groups(
    found: dict[str, RoutedParameter], ranks: tuple[int, ...], scales: tuple[float, ...] | None
) -> list[dict[str, Any]]:
    """Return the groups of layers and of other matrices; without ``scales`` each has its levelled ones."""
    for name, own in sorted(found.items(), key=lambda item: max(item[1].weight.shape[-2:])):
        check_rank(name, own.weight.shape, ranks)
    groups = []
    for name, (weight, bias, transposed) in found.items():
        n_in = weight.shape[-2 if transposed else -1]
        group: dict[str, Any] = {
            "params": [p for p in (weight, bias) if p is not None and p.requires_grad],
            "module": name,
            "form": "stacked" if weight.ndim == 3 else "merged",
            "experts": expert_names(ranks),
            "ranks": ranks,
            "scales": scales or level_scales(ranks, n_in),
        }
        groups.append({**group, "transposed": transposed} if weight.ndim == 3 else group)
    return groups


def _b_factors(group: dict[str, Any]) -> tuple[float, ...]:
    """Return ``s* / s`` of each adapter."""
    A = group["params"][-2]
    level = level_scales(group["ranks"], A.shape[1], full_rank="fft" in group["experts"])
    return tuple(wanted / scale for wanted, scale in zip(level, group["scales"], strict=True))


def _ordinary_groups(model: nn.Module, routed: list[dict[str, Any]], weight_decay: float) -> list[dict[str, Any]]:
    taken = {id(p) for group in routed for p in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    undecayed = {id(p) for module in model.modules() for p in _undecayed(module)}
    matrices = {"params": [p for p in rest if id(p) not in undecayed], "weight_decay": weight_decay}
    vectors = {"params": [p for p in rest if id(p) in undecayed], "weight_decay": 0.0}
    return [group for group in (matrices, vectors) if group["params"]]


def _undecayed(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's own vectors, and what is a norm's or a bias in more dimensions."""
    norm = type(module).__name__.endswith("Norm")
    return [p for key, p in module.named_parameters(recurse=False) if norm or p.ndim < 2 or key.endswith("bias")]


def _is_matched(lora_lr: float | str | None) -> bool:
    if isinstance(lora_lr, str) and lora_lr != "matched":
        raise MolfError(f'lora_lr={lora_lr!r}: give a number, None for lr, or "matched"')
    return lora_lr == "matched"


def _ratio(lr: float | torch.Tensor, lora_lr: float | None) -> float:
    if lora_lr is None or lora_lr == float(lr):
        return 1.0
    if float(lr) == 0:
        raise MolfError(f"lr=0 with lora_lr={lora_lr}: LoRA's rate follows lr as a ratio, so lr must be above 0")
    return float(lora_lr) / float(lr)


def _refuse_lora_options(options: dict[str, Any]) -> None:
    defaults = inspect.signature(param_groups).parameters
    for name, value in options.items():
        if value != defaults[name].default:
            raise MolfError(
                f"{name}={value} asks for LoRA experts inside the optimizer, but the model already carries PEFT adapters, which "
                f"are the experts then: one or the other. Leave {name} out, or call merge_and_unload() on the model first"
            )


def checked_ranks(
    ranks: Sequence[int] | None, lora_alpha: float | Sequence[float]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return ranks and one alpha for each.

    Raises:
        MolfError: If a rank is not a positive integer of its own, or the alphas are not positive or not as many.
        TypeError: If ``ranks`` is no sequence.
    """
    if isinstance(ranks, Number | str):
        raise TypeError(f"ranks={ranks!r}: give one rank per LoRA expert, for example ranks=(128,)")
    ranks = (128,) if ranks is None else tuple(ranks)
    if not all(is_integer(r) and r >= 1 for r in ranks):
        raise MolfError(f"ranks={ranks}: every rank must be a positive integer")
    ranks = tuple(map(int, ranks))
    if len(set(ranks)) < len(ranks):
        raise MolfError(f"ranks={ranks}: the rank names an expert, so each may occur only once")
    given: Any = lora_alpha
    several = isinstance(given, Sequence) and not isinstance(given, str)
    alphas: tuple[Any, ...] = tuple(given) if several else (given,) * len(ranks)
    if len(alphas) != len(ranks) or not all(is_number(alpha) for alpha in alphas):
        raise MolfError(f"lora_alpha={lora_alpha!r}: give one number, or one for each of ranks={ranks}")
    if not all(alpha > 0 for alpha in alphas):
        raise MolfError(f"lora_alpha={lora_alpha}: must be above 0; without LoRA experts, ranks=(), this is AdamW")
    return ranks, tuple(map(float, alphas))


def is_integer(value: Any) -> TypeGuard[int]:
    """Return whether a value is an integer, of Python or NumPy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float | torch.Tensor]:
    """Return whether a value is a finite number: of Python or NumPy, or a tensor of one element."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and bool(value.isfinite())
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def check_numbers(**numbers: float | torch.Tensor | None) -> None:
    """Check that all are finite numbers of 0 or more; ``lora_lr`` may be None.

    Raises:
        MolfError: If one is not.
    """
    for name, value in numbers.items():
        if not (is_number(value) and value >= 0) and not (name == "lora_lr" and value is None):
            text = "; it is text, as YAML reads 5e-5: write 5.0e-5" if isinstance(value, str) else ""
            raise MolfError(f"{name}={value!r}: must be a finite number, 0 or more{text}")


def _check_coverage(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    counts: dict[int, int] = {}
    for group in groups:
        for p in group["params"]:
            counts[id(p)] = counts.get(id(p), 0) + 1
    wrong = [n for n, p in model.named_parameters() if p.requires_grad and counts.get(id(p)) != 1]
    assert not wrong, f"every trainable parameter must be in exactly one group, but {wrong} are not"


def _say_what_is_not_routed(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Log which trained matrices are in no layer and take plain AdamW, a warning if they are more than a twentieth."""
    routed = {id(p) for group in groups if "module" in group for p in group["params"]}
    kinds = unrouted_kinds(model, routed)
    share = sum(numel for _, numel in kinds.values()) / sum(p.numel() for group in groups for p in group["params"])
    if kinds:
        largest = sorted(kinds, key=lambda name: -kinds[name][1])
        logger.log(
            logging.WARNING if share > 0.05 else logging.INFO,
            "%.1f %% of the trained parameters are matrices outside of linear layers and take plain AdamW: %s; [out, in] and "
            "[n, out, in] among them are routed if target_parameters name them",
            100 * share,
            ", ".join(f"{name} {kinds[name][0]}" for name in largest[:5]) + (", ..." if len(largest) > 5 else ""),
        )
