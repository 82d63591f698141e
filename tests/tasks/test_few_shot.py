import pytest

from molf.tasks import Generate, Likelihood, Metric, OptionScores, Split, get_task
from molf.tasks.few_shot import FewShot, with_examples


class Sums:
    """A benchmark of four rows to train on and two others."""

    name = "sums"
    headline = "right"

    def load(self, data_path, *, sample, limit, seed):
        return Split([{"n": n} for n in range(4)], [{"n": 7}, {"n": 8}], "here")

    def example(self, row):
        return {"prompt": f"1 + {row['n']} =", "completion": f" {row['n'] + 1}"}

    def requests(self, row):
        prompt = self.example(row)["prompt"]
        return [Likelihood(prompt, " 1"), Generate(prompt, 3, (";",))]

    def score(self, rows, answers):
        return {"right": Metric(50, len(rows))}


def load(count, seed=0, task=None):
    task = task or Sums()
    return with_examples(task, task.load(None, sample=False, limit=None, seed=seed), count, seed)


def test_every_prompt_begins_with_the_examples_in_training_and_evaluation():
    task, split = load(2)
    used = [row["n"] for row in Sums().load(None, sample=False, limit=None, seed=0).train if row not in split.train]
    (row, *_), (first, second) = split.eval, used
    orders = [f"1 + {a} = {a + 1}\n\n1 + {b} = {b + 1}\n\n" for a, b in ((first, second), (second, first))]
    assert task.shots in orders
    assert task.example(row) == {"prompt": f"{task.shots}1 + 7 =", "completion": " 8"}
    assert task.requests(row) == [Likelihood(f"{task.shots}1 + 7 =", " 1"), Generate(f"{task.shots}1 + 7 =", 3, (";",))]
    assert (len(split.train), split.eval) == (2, [{"n": 7}, {"n": 8}])
    assert split.origin == "here, 2 of the training rows as examples"


def test_the_seed_chooses():
    shots = [load(2, seed)[0].shots for seed in (0, 0, *range(1, 9))]
    assert shots[0] == shots[1]
    assert len(set(shots)) > 2


def test_examples_are_not_evaluated_where_the_rows_are_the_same():
    task = get_task("fact")
    few, split = with_examples(task, task.load(None, sample=True, limit=10, seed=0), 3, seed=0)
    assert split.train == split.eval
    assert len(split.eval) == 7
    assert not any(task.example(row)["prompt"] in few.shots for row in split.eval)


def test_it_is_the_benchmark_in_all_else():
    task, split = load(1)
    assert (task.name, task.headline) == ("sums", "right")
    assert task.load(None, sample=False, limit=None, seed=0).origin == "here"
    assert task.score(split.eval, [[], []]) == {"right": Metric(50, 2)}
    assert task.outcomes(split.eval, [[], []]) == [{}, {}]
    med = get_task("med")
    row = med.load(None, sample=True, limit=1, seed=0).eval[0]
    answers = [[OptionScores((-1.0, -2.0, -2.0, -2.0), (1, 2, 3, 4)), " A"]]
    assert FewShot(med, "").outcomes([row], answers) == med.outcomes([row], answers)


def test_what_cannot_be_done_is_told():
    with pytest.raises(ValueError, match="--few_shot 5 needs 5 training rows, but here has 4"):
        load(5)

    class Texts(Sums):
        def example(self, row):
            return {"text": "x"}

    with pytest.raises(ValueError, match="--few_shot 1 needs rows with a prompt and a completion, but those of sums"):
        load(1, task=Texts())
    with pytest.raises(ValueError, match="--few_shot 2 takes every row to evaluate on of .*; give fewer examples"):
        with_examples(get_task("fact"), get_task("fact").load(None, sample=True, limit=2, seed=0), 2, seed=0)
