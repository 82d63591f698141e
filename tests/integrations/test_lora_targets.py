"""Which layers and parameters get LoRA experts, and what is said of the others."""

import logging

import pytest
import torch
from peft import AutoPeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM
from torch import nn

from families import FAMILIES, output
from molf import MoLF, add_lora_experts
from molf.errors import MolfError
from molf.integrations.lora_targets import find_targets, task_type

STACKS = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]


class Shouting(nn.Linear):
    """A layer that is a Linear by its class only."""

    def __init__(self, result):
        super().__init__(3, 3)
        self.result = result

    def forward(self, x):
        return self.result(super().forward(x))


def of(name):
    return FAMILIES[name].build()


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("Llama", "CAUSAL_LM"),
        ("Llava", "CAUSAL_LM"),
        ("Mamba", "CAUSAL_LM"),
        ("T5", "SEQ_2_SEQ_LM"),
        ("Whisper", None),
        ("BERT masked", None),
        ("GPT-2 classifier", None),
        ("CLIP", None),
    ],
)
def test_the_task_of_a_class(name, task):
    assert task_type(of(name)) == task


def test_generating_models_keep_their_class():
    for name, kind in {"Llama": PeftModelForCausalLM, "T5": PeftModelForSeq2SeqLM}.items():
        assert type(add_lora_experts(of(name), ranks=(2,))) is kind


def test_an_encoder_is_found_again_by_its_adapter(tmp_path):
    of("BERT classifier").save_pretrained(tmp_path / "base")
    model = type(of("BERT classifier")).from_pretrained(tmp_path / "base")
    add_lora_experts(model, ranks=(2,)).save_pretrained(tmp_path / "adapters")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapters" / "lora_r2")
    assert type(loaded.get_base_model()) is type(model)


def test_stacks_are_parameters_and_routers_are_named():
    targets = find_targets(of("Mixtral"))
    assert sorted(targets.parameters) == sorted(STACKS)
    assert {name.rpartition(".")[2] for name in targets.modules} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert targets.left_out == {"model.layers.*.mlp.gate": "MixtralTopKRouter"}
    assert "0.5 % are weights without it: model.layers.*.mlp.gate (MixtralTopKRouter)" in str(targets)


def test_a_stack_by_its_name():
    targets = find_targets(of("Mixtral"), ["q_proj", "down_proj"])
    assert (targets.modules, targets.parameters) == (["model.layers.0.self_attn.q_proj"], STACKS[1:])
    excluded = find_targets(of("Mixtral"), exclude_modules=["down_proj"])
    assert excluded.parameters == STACKS[:1] and list(excluded.left_out) == ["model.layers.*.mlp.gate"]
    assert not targets.left_out


def test_a_module_stands_for_its_stacks():
    for target in (["q_proj", "experts"], r".*\.(experts|q_proj)"):
        targets = find_targets(of("Mixtral"), target)
        assert (targets.modules, sorted(targets.parameters)) == (["model.layers.0.self_attn.q_proj"], sorted(STACKS))
    targets = find_targets(of("Mixtral"), exclude_modules=["experts"])
    assert not targets.parameters and list(targets.left_out) == ["model.layers.*.mlp.gate"]


def test_the_names_that_stacks_had_before():
    projections = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(find_targets(of("Qwen3-MoE"), projections).parameters) == sorted(STACKS)
    assert sorted(find_targets(of("Mixtral"), ["w1", "w2", "w3"]).parameters) == sorted(STACKS)
    assert find_targets(of("Qwen3-MoE"), projections[:2]).parameters == []
    model = add_lora_experts(of("DeepSeek-V3"), ranks=(2, 4), target_modules=projections)
    experts = MoLF(model).experts
    assert {"model.layers.0.mlp.gate_proj", "model.layers.1.mlp.experts.gate_up_proj"} <= set(experts)


def test_dropout_leaves_stacks_frozen_and_says_so(caplog):
    model = add_lora_experts(of("Mixtral"), ranks=(2,), lora_dropout=0.1)
    assert not any("experts" in name for name, p in model.named_parameters() if p.requires_grad)
    assert "gate_up_proj (which takes plain LoRA without dropout only)" in caplog.text
    assert "71." in caplog.text  # the share


def test_layers_that_peft_takes_for_older_names_of_stacks():
    """Dense layers and shared experts of DeepSeek have the names that its stacked experts had."""
    targets = find_targets(of("DeepSeek-V3"))
    assert "model.layers.0.mlp.gate_proj.weight" in targets.parameters
    assert "model.layers.1.mlp.shared_experts.down_proj.weight" in targets.parameters
    left = find_targets(of("DeepSeek-V3"), stacks=False).left_out
    assert left["model.layers.*.mlp.up_proj"] == "which takes plain LoRA without dropout only"
    optimizer = MoLF(add_lora_experts(of("DeepSeek-V3"), ranks=(2, 4)))
    assert {"model.layers.0.mlp.gate_proj", "model.layers.1.mlp.experts.down_proj"} <= set(optimizer.experts)


def test_layers_that_are_no_linear_map_are_left_out():
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(3, 3),
            "own": Shouting(lambda y: y),
            "pair": Shouting(lambda y: (y, y)),
            "doubled": Shouting(lambda y: 2 * y),
            "narrow": Shouting(lambda y: y[..., :1]),
            "broken": Shouting(lambda y: y[5]),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    targets = find_targets(model)
    assert targets.modules == ["plain", "own"]
    assert {"pair", "doubled", "narrow", "broken", "attention.out_proj"} < set(targets.left_out)
    with pytest.raises(MolfError, match=r"matches target_modules=\['pair'\].*: pair is left out \(Shouting\)"):
        find_targets(model, ["pair"])
    with pytest.raises(
        MolfError, match=r"those of this model are named broken, doubled, narrow, out_proj, own, pair, plain"
    ):
        find_targets(model, ["lain"])


def test_layers_of_routers_are_left_out():
    class TopKGating(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

    model = nn.ModuleDict({"gate": TopKGating(), "router": nn.Linear(3, 2), "gate_proj": nn.Linear(3, 3)})
    targets = find_targets(model)
    assert targets.modules == ["gate_proj"]
    assert targets.left_out == dict.fromkeys(["gate.layer", "router"], "Linear, of a router")
    assert find_targets(model, ["gate_proj"]).modules == ["gate_proj"]


def test_a_model_without_layers():
    with pytest.raises(MolfError, match="nothing: it has none"):
        find_targets(nn.Sequential(nn.Embedding(3, 3)))


def test_shapes_suffice():
    with torch.device("meta"):
        for name in ("Llama 4", "Falcon", "Jamba"):
            assert find_targets(of(name)).modules


def test_plain_models_say_nothing_as_a_warning(caplog):
    add_lora_experts(of("Llama"), ranks=(2,))
    assert not caplog.records
    with caplog.at_level(logging.INFO):
        add_lora_experts(of("Llama"), ranks=(2,))
    assert "LoRA adapts 64.7 % of the parameters; 0.0 % are weights without it: none" in caplog.text


def test_a_trained_base_has_stacks_as_fft_experts():
    model = add_lora_experts(of("gpt-oss"), ranks=(2, 4), freeze_base=False)
    optimizer = MoLF(model, lr=1e-2)
    experts = optimizer.experts["model.layers.0.mlp.experts.gate_up_proj"]
    assert list(experts) == ["fft", "lora_r2", "lora_r4"]
    assert experts["fft"].weight.shape == (4, 32, 96) and experts["lora_r2"].A.shape == (4 * 2, 32)
    output(model, FAMILIES["gpt-oss"].batch()).square().mean().backward()
    optimizer.step()
    assert "model.layers.0.mlp.experts.gate_up_proj" in optimizer.routing.modules
