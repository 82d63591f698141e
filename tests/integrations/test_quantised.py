"""MoLF-Efficient on bases that bitsandbytes quantised to 4 and 8 bits."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from molf import MoLF, add_lora_experts
from molf.integrations.export import export_peft
from small import tiny_llama

CONFIGS = {"4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8bit": {"load_in_8bit": True}}


@pytest.fixture(params=CONFIGS)
def quantised(request, tmp_path):
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**CONFIGS[request.param])
    return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_experts_learn_and_the_base_keeps_its_bits(quantised):
    model = add_lora_experts(quantised, ranks=(2, 4))
    layers = {n: m for n, m in model.named_modules() if n.endswith("up_proj.base_layer")}
    base = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    assert base and not any(weight.is_floating_point() for weight in base.values())
    optimizer = MoLF(model, lr=1e-2)
    assert optimizer.param_groups[0]["experts"] == ("lora_r2", "lora_r4")
    ids = torch.randint(0, 40, (3, 9))
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(layer.weight, base[name]) for name, layer in layers.items())


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_the_experts_are_exported_as_one_adapter_for_the_quantised_base(quantised, tmp_path):
    plain = copy.deepcopy(quantised)
    model = add_lora_experts(quantised, ranks=(2, 4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    assert export_peft(model.eval(), tmp_path / "one") == 6
    loaded = PeftModel.from_pretrained(plain, tmp_path / "one").eval()
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 14
    # Layer by layer: bitsandbytes rounds a layer's input on a CPU, so that from one layer to the next rounding errors grow.
    with torch.no_grad():
        for name in adapted:
            layer = model.get_submodule(name)
            x = torch.randn(3, layer.in_features)
            expected = layer(x)
            assert (expected - layer.base_layer(x)).abs().max() > 1e-2
            torch.testing.assert_close(loaded.get_submodule(name)(x), expected, atol=1e-5, rtol=0)


def test_the_merged_form_refuses_a_quantised_base(quantised):
    with pytest.raises(ValueError, match=r"not floating point: a quantised base cannot be trained.*add_lora_experts"):
        MoLF(quantised, ranks=(2,))
