import logging
import re

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

import molf
from conftest import TOLERANCE
from molf.integrations.lora_experts import add_lora_experts
from small import tiny_llama

IDS = torch.arange(24).reshape(2, 12) % 40


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def trained(dtype=torch.float32, tied=True, **options):
    """A model after a few steps of MoLF."""
    model = add_lora_experts(tiny_llama(dtype, tie_word_embeddings=tied), ranks=(2, 6), **options)
    optimizer = molf.MoLF(model, lr=2e-2, top_k=2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("freeze_base", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_model_computes_the_same(freeze_base, tied):
    model = trained(freeze_base=freeze_base, tied=tied)
    expected = logits(model)
    assert (expected - logits(tiny_llama(tie_word_embeddings=tied))).abs().max() > 1e-2
    merged = molf.merge(model)
    assert type(merged) is type(tiny_llama())
    assert merged.state_dict().keys() == tiny_llama().state_dict().keys()
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)


def test_all_experts_are_merged_whichever_are_active():
    model = trained()
    expected = logits(model)
    model.set_adapter("lora_r2")
    torch.testing.assert_close(logits(molf.merge(model)), expected, atol=1e-5, rtol=0)


def test_bfloat16_is_cast_once_and_the_difference_logged(caplog):
    model = trained(torch.bfloat16)
    expected, exact = logits(model), {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            weight = layer.get_base_layer().weight.detach().float()
            for adapter, scale in layer.scaling.items():
                weight += scale * (layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()).detach()
            exact[f"{name}.weight"] = weight
    with caplog.at_level(logging.INFO):
        merged = molf.merge(model)
    start, state = tiny_llama(torch.bfloat16).state_dict(), merged.state_dict()
    assert {x.dtype for x in state.values()} == {torch.bfloat16}
    for name, value in state.items():
        assert torch.equal(value, exact[name].bfloat16() if name in exact else start[name]), name
    lost = max((exact[name] - state[name].float()).abs().max().item() for name in exact)
    logged = re.search(r"merged lora_r2, lora_r6; casting changed no weight by more than (\S+)", caplog.text)
    assert float(logged[1]) == pytest.approx(lost, rel=1e-2) and lost > 0
    torch.testing.assert_close(logits(merged), expected, atol=TOLERANCE[torch.bfloat16], rtol=0)


@pytest.mark.parametrize("resting", ["another", "ref"])  # TRL calls its copy of the adapter ref
def test_adapters_that_rest_are_left_out(resting, caplog):
    settings = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj"]}
    model = get_peft_model(tiny_llama(), LoraConfig(**settings))
    expected = logits(model)
    model.add_adapter(resting, LoraConfig(**settings))
    with caplog.at_level(logging.INFO):
        merged = molf.merge(model)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    assert "merged default;" in caplog.text and f"dropped {resting}, which is not active" in caplog.text


def test_experts_that_were_loaded_are_all_merged(tmp_path):
    model = trained()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora_r2", adapter_name="lora_r2")
    loaded.load_adapter(tmp_path / "lora_r6", "lora_r6")
    assert loaded.active_adapters == ["lora_r2"]
    torch.testing.assert_close(logits(molf.merge(loaded)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("parallel", [lambda model: model, nn.DataParallel], ids=["alone", "parallel"])
def test_a_compiled_model_is_merged(parallel):
    model = trained()
    expected = logits(model)
    compiled = parallel(torch.compile(parallel(model), backend="eager"))
    torch.testing.assert_close(logits(molf.merge(compiled)), expected, atol=1e-5, rtol=0)


def test_adapters_that_the_model_added_itself_are_refused():
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(molf.errors.MolfError, match=r"its own add_adapter.*PeftModel\.from_pretrained"):
        molf.merge(model)


def test_a_plain_model_is_returned_as_it_is():
    model = tiny_llama()
    assert molf.merge(model) is model
    compiled = torch.compile(model, backend="eager")
    assert molf.merge(compiled) is compiled


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=["q_proj"]),
        LoraConfig(r=2, modules_to_save=["norm"], init_lora_weights=False, target_modules=["q_proj"]),
        LoraConfig(r=2, trainable_token_indices=[1, 2], init_lora_weights=False, target_modules=["q_proj"]),
        AdaLoraConfig(init_r=3, total_step=9, init_lora_weights=False, target_modules=["q_proj"]),
    ],
    ids=["dora", "modules_to_save", "some tokens", "adalora"],
)
def test_other_adapters_of_peft(config):
    model = get_peft_model(tiny_llama(), config)
    expected = logits(model)
    torch.testing.assert_close(logits(molf.merge(model)), expected, atol=1e-5, rtol=0)


def test_a_quantised_base_is_refused():
    model = trained()
    model.get_base_model().quantization_method = "bitsandbytes"
    with pytest.raises(molf.errors.MolfError, match="quantised base"):
        molf.merge(model)


def test_weights_that_are_not_finite_are_refused():
    model = trained()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "v_proj.lora_B" in name).fill_(float("nan"))
    with pytest.raises(molf.errors.MolfError, match=r"cannot merge model.layers.0.self_attn.v_proj: NaNs"):
        molf.merge(model)
