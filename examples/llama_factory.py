"""MoLF in LLaMA-Factory, which asks a function of its own for optimizers that it does not know by name.

python examples/llama_factory.py llama_factory.yaml   # settings of LLaMA-Factory, and those of MoLF under molf:
"""

import sys
from typing import Any

import yaml
from llamafactory.train import trainer_utils, tuner

from molf import MoLF
from molf.errors import MolfError


def main(settings: dict[str, Any]) -> None:
    """Train with LLaMA-Factory's settings, and MoLF's options under ``molf``."""
    options = settings.pop("molf", None) or {}

    def create(model: Any, args: Any, *_: Any) -> MoLF:
        if hasattr(model, "peft_config"):
            raise MolfError("finetuning_type: lora trains one adapter, and leaves MoLF nothing to choose: use full")
        clip = args.max_grad_norm or None
        args.max_grad_norm = 0.0  # MoLF clips the LoRA experts' gradients too
        given = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "max_grad_norm": clip}
        return MoLF(model, **(given | options))

    for module in list(sys.modules.values()):  # its trainers have imported the function by name
        if getattr(module, "create_custom_optimizer", None) is not None:
            module.create_custom_optimizer = create
    assert trainer_utils.create_custom_optimizer is create
    tuner.run_exp(settings)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        main(yaml.safe_load(file))
