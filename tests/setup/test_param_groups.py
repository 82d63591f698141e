import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from molf import MoLF, add_lora_experts, param_groups
from molf.setup.param_groups import alignment, expert_names, level_scales, lora_scales
from small import mlp, tiny_llama, train
from stacks import Stacks

SCALARS = (bool, int, float, str)


def test_names_and_scales_of_experts():
    assert expert_names(()) == ("fft",)
    assert expert_names((32, 4)) == ("fft", "lora_r32", "lora_r4")
    assert lora_scales((4, 16), (16.0, 16.0), use_rslora=True) == (8.0, 4.0)
    assert lora_scales((4, 16), (16.0, 16.0), use_rslora=False) == (4.0, 1.0)


@pytest.mark.parametrize("build", [mlp, tiny_llama], ids=["mlp", "llama"])
def test_every_trainable_parameter_is_in_exactly_one_group(build):
    model = build()
    next(model.parameters()).requires_grad_(False)
    ids = [id(p) for group in param_groups(model, ranks=(2,)) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("number", [float, torch.tensor])
def test_groups_are_flat(number):
    """A tensor rate is copied, so that each group has one of its own; other numbers are plain."""
    lr, others = number(1e-3), {"weight_decay": number(0.1), "lora_weight_decay": number(0.2)}
    groups = param_groups(mlp(), ranks=(2, 3), lr=lr, lora_lr=number(2e-3), **others)
    extra = {"params": nn.Parameter(torch.ones(2)), "betas": (number(0.8), number(0.9)), "eps": number(1e-4)}
    groups += MoLF([*groups, {**extra, "weight_decay": number(0.1)}]).param_groups
    for group in groups:
        for key, value in group.items():
            if key not in ("params", "lr"):
                flat = value if isinstance(value, tuple) else (value,)
                assert all(isinstance(item, SCALARS) for item in flat), key
    if isinstance(lr, torch.Tensor):
        assert len({group["lr"].data_ptr() for group in groups[:5]} | {lr.data_ptr()}) == 6


def test_numbers_of_numpy_are_taken_and_saved_as_plain_ones(tmp_path):
    """As they come from ``np.logspace`` or a table of settings."""
    rates = {name: np.float32(0.5) for name in ("lr", "lora_lr", "weight_decay", "lora_weight_decay", "max_grad_norm")}
    counts = {"ranks": np.array([2, 3]), "top_k": np.int64(2), "lora_alpha": np.float32(8)}
    optimizer = MoLF(mlp(), **rates, **counts)
    twin = MoLF(mlp(), ranks=(2, 3), top_k=2, lora_alpha=8.0, **dict.fromkeys(rates, 0.5))
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(2)), "lr": np.float64(0.5), "eps": np.float32(0.5)})
    assert (optimizer.top_k, optimizer.max_grad_norm) == (twin.top_k, twin.max_grad_norm)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    groups = torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"]
    assert groups[:-1] == twin.state_dict()["param_groups"]


def test_ordinary_groups_come_first():
    model = mlp()
    matrices, vectors, *routed = param_groups(model, ranks=(2,), weight_decay=0.3)
    assert [id(p) for p in matrices["params"]] == [id(model[0].weight)]
    assert [id(p) for p in vectors["params"]] == [id(p) for p in model[3].parameters()]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert [(group["module"], len(group["params"])) for group in routed] == [("1", 2), ("4", 1), ("5", 2)]
    assert not any("module" in group for group in (matrices, vectors))
    model[1].bias.requires_grad_(False)
    assert [len(group["params"]) for group in param_groups(model, ranks=(2,)) if "module" in group] == [1, 1, 2]
    assert [group.get("module") for group in param_groups(nn.Sequential(nn.Linear(3, 3)), ranks=(2,))] == ["0"]


def test_norms_and_biases_of_more_dimensions_are_not_decayed():
    model = nn.Sequential(nn.LayerNorm((2, 3)), nn.Flatten(), nn.Linear(6, 6))
    model.experts_bias, model.position = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(4, 6))
    matrices, rest, _ = param_groups(model, ranks=(2,))
    assert [id(p) for p in matrices["params"]] == [id(model.position)]
    assert {id(p) for p in rest["params"]} == {id(p) for p in (model.experts_bias, *model[0].parameters())}


def test_level_scales():
    """As long as a full-rank step, shortened by the alignment; without such a step the best aligned one is as long."""
    ranks, n_in = (2, 128), 200
    longer = [1 + 2 * r / (math.pi * n_in) for r in ranks]
    equal = [math.sqrt(3 * n_in / r / f) for r, f in zip(ranks, longer, strict=True)]
    shorter = [alignment(r, n_in) for r in ranks]
    assert level_scales(ranks, n_in) == pytest.approx([s * a for s, a in zip(equal, shorter, strict=True)])
    alone = [equal[0] * shorter[0] / shorter[1], equal[1]]
    assert level_scales(ranks, n_in, full_rank=False) == pytest.approx(alone)


def test_defaults_are_the_published_recipe_at_matched_rates():
    group = param_groups(nn.Sequential(nn.Linear(200, 200)))[0]
    recipe = {"lr": 5e-5, "weight_decay": 0.1, "lora_weight_decay": 0.01, "ranks": (128,)}
    assert recipe.items() <= group.items()
    assert group["scales"] == level_scales((128,), 200) and group["lora_lr_ratio"] == 1.0
    published = param_groups(nn.Sequential(nn.Linear(200, 200)), lora_lr=None)[0]
    assert published["scales"] == pytest.approx((32 / 128**0.5,)) and published["lora_lr_ratio"] == 1.0
    assert param_groups(mlp(), ranks=(2,), lr=1e-3, lora_lr=4e-3)[-1]["lora_lr_ratio"] == pytest.approx(4.0)


def test_given_groups_are_the_same_optimizer():
    model = mlp()
    twin = copy.deepcopy(model)
    options = {"ranks": (2, 3), "lr": 1e-3, "lora_lr": 2e-3, "weight_decay": 0.2, "lora_alpha": (8, 4)}
    torch.manual_seed(5)
    from_model = MoLF(model, top_k=2, **options)
    torch.manual_seed(5)
    from_groups = MoLF(param_groups(twin, **options), top_k=2)
    assert train(model, from_model, 5) == train(twin, from_groups, 5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def lora_start(seed=0, dtype=torch.float64, **options):
    model = mlp(dtype)
    torch.manual_seed(seed)
    experts = MoLF(model, **{"ranks": (2, 3), **options}).experts
    return {(module, e): (own[e].A, own[e].B) for module, own in experts.items() for e in own if e != "fft"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_start_is_the_same_in_every_dtype(dtype):
    for (A, B), (a, b) in zip(lora_start().values(), lora_start(dtype=dtype).values(), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(A, a.double())
        assert not B.any() and not b.any()


def test_start_depends_on_the_seed_but_not_on_the_default_dtype():
    expected, other = lora_start(), lora_start(seed=2)
    torch.set_default_dtype(torch.float64)
    try:
        got = lora_start()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, (A, _) in got.items():
        assert torch.equal(A, expected[name][0]) and not torch.equal(A, other[name][0])


def test_layers_and_experts_start_apart():
    starts = [A[:2, :5] for A, _ in lora_start().values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


def test_start_is_kaiming_uniform():
    torch.manual_seed(0)
    A = MoLF(nn.Sequential(nn.Linear(100, 400)), ranks=(200,)).experts["0"]["lora_r200"].A
    bound = 100**-0.5  # gain sqrt(2 / (1 + 5)), times sqrt(3 / fan_in)
    assert A.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert A.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert abs(A.mean().item()) < bound * 0.02


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": (0,)}, r"ranks=\(0,\): every rank must be a positive integer"),
        ({"ranks": (2.0,)}, "positive integer"),
        ({"ranks": (True,)}, "positive integer"),
        ({"ranks": (2, 2)}, r"ranks=\(2, 2\).*may occur only once"),
        ({"ranks": (2, 14)}, r"ranks=\(2, 14\) exceeds"),
        ({"ranks": (2, 3), "lora_alpha": (1.0,)}, r"lora_alpha=\(1\.0,\).*ranks=\(2, 3\)"),
        ({"ranks": (2,), "lora_alpha": (1.0, 2.0)}, "give one number"),
        ({"lora_alpha": 0}, r"lora_alpha=0: must be above 0; without LoRA experts, ranks=\(\), this is AdamW"),
        ({"lr": "high"}, "lr='high': must be a finite number, 0 or more"),
        ({"lr": "5e-5"}, "0 or more; it is text, as YAML reads 5e-5: write 5.0e-5"),
        ({"lr": -1e-3}, r"lr=-0\.001: must be a finite number, 0 or more"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": torch.tensor(float("inf"))}, r"lr=tensor\(inf\)"),
        ({"lora_lr": -1.0}, r"lora_lr=-1\.0"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"lora_weight_decay": float("inf")}, "lora_weight_decay=inf"),
        ({"lr": 0.0, "lora_lr": 1e-3}, r"lr=0 with lora_lr=0\.001.*lr must be above 0"),
    ],
    ids=str,
)
def test_numbers_that_do_not_work(options, words):
    with pytest.raises(ValueError, match=words):
        param_groups(mlp(), **{"ranks": (2,), **options})


@pytest.mark.parametrize("lora_lr", [None, 0.0])
def test_all_rates_may_be_zero(lora_lr):
    assert param_groups(mlp(), ranks=(2,), lr=0.0, lora_lr=lora_lr)[-1]["lora_lr_ratio"] == 1.0


def test_the_smallest_layer_is_named():
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 3), nn.Linear(3, 5))
    with pytest.raises(ValueError, match=r"smallest routed layer, 2 \[5, 3\]; use r <= 5"):
        param_groups(model, ranks=(10,))


@pytest.mark.parametrize("given", [[], {}, nn.Linear(2, 2).parameters()], ids=["list", "dict", "parameters"])
def test_the_model_is_needed(given):
    with pytest.raises(TypeError, match="needs the model"):
        param_groups(given, ranks=(2,))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": 128}, "ranks=128: give one rank per LoRA expert"),
        ({"ranks": 8.0}, r"ranks=8\.0: give one rank per LoRA expert"),
        ({"ranks": "128"}, "ranks='128': give one rank per LoRA expert"),
        ({"use_rslora": "no"}, "use_rslora='no': give True or False"),
        ({"target_modules": 5}, "target_modules=5: give a list of names"),
        ({"exclude_modules": [1]}, r"exclude_modules=\[1\]: give a list of names"),
    ],
    ids=str,
)
def test_options_of_a_wrong_type(options, words):
    with pytest.raises(TypeError, match=words):
        param_groups(mlp(), **{"ranks": (2,), **options})


def routed_names(model, **options):
    return [group["module"] for group in param_groups(model, ranks=(2,), **options) if "module" in group]


@pytest.mark.parametrize("given", [tuple, list, set, iter], ids=lambda kind: kind.__name__)
def test_names_may_be_given_in_any_order_and_none_means_no_wish(given):
    names = {"target_modules": given(["1", "4"]), "exclude_modules": given(["4"])}
    assert routed_names(mlp(), **names) == ["1"]
    assert routed_names(mlp(), target_modules=None, exclude_modules=None) == ["1", "4", "5"]
    parameters = given(["gate.weight"])
    assert routed_names(tiny_mixtral(), target_modules=["q_proj"], target_parameters=parameters)[1].endswith(
        "gate.weight"
    )


def test_a_target_that_matches_nothing_is_refused_and_an_exclusion_named(caplog):
    llama = tiny_llama()
    with pytest.raises(
        ValueError, match=r"target_modules name 'k_porj' \(did you mean 'k_proj'\?\), 'xy', which match noth"
    ):
        param_groups(llama, ranks=(2,), target_modules=["q_proj", "k_porj", "xy"])
    routed_names(llama, exclude_modules=("lm_head", "up_proj", "layers.1.mlp"))
    assert not caplog.records
    for excluded, word in ((("o_porj", "up_proj"), r"'o_porj' (did you mean 'o_proj'?), which"), ("q", "'q', which")):
        routed_names(llama, exclude_modules=excluded)
        assert word in caplog.messages[-1]


def test_layers_without_a_shape_are_refused():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet.*run one forward pass of the model first"):
        param_groups(model, ranks=(2,))
    model(torch.ones(1, 3))
    assert routed_names(model) == ["0", "1"]


def transposed_weight():
    model = mlp()
    model[1].weight = nn.Parameter(model[1].weight.detach().T.contiguous().T)
    return model


def shared_bias():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    return model


def weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (transposed_weight, r"1\.weight is not contiguous.*\.contiguous\(\)"),
        (shared_bias, r"shared.*0\.bias = 1\.bias"),
        (weight_norm, "0 .*parametri"),
    ],
)
def test_weights_that_cannot_be_trained_are_named(build, words):
    with pytest.raises(ValueError, match=words):
        param_groups(build(), ranks=(2,))


@pytest.mark.parametrize("tensor", ["0.weight", "1.weight", "1.bias"])
def test_half_precision_weights_must_be_frozen(tensor):
    model = mlp(torch.float32)
    module, leaf = tensor.split(".")
    setattr(model[int(module)], leaf, nn.Parameter(getattr(model[int(module)], leaf).half()))
    with pytest.raises(ValueError, match=rf"{tensor} is torch\.float16.*float32 weights \(with autocast\)"):
        param_groups(model, ranks=(2,))
    model[int(module)].requires_grad_(False)
    assert all(p.dtype == torch.float32 for group in param_groups(model, ranks=(2,)) for p in group["params"])


@pytest.mark.parametrize("inner", [False, True], ids=["wrapped", "inner"])
def test_adapters_of_peft_are_refused_and_can_be_merged(inner):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"ranks=\(2,\).*already carries PEFT adapters.*merge_and_unload"):
        param_groups(model.base_model.model if inner else model, ranks=(2,))
    assert len(param_groups(model.merge_and_unload().requires_grad_(True), ranks=(2,))) == 2 + 14


def tiny_mixtral(**sizes):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 30, **sizes}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


def test_stacked_experts_are_routed_and_routers_named(caplog):
    caplog.set_level("INFO")
    groups = param_groups(tiny_mixtral(), ranks=(2,))
    routed = {group["module"].rpartition(".")[2]: group for group in groups if "module" in group}
    assert list(routed) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    stack = routed["gate_up_proj"]
    assert stack["form"] == "stacked" and stack["transposed"] is False and stack["params"][0].shape == (4, 48, 16)
    assert stack["scales"] == level_scales((2,), 16)
    (message,) = caplog.messages
    assert "1.0 % of the trained parameters are matrices outside of linear layers" in message
    assert "model.layers.*.mlp.gate.weight [4, 16]" in message and "target_parameters" in message
    assert caplog.records[0].levelname == "INFO"


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"target_modules": ["q_proj", "down_proj"]}, ["q_proj", "down_proj"]),
        ({"target_modules": ["down_proj"]}, ["down_proj"]),
        ({"target_modules": r".*experts\.(gate_up|down)_proj"}, ["gate_up_proj", "down_proj"]),
        ({"exclude_modules": ["lm_head", "gate_up_proj"]}, ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]),
        ({"target_modules": ["q_proj", "experts"]}, ["q_proj", "gate_up_proj", "down_proj"]),
        ({"exclude_modules": ["lm_head", "experts"]}, ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}, ["q_proj", "weight"]),
    ],
    ids=str,
)
def test_stacks_are_targeted_by_the_names_of_their_parameters(options, kinds):
    groups = param_groups(tiny_mixtral(), ranks=(2,), **options)
    assert [group["module"].rpartition(".")[2] for group in groups if "module" in group] == kinds


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["gate.wait"],
            r"\['gate\.wait'\] match no parameter outside of nn\.Linear.*model\.layers\.\*\.mlp\.gate\.weight",
        ),
        (["norm.weight"], r"model\.norm\.weight, which has shape \[16\]: only matrices"),
        (["gate.weight"], r"mlp\.gate\.weight, which is frozen"),
    ],
)
def test_named_parameters_that_cannot_be_routed_are_refused(names, message):
    model = tiny_mixtral()
    model.model.layers[0].mlp.gate.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        param_groups(model, ranks=(2,), target_parameters=names)
    for given in ("gate.weight", None):
        with pytest.raises(TypeError, match="give a list of names"):
            param_groups(model, ranks=(2,), target_parameters=given)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (["gate_proj"], "are named down_proj, gate_up_proj, k_proj"),
        (["gate"], "TopKRouter.*if target_parameters name it"),
    ],
)
def test_targets_that_match_nothing_in_a_mixture(target, words):
    with pytest.raises(ValueError, match=words):
        param_groups(tiny_mixtral(), ranks=(2,), target_modules=target)


def test_fused_projections_of_attention_are_routed():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    groups = [group for group in param_groups(model, ranks=(2,)) if "module" in group]
    assert [group["module"] for group in groups] == [
        "self_attn.out_proj",
        "linear1",
        "linear2",
        "self_attn.in_proj_weight",
    ]
    assert [tuple(p.shape) for p in groups[-1]["params"]] == [(24, 8), (24,)] and groups[-1]["form"] == "merged"


def test_the_order_of_a_stack_is_the_modules_own_or_that_of_its_hidden_size():
    class Experts(nn.Module):
        num_experts, hidden_size = 3, 8

        def __init__(self, **attributes):
            super().__init__()
            self.up_proj, self.down_proj = nn.Parameter(torch.zeros(3, 8, 12)), nn.Parameter(torch.zeros(3, 12, 8))
            vars(self).update(attributes)

    def order(module):
        return {group["transposed"] for group in param_groups(module, ranks=(2,)) if "module" in group}

    assert order(Experts()) == {True}
    assert order(Experts(num_experts=0, num_routed_experts=3)) == {True}
    assert order(Experts(num_local_experts=[3, 3])) == {True}
    assert order(Experts(hidden_size=12)) == {False}
    assert order(Experts(is_transposed=False)) == {False}


def test_a_stack_with_two_owners_is_refused_alone_and_can_be_excluded():
    model = nn.ModuleList([Stacks(), Stacks()])
    model[1].up_proj = model[0].up_proj
    with pytest.raises(
        ValueError, match=r"the up_proj of 0\.up_proj is shared \(0\.up_proj = 1\.up_proj\).*'0\.up_proj'"
    ):
        param_groups(model, ranks=(2,))
    groups = param_groups(model, ranks=(2,), exclude_modules=["up_proj"])
    assert [group["module"] for group in groups if "module" in group] == ["0.down_proj", "1.down_proj"]


def test_an_empty_stack_is_not_routed():
    model = Stacks(n=3)
    model.num_experts, model.nothing = 3, nn.Parameter(torch.zeros(3, 0, 2))
    groups = param_groups(model, ranks=(2,))
    assert [group["module"] for group in groups if "module" in group] == ["up_proj", "down_proj"]


def test_one_expert_leaves_nothing_to_choose(caplog):
    param_groups(add_lora_experts(tiny_llama(), ranks=(2, 4)))
    param_groups(mlp(), ranks=())  # AdamW on purpose
    assert not caplog.messages
    param_groups(add_lora_experts(tiny_llama(), ranks=(2,)))
    (message,) = caplog.messages
    assert "Every routed layer has one expert, lora_r2: there is nothing to choose" in message


def test_convolutions_and_positions_are_no_stacks(caplog):
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.Linear(80, 80))
    model[0].num_experts = 8
    model.position = nn.Parameter(torch.zeros(1, 4, 8))
    groups = param_groups(model, ranks=(2,))
    assert [group["module"] for group in groups if "module" in group] == ["1"]
    assert not caplog.messages  # less than a twentieth of the parameters


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_a_single_matrix_of_a_stack_is_no_target(option):
    with pytest.raises(ValueError, match=rf"{option} names \['down_proj\[0\]'\], single matrices of a stack"):
        param_groups(tiny_mixtral(), ranks=(2,), **{option: ["down_proj[0]"]})
