import pytest

from molf.study.engine.predictions import PREDICTIONS_BEFORE_FILE, PREDICTIONS_FILE, as_predictions, write_predictions
from molf.study.report.examples import LONGEST, SHOWN, read_examples
from molf.study.results.result import read_result
from molf.tasks import get_task
from molf.tasks.base import OptionScores, TargetScores
from report_runs import prediction, write_run
from small_runs import small_result


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def groups(folder):
    return {
        group.title: [example.row for example in group.examples] for group in read_examples(folder, read_result(folder))
    }


def test_rows_by_how_they_changed(folder):
    assert groups(folder) == {
        "wrong before, right after": [0],
        "right before, wrong after": [1],
        "wrong before and after": [2],
        "right before and after": [3],
    }
    (example,) = read_examples(folder, read_result(folder))[0].examples
    assert (example.prompt, example.expected) == ("Paris is in", " Rome")
    assert example.before == example.after == "Rome"


def test_without_predictions_before(folder):
    (folder / PREDICTIONS_BEFORE_FILE).unlink()
    assert groups(folder) == {"wrong": [1, 2], "right": [0, 3]}
    (folder / PREDICTIONS_FILE).unlink()
    assert groups(folder) == {}


def test_many_rows_and_long_texts_are_cut(folder):
    long = "x" * LONGEST + "end"
    write_predictions(folder / PREDICTIONS_FILE, (prediction(row, True, long, subject=long) for row in range(50)))
    (group,) = [g for g in read_examples(folder, read_result(folder)) if g.title == "right"]
    assert (group.count, len(group.examples)) == (46, SHOWN)
    assert group.examples[0].after == "x" * LONGEST + "…"
    assert group.examples[0].prompt.endswith("xend is in") and len(group.examples[0].prompt) == LONGEST + 1


@pytest.mark.parametrize(
    "damage",
    [{"answers": []}, {"answers": 5}, {"record": {}}, {"record": None}, {"row": [1]}, {"outcome": None}],
    ids=str,
)
def test_damaged_predictions_are_named(folder, damage):
    good = prediction(0, True, "Rome")
    write_predictions(folder / PREDICTIONS_FILE, [good, good | {"row": 1} | damage])
    with pytest.raises(ValueError, match="line 2: not a prediction of this version of molf: .*`molf eval`"):
        groups(folder)


def options(best):
    return [OptionScores(tuple(0.0 if i == best else -1.0 for i in range(4)), (1, 2, 3, 4)), " B"]


CHAT = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "B"}]
QUESTION = {"question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 1}
TASKS = {
    "med": ([QUESTION, QUESTION], [options(1), options(2)], " B"),
    "custom": (
        [{"prompt": "Which?", "completion": " B"}, {"messages": CHAT}],
        [[TargetScores((0.0, 0.0), (1, 2), (True, True))], [TargetScores((0.0, 0.0), (1, 2), (True, False))]],
        "1 of the 2 tokens of the answer are the most likely ones",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_which_rows_are_right(name, tmp_path):
    task, (rows, answers, wrote) = get_task(name), TASKS[name]
    write_predictions(tmp_path / PREDICTIONS_FILE, as_predictions(task, rows, answers))
    wrong, right = read_examples(tmp_path, small_result(config={"task": name}, headline=task.headline))
    assert ([wrong.title, right.title], wrong.count, right.count) == (["wrong", "right"], 1, 1)
    assert wrong.examples[0].row == 1 and wrong.examples[0].after == wrote
