"""What PEFT does not save but resuming needs: AdaLoRA's uncut state, and base weights trained beside adapters."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from molf.errors import MolfError
from molf.integrations.whole_checkpoints import CheckpointPart
from molf.study.methods.adalora import adalora_config
from molf.study.methods.trainable import trained, trained_base

ADALORA_FILE = "adalora.safetensors"
BASE_FILE = "trained_base.safetensors"
_FACTOR, _CUT = "factor", "cut"
_IMPORTANCES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # attributes of PEFT's RankAllocator
_ADVICE = "resume with the settings of that run, or pass --overwrite to train from the start"


class AdaLoraState(CheckpointPart):
    """AdaLoRA's uncut factors, the importance of each singular value, and which singular values are cut.

    PEFT's own file holds only the directions that are kept. In training the others stay in the model with a singular value of
    0, and have moments in the optimizer.
    """

    replaces_weights = True

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the state."""
        adapted: Any = model
        kept = adalora_config(adapted).rank_pattern or {}
        groups: dict[str, dict[str, Tensor]] = {
            _FACTOR: {name: p.detach() for name, p in trained(model).items()},
            _CUT: {name: ~torch.tensor(mask) for name, mask in kept.items()},
            **{kind: getattr(adapted.rankallocator, kind) for kind in _IMPORTANCES},
        }
        tensors = {f"{kind}/{name}": x.contiguous() for kind, own in groups.items() for name, x in own.items()}
        save_file(tensors, folder / ADALORA_FILE)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Bring an AdaLoRA model to the state of a checkpoint."""
        file = folder / ADALORA_FILE
        if not file.is_file():
            raise MolfError(
                f"{folder} has no {ADALORA_FILE}: it was not written by a run with method adalora; {_ADVICE}"
            )
        saved: dict[str, dict[str, Tensor]] = {kind: {} for kind in (_FACTOR, _CUT, *_IMPORTANCES)}
        for key, value in load_file(file).items():
            kind, _, name = key.partition("/")
            saved[kind][name] = value
        factors = trained(model)
        _check_shapes(folder, factors, saved[_FACTOR])
        for name, p in factors.items():
            p.data.copy_(saved[_FACTOR][name])
        adapted: Any = model
        device = next(model.parameters()).device
        for kind in _IMPORTANCES:
            setattr(adapted.rankallocator, kind, {name: value.to(device) for name, value in saved[kind].items()})
        adalora_config(adapted).rank_pattern = {name: (~cut).tolist() for name, cut in saved[_CUT].items()} or None


def _check_shapes(folder: Path, factors: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    here, there = ({name: list(x.shape) for name, x in side.items()} for side in (factors, saved))
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise MolfError(
                f"{folder} was written by another AdaLoRA run: {name} is {there.get(name, 'missing')} there and "
                f"{here.get(name, 'missing')} here; {_ADVICE}"
            )


class TrainedBase(CheckpointPart):
    """The base weights of a model that trains adapters and its own weights; PEFT saves the adapters only."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the weights."""
        save_file({name: p.detach().contiguous() for name, p in trained_base(model).items()}, folder / BASE_FILE)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Load the base weights of a checkpoint into the model."""
        file = folder / BASE_FILE
        saved = load_file(file) if file.is_file() else {}
        weights = trained_base(model)
        if saved.keys() != weights.keys():
            raise MolfError(
                f"{folder} does not hold the base weights that this run trains ({len(saved)} of {len(weights)}); {_ADVICE}"
            )
        for name, p in weights.items():
            p.data.copy_(saved[name])
