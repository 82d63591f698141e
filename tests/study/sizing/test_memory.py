"""Counts against hand arithmetic, for shapes of published models; activations against a real forward pass."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3TextConfig, JetMoeConfig

from families import FAMILIES
from models import SHAPES
from molf import MoLF, add_lora_experts
from molf.errors import MolfError
from molf.study.config.run_config import RunConfig
from molf.study.sizing.activations import Activations, measure_activations
from molf.study.sizing.blueprint import Blueprint
from molf.study.sizing.memory import Memory, Needs, available_memory, estimate
from molf.study.sizing.parameters import Count
from molf.study.sizing.report import memory_table, parameters_table, verdict
from small import tiny_llama

QWEN_1_5B, QWEN_3B = SHAPES["qwen2.5-1.5b"], SHAPES["qwen2.5-3b"]
GEMMA_1B = Gemma3TextConfig(
    vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
    num_key_value_heads=1, head_dim=256,
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Skip the forward passes of large models; tests of activations measure those of small ones themselves."""
    monkeypatch.setattr("molf.study.sizing.memory.measure_activations", lambda *args: Activations(9, 5))


def by_hand(config):
    """Elements of linear weights, their biases, the rest, and the sum of in + out over all linear layers."""
    h, m, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or h // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    gemma = isinstance(config, Gemma3TextConfig)
    shapes = [(h, q), (h, kv), (h, kv), (q, h), (h, m), (h, m), (m, h)]
    weights = layers * sum(fan_in * fan_out for fan_in, fan_out in shapes)
    biases = 0 if gemma else layers * (q + 2 * kv)
    norms = layers * (4 * h + 2 * head if gemma else 2 * h) + h
    return weights, biases, config.vocab_size * h + norms, layers * sum(map(sum, shapes))


def needs_of(config, accelerator=True, **settings):
    small = {"per_device_train_batch_size": 1, "max_length": 16, "bf16": False}
    return estimate(Blueprint(RunConfig.from_dict(small | settings), config), accelerator)


@pytest.mark.parametrize(
    ("config", "parameters", "method", "ranks"),
    [
        (QWEN_1_5B, 1_543_714_304, "molf", 128),
        (QWEN_3B, 3_085_938_688, "molf_e", 32 + 128),
        (QWEN_1_5B, 1_543_714_304, "lora", 128),
        (GEMMA_1B, 999_885_952, "lora", 128),
        (GEMMA_1B, 999_885_952, "fft", 0),
    ],
)
def test_published_models(config, parameters, method, ranks):
    needs = needs_of(config, method=method)
    weights, biases, other, pairs = by_hand(config)
    assert weights + biases + other == parameters
    trained = int(method in ("molf", "fft"))
    assert needs.parameters == {
        "base weight": Count(weights, trained * weights),
        "bias": Count(biases, trained * biases),
        "LoRA": Count(ranks * pairs, ranks * pairs),
        "other": Count(other, trained * other),
    }
    memory = needs.memory
    assert (memory.weights, memory.gradients) == (4 * parameters, trained * 4 * parameters)
    assert memory.states == trained * 8 * parameters
    assert memory.lora == (12 if method == "molf" else 16) * ranks * pairs


@pytest.mark.parametrize("method", ["rslora", "dora", "adalora", "pissa", "eva", "lora_plus"])
def test_other_adapters(method):
    needs = needs_of(QWEN_1_5B, method=method, lora_rank=8)
    pairs, outs = by_hand(QWEN_1_5B)[3], 28 * (3 * 1536 + 2 * 256 + 2 * 8960)
    layers = 28 * 7
    extra = {"dora": outs, "adalora": 4 * pairs + 12 * layers}
    assert needs.parameters["LoRA"].trainable == 8 * pairs + extra.get(method, 0)
    assert needs.parameters["other"] == Count(by_hand(QWEN_1_5B)[2], 0)


def test_frozen_and_half_precision_parts():
    weights, biases, other, pairs = by_hand(QWEN_1_5B)
    needs = needs_of(QWEN_1_5B, method="molf", freeze_non_linear=True, ranks=[4], dtype="bfloat16")
    assert [count.trainable for count in needs.parameters.values()] == [weights, 0, 4 * pairs, 0]
    assert needs.memory.weights == 2 * (weights + biases + other)
    assert needs.memory.gradients == 2 * weights
    assert needs.memory.states == (8 + 2) * weights
    stochastic = needs_of(QWEN_1_5B, method="fft", dtype="bfloat16")
    assert stochastic.memory.states == 8 * (weights + biases + other)


@pytest.mark.parametrize("optim_bits", [32, 8])
@pytest.mark.parametrize(
    ("dtype", "bf16_update"), [("float32", "split"), ("bfloat16", "split"), ("bfloat16", "stochastic")]
)
def test_states_are_those_of_a_real_step(optim_bits, dtype, bf16_update):
    model = tiny_llama(getattr(torch, dtype), hidden_size=72, vocab_size=90, attention_bias=True)
    settings = {"ranks": [4], "optim_bits": optim_bits, "bf16_update": bf16_update}
    memory = needs_of(model.config, method="molf", dtype=dtype, **settings).memory
    optimizer = MoLF(model, **settings)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    found = [
        (key, x.numel() * x.element_size()) for own in optimizer.state.values() for key, x in own.items() if x.ndim
    ]
    assert sum(size for key, size in found if key.startswith("lora")) == memory.lora
    assert sum(size for key, size in found if not key.startswith("lora")) == memory.states


def test_8_bit_states_of_a_3b_model():
    """Two bytes a parameter, and eight a block of 256; vectors stay in float32."""
    weights, biases, other, _ = by_hand(QWEN_3B)
    norms = 36 * 2 * 2048 + 2048
    matrices = weights + other - norms
    found = needs_of(QWEN_3B, dtype="bfloat16", bf16_update="stochastic", optim_bits=8).memory.states
    assert found == 2 * matrices + 8 * matrices // 256 + 8 * (biases + norms)  # all rows end where a block ends


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", ["fft", "lora", "molf_e"])
def test_activations_are_those_of_a_real_forward_pass(method, bf16):
    config = tiny_llama().config
    blueprint = Blueprint(RunConfig.from_dict({"method": method, "lora_rank": 4, "ranks": [2, 4]}), config)
    with blueprint.fake_mode:
        planned = measure_activations(blueprint.model, 2, 16, bf16)
        shapes = {name: p.shape for name, p in blueprint.model.named_parameters()}
    real = tiny_llama().train()
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        real = get_peft_model(real, LoraConfig(**blueprint.recipe.lora))
    if method == "molf_e":
        real = add_lora_experts(real, **blueprint.recipe.experts)
    assert {name: p.shape for name, p in real.named_parameters()} == shapes
    assert measure_activations(real, 2, 16, bf16) == planned
    assert 0 < planned.checkpointed < planned.kept


@pytest.mark.parametrize("method", ["fft", "molf_e"])
@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss", "Mamba"])
def test_activations_of_stacked_experts_and_state_spaces(name, method, monkeypatch):
    real = FAMILIES[name].build().train()
    blueprint = Blueprint(RunConfig.from_dict({"method": method, "ranks": [2, 4]}), real.config)
    with blueprint.fake_mode:
        planned = measure_activations(blueprint.model, 2, 16, False)
    if method == "molf_e":
        real = add_lora_experts(real, **blueprint.recipe.experts)
    monkeypatch.setattr("molf.study.sizing.activations._GroupedProducts", nullcontext)  # the model's own products
    assert measure_activations(real, 2, 16, False).kept == pytest.approx(planned.kept, rel=1e-3)


def test_a_model_that_looks_at_values_is_refused_by_name():
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "kv_channels": 4,
    }
    config = JetMoeConfig(vocab_size=30, num_local_experts=2, **sizes)
    blueprint = Blueprint(RunConfig.from_dict({"method": "molf", "ranks": [2]}), config)
    with blueprint.fake_mode, pytest.raises(MolfError, match="JetMoeForCausalLM looks at values"):
        measure_activations(blueprint.model, 1, 4, False)


def test_activations_grow_with_the_batch_and_leave_no_hook():
    model = tiny_llama(num_hidden_layers=6).train()
    one, two = (measure_activations(model, batch, 16, False) for batch in (1, 2))
    assert 1.9 < two.kept / one.kept <= 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


RELEASING = {"optimizer_in_backward": True, "max_grad_norm": 0, "gradient_accumulation_steps": 1}


def test_released_gradients_are_those_of_one_layer():
    embedding, mlp = 151936 * 1536, 1536 * 8960
    everything = needs_of(QWEN_1_5B, **RELEASING).memory
    assert everything.gradients == 4 * embedding and everything.released
    assert needs_of(QWEN_1_5B, freeze_non_linear=True, dtype="bfloat16", **RELEASING).memory.gradients == 2 * mlp
    efficient, usual = (needs_of(QWEN_1_5B, method="molf_e", ranks=[2, 4], **more).memory for more in (RELEASING, {}))
    pairs = by_hand(QWEN_1_5B)[3]
    assert efficient.gradients == 4 * 6 * (1536 + 8960)
    assert usual.lora - efficient.lora == 4 * 6 * pairs
    plain = needs_of(QWEN_1_5B, max_grad_norm=0, gradient_accumulation_steps=1).memory
    assert everything.peak < plain.peak


def test_the_peak():
    memory = Memory(10, 4, 20, 3, 5, 9, 5, 2, accumulates=False)
    assert (memory.resident, memory.peak) == (33, 33 + 7)
    assert Memory(10, 40, 20, 3, 5, 9, 5, 2, accumulates=False).peak == 33 + 40
    assert Memory(10, 4, 20, 3, 5, 9, 5, 2, accumulates=True).peak == 33 + 4 + 7
    assert Memory(10, 4, 20, 3, 5, 9, 5, 2, accumulates=False, released=True).peak == 33 + 4 + 7


def test_settings_decide_what_is_kept():
    plain = needs_of(QWEN_1_5B, method="fft", gradient_checkpointing=False, gradient_accumulation_steps=1).memory
    assert plain.activations == plain.activations_all > plain.activations_checkpointed
    assert not plain.accumulates
    usual = needs_of(QWEN_1_5B, method="fft", gradient_checkpointing=True).memory
    assert usual.activations == usual.activations_checkpointed
    assert usual.accumulates
    assert usual.logits == 4 * (16 * 32768 + 151936 * 1536)
    assert needs_of(QWEN_1_5B, method="lora").memory.logits == 4 * 16 * 32768
    assert needs_of(QWEN_1_5B, method="lora", accelerator=False).memory.logits == 8 * 4 * 16 * 32768


def needs_with(peak, activations=0, gradients=0):
    rest = peak - max(activations, gradients)
    memory = Memory(rest, gradients, 0, 0, activations, activations, 0, 0, accumulates=False)
    return Needs({"other": Count(7, 7), "LoRA": Count(3, 3)}, memory, (8, 512))


@pytest.mark.parametrize(
    ("peak", "said"),
    [(8, "it fits: 8.0 of 10.0 GiB"), (9.5, "warning: it hardly fits"), (11, "warning: it does not fit: 11.0 of 10.0")],
)
def test_the_verdict(peak, said):
    assert verdict(needs_with(int(peak * 2**30)), 10 * 2**30).startswith(said)


def test_the_verdict_suggests_what_would_help():
    assert "gradient_checkpointing" not in verdict(needs_with(100), 10).split("try ")[1]
    assert "gradient_checkpointing" in verdict(needs_with(100, 50), 10).split("try ")[1]
    assert "method molf_e" in verdict(needs_with(100), 10)
    assert "optimizer_in_backward" not in verdict(needs_with(100), 10)
    assert "method molf with optimizer_in_backward" in verdict(needs_with(100, gradients=60, activations=50), 10)
    sizes = {"dtype": "bfloat16", "bf16_update": "stochastic"}
    assert "optim_bits 8" in verdict(needs_of(QWEN_1_5B, **sizes), 10)
    assert "optim_bits 8" not in verdict(needs_of(QWEN_1_5B, optim_bits=8, **sizes), 10)
    assert "--memory_gb" in verdict(needs_with(100), None)


def test_the_tables():
    needs = needs_with(2**30)
    assert [*parameters_table(needs).columns[1].cells] == ["7", "3", "10"]
    assert [*memory_table(needs).columns[1].cells][-1] == "1.00"


@pytest.mark.parametrize("visible", [False, True])
def test_the_visible_device(monkeypatch, visible):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=7))
    assert available_memory() == (7 if visible else None)
