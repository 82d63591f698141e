import math

import pytest

from molf.study.config.run_config import MethodConfig
from molf.study.methods.baselines import PROJECTIONS, adalora_arguments, lora_alpha, lora_arguments

LLAMA = [f"model.layers.0.block.{name}" for name in PROJECTIONS] + ["lm_head"]


def test_lora():
    assert lora_arguments(MethodConfig(method="lora", lora_rank=16), LLAMA) == {
        "r": 16,
        "lora_alpha": 32.0,
        "use_rslora": False,
        "lora_dropout": 0.05,
        "target_modules": list(PROJECTIONS),
        "exclude_modules": ["lm_head"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


@pytest.mark.parametrize(
    "method", [MethodConfig(method="rslora", lora_rank=16), MethodConfig(method="lora", use_rslora=True, lora_rank=16)]
)
def test_rank_stabilised_lora(method):
    arguments = lora_arguments(method, LLAMA)
    assert (arguments["use_rslora"], arguments["lora_alpha"]) == (True, 8.0)


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
    lora = lora_arguments(MethodConfig(method="lora"), LLAMA)
    assert lora_arguments(MethodConfig(method=method), LLAMA) == lora | own


def test_adalora_ends_with_the_rank_that_was_asked_for():
    arguments = adalora_arguments(MethodConfig(method="adalora", lora_rank=5), {}, LLAMA)
    assert (arguments["init_r"], arguments["target_r"]) == (8, 5)
    assert arguments["lora_alpha"] / arguments["init_r"] == 2.0
    assert arguments["orth_reg_weight"] == 0.0, "the callback's"
    assert arguments["lora_dropout"] == 0.05


def test_adalora_cannot_use_scaled_gradients():
    with pytest.raises(ValueError, match="use bf16"):
        adalora_arguments(MethodConfig(method="adalora"), {"fp16": True}, LLAMA)


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_given_alpha_and_dropout_win(method):
    arguments = lora_arguments(MethodConfig(method=method, lora_alpha=3.0, lora_dropout=0.1), LLAMA)
    assert (arguments["lora_alpha"], arguments["lora_dropout"]) == (3.0, 0.1)


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
    config = MethodConfig(method=method, target_modules=targets)
    arguments = adalora_arguments(config, {}, modules) if method == "adalora" else lora_arguments(config, modules)
    assert arguments["target_modules"] == expected


@pytest.mark.parametrize("rank", [1, 16, 128])
def test_alpha_for_a_scale(rank):
    assert lora_alpha(rank, use_rslora=True) / math.sqrt(rank) == pytest.approx(2)
    assert lora_alpha(rank, use_rslora=False) / rank == pytest.approx(2)
    assert lora_alpha(rank, use_rslora=True, scale=1.0) / math.sqrt(rank) == pytest.approx(1)
