import pytest
import torch
from torch import nn

from families import FAMILIES
from molf import MoLF
from molf.errors import MolfError
from molf.integrations.trainer import MoLFFactory
from molf.study.config.run_config import PUBLISHED_RECIPE, MethodConfig
from molf.study.methods.adapters import LoraPlusFactory, add_adapters, optimizer_of, save_adapters
from molf.study.methods.recipe import method_recipe


def recipe(**settings):
    train = PUBLISHED_RECIPE | {"learning_rate": 1e-3}
    return method_recipe(MethodConfig(ranks=[2, 4], lora_rank=4, **settings), train, [])


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["fft", "molf"])
def test_no_adapters(method, tiny_model):
    assert add_adapters(tiny_model, recipe(method=method), freeze_rest=False) is tiny_model


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa", "eva", "lora_plus", "adalora", "molf_e"])
def test_adapters_on_a_frozen_base(method, tiny_model):
    model = add_adapters(tiny_model, recipe(method=method), freeze_rest=True)
    assert all(".lora_" in name for name in trained(model))
    names = ["lora_r2", "lora_r4"] if method == "molf_e" else ["default"]
    assert list(model.peft_config) == names


@pytest.mark.parametrize("method", ["lora", "adalora", "molf_e"])
def test_layers_that_are_not_there(method, tiny_model):
    reason = "; those of this model are named down_proj" if method == "molf_e" else ": No modules were targeted"
    with pytest.raises(MolfError, match=rf"target_modules=\['w_proj'\] and exclude_modules=.*{reason}"):
        add_adapters(tiny_model, recipe(method=method, target_modules=["w_proj"]), freeze_rest=True)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "adalora", "lora_plus"])
@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3", "Mamba"])
def test_baselines_on_mixtures_and_state_spaces(name, method, caplog):
    model = add_adapters(FAMILIES[name].build(), recipe(method=method), freeze_rest=True)
    assert trained(model) and all(".lora_" in name for name in trained(model))
    assert "weights without it: " in caplog.text


def test_a_baseline_without_dropout_adapts_stacked_experts():
    models = [FAMILIES["Mixtral"].build() for _ in range(2)]
    efficient = add_adapters(models[0], recipe(method="molf_e"), freeze_rest=True)
    lora = add_adapters(models[1], recipe(method="lora", lora_dropout=0.0), freeze_rest=True)
    assert {name.replace(".default", ".lora_r4") for name in trained(lora)} < trained(efficient)
    assert any("experts" in name for name in trained(lora))


def test_what_is_not_adapted_may_be_trained(tiny_model):
    model = add_adapters(tiny_model, recipe(method="molf_e"), freeze_rest=False)
    base = {name for name in trained(model) if ".lora_" not in name}
    assert base
    assert not any("proj" in name for name in base)


def test_what_was_frozen_stays_frozen(tiny_model):
    tiny_model.lm_head.weight.requires_grad_(False)
    model = add_adapters(tiny_model, recipe(method="molf_e"), freeze_rest=False)
    assert not any("lm_head" in name for name in trained(model))


@pytest.mark.parametrize("freeze_rest", [False, True])
def test_a_trained_base_with_dropout(freeze_rest, tiny_model):
    everything = trained(tiny_model)
    model = add_adapters(tiny_model, recipe(lora_dropout=0.1), freeze_rest=freeze_rest)
    base = {name for name in trained(model) if ".lora_" not in name}
    assert len(base) == (14 if freeze_rest else len(everything))
    assert any(isinstance(module, nn.Dropout) and module.p == 0.1 for module in model.modules())


def test_which_optimizer():
    assert optimizer_of(recipe(method="lora")) is None
    assert optimizer_of(recipe(method="fft")) is None
    for changes, adapters in (({}, ()), ({"lora_dropout": 0.1}, ("lora_r2", "lora_r4"))):
        factory, options = optimizer_of(recipe(**changes))
        assert factory is MoLFFactory and options["adapters"] == adapters
    assert optimizer_of(recipe(method="lora_plus"))[0] is LoraPlusFactory


def test_molf_finds_all_experts_whatever_is_active(tiny_model):
    asked = recipe(method="molf_e")
    model = add_adapters(tiny_model, asked, freeze_rest=True)
    model.set_adapter("lora_r2")
    factory, options = optimizer_of(asked)
    optimizer = factory()(model, **options)
    assert isinstance(optimizer, MoLF)
    assert {tuple(group["experts"]) for group in optimizer.param_groups} == {("lora_r2", "lora_r4")}


def test_lora_plus_lets_b_learn_faster(tiny_model):
    asked = recipe(method="lora_plus", loraplus_lr_ratio=8.0)
    model = add_adapters(tiny_model, asked, freeze_rest=True)
    factory, options = optimizer_of(asked)
    optimizer = factory()(model, **options)
    assert type(optimizer) is torch.optim.AdamW
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert rates.pop(id(p)) == (8e-3 if "lora_B" in name else 1e-3, 0.01)
    assert not rates


def test_adapters_replace_those_of_an_earlier_run(tiny_model, tmp_path):
    folder = tmp_path / "adapters"
    (folder / "lora_r64").mkdir(parents=True)
    save_adapters(add_adapters(tiny_model, recipe(method="molf_e"), freeze_rest=True), folder)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"lora_r2", "lora_r4"}
    assert {path.name for path in tmp_path.iterdir()} == {"adapters"}
