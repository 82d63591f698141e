import pytest

from molf.study.config.run_config import TaskConfig
from molf.study.run.selection import load_split, selection_split
from molf.tasks import Split, get_task

ROWS = [{"n": number} for number in range(10)]


def test_training_rows_are_held_out():
    split = Split(ROWS[:6], ROWS[6:], "here")
    chosen = selection_split(split, ROWS[:6], 2)
    assert (chosen.train, chosen.eval) == (ROWS[:4], ROWS[4:6])
    assert "selection" in chosen.origin


def test_rows_that_equal_a_held_out_one_are_not_trained_on():
    split = Split([ROWS[1], ROWS[0], ROWS[2], ROWS[0]], ROWS[6:], "here")
    chosen = selection_split(split, split.train, 1)
    assert (chosen.train, chosen.eval) == ([ROWS[1], ROWS[2]], [ROWS[0]])
    with pytest.raises(ValueError, match="at least one more to train on"):
        selection_split(Split([ROWS[0], ROWS[0]], ROWS[6:], "here"), [], 1)


def test_where_training_rows_are_evaluated_other_rows_are():
    split = Split(ROWS[:4], ROWS[:4], "here")
    chosen = selection_split(split, ROWS, 5)
    assert chosen.train == chosen.eval == ROWS[4:9]


def test_rows_that_are_evaluated_on_are_never_used():
    split = Split([*ROWS[:6], ROWS[8]], ROWS[6:], "here")
    chosen = selection_split(split, split.train, 3)
    assert not [row for row in chosen.train + chosen.eval if row in split.eval]
    same = Split(ROWS[:3], ROWS[:3], "here")
    assert selection_split(same, [*ROWS[:5], *ROWS[:3]], 2).eval == ROWS[3:5]


@pytest.mark.parametrize(("split", "count"), [((6, 6), 6), ((6, 0), 5)])
def test_too_few_rows(split, count):
    train, start = split
    with pytest.raises(ValueError, match=f"selection_limit={count} needs .* lower selection_limit"):
        selection_split(Split(ROWS[:train], ROWS[start:train] or ROWS[train:], "here"), ROWS[:train], count)


def test_facts_are_chosen_by_other_facts():
    task = get_task("fact")
    judged = load_split(task, TaskConfig(sample=True, limit=20), seed=0)
    chosen = load_split(task, TaskConfig(sample=True, limit=20, selection_limit=30), seed=0)
    assert judged == task.load(sample=True, limit=20)
    assert chosen.train == chosen.eval == task.load(sample=True, limit=50).train[20:]
    with pytest.raises(ValueError, match="there are 980;"):
        load_split(task, TaskConfig(sample=True, limit=20, selection_limit=981), seed=0)
