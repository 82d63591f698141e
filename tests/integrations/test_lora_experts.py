import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from families import FAMILIES
from molf import add_lora_experts
from molf.errors import MolfError
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
        ({"lora_alpha": "x"}, "lora_alpha='x': give one number"),
        ({"ranks": (2, 4), "lora_alpha": (8.0,)}, r"one for each of ranks=\(2, 4\)"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0: give a number in \[0, 1\)"),
        ({"lora_dropout": -0.5}, r"lora_dropout=-0.5: give a number in \[0, 1\)"),
        ({"lora_dropout": float("nan")}, r"lora_dropout=nan: give a number in \[0, 1\)"),
        ({"use_rslora": "false"}, "use_rslora='false': give True or False"),
        ({"freeze_base": 0}, "freeze_base=0: give True or False"),
    ],
    ids=str,
)
def test_bad_options(options, words):
    with pytest.raises((MolfError, TypeError), match=words):
        add_lora_experts(tiny_llama(), **options)


@pytest.mark.parametrize("build", [tiny_llama, FAMILIES["Mixtral"].build], ids=["dense", "stacks"])
def test_a_target_that_matches_nothing_is_said(build, caplog):
    model = add_lora_experts(build(), ranks=(2,), target_modules=iter(["v_proj", "q_porj"]))
    assert "target_modules name 'q_porj' (did you mean 'q_proj'?), which match nothing" in caplog.text
    assert {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad} == {"v_proj"}


def test_nothing_is_excluded():
    model = add_lora_experts(tiny_llama(), ranks=(2,), target_modules=["q_proj"], exclude_modules=None)
    assert "layers.0.self_attn.q_proj.lora_A.lora_r2.weight" in " ".join(dict(model.named_parameters()))


def test_a_peft_model_is_refused():
    with pytest.raises(TypeError, match="PeftModel already"):
        add_lora_experts(add_lora_experts(tiny_llama(), ranks=(2,)), ranks=(4,))


def test_a_model_with_an_adapter_of_its_own_is_refused(tmp_path):
    """``from_pretrained`` loads an adapter's folder as a plain class with LoRA layers in it, which are linear layers, too."""
    add_lora_experts(tiny_llama(), ranks=(2,)).save_pretrained(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "lora_r2")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "lora_r2")
    with pytest.raises(TypeError, match="from_pretrained or its own add_adapter have put one into it"):
        add_lora_experts(model, ranks=(4,))
