"""The branched form: against the merged one, and against PEFT LoRA with AdamW."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from conftest import TOLERANCE
from molf import MoLF, add_lora_experts
from small import tiny_llama


def tiny_gpt2(dtype=torch.float32):
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    return GPT2LMHeadModel(config).to(dtype)


def train(model, optimizer, steps=6):
    generator = torch.Generator().manual_seed(1)
    winners = []
    for _ in range(steps):
        ids = torch.randint(0, 40, (3, 9), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        winners.append(getattr(optimizer, "routing", None) and optimizer.routing.winners())
    return winners


def same_start(source, target):
    """Give all LoRA experts of one optimizer the values of another's, B away from zero."""
    for module, experts in source.experts.items():
        for name, expert in experts.items():
            if name != "fft":
                expert.assign(B=torch.randn(expert.B.shape) * 0.05)
                target.experts[module][name].assign(A=expert.A, B=expert.B)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"score": "pfn", "max_grad_norm": 0.5}], ids=str)
def test_merged_equals_branched(options):
    plain = tiny_llama(torch.float64, attention_bias=True)
    adapted = add_lora_experts(copy.deepcopy(plain), ranks=(2, 6), lora_alpha=8.0, freeze_base=False)
    merged = MoLF(plain, ranks=(2, 6), lora_alpha=8.0, lr=2e-3, lora_lr=4e-3, **options)
    branched = MoLF(adapted, lr=2e-3, lora_lr=4e-3, **options)
    same_start(branched, merged)
    assert list(merged.experts) == list(branched.experts)
    assert train(plain, merged) == train(adapted, branched)
    for module, experts in merged.experts.items():
        for name, expert in experts.items():
            for leaf in ("weight", "bias") if name == "fft" else ("A", "B"):
                got, want = getattr(expert, leaf), getattr(branched.experts[module][name], leaf)
                if want is not None:
                    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[torch.float64])
    ids = torch.arange(12).view(1, 12)
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "max_grad_norm": 0.5}, {"score": "pfn"}], ids=str)
def test_with_matched_rates_the_scale_of_an_adapter_changes_nothing(options):
    plain = tiny_llama(torch.float64)
    models, optimizers = [plain], []
    for alpha in (2.0, 8.0):
        models.append(add_lora_experts(copy.deepcopy(plain), ranks=(2, 6), lora_alpha=alpha, freeze_base=False))
    for model in models:
        ranks = {"ranks": (2, 6)} if model is plain else {}
        optimizers.append(MoLF(model, lr=2e-3, lora_lr="matched", lora_weight_decay=0.1, **ranks, **options))
    for module, experts in optimizers[0].experts.items():
        for name, expert in experts.items():
            if name != "fft":
                for optimizer in optimizers[1:]:
                    optimizer.experts[module][name].assign(A=expert.A)
    winners = [train(model, optimizer) for model, optimizer in zip(models, optimizers, strict=True)]
    assert winners[0] == winners[1] == winners[2]
    ids = torch.arange(12).view(1, 12)
    for model in models[1:]:
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1e-3}], ids=str)
def test_with_matched_rates_gradients_stay_as_they_are(options):
    """Loops may read them after the step, or go on adding to them; what clipping does to one, it does to all."""
    model = add_lora_experts(tiny_llama(torch.float64), ranks=(2, 4))
    optimizer = MoLF(model, lr=1e-3, **options)
    assert all(factor != 1 for factor in optimizer.param_groups[-1]["b_factors"])
    ids = torch.arange(12).view(1, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    optimizer.step()
    factors = torch.stack([(p.grad / grad)[grad != 0].mean() for p, grad in before.items() if grad.any()])
    torch.testing.assert_close(factors, torch.full_like(factors, factors[0]))
    assert (factors == 1).all() if not options else (factors < 0.1).all()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_one_lora_expert_on_a_frozen_base_equals_peft_lora_with_adamw(build):
    base = build(torch.float64)
    adapted = add_lora_experts(copy.deepcopy(base), ranks=(4,), lora_alpha=16)
    config = LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules="all-linear", exclude_modules=["lm_head"])
    config.fan_in_fan_out = build is tiny_gpt2
    peft = get_peft_model(base, config)
    rename = {n.replace("lora_r4", "default"): p for n, p in adapted.named_parameters() if p.requires_grad}
    lora = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    assert rename.keys() == lora.keys()
    with torch.no_grad():
        for name, p in lora.items():
            p.copy_(rename[name])
    train(adapted, MoLF(adapted, lora_lr=3e-3, lr=3e-3, lora_weight_decay=0.05))
    train(peft, torch.optim.AdamW(lora.values(), lr=3e-3, weight_decay=0.05))
    for name, p in lora.items():
        torch.testing.assert_close(rename[name], p, rtol=0, atol=TOLERANCE[torch.float64], msg=name)


def test_a_frozen_base_and_losers_keep_every_bit():
    model = add_lora_experts(tiny_llama(), ranks=(2, 4))
    optimizer = MoLF(model, lora_lr=1e-2, lr=1e-2)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = {(m, n): (e.A.clone(), e.B.clone()) for m, es in optimizer.experts.items() for n, e in es.items()}
    (winners,) = train(model, optimizer, steps=1)
    assert {expert for won in winners.values() for expert in won} <= {"lora_r2", "lora_r4"}
    for (module, name), (A, B) in before.items():
        expert = optimizer.experts[module][name]
        assert torch.equal(expert.B, B) == (name not in winners[module])
        assert name in winners[module] or torch.equal(expert.A, A)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("freeze_base", [True, False])
def test_state_survives_saving(tmp_path, freeze_base):
    def build(seed):
        model = add_lora_experts(tiny_llama(), ranks=(2, 4), freeze_base=freeze_base)
        torch.manual_seed(seed)
        return model, MoLF(model, lr=1e-2)

    straight, straight_optimizer = build(1)
    train(straight, straight_optimizer, 3)
    torch.save({"model": straight.state_dict(), "optimizer": straight_optimizer.state_dict()}, tmp_path / "state.pt")
    train(straight, straight_optimizer, 3)
    resumed, optimizer = build(2)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, 3)
    for (name, p), q in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_bf16_base_trains_with_low_parts():
    model = add_lora_experts(tiny_llama(torch.bfloat16), ranks=(2,), freeze_base=False)
    optimizer = MoLF(model, lr=1e-3)
    train(model, optimizer, 2)
    weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert optimizer.state[weight]["low"].dtype == torch.int16
    assert optimizer.experts["model.layers.0.mlp.up_proj"]["fft"].weight.dtype == torch.float32


def adapter(model, **options):
    return get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **options}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "plain LoRA; turn use_dora"),
        ({}, "none is active, trains"),
        ({"rank_pattern": {"q_proj": 4}}, "all layers must have the same experts"),
    ],
    ids=["dora", "frozen", "rank_pattern"],
)
def test_models_that_cannot_be_routed(options, words):
    model = adapter(tiny_llama(tie_word_embeddings=False), **options)
    with pytest.raises(ValueError, match=words):
        MoLF(model if options else model.requires_grad_(False))


def test_adapters_of_equal_rank_cannot_be_told_apart():
    model = adapter(tiny_llama())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"have ranks \(2, 2\): experts are told apart by their rank"):
        MoLF(model)


@pytest.mark.parametrize(
    "option", [{"ranks": (2,)}, {"lora_alpha": 8.0}, {"use_rslora": False}, {"target_modules": ["q_proj"]}], ids=str
)
def test_options_of_the_merged_form_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.*one or the other"):
        MoLF(add_lora_experts(tiny_llama(), ranks=(2,)), **option)


def test_top_k_counts_the_experts_there_are():
    with pytest.raises(ValueError, match=r"between 1 and 2, the number of experts \(lora_r2, lora_r4\)"):
        MoLF(add_lora_experts(tiny_llama(), ranks=(2, 4)), top_k=3)


@pytest.mark.parametrize("freeze_base", [True, False])
def test_conv1d_of_gpt2(freeze_base):
    """Its weights are transposed; with all experts winning, every one takes the step of AdamW."""
    model = add_lora_experts(tiny_gpt2(torch.float64), ranks=(2, 4), freeze_base=freeze_base)
    assert isinstance(model.base_model.model.transformer.h[0].attn.c_attn.base_layer, Conv1D)
    twin = copy.deepcopy(model)
    # The gradient of a key's bias is zero but for rounding, which a small eps would blow up to a step.
    rates = {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-4}
    optimizer = MoLF(model, **rates, lora_lr=1e-2, lora_weight_decay=0.0, top_k=2 if freeze_base else 3)
    assert len(optimizer.experts) == 8
    assert len(optimizer.param_groups[-1]["experts"]) == (2 if freeze_base else 3)
    train(model, optimizer, 4)
    train(twin, torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], **rates), 4)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE[torch.float64], msg=name)


def idle(model, how):
    """Leave one of a model's adapters active, or freeze the others."""
    if how == "set_adapter":
        model.set_adapter("lora_r2")
    elif how == "layers":
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module._active_adapter = ["lora_r2"]
    else:
        model.set_requires_grad("lora_r4", requires_grad=False)


@pytest.mark.parametrize(
    ("how", "set_to_none"),
    [
        ("set_adapter", True),
        ("set_adapter", False),
        ("layers", True),
        ("requires_grad", True),
        ("requires_grad", False),
    ],
)
def test_an_expert_that_stops_to_train_is_refused(how, set_to_none):
    """As after PEFT's loading of a checkpoint. Gradients that were set to zero, and not freed, are no sign of training."""
    model = add_lora_experts(tiny_llama(), ranks=(2, 4))
    optimizer = MoLF(model, lr=1e-2)
    ids = torch.arange(12).view(1, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    idle(model, how)
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(
        ValueError, match=r"of the experts of model\.layers\.0\.self_attn\.q_proj, lora_r4 would never move"
    ):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.base_model.set_adapter(["lora_r2", "lora_r4"])
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
