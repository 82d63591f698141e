"""A run's model as the method trains it, with shapes and types but without weights."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from molf.integrations.bundled import locate
from molf.study.config.run_config import RunConfig
from molf.study.config.trainer_config import TrainConfig
from molf.study.methods.adapters import add_adapters
from molf.study.methods.recipe import Recipe, method_recipe
from molf.study.methods.trainable import freeze_all_but_routed, routed_layers

LINEAR = (nn.Linear, Conv1D)


class Blueprint:
    """A model without weights, made ready for a method.

    Attributes:
        config: The run.
        recipe: Its method, spelt out.
        model: The model, with adapters where the method has them.
        pairs: Elements of the LoRA pairs that MoLF keeps in its optimizer: sum of ``r (in + out)`` over layers and ranks.
    """

    def __init__(self, config: RunConfig, model_config: Any = None):
        """Draw the model of a run.

        Args:
            config: The run.
            model_config: The model's transformers configuration; read by the run's ``model_name_or_path`` if left out.
        """
        self.config = config
        with torch.device("meta"):
            dtype = "float32" if config.model.dtype == "auto" else config.model.dtype
            plain = AutoModelForCausalLM.from_config(model_config or _read_config(config), dtype=dtype).train()
            linears = [name for name, module in plain.named_modules() if isinstance(module, LINEAR)]
            self.recipe = method_recipe(config.method, config.train, linears)
            layers = list(routed_layers(plain, config.method).values()) if self.recipe.molf is not None else []
            self.pairs = _pairs(layers, config.method.ranks or ()) if self.recipe.merged else 0
            if config.method.freeze_non_linear and not self.recipe.adapted:
                freeze_all_but_routed(plain, config.method)
            self.model = add_adapters(plain, _start_as_usual(self.recipe), bool(config.method.freeze_non_linear))
        # Fake tensors are meta tensors that know the device they would be on, which attention and autocast go by.
        self._paper = FakeTensorMode()
        with self._paper:
            _move(self.model, "cpu")

    def on_paper(self) -> AbstractContextManager[Any]:
        """Return the context in which the model can be run; it computes nothing but shapes and types."""
        return self._paper

    def setting(self, name: str) -> Any:
        """Return a setting of the trainer: the run's, the method's, or the default."""
        defaults = {f.name: f.default for f in fields(TrainConfig)}
        return (defaults | self.config.train | self.recipe.train)[name]


def _read_config(config: RunConfig) -> Any:
    trust = bool(config.train.get("trust_remote_code", False))
    return AutoConfig.from_pretrained(locate(config.model.model_name_or_path), trust_remote_code=trust)


def _pairs(layers: Sequence[nn.Linear], ranks: Sequence[int]) -> int:
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers for rank in ranks)


def _start_as_usual(recipe: Recipe) -> Recipe:
    """Leave out starts that are computed from weights or data: the shapes are the same."""
    return recipe if recipe.lora is None else replace(recipe, lora={**recipe.lora, "init_lora_weights": True})


def _move(model: nn.Module, device: str) -> None:
    """Replace all tensors of a model by empty ones on a device, keeping those shared that are."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if id(old) not in parameters:
                parameters[id(old)] = nn.Parameter(
                    torch.empty(old.shape, dtype=old.dtype, device=device), old.requires_grad
                )
            setattr(module, name, parameters[id(old)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
