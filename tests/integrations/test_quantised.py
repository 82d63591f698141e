"""MoLF-Efficient on bases that bitsandbytes quantised to 4 and 8 bits."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from molf import MoLF, add_lora_experts
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


def test_the_merged_form_refuses_a_quantised_base(quantised):
    with pytest.raises(ValueError, match=r"not floating point: a quantised base can't be trained.*add_lora_experts"):
        MoLF(quantised, ranks=(2,))
