import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from families import FAMILIES
from molf import add_lora_experts
from molf.integrations.export import export_merged, export_peft, vllm_max_lora_rank, whole_folder
from small import tiny_llama

IDS = torch.arange(24).reshape(2, 12) % 40
NAMES = ["lora_r2", "lora_r6"]


def with_experts(model, targets="all-linear", ranks=(2, 6), **settings):
    """A model with one randomly initialised LoRA adapter per rank, all active."""
    for number, rank in enumerate(ranks):
        config = LoraConfig(r=rank, lora_alpha=32, use_rslora=True, target_modules=targets, **settings)
        if number == 0:
            model = get_peft_model(model, config, adapter_name=f"lora_r{rank}")
        else:
            model.add_adapter(f"lora_r{rank}", config)
    model.base_model.set_adapter([f"lora_r{rank}" for rank in ranks])
    return randomise(model)


def randomise(model):
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


@pytest.fixture
def base():
    return tiny_llama()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["layers.1.self_attn.v_proj"]])
def test_one_adapter_equals_the_experts(base, tmp_path, targets):
    plain = copy.deepcopy(base)
    model = with_experts(base, targets)
    assert export_peft(model, tmp_path / "one") == 8
    expected = logits(model)
    assert (expected - logits(plain)).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(plain, tmp_path / "one")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, atol=1e-6, rtol=0)


def test_wrappers_leave_no_trace_in_an_adapter(base, tmp_path):
    plain = copy.deepcopy(base)
    model = with_experts(base)
    expected = logits(model)
    layers = model.base_model.model.model.layers
    layers[1] = torch.compile(layers[1], backend="eager")
    export_peft(nn.DataParallel(torch.compile(model, backend="eager")), tmp_path / "one")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, tmp_path / "one")), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss", "DeepSeek-V3"])
def test_stacked_experts_in_one_adapter(name, tmp_path):
    plain = FAMILIES[name].build()
    model = randomise(add_lora_experts(copy.deepcopy(plain), ranks=(2, 6)))
    assert export_peft(model, tmp_path / "one") == 8
    expected = logits(model)
    assert (expected - logits(plain)).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(plain, tmp_path / "one")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-6, rtol=0)


def test_the_adapter_says_its_scale_without_rank_stabilisation(base, tmp_path):
    export_peft(with_experts(base), tmp_path / "one")
    config = json.loads((tmp_path / "one/adapter_config.json").read_text())
    expected = {"r": 8, "lora_alpha": 8, "use_rslora": False, "bias": "none", "modules_to_save": None}
    assert {name: config[name] for name in expected} == expected
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config["target_modules"]) == projections
    tensors = load_file(tmp_path / "one/adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    assert {tuple(t.shape) for name, t in tensors.items() if "q_proj.lora_A" in name} == {(8, 16)}


def test_layers_with_different_ranks(base, tmp_path):
    plain = copy.deepcopy(base)
    model = with_experts(base, ["q_proj", "up_proj"], rank_pattern={"layers.1.mlp.up_proj": 3})
    assert export_peft(model, tmp_path / "one") == 8
    loaded = PeftModel.from_pretrained(plain, tmp_path / "one")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=0)


def test_an_expert_that_only_some_layers_have(base, tmp_path):
    plain = copy.deepcopy(base)
    model = with_experts(base, ["q_proj", "up_proj"], ranks=(2,))
    model.add_adapter("more", LoraConfig(r=3, target_modules=["up_proj", "o_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["lora_r2", "more"])
    assert export_peft(model, tmp_path / "one") == 5
    loaded = PeftModel.from_pretrained(plain, tmp_path / "one")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=0)


def test_adapters_that_rest_are_left_out(base, tmp_path):
    plain = copy.deepcopy(base)
    model = with_experts(base, ["q_proj"])
    expected = logits(model)
    model.add_adapter("ref", LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    assert export_peft(model, tmp_path / "one") == 8
    loaded = PeftModel.from_pretrained(plain, tmp_path / "one")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-6, rtol=0)


def test_conv1d(tmp_path):
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))
    plain = copy.deepcopy(base)
    model = with_experts(base, ["c_attn", "c_fc"], fan_in_fan_out=True)
    export_peft(model, tmp_path / "one")
    expected = logits(model)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "one")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-6, rtol=0)
    export_merged(model, tmp_path / "merged")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-6, rtol=0)


def test_merged_in_float32_keeps_logits_and_ties(base, tmp_path):
    model = with_experts(base)
    expected = logits(model)
    assert export_merged(model, tmp_path / "merged") == 0.0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-6, rtol=0)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    tensors = load_file(tmp_path / "merged/model.safetensors")
    assert not [name for name in tensors if "lora" in name or name == "lm_head.weight"]


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_in_float32_and_cast_once(base_dtype, dtype, tmp_path):
    model = with_experts(tiny_llama(base_dtype))
    exact = copy.deepcopy(model).float().merge_and_unload(adapter_names=NAMES).state_dict()
    lost = export_merged(model, tmp_path / "merged", dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    assert all(torch.equal(merged[name], exact[name].to(dtype)) for name in exact)
    assert lost == max((merged[name].float() - exact[name]).abs().max().item() for name in exact)
    assert (lost > 0) == (dtype == torch.bfloat16)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
    ],
)
def test_what_one_lora_cannot_express(base, tmp_path, settings, reason):
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **settings), adapter_name="odd")
    with pytest.raises(ValueError, match=f"'odd' has .*{reason}"):
        export_peft(model, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_a_base_that_trains_too_is_refused(base, tmp_path):
    model = add_lora_experts(base, ranks=(2, 6), freeze_base=False)
    with pytest.raises(ValueError, match=r"20 parameters of the base model train, too .*merged checkpoint instead"):
        export_peft(model, tmp_path / "one")


def test_a_plain_model_is_no_adapter(base, tmp_path):
    with pytest.raises(TypeError, match=r"takes a PeftModel, got LlamaForCausalLM: save a plain model by"):
        export_peft(base, tmp_path / "one")


def test_an_adapted_embedding_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(tie_word_embeddings=False), LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="embed_tokens is not a linear layer"):
        export_peft(model, tmp_path / "one")


def test_weights_that_are_not_finite_leave_nothing(base, tmp_path):
    model = with_experts(base)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        export_merged(model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("mine")
    for used in (tmp_path / "used", tmp_path / "used/file"):
        with pytest.raises(ValueError, match="not empty"), whole_folder(used):
            pass
    assert (tmp_path / "used/file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as partial:
        (partial / "file").write_text("new")
    assert (tmp_path / "empty/file").read_text() == "new"


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (8, 8), (9, 16), (160, 256), (512, 512), (513, None)])
def test_vllm_takes_certain_ranks(rank, served):
    assert vllm_max_lora_rank(rank) == served
