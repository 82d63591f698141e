import pytest

from molf.cli import main
from molf.study.methods.recipe_file import RecipeFile

MADE = RecipeFile("routing", "a run", 100, 90, ["a"], {"b": 2, "c": 5})


@pytest.fixture
def asked(monkeypatch):
    """What the command asks for, instead of making it."""
    calls = []
    for name in ("recipe_from_run", "recipe_from_probe"):
        monkeypatch.setattr(f"molf.study.run.recipes.{name}", lambda *given: calls.append(given) or MADE)
    return calls


def test_from_a_run(asked, tmp_path, capsys):
    assert main(["recipe", str(tmp_path), "--budget", "5%", "--allocation", "random", "--draw", "2"]) == 0
    ((run, request, folder),) = asked
    assert (run, folder) == (tmp_path, tmp_path / "recipe-random-2")
    assert (request.budget, request.rule, request.draw) == ("5%", "random", 2)
    printed = capsys.readouterr().out
    assert "90 parameters train, of a budget of 100" in printed
    assert "1 layers whole, 2 by LoRA of rank 2 to 5" in printed
    assert f"molf train --recipe {folder}/recipe.yaml" in printed


def test_from_a_probe_with_the_settings_of_a_run(asked, tmp_path):
    line = f"recipe --probe_steps 5 --ranks 2 4 --task fact --output_dir {tmp_path}/r --learning_rate 1e-3"
    assert main(line.split()) == 0
    ((config, steps, request, folder),) = asked
    assert (steps, folder, request.rule) == (5, tmp_path / "r", "routing")
    assert (config.method.ranks, config.task.task, config.train["learning_rate"]) == ([2, 4], "fact", 1e-3)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "give either the folder of a run first, or --probe_steps"),
        ("runs/x --probe_steps 3", "give either the folder of a run first, or --probe_steps"),
        ("runs/x --learning_rate 1", "unexpected '--learning_rate'; settings of a run are for --probe_steps"),
        ("--probe_steps 3", "--probe_steps keeps no run: give --output_dir"),
        ("--probe_steps 3 --output_dir x --learning_rte 1", "unknown setting 'learning_rte'"),
    ],
)
def test_command_lines_that_cannot_be(asked, line, words, capsys):
    assert main(["recipe", *line.split()]) == 2
    assert words in capsys.readouterr().err and not asked


def test_only_files_that_are_there_are_named_and_commands_can_be_pasted(asked, tmp_path, capsys):
    run = tmp_path / "my run"
    (folder := run / "recipe-routing").mkdir(parents=True)
    (folder / "axolotl.yaml").touch()
    assert main(["recipe", str(run / "result.json")]) == 0
    printed = capsys.readouterr().out
    assert f"--recipe '{folder / 'recipe.yaml'}' --model" in printed
    assert (
        f"for axolotl: {folder / 'axolotl.yaml'}" in printed and "for PEFT: no file, as it cannot train this" in printed
    )
