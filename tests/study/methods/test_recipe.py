import math

import pytest

from molf.errors import MolfError
from molf.study.config.run_config import PUBLISHED_RECIPE, MethodConfig
from molf.study.methods.recipe import PROJECTIONS, Recipe, method_recipe

TRAIN = dict(PUBLISHED_RECIPE)
LLAMA = [f"model.layers.0.block.{name}" for name in PROJECTIONS] + ["lm_head"]


def test_full_fine_tuning_is_the_trainer_as_it_is():
    recipe = method_recipe(MethodConfig(method="fft"), TRAIN, LLAMA)
    assert recipe == Recipe(train={})
    assert not recipe.adapted


def test_molf_takes_the_rates_and_the_clipping_from_the_trainer():
    recipe = method_recipe(MethodConfig(method="molf", lora_learning_rate=2e-5), TRAIN | {"adam_beta2": 0.95}, LLAMA)
    assert recipe.train == {"max_grad_norm": 0.0}
    assert recipe.merged
    assert not recipe.adapted
    assert recipe.molf == {
        "ranks": (128,),
        "lr": 5e-5,
        "lora_lr": 2e-5,
        "weight_decay": 0.1,
        "lora_weight_decay": 0.01,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "lora_alpha": 32.0,
        "use_rslora": True,
        "top_k": 1,
        "score": "epd",
        "target_modules": "all-linear",
        "exclude_modules": ("lm_head",),
        "target_parameters": (),
        "max_grad_norm": 1.0,
        "optim_bits": 32,
        "optimizer_in_backward": False,
        "fused": None,
        "bf16_update": "split",
    }


@pytest.mark.parametrize("off", [0, 0.0, None])
def test_molf_without_clipping(off):
    assert method_recipe(MethodConfig(), TRAIN | {"max_grad_norm": off}, LLAMA).molf["max_grad_norm"] is None


RELEASING = {"max_grad_norm": 0, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize("method", ["molf", "molf_e"])
def test_gradient_release(method):
    recipe = method_recipe(
        MethodConfig(method=method, optimizer_in_backward=True, fused=True), TRAIN | RELEASING, LLAMA
    )
    assert recipe.molf["fused"] is True
    assert recipe.molf["optimizer_in_backward"] is True
    assert recipe.molf["max_grad_norm"] is None


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [("max_grad_norm", 1.0, 0), ("gradient_accumulation_steps", 4, 1), ("fp16", True, False)],
)
def test_gradient_release_with_what_needs_all_gradients(name, value, allowed):
    with pytest.raises(ValueError, match=rf"optimizer_in_backward=True with {name}={value}: .*set {name}={allowed}$"):
        method_recipe(MethodConfig(optimizer_in_backward=True), TRAIN | RELEASING | {name: value}, LLAMA)


def test_molf_arguments_are_those_of_the_optimizer():
    import inspect

    from molf import MoLF, add_lora_experts

    accepted = inspect.signature(MoLF.__init__).parameters
    assert set(method_recipe(MethodConfig(), TRAIN, LLAMA).molf) <= set(accepted)
    recipe = method_recipe(MethodConfig(method="molf_e"), TRAIN, LLAMA)
    assert set(recipe.molf) <= set(accepted)
    assert set(recipe.experts) == set(inspect.signature(add_lora_experts).parameters) - {"model"}
    assert not set(recipe.molf) & set(recipe.experts), "the optimizer finds the experts in the model"


@pytest.mark.parametrize("method", [MethodConfig(method="molf_e"), MethodConfig(fft_expert=False)])
def test_molf_efficient(method):
    recipe = method_recipe(method, TRAIN, LLAMA)
    assert (recipe.merged, recipe.adapted) == (False, True)
    assert recipe.train == {"max_grad_norm": 0.0}
    assert recipe.experts == {
        "ranks": (32, 128),
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "use_rslora": True,
        "freeze_base": True,
        "target_modules": "all-linear",
        "exclude_modules": ("lm_head",),
    }


def test_molf_with_dropout_has_its_experts_in_the_model():
    recipe = method_recipe(MethodConfig(lora_dropout=0.05), TRAIN, LLAMA)
    assert (recipe.merged, recipe.adapted) == (False, True)
    assert recipe.experts["ranks"] == (128,)
    assert recipe.experts["lora_dropout"] == 0.05
    assert recipe.experts["freeze_base"] is False
    assert method_recipe(MethodConfig(lora_dropout=0.0), TRAIN, LLAMA).merged


def test_one_learning_rate_serves_both_unless_lora_has_its_own():
    train = TRAIN | {"learning_rate": 1e-4}
    assert method_recipe(MethodConfig(), train, LLAMA).molf["lora_lr"] == "matched"
    assert method_recipe(MethodConfig(recipe="published"), train, LLAMA).molf["lora_lr"] == 1e-4
    assert method_recipe(MethodConfig(lora_learning_rate=2e-4), train, LLAMA).molf["lora_lr"] == 2e-4
    assert method_recipe(MethodConfig(method="lora"), train, LLAMA).train["learning_rate"] == 1e-4
    own = MethodConfig(method="lora", lora_learning_rate=5e-4)
    assert method_recipe(own, train, LLAMA).train == {"learning_rate": 5e-4, "weight_decay": 0.01}


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa", "eva", "lora_plus", "adalora"])
def test_adapters_are_trained_at_loras_rate_and_decay(method):
    recipe = method_recipe(MethodConfig(method=method, lora_learning_rate=5e-4), TRAIN, LLAMA)
    assert recipe.train == {"learning_rate": 5e-4, "weight_decay": 0.01}
    assert recipe.adapted
    assert (recipe.molf, recipe.experts) == (None, None)
    assert (recipe.lora is None, recipe.adalora is None) == (method == "adalora", method != "adalora")
    assert (recipe.loraplus is not None) == (method == "lora_plus")


def test_lora_plus():
    recipe = method_recipe(MethodConfig(method="lora_plus", loraplus_lr_ratio=4.0), TRAIN, LLAMA)
    assert recipe.loraplus == {
        "lr": 5e-5,
        "loraplus_lr_ratio": 4.0,
        "loraplus_weight_decay": 0.01,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
    }
    assert recipe.lora == method_recipe(MethodConfig(method="lora"), TRAIN, LLAMA).lora


def arguments(modules=LLAMA, train=(), **settings):
    """PEFT's arguments for a baseline."""
    recipe = method_recipe(MethodConfig(**settings), TRAIN | dict(train), modules)
    return recipe.lora if recipe.adalora is None else recipe.adalora


def test_lora():
    assert arguments(method="lora", lora_rank=16) == {
        "r": 16,
        "lora_alpha": 32.0,
        "use_rslora": False,
        "lora_dropout": 0.05,
        "target_modules": list(PROJECTIONS),
        "exclude_modules": ["lm_head"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


@pytest.mark.parametrize("settings", [{"method": "rslora"}, {"method": "lora", "use_rslora": True}])
@pytest.mark.parametrize("rank", [1, 16, 128])
def test_rank_stabilised_lora_has_the_scale_of_lora(settings, rank):
    found = arguments(lora_rank=rank, **settings)
    assert found["use_rslora"] and found["lora_alpha"] / math.sqrt(rank) == pytest.approx(2)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("dora", {"use_dora": True}),
        ("eva", {"init_lora_weights": "eva"}),
        ("pissa", {"init_lora_weights": "pissa", "lora_dropout": 0.0, "lora_alpha": 128}),
        ("lora_plus", {}),
    ],
)
def test_what_the_variants_change(method, own):
    assert arguments(method=method) == arguments(method="lora") | own


def test_adalora_ends_with_the_rank_that_was_asked_for():
    found = arguments(method="adalora", lora_rank=5)
    assert (found["init_r"], found["target_r"]) == (8, 5)
    assert found["lora_alpha"] / found["init_r"] == 2.0
    assert found["orth_reg_weight"] == 0.0, "the callback's"
    assert found["lora_dropout"] == 0.05


def test_adalora_cannot_use_scaled_gradients():
    with pytest.raises(MolfError, match="use bf16"):
        arguments(method="adalora", train={"fp16": True})


@pytest.mark.parametrize("method", ["lora", "pissa", "adalora"])
def test_given_alpha_and_dropout_win(method):
    found = arguments(method=method, lora_alpha=3.0, lora_dropout=0.1)
    assert (found["lora_alpha"], found["lora_dropout"]) == (3.0, 0.1)


@pytest.mark.parametrize(
    ("modules", "targets", "expected"),
    [
        (["transformer.h.0.attn.c_attn"], ["all-linear"], "all-linear"),
        (LLAMA[:3], ["all-linear"], "all-linear"),
        (LLAMA, ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    ],
)
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_targets(method, modules, targets, expected):
    assert arguments(modules, method=method, target_modules=targets)["target_modules"] == expected
