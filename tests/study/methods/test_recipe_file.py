import json
import re
from dataclasses import replace

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from molf.study.methods.recipe_file import RecipeFile, lora_arguments, read_recipe, write_recipe
from small import tiny_llama

LAYER = "model.layers.{}.self_attn.{}_proj"
WHOLE = [LAYER.format(0, "q"), "model.layers.1.mlp.down_proj"]
RANKS = {LAYER.format(1, "q"): 1, LAYER.format(0, "v"): 3}
RECIPE = RecipeFile("routing", "the routing of a run", 9000, 8000, WHOLE, RANKS)


def written(folder, recipe=RECIPE, model=None):
    write_recipe(folder, recipe, [name for name, _ in (model or tiny_llama()).named_parameters()])
    return folder


def test_what_is_written_is_read(tmp_path):
    assert read_recipe(written(tmp_path) / "recipe.yaml") == RECIPE


def test_peft_trains_exactly_that_from_its_file_alone(tmp_path):
    config = LoraConfig.from_pretrained(written(tmp_path) / "peft")
    model = get_peft_model(tiny_llama(), config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"base_model.model.{name}.modules_to_save.default.weight" for name in WHOLE}
    expected |= {f"base_model.model.{name}.lora_{side}.default.weight" for name in RANKS for side in "AB"}
    assert trained.keys() == expected
    for name, rank in RANKS.items():
        layer = model.base_model.model.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 2.0)


def test_axolotl_unfreezes_the_whole_layers(tmp_path):
    patterns = yaml.safe_load((written(tmp_path) / "axolotl.yaml").read_text())["unfrozen_parameters"]
    names = [name for name, _ in tiny_llama().named_parameters()]
    matched = [name for name in names if any(re.match(pattern, name) for pattern in patterns)]
    assert sorted(matched) == sorted(f"{name}.weight" for name in WHOLE)


def test_names_match_nothing_else():
    """PEFT takes keys of patterns for the ends of names, as regular expressions."""
    arguments = lora_arguments({"a.b": 2, "x.a.b": 3, "aab": 4}, dropout=0.0)
    patterns = arguments["rank_pattern"]
    for name, rank in {"a.b": 2, "x.a.b": 3, "aab": 4}.items():
        found = [own for key, own in patterns.items() if re.match(rf"(.*\.)?({key})$", name)]
        assert found == [rank]


def test_without_lora_there_is_no_peft_file(tmp_path):
    written(tmp_path)  # an earlier recipe in the same folder leaves nothing behind
    folder = written(tmp_path, replace(RECIPE, ranks={}))
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"recipe.yaml", "axolotl.yaml"}


def test_without_whole_layers_peft_saves_no_module_and_axolotl_which_would_train_everything_gets_no_file(tmp_path):
    written(tmp_path)
    folder = written(tmp_path, replace(RECIPE, whole=[]))
    assert json.loads((folder / "peft/adapter_config.json").read_text())["modules_to_save"] is None
    assert not (folder / "axolotl.yaml").exists()


@pytest.mark.parametrize("name", ["recipe.yaml", "axolotl.yaml", "peft/adapter_config.json"])
def test_files_of_the_user_are_neither_replaced_nor_removed(tmp_path, name):
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("base_model: mine")
    with pytest.raises(ValueError, match=f"holds {name}, which no recipe wrote .*choose another --output_dir"):
        written(tmp_path, replace(RECIPE, whole=[]))
    assert own.read_text() == "base_model: mine"
    own.unlink()
    assert read_recipe(written(tmp_path) / "recipe.yaml") == read_recipe(written(tmp_path) / "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be an object, found null"),
        ("[]", "must be an object, found a list"),
        ("{whole", "is not a recipe"),
        ("whole: []", "no allocation, source, budget, trainable, ranks"),
        (yaml.safe_dump(vars(RECIPE) | {"more": 1}), "unknown more"),
        (yaml.safe_dump(vars(RECIPE) | {"ranks": {"a": "2"}}), "must be an integer"),
        (yaml.safe_dump(vars(RECIPE) | {"ranks": {"a": 0}}), "the rank of a is below 1"),
        (yaml.safe_dump(vars(RECIPE) | {"whole": [3]}), "3 in whole is no name"),
        (yaml.safe_dump(vars(RECIPE) | {"whole": list(RANKS)}), "in whole is no name, or in ranks too"),
        (yaml.safe_dump(vars(RECIPE) | {"whole": [], "ranks": {}}), "no layer trains"),
        ("- &a [*a]", "is not a recipe"),
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_file_is_refused(tmp_path, text, words):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"recipe.yaml is not a recipe: .*{re.escape(words)}|{words}"):
        read_recipe(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no recipe .*none.yaml; write one with `molf recipe RUN`"):
        read_recipe(tmp_path / "none.yaml")


def test_a_folder_is_told_from_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=f"recipe={re.escape(str(tmp_path))} is a folder: give its recipe.yaml, "):
        read_recipe(tmp_path)
