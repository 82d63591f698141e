import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from molf.study.config.method_config import MethodConfig
from molf.study.methods.recipe_file import RecipeFile, read_recipe, write_recipe
from molf.study.run.job import job_recipe, load_job, make_trainer
from molf.study.run.recipes import Request, layers_of, parse_budget, recipe_from_probe, recipe_from_run
from molf.study.sizing.blueprint import Blueprint
from molf.study.sizing.parameters import count_parameters
from small_runs import carry_out, small_config, weights

RULES = ["routing", "random", "kind", "uniform", "eva"]


@pytest.fixture(scope="module")
def recipes(finished, tmp_path_factory):
    """The recipe of every rule, from the same run and budget."""
    run, folder = finished(method="molf").folder, tmp_path_factory.mktemp("recipes")
    return {rule: recipe_from_run(run, Request("20%", rule), folder / rule) for rule in RULES}, folder


def test_all_rules_use_the_same_budget(recipes, shared_model):
    made, folder = recipes
    model = AutoModelForCausalLM.from_pretrained(shared_model)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    layers = layers_of(model, [name for name in names if name != "lm_head"])
    (budget,) = {recipe.budget for recipe in made.values()}
    assert budget == sum(p.numel() for p in model.parameters()) // 5
    for rule, recipe in made.items():
        cost = sum(layers[name].whole for name in recipe.whole)
        cost += sum(layers[name].per_rank * rank for name, rank in recipe.ranks.items())
        cheapest = min(layer.per_rank for name, layer in layers.items() if name not in recipe.whole)
        assert recipe.trainable == cost and budget - cheapest < cost <= budget, rule
        assert read_recipe(folder / rule / "recipe.yaml") == recipe
    assert made["routing"].whole and not made["uniform"].whole and not made["eva"].whole
    assert len(set(made["eva"].ranks.values())) > 2, "EVA's ranks differ"
    assert made["random"].allocation == "random, draw 0"


@pytest.mark.parametrize("rule", ["routing", "uniform"])
def test_training_trains_exactly_that(recipes, rule, settings, shared_model):
    made, folder = recipes
    recipe = made[rule]
    result = carry_out(
        settings, method="static", allocation=str(folder / rule / "recipe.yaml"), lora_learning_rate=1e-2
    )
    whole = sum(t.numel() for name, t in weights(shared_model).items() if name.removesuffix(".weight") in recipe.whole)
    assert result.training.trainable_parameters + result.training.lora_parameters == recipe.trainable
    assert result.training.trainable_parameters == whole
    before, after = weights(shared_model), weights(settings["output_dir"])
    for name, old in before.items():
        change, layer = after[name] - old, name.removesuffix(".weight")
        rank = recipe.ranks.get(layer, 0)
        if layer in recipe.whole:
            assert torch.linalg.matrix_rank(change) > 4, name
        elif rank:
            values = torch.linalg.svdvals(change.double())
            assert values[0] > 1e-5 > values[rank:].sum(), name
        else:
            assert not change.any(), name


def test_a_plan_counts_the_same(recipes, settings):
    made, folder = recipes
    file = str(folder / "routing" / "recipe.yaml")
    blueprint = Blueprint(small_config(settings, method="static", allocation=file).resolved())
    assert sum(count.trainable for count in count_parameters(blueprint.model).values()) == made["routing"].trainable


def test_rates_and_decays(recipes, settings):
    made, folder = recipes
    rates = {"learning_rate": 3e-4, "weight_decay": 0.2, "lora_learning_rate": 4e-3, "lora_weight_decay": 0.05}
    file = str(folder / "routing" / "recipe.yaml")
    job = load_job(small_config(settings, method="static", allocation=file, **rates).resolved())
    trainer = make_trainer(job, job_recipe(job))
    groups = trainer.create_optimizer().param_groups
    assert [(group["initial_lr"] if "initial_lr" in group else group["lr"]) for group in groups] == [3e-4, 4e-3]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.05]
    assert sum(p.numel() for group in groups for p in group["params"]) == made["routing"].trainable


@pytest.mark.parametrize("ranks", [True, False], ids=["with LoRA", "whole layers only"])
def test_resuming_changes_nothing(recipes, ranks, settings, tmp_path):
    made, _ = recipes
    recipe = made["routing"] if ranks else replace(made["routing"], ranks={})
    write_recipe(tmp_path, recipe, [])
    changes = {
        "method": "static",
        "allocation": str(tmp_path / "recipe.yaml"),
        "save_strategy": "steps",
        "save_steps": 2,
    }
    carry_out(settings, **changes, eval_limit=1)
    whole, before = weights(settings["output_dir"]), weights(settings["model_name_or_path"])
    changed = {name for name, tensor in whole.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in (*recipe.whole, *recipe.ranks)}
    resume = str(tmp_path / "run" / "checkpoint-2")
    carry_out(settings, **changes, eval_limit=1, output_dir=str(tmp_path / "again"), resume_from_checkpoint=resume)
    again = weights(tmp_path / "again")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    other = {name: rank + 1 for name, rank in recipe.ranks.items()} or {"model.layers.0.self_attn.q_proj": 1}
    write_recipe(tmp_path, replace(recipe, whole=recipe.whole if ranks else [], ranks=other), [])
    with pytest.raises(ValueError, match=r"checkpoint-2 was made with recipe=SHA-256 .* \(here SHA-256"):
        carry_out(settings, **changes, output_dir=str(tmp_path / "other"), resume_from_checkpoint=resume)


def test_a_probe(settings, tmp_path, shared_model):
    config = small_config(settings, method="molf")
    made = recipe_from_probe(config, 3, Request("5000"), tmp_path / "recipe")
    assert made.source == "a probe of 3 steps" and 4900 < made.trainable <= made.budget == 5000
    assert {path.name for path in tmp_path.iterdir()} == {"recipe"}, "the probe leaves nothing else"
    with pytest.raises(ValueError, match="a probe with method lora, which does not route"):
        recipe_from_probe(small_config(settings, method="lora"), 3, Request(), tmp_path / "recipe")
    with pytest.raises(ValueError, match="probe_steps=0 must be at least 1"):
        recipe_from_probe(config, 0, Request(), tmp_path / "recipe")


def test_a_frozen_base_has_no_whole_layers(finished, tmp_path):
    made = recipe_from_run(finished(method="molf_e").folder, Request("10%"), tmp_path)
    assert made.whole == [] and all(name.startswith("model.layers.") for name in made.ranks)


def test_a_run_without_routing_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="has no routing log: make recipes from a run with method molf or molf_e"):
        recipe_from_run(finished(method="lora").folder, Request(), tmp_path)


def test_another_model_is_refused(settings, tmp_path):
    recipe = RecipeFile("routing", "", 10, 10, ["model.layers.7.self_attn.q_proj"], {})
    write_recipe(tmp_path, recipe, [])
    with pytest.raises(
        ValueError, match=r"the recipe names model.layers.7.self_attn.q_proj, which this model does not"
    ):
        carry_out(settings, method="static", allocation=str(tmp_path / "recipe.yaml"))


def test_how_the_file_is_given(settings):
    with pytest.raises(ValueError, match="method static needs to know what trains: give --recipe FILE"):
        carry_out(settings, method="static")
    with pytest.raises(ValueError, match="there is no recipe publishd; .* default or published"):
        carry_out(settings, method="static", recipe="publishd")
    assert MethodConfig(recipe="a.yaml") == MethodConfig(method="static", allocation="a.yaml")
    for wrong in ({"method": "lora"}, {"method": "static", "allocation": "b.yaml"}):
        with pytest.raises(ValueError, match="recipe=a.yaml with .* leave one"):
            MethodConfig(recipe="a.yaml", **wrong)


@pytest.mark.parametrize(("text", "budget"), [("10%", 100), ("0.15%", 1), ("100%", 1000), ("7", 7), ("1e2", 100)])
def test_budgets(text, budget):
    assert parse_budget(text, 1000) == budget


@pytest.mark.parametrize("text", ["", "%", "ten", "nan", "inf", "0", "-5%", "101%", "0.01%"])
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match=re.escape(f"budget={text} is ")):
        parse_budget(text, 1000)


def test_a_log_that_decided_nothing_makes_no_recipe(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished(method="molf").folder, run)
    log = run / "routing.jsonl"
    header, *lines = log.read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    idle = [line | {"scores": [[0] * len(own) for own in line["scores"]]} for line in lines]
    log.write_text("\n".join([header, *map(json.dumps, idle)]) + "\n")
    with pytest.raises(ValueError, match=f"the routing of {run} decided nothing: every score is 0"):
        recipe_from_run(run, Request(), tmp_path / "recipe")
    assert recipe_from_run(run, Request("10%", "uniform"), tmp_path / "recipe").ranks
