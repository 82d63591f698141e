"""What PEFT trains beside LoRA on linear layers takes plain AdamW, or is refused."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from conftest import TOLERANCE
from molf import MoLF
from small import tiny_llama

RATES = {"lr": 1e-2, "lora_lr": 1e-2, "weight_decay": 0.1, "lora_weight_decay": 0.01, "eps": 1e-4}


def llama(**options):
    return adapted(tiny_llama(torch.float64, attention_bias=True, tie_word_embeddings=False), **options)


def sequences(kind=BertForSequenceClassification, task_type="SEQ_CLS", **options):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
    config = BertConfig(**sizes, vocab_size=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return adapted(kind(config).double(), **{"target_modules": ["query"], "task_type": task_type, **options})


def tokens():
    return sequences(BertForTokenClassification, "TOKEN_CLS")


def adapted(model, **options):
    return get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}))


def several(*options):
    """Adapters of ranks 2, 3, ..., all active."""
    model = tiny_llama(torch.float64, attention_bias=True, tie_word_embeddings=False)
    configs = [LoraConfig(**{"r": r, "target_modules": ["q_proj"], **own}) for r, own in enumerate(options, start=2)]
    model = get_peft_model(model, configs[0], adapter_name="r2")
    for config in configs[1:]:
        model.add_adapter(f"r{config.r}", config)
    model.base_model.set_adapter(list(model.peft_config))
    return model


def loss_of(model, t):
    ids = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(t))
    labels = {"SEQ_CLS": ids[:, 0] % 2, "TOKEN_CLS": ids % 2}.get(
        model.peft_config[model.active_adapters[0]].task_type, ids
    )
    return model(input_ids=ids, labels=labels).loss


def train(model, optimizer, steps=3):
    for t in range(steps):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()


def is_expert(name):
    return name.endswith(".weight") and (".lora_A." in name or ".lora_B." in name)


HEAD = (["classifier.modules_to_save.default.weight"], ["classifier.modules_to_save.default.bias"])
TOKENS = "embed_tokens.token_adapter.trainable_tokens_delta"
QKVO = [f"{x}_proj.bias" for x in "kvo"]
# A model, and the ends of the names of ordinary parameters that are decayed, and of those that are not.
EXTRAS = {
    "biases of adapted layers": (llama, {"bias": "lora_only"}, [], ["q_proj.base_layer.bias"]),
    "all biases": (llama, {"bias": "all"}, [], ["q_proj.base_layer.bias", *QKVO]),
    "a head": (llama, {"modules_to_save": ["lm_head"]}, ["lm_head.modules_to_save.default.weight"], []),
    "norms": (llama, {"modules_to_save": ["norm"]}, [], ["norm.modules_to_save.default.weight"]),
    "sequences": (sequences, {}, *HEAD),
    "tokens": (tokens, {}, *HEAD),
    "all linear": (sequences, {"target_modules": "all-linear"}, *HEAD),
    "a head that is adapted, too": (sequences, {"target_modules": ["query", "classifier"]}, *HEAD),
    "some tokens": (llama, {"trainable_token_indices": [1, 2]}, [f"{TOKENS}.default"], []),
    "biases of B": (llama, {"lora_bias": True}, [], ["q_proj.lora_B.default.bias"]),
    "embeddings": (
        llama,
        {"target_modules": ["q_proj", "embed_tokens"]},
        ["embed_tokens.lora_embedding_A.default", "embed_tokens.lora_embedding_B.default"],
        [],
    ),
}


@pytest.mark.parametrize(("build", "options", "decayed", "undecayed"), EXTRAS.values(), ids=EXTRAS.keys())
def test_extras_take_plain_adamw(build, options, decayed, undecayed):
    model = build(**options)
    twin = copy.deepcopy(model)
    optimizer = MoLF(model, **RATES)
    assert all(list(experts) == ["lora_r2"] for experts in optimizer.experts.values())
    names = {id(p): name for name, p in model.named_parameters()}
    for decay, ends in ((0.1, decayed), (0.0, undecayed)):
        groups = [g for g in optimizer.param_groups if "module" not in g and g["weight_decay"] == decay]
        found = [names[id(p)] for group in groups for p in group["params"]]
        assert bool(found) == bool(ends) and all(name.endswith(tuple(ends)) for name in found)
        assert all(any(name.endswith(end) for name in found) for end in ends)
    trained = [(name, p) for name, p in twin.named_parameters() if p.requires_grad]
    decays = [0.01 if is_expert(n) else 0.1 if n.endswith(tuple(decayed)) and decayed else 0.0 for n, _ in trained]
    groups = [{"params": [p], "weight_decay": decay} for (_, p), decay in zip(trained, decays, strict=True)]
    adamw = torch.optim.AdamW(groups, lr=1e-2, eps=1e-4)
    train(model, optimizer)
    train(twin, adamw)
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=0, atol=TOLERANCE[torch.float64], msg=name)


@pytest.mark.parametrize(
    ("options", "ordinary"),
    [
        (({"modules_to_save": ["lm_head"]}, {}), ["lm_head.modules_to_save.r2.weight"]),
        (({}, {"modules_to_save": ["lm_head"]}), ["lm_head.modules_to_save.r3.weight"]),
        (
            ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}),
            ["embed_tokens.modules_to_save.r3.weight", "lm_head.modules_to_save.r2.weight"],
        ),
        (({"trainable_token_indices": [1]}, {}), [f"{TOKENS}.r2"]),
        (({"lora_bias": True}, {}), ["q_proj.lora_B.r2.bias"] * 2),
    ],
    ids=["first", "second", "both", "tokens", "biases of B"],
)
def test_several_adapters(options, ordinary):
    model = several(*options)
    optimizer = MoLF(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 1)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [names[id(p)] for group in optimizer.param_groups if "module" not in group for p in group["params"]]
    assert all(name.endswith(end) for name, end in zip(found, ordinary, strict=True))
    assert all(list(experts) == ["lora_r2", "lora_r3"] for experts in optimizer.experts.values())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert set(found) < moved <= set(found) | {name for name in before if is_expert(name)}


def test_with_a_trained_weight_a_bias_is_of_its_expert():
    model = llama(bias="all")
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.weight.requires_grad_(True)
    for experts in MoLF(model).experts.values():
        assert list(experts) == ["fft", "lora_r2"]
        assert experts["fft"].weight.shape == (16, 16) and experts["fft"].bias.shape == (16,)


def test_an_adapter_of_another_kind_that_is_not_active_is_no_obstacle():
    model = several({}, {})
    model.add_adapter("dora", LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
    model.base_model.set_adapter(["r2", "r3"])
    assert all(list(experts) == ["lora_r2", "lora_r3"] for experts in MoLF(model).experts.values())


class Parts(nn.Module):
    """A linear layer beside modules of other kinds."""

    def __init__(self):
        super().__init__()
        self.linear, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3)
        self.stacked = nn.ParameterDict({"weight": torch.zeros(3, 8, 8)})
        self.matrix = nn.ParameterDict({"weight": torch.zeros(8, 8)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({"target_modules": [f"conv{n}", "linear"]}, rf"conv{n} is no linear layer \(Conv{n}d\)") for n in (1, 2, 3)),
        ({"target_modules": ["linear"], "use_dora": True}, "linear has LoRA adapters of another kind.*turn use_dora"),
    ],
    ids=str,
)
def test_layers_that_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        MoLF(adapted(Parts(), **options))


def test_adapters_that_share_their_memory_are_refused():
    model = adapted(tiny_llama(), target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match=r"'default' ties LoRA of the embedding.*leave ensure_weight_tying out"):
        MoLF(model)


def test_tied_copies_and_tokens_move_once():
    for options in (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [1]},
    ):
        model = adapted(tiny_llama(torch.float64), **options)
        optimizer = MoLF(model)
        assert [len(group["params"]) for group in optimizer.param_groups if "module" not in group] == [1]
        train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("options", "module"),
    [
        ({"target_modules": ["linear", "attention"]}, "attention"),
        ({"target_modules": ["attention"], "target_parameters": ["linear.weight"]}, "linear"),
        ({"target_modules": ["linear"], "target_parameters": ["matrix.weight"]}, "matrix"),
        ({"target_modules": ["linear"], "target_parameters": ["stacked.weight"]}, "stacked"),
    ],
)
def test_matrices_in_other_modules_can_have_experts(options, module):
    """The projections of an attention layer, and PEFT's ``target_parameters``."""
    model = adapted(Parts(), **options)
    assert list(MoLF(model).experts[module]) == ["lora_r2"]


def test_adalora_is_refused():
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"q_proj has adapters of another kind \(SVDLinear\): experts are plain LoRA"):
        MoLF(get_peft_model(tiny_llama(), config))


def test_only_embeddings_are_nothing_to_route():
    with pytest.raises(ValueError, match="none is active, trains, and is LoRA on a linear layer"):
        MoLF(llama(target_modules=["embed_tokens"]))


def test_adapters_that_will_not_train_are_named(caplog):
    model = several({}, {}, {})
    MoLF(model)
    assert not caplog.records
    model.base_model.set_adapter(["r2", "r4"])
    MoLF(model)
    assert "The adapters r3 are no experts: they are not active, or frozen" in caplog.text
