"""Every example runs, on a tiny model instead of the pretrained one."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import own_score
import own_task
import pytorch_loop
import trl_sft
from molf.study.results.result import read_result
from molf.tasks import TASKS, TargetScores

EXAMPLES = Path(own_score.__file__).parent


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 40


def test_pytorch_loop(tiny_checkpoint, capsys):
    losses = pytorch_loop.main(tiny_checkpoint, rank=2, steps=4)
    assert losses[-1] < losses[0]
    assert "full fine-tuning won" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # no accelerator here
def test_trl_sft(tiny_checkpoint, tmp_path):
    trainer = trl_sft.main(tiny_checkpoint, str(tmp_path), rank=2, steps=3)
    assert trainer.state.global_step == 3
    assert len((tmp_path / "routing.jsonl").read_text().splitlines()) == 4, "a header and three steps"
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_own_score(capsys):
    loss, routing = own_score.main(steps=5)
    assert loss > 0 and routing.chosen.sum() == 2
    assert "won the last step" in capsys.readouterr().out


def test_own_task(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "boolq", own_task.BoolQ())
    rows = [{"passage": f"{n} is a number.", "question": f"is {n} a number", "answer": n % 3 > 0} for n in range(6)]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--task", "boolq", "--data_path", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    assert own_task.main(["train", "--model_name_or_path", tiny_checkpoint, "--ranks", "2", *data]) == 0
    result = read_result(tmp_path / "run")
    assert (result.headline, result.metrics["accuracy"].n) == ("accuracy", 6)
    task = own_task.BoolQ()
    yes, no = TargetScores((-1.0,), (1,), (True,)), TargetScores((-2.0,), (2,), (False,))
    assert task.score(rows, [[yes, no]] * 6)["accuracy"].value == pytest.approx(100 * 4 / 6)
    assert [task.example(row)["completion"] for row in rows[:2]] == [" no", " yes"]


def test_the_page_about_tasks_shows_the_example():
    page = (EXAMPLES.parent / "docs" / "adding-a-task.md").read_text()
    assert f"```python\n{Path(own_task.__file__).read_text()}```" in page
