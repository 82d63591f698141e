"""The model of a run as its method trains it, with shapes and dtypes but without weights."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from molf.errors import MolfError
from molf.integrations.bundled import locate
from molf.integrations.loading import explained
from molf.integrations.lora_targets import find_targets
from molf.setup.discovery import check_rank
from molf.study.config.run_config import RunConfig
from molf.study.config.trainer_config import TrainConfig
from molf.study.methods.adapters import add_adapters
from molf.study.methods.recipe import method_recipe
from molf.study.methods.trainable import freeze_all_but_routed, lora_pairs, routed_layers
from molf.study.sizing.parameters import LINEAR


class Blueprint:
    """A model without weights, prepared for a run's method.

    Args:
        config: The run.
        model_config: The model's transformers configuration; that of the run's ``model_name_or_path`` if left out.

    Attributes:
        recipe: The method as settings of the libraries.
        model: The model, with the method's adapters.
        pairs: Elements of the LoRA pairs in MoLF's optimizer.
        fake_mode: The context to run the model in; it computes only shapes and dtypes.
    """

    def __init__(self, config: RunConfig, model_config: Any = None):
        self.config = config
        if model_config is None:
            trust = bool(config.train.get("trust_remote_code", False))
            source = locate(config.model.model_name_or_path)
            with explained(f"cannot load the configuration of {config.model.model_name_or_path!r}", source):
                model_config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
        with torch.device("meta"):
            dtype = "float32" if config.model.dtype == "auto" else config.model.dtype
            plain = empty_model(model_config, dtype).train()
            linears = [name for name, module in plain.named_modules() if isinstance(module, LINEAR)]
            self.recipe = recipe = method_recipe(config.method, config.train, linears)
            shapes: dict[str, Any] = {}
            if recipe.merged:
                shapes = {name: own.weight.shape for name, own in routed_layers(plain, config.method).items()}
            elif recipe.experts is not None:
                found = find_targets(plain, recipe.experts["target_modules"], recipe.experts["exclude_modules"])
                shapes = {name: plain.get_submodule(name).weight.shape for name in found.modules}
            for name, shape in shapes.items():
                check_rank(name, shape, config.method.ranks or ())
            self.pairs = lora_pairs(plain, config.method) if recipe.merged else 0
            if config.method.freeze_non_linear and not recipe.adapted:
                freeze_all_but_routed(plain, config.method)
            if recipe.lora is not None:  # initialisations from weights or data give the same shapes
                recipe = replace(recipe, lora={**recipe.lora, "init_lora_weights": True})
            self.model = add_adapters(plain, recipe, bool(config.method.freeze_non_linear))
        # Fake tensors are meta tensors with a device, which attention and autocast need.
        self.fake_mode = FakeTensorMode()
        with self.fake_mode:
            _move(self.model, "cpu")

    def setting(self, name: str) -> Any:
        """Return a Trainer setting: the method's, the run's, or the default."""
        defaults = {f.name: f.default for f in fields(TrainConfig)}
        return (defaults | self.config.train | self.recipe.train)[name]


def empty_model(model_config: Any, dtype: str = "float32") -> Any:
    """Return a model without weights, on the meta device.

    Raises:
        MolfError: It is no causal language model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    except ValueError as error:
        raise MolfError(
            f"{model_config.name_or_path or model_config.model_type!r} is no causal language model: "
            f"{str(error).splitlines()[0]} Runs train decoders such as Llama"
        ) from error


def _move(model: nn.Module, device: str) -> None:
    """Replace all tensors of a model by empty ones on a device; shared parameters stay shared."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if id(old) not in parameters:
                new = torch.empty(old.shape, dtype=old.dtype, device=device)
                parameters[id(old)] = nn.Parameter(new, old.requires_grad)
            setattr(module, name, parameters[id(old)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
