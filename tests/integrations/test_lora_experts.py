import pytest
import torch
from peft import PeftModel

from molf import add_lora_experts
from small import tiny_llama


def test_one_active_adapter_per_rank():
    model = add_lora_experts(tiny_llama(), ranks=(2, 4), lora_alpha=(8, 16), lora_dropout=0.1)
    assert isinstance(model, PeftModel)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.active_adapters == ["lora_r2", "lora_r4"]
    assert layer.r == {"lora_r2": 2, "lora_r4": 4}
    assert layer.scaling == pytest.approx({"lora_r2": 8 / 2**0.5, "lora_r4": 16 / 2})
    assert layer.lora_dropout["lora_r2"].p == layer.lora_dropout["lora_r4"].p == 0.1
    assert not hasattr(model.base_model.model.lm_head, "lora_A")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_an_unfrozen_base_trains_what_trained_before():
    plain = tiny_llama()
    plain.model.norm.requires_grad_(False)
    model = add_lora_experts(plain, ranks=(2,), freeze_base=False)
    assert all(p.requires_grad for n, p in model.named_parameters() if n.endswith("base_layer.weight"))
    assert model.base_model.model.model.embed_tokens.weight.requires_grad
    assert not model.base_model.model.model.norm.weight.requires_grad


def test_it_starts_as_the_plain_model():
    plain = tiny_llama()
    ids = torch.arange(8).view(1, 8)
    want = plain(ids).logits
    assert torch.equal(add_lora_experts(plain, ranks=(2, 4))(ids).logits, want)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": ()}, "one or more different positive ranks"),
        ({"ranks": (4, 4)}, "each may occur only once"),
        ({"ranks": (0, 4)}, "every rank must be a positive integer"),
        ({"lora_dropout": 2.0}, r"lora_dropout=2\.0: must be at least 0 and below 1"),
        ({"lora_alpha": "x"}, "lora_alpha='x': give one number"),
        ({"ranks": (2, 4), "lora_alpha": (8.0,)}, r"one for each of ranks=\(2, 4\)"),
    ],
    ids=str,
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        add_lora_experts(tiny_llama(), **options)


def test_a_peft_model_is_refused():
    with pytest.raises(TypeError, match="PeftModel already"):
        add_lora_experts(add_lora_experts(tiny_llama(), ranks=(2,)), ranks=(4,))
