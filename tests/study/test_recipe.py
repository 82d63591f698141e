import math

import pytest

from molf.study.config import PUBLISHED_RECIPE, MethodConfig
from molf.study.recipe import PROJECTIONS, lora_alpha, method_recipe

TRAIN = dict(PUBLISHED_RECIPE)
LLAMA = [f"model.layers.0.block.{name}" for name in PROJECTIONS] + ["lm_head"]


def test_full_fine_tuning_is_the_trainer_as_it_is():
    recipe = method_recipe(MethodConfig(method="fft"), TRAIN, LLAMA)
    assert (recipe.train, recipe.molf, recipe.lora) == ({}, None, None)


def test_molf_takes_the_rates_and_the_clipping_from_the_trainer():
    recipe = method_recipe(MethodConfig(method="molf", lora_learning_rate=2e-5), TRAIN | {"adam_beta2": 0.95}, LLAMA)
    assert recipe.train == {"max_grad_norm": 0.0}
    assert recipe.lora is None
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
        "max_grad_norm": 1.0,
        "bf16_update": "split",
    }


@pytest.mark.parametrize("off", [0, 0.0, None])
def test_molf_without_clipping(off):
    assert method_recipe(MethodConfig(), TRAIN | {"max_grad_norm": off}, LLAMA).molf["max_grad_norm"] is None


def test_molf_arguments_are_those_of_the_optimizer():
    import inspect

    from molf import MoLF

    accepted = inspect.signature(MoLF.__init__).parameters
    assert set(method_recipe(MethodConfig(), TRAIN, LLAMA).molf) <= set(accepted)


def test_one_learning_rate_serves_both_unless_lora_has_its_own():
    train = TRAIN | {"learning_rate": 1e-4}
    assert method_recipe(MethodConfig(), train, LLAMA).molf["lora_lr"] == 1e-4
    assert method_recipe(MethodConfig(method="lora"), train, LLAMA).train["learning_rate"] == 1e-4
    own = MethodConfig(method="lora", lora_learning_rate=5e-4)
    assert method_recipe(own, train, LLAMA).train == {"learning_rate": 5e-4, "weight_decay": 0.01}


def test_lora_baseline():
    recipe = method_recipe(MethodConfig(method="lora", lora_rank=16), TRAIN, LLAMA)
    assert recipe.molf is None
    assert recipe.lora["r"] == 16
    assert recipe.lora["lora_alpha"] == 8.0
    assert recipe.lora["lora_dropout"] == 0.05
    assert recipe.lora["use_rslora"] is True
    assert recipe.lora["target_modules"] == list(PROJECTIONS)


def test_given_alpha_and_dropout_win():
    recipe = method_recipe(MethodConfig(method="lora", lora_alpha=3.0, lora_dropout=0.0), TRAIN, LLAMA)
    assert (recipe.lora["lora_alpha"], recipe.lora["lora_dropout"]) == (3.0, 0.0)
    assert method_recipe(MethodConfig(lora_alpha=64.0), TRAIN, LLAMA).molf["lora_alpha"] == 64.0


@pytest.mark.parametrize(
    ("modules", "targets", "expected"),
    [
        (["transformer.h.0.attn.c_attn"], ["all-linear"], "all-linear"),
        (LLAMA[:3], ["all-linear"], "all-linear"),
        (LLAMA, ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    ],
)
def test_lora_targets(modules, targets, expected):
    recipe = method_recipe(MethodConfig(method="lora", target_modules=targets), TRAIN, modules)
    assert recipe.lora["target_modules"] == expected


@pytest.mark.parametrize("rank", [1, 16, 128])
def test_the_default_alpha_scales_by_two(rank):
    assert lora_alpha(rank, use_rslora=True) / math.sqrt(rank) == pytest.approx(2)
    assert lora_alpha(rank, use_rslora=False) / rank == pytest.approx(2)


def test_what_molf_cannot_do_yet_is_refused():
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1.*--method lora"):
        method_recipe(MethodConfig(lora_dropout=0.1), TRAIN, LLAMA)
    with pytest.raises(ValueError, match=r"fft_expert=False.*--method lora"):
        method_recipe(MethodConfig(fft_expert=False), TRAIN, LLAMA)
    assert method_recipe(MethodConfig(lora_dropout=0.0), TRAIN, LLAMA).molf
