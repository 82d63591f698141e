"""LoRA experts as PEFT adapters: the branched form, and MoLF-Efficient if the base is frozen."""

import re
import warnings
from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from molf.errors import MolfError
from molf.integrations.joint_forward import join_experts
from molf.integrations.lora_targets import find_targets, task_type
from molf.setup.discovery import listed_names
from molf.setup.param_groups import checked_ranks, expert_names, is_number
from molf.setup.peft_adapters import is_adapted


def add_lora_experts(
    model: nn.Module,
    ranks: Sequence[int] = (32, 128),
    *,
    lora_alpha: float | Sequence[float] = 32.0,
    lora_dropout: float = 0.0,
    use_rslora: bool = True,
    freeze_base: bool = True,
    target_modules: str | Sequence[str] | None = "all-linear",
    exclude_modules: str | Sequence[str] | None = ("lm_head",),
) -> PeftModel:
    """Add one PEFT LoRA adapter per rank to a model, named ``lora_r{rank}``, all active together.

    ``molf.MoLF(model)`` then routes between them, and with ``freeze_base=False`` the base weight too. The model is an ordinary
    ``PeftModel`` that saves, loads, merges and takes quantised bases as usual. In training, all experts of a layer run in one
    pass (``JointLinear``) with one dropout mask.

    Stacked weights ``[experts, ., .]`` of mixtures get a pair of LoRA matrices for each slice, and one decision for all slices.
    Routers, and layers whose weight another module reads, get no experts: a warning names them, with their share.

    Args:
        model: A plain model; changed in place.
        ranks: Rank of each LoRA expert, all different.
        lora_alpha: LoRA's alpha: one for all experts, or one per rank.
        lora_dropout: Dropout before each A, in [0, 1). Stacked weights take none: above 0 they get no experts.
        use_rslora: Scale by ``alpha / sqrt(r)`` instead of ``alpha / r``.
        freeze_base: Train the experts only (MoLF-Efficient). Otherwise everything that trained before still does, and the weights
            of the adapted layers are the ``fft`` experts. PEFT saves adapters only, so save the merged model then.
        target_modules: As in PEFT; names of stacked tensors are understood, too. A warning tells which
            names in a list match nothing.
        exclude_modules: As in PEFT; None excludes nothing.

    Raises:
        MolfError: ``ranks`` is empty, repeats a rank or has one below 1, there is another number of alphas, the dropout is
            outside [0, 1), or nothing that can be adapted matches.
        TypeError: The model has adapters already, or a switch is no bool.
    """
    if is_adapted(model):
        raise TypeError(
            "the model has adapters: it is a PeftModel already, or from_pretrained or its own add_adapter have put one into it. "
            "Give the plain model, or add adapters with model.add_adapter"
        )
    ranks, alphas = checked_ranks(ranks, lora_alpha)
    if not (is_number(lora_dropout) and 0 <= lora_dropout < 1):
        raise MolfError(f"lora_dropout={lora_dropout!r}: give a number in [0, 1)")
    for option, given in (("use_rslora", use_rslora), ("freeze_base", freeze_base)):
        if not isinstance(given, bool):
            raise TypeError(f"{option}={given!r}: give True or False")
    if not ranks:
        raise MolfError("ranks=(): give one or more different positive ranks, one for each LoRA expert")
    target_modules = listed_names("target_modules", target_modules, "all-linear")
    exclude_modules = listed_names("exclude_modules", exclude_modules, ())
    targets = find_targets(model, target_modules, exclude_modules, stacks=lora_dropout == 0)
    targets.log()
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in targets.modules)
    trained = [p for p in model.parameters() if p.requires_grad]
    adapted: PeftModel | None = None
    for name, rank, alpha in zip(expert_names(ranks)[1:], ranks, alphas, strict=True):
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            fan_in_fan_out=transposed,
            target_modules=list(targets.modules),
            target_parameters=list(targets.parameters) or None,
            task_type=task_type(model),
        )
        with warnings.catch_warnings():
            # Of models that have Conv1D and nn.Linear layers: PEFT does what is right for each.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
            if adapted is None:
                adapted = get_peft_model(model, config, adapter_name=name)
            else:
                adapted.add_adapter(name, config)
    assert adapted is not None
    adapted.base_model.set_adapter(list(adapted.peft_config))
    adapted.base_model.peft_config = adapted.base_model.model.peft_config = _ExpertConfigs(adapted.peft_config)
    join_experts(adapted)
    if not freeze_base:
        for p in trained:
            p.requires_grad_(True)
    return adapted


class _ExpertConfigs(dict[str, LoraConfig]):
    """Adapters' configurations by name. TRL copies the one named "default" for its reference model; no expert is called so."""

    def __missing__(self, name: str) -> LoraConfig:
        if name != "default":
            raise KeyError(name)
        return next(iter(self.values()))


def trained_adapters(model: PeftModel) -> tuple[str, ...]:
    """Return the adapters that make up what a model has learnt: its experts, and whatever else is active.

    Experts count whether they are active or not, because loading and ``set_adapter`` leave one active. Other adapters that rest
    do not: TRL's copy of the adapter for its reference model, or one of another task.
    """
    active = model.active_adapters
    active = [active] if isinstance(active, str) else active
    return tuple(name for name in model.peft_config if name in active or re.fullmatch(r"lora_r\d+", name))


def unsaved_parameters(model: PeftModel, adapters: Sequence[str]) -> list[str]:
    """Return the names of the parameters that train and that PEFT does not save with these adapters: weights of the base."""
    states = [get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False) for name in adapters]
    saved = {tensor.data_ptr() for state in states for tensor in state.values()}
    return [name for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in saved]
