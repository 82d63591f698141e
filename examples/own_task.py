"""A benchmark of one's own: BoolQ, yes-or-no questions about a passage (Clark et al., NAACL 2019)."""

from typing import Any

from molf.cli import main
from molf.tasks import TASKS, Answer, Likelihood, Metric, Request, Row
from molf.tasks.metrics import percentage
from molf.tasks.sources import HubData, Source, SourceTask

FIELDS = {"passage": str, "question": str, "answer": bool}


class BoolQ(SourceTask):
    """Is the answer yes or no? The model answers what it finds more likely."""

    name, headline = "boolq", "accuracy"
    source = Source(HubData("google/boolq"), splits=("train", "validation"), fields=FIELDS)

    def example(self, row: Row) -> dict[str, Any]:
        return {"prompt": prompt(row), "completion": " yes" if row["answer"] else " no"}

    def requests(self, row: Row) -> list[Request]:
        return [Likelihood(prompt(row), answer) for answer in (" yes", " no")]

    def score(self, rows: list[Row], answers: list[list[Answer]]) -> dict[str, Metric]:
        said_yes = [yes.mean_logprob > no.mean_logprob for yes, no in answers]
        right = [said == row["answer"] for said, row in zip(said_yes, rows, strict=True)]
        return {"accuracy": percentage(right)}


def prompt(row: Row) -> str:
    return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"


if __name__ == "__main__":  # python examples/own_task.py train --task boolq --model_name_or_path ...
    TASKS["boolq"] = BoolQ()
    raise SystemExit(main())
