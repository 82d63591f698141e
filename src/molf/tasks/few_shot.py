"""Worked examples before every prompt of any benchmark."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from molf.errors import MolfError
from molf.tasks.base import Answer, ExampleTokens, HasRowResults, Metric, Request, Row, Split, Task


class FewShot:
    """A benchmark whose prompts all start with the same examples, in training and in evaluation."""

    def __init__(self, task: Task, shots: str) -> None:
        # shots: the examples, each followed by an empty line.
        self.task, self.shots = task, shots
        self.name, self.headline = task.name, task.headline

    def load(self, data_path: str | None, *, sample: bool, limit: int | None, seed: int) -> Split:
        """Load the benchmark's rows, including those of the examples."""
        return self.task.load(data_path, sample=sample, limit=limit, seed=seed)

    def example(self, row: Row) -> dict[str, Any]:
        """Return the training example of a row, with the examples before its prompt."""
        return self._prefixed(self.task.example(row))

    def requests(self, row: Row) -> list[Request]:
        """Return the requests about a row, with the examples before every prompt."""
        return [
            ExampleTokens(self._prefixed(request.example))
            if isinstance(request, ExampleTokens)
            else replace(request, prompt=self.shots + request.prompt)
            for request in self.task.requests(row)
        ]

    def _prefixed(self, example: Mapping[str, Any]) -> dict[str, Any]:
        return {**example, "prompt": self.shots + example["prompt"]}

    def score(self, rows: list[Row], answers: list[list[Answer]]) -> dict[str, Metric]:
        """Return the benchmark's metrics."""
        return self.task.score(rows, answers)

    def outcomes(self, rows: list[Row], answers: list[list[Answer]]) -> list[dict[str, Any]]:
        """Return the outcome of every row, empty if the benchmark has none."""
        return self.task.outcomes(rows, answers) if isinstance(self.task, HasRowResults) else [{} for _ in rows]


def with_examples(task: Task, split: Split, count: int, seed: int) -> tuple[Task, Split]:
    """Put training rows, chosen by the seed, before every prompt; remove them from those to train and evaluate on.

    Raises:
        MolfError: There are too few rows, so that none is left to evaluate on, or the rows have no prompts.
    """
    if len(split.train) < count:
        raise MolfError(f"--few_shot {count} needs {count} training rows, but {split.origin} has {len(split.train)}")
    chosen = random.Random(seed).sample(split.train, count)
    examples = [task.example(row) for row in chosen]
    if any("prompt" not in example for example in examples):
        raise MolfError(
            f"--few_shot {count} needs rows with a prompt and a completion, but those of {task.name} have no prompt"
        )
    shots = "".join(f"{example['prompt']}{example['completion']}\n\n" for example in examples)
    train, evaluation = ([row for row in rows if row not in chosen] for rows in (split.train, split.eval))
    if split.eval and not evaluation:
        raise MolfError(
            f"--few_shot {count} takes every row to evaluate on of {split.origin}; give fewer examples or more rows"
        )
    return FewShot(task, shots), Split(train, evaluation, f"{split.origin}, {count} of the training rows as examples")
