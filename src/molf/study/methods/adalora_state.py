"""What going on with AdaLoRA takes and PEFT does not save: uncut factors, importances, and which singular values are cut."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from molf.integrations.whole_checkpoints import CheckpointPart

FILE_NAME = "adalora.safetensors"
_FACTOR, _CUT = "factor", "cut"
_IMPORTANCES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaLoraState(CheckpointPart):
    """AdaLoRA's whole state, as a part of every checkpoint.

    PEFT's own file, which is there for other programs, holds the factors without the cut directions. Training needs these: they
    stay in the model, with a singular value of 0, and their moments in the optimizer.
    """

    replaces_weights = True

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the state."""
        save_file(_state(model), folder / FILE_NAME)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Bring an AdaLoRA model to the state of a checkpoint.

        Raises:
            ValueError: The checkpoint was not written by AdaLoRA with the same layers and ranks.
        """
        file = folder / FILE_NAME
        if not file.is_file():
            raise ValueError(f"{folder} has no {FILE_NAME}: it was not written by a run with method adalora")
        saved = {kind: _of_kind(load_file(file), kind) for kind in (_FACTOR, _CUT, *_IMPORTANCES)}
        _check(folder, {name: p.shape for name, p in _factors(model).items()}, saved[_FACTOR])
        adapted: Any = model
        for name, p in _factors(model).items():
            p.data.copy_(saved[_FACTOR][name])
        device = next(model.parameters()).device
        for kind in _IMPORTANCES:
            setattr(adapted.rankallocator, kind, {name: value.to(device) for name, value in saved[kind].items()})
        pattern = {name: (~cut).tolist() for name, cut in saved[_CUT].items()}
        _config(adapted).rank_pattern = pattern or None


def _state(model: Any) -> dict[str, Tensor]:
    groups: dict[str, dict[str, Tensor]] = {
        _FACTOR: {name: p.detach() for name, p in _factors(model).items()},
        _CUT: {name: ~torch.tensor(kept) for name, kept in (_config(model).rank_pattern or {}).items()},
        **{kind: getattr(model.rankallocator, kind) for kind in _IMPORTANCES},
    }
    return {f"{kind}/{name}": value.contiguous() for kind, own in groups.items() for name, value in own.items()}


def _of_kind(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    prefix = f"{kind}/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _factors(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _config(model: Any) -> Any:
    return model.peft_config[model.base_model.trainable_adapter_name]


def _check(folder: Path, here: dict[str, torch.Size], saved: dict[str, Tensor]) -> None:
    there = {name: value.shape for name, value in saved.items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            ours, theirs = (list(side[name]) if name in side else "missing" for side in (here, there))
            raise ValueError(
                f"{folder} is of another AdaLoRA run: {name} is {theirs} there and {ours} here; go on with the settings that it "
                "was made with"
            )
