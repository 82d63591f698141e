import pytest
import torch

from molf.study.methods.static import StaticFactory, parameters_of, train_only
from small import tiny_llama

LAYER = "model.layers.0.self_attn.q_proj"


def test_biases_are_not_decayed():
    model = torch.nn.Linear(3, 2)
    options = {"lr": 1e-3, "weight_decay": 0.1, "lora_lr": 1e-2, "lora_weight_decay": 0.2, "betas": (0.8, 0.9)}
    groups = StaticFactory()(model, **options).param_groups
    found = [(group["params"], group["weight_decay"]) for group in groups]
    assert found == [([model.weight], 0.1), ([model.bias], 0.0)]
    assert all((group["lr"], group["betas"]) == (1e-3, (0.8, 0.9)) for group in groups)


def test_everything_but_the_layers_is_frozen():
    model = tiny_llama()
    layers = parameters_of(model, [LAYER, "model.norm.weight"])
    train_only(model, layers)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{LAYER}.weight", "model.norm.weight"]
    assert layers[LAYER] == [model.get_submodule(LAYER).weight]


def test_a_layer_that_the_model_lacks_is_named():
    with pytest.raises(ValueError, match=r"the recipe names b, which this model does not have \(2 of 3 names\)"):
        parameters_of(tiny_llama(), [LAYER, "b", "c"])
