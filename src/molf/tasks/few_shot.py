"""Worked examples before every prompt, for any benchmark."""

import random
from dataclasses import replace
from typing import Any

from molf.tasks.base import Answer, ExampleTokens, HasRowResults, Metric, Request, Row, Split, Task


class FewShot:
    """A benchmark whose prompts all begin with the same examples, in training and in evaluation.

    Args:
        task: The benchmark itself.
        shots: The examples, each ending in an empty line.
    """

    def __init__(self, task: Task, shots: str) -> None:
        self.task, self.shots = task, shots
        self.name, self.headline = task.name, task.headline

    def load(self, data_path: str | None, *, sample: bool, limit: int | None, seed: int) -> Split:
        """Load the benchmark's rows, those of the examples among them."""
        return self.task.load(data_path, sample=sample, limit=limit, seed=seed)

    def example(self, row: Row) -> dict[str, Any]:
        """Return the training example of a row, with the examples before its prompt."""
        own = self.task.example(row)
        return {**own, "prompt": self.shots + own["prompt"]}

    def requests(self, row: Row) -> list[Request]:
        """Return what to ask about a row, with the examples before every prompt."""
        return [self._prefixed(request) for request in self.task.requests(row)]

    def _prefixed(self, request: Request) -> Request:
        if isinstance(request, ExampleTokens):
            return ExampleTokens({**request.example, "prompt": self.shots + request.example["prompt"]})
        return replace(request, prompt=self.shots + request.prompt)

    def score(self, rows: list[Row], answers: list[list[Answer]]) -> dict[str, Metric]:
        """Return the benchmark's metrics."""
        return self.task.score(rows, answers)

    def outcomes(self, rows: list[Row], answers: list[list[Answer]]) -> list[dict[str, Any]]:
        """Return what came of every row, as far as the benchmark tells."""
        return self.task.outcomes(rows, answers) if isinstance(self.task, HasRowResults) else [{} for _ in rows]


def with_examples(task: Task, split: Split, count: int, seed: int) -> tuple[Task, Split]:
    """Put training rows before every prompt; they are neither trained nor evaluated on any more.

    Args:
        task: The benchmark.
        split: Its rows.
        count: How many examples.
        seed: Chooses them.

    Raises:
        ValueError: If there are too few training rows, or they have no prompt.
    """
    if len(split.train) < count:
        raise ValueError(f"few_shot={count} needs as many training rows, and {split.origin} has {len(split.train)}")
    chosen = random.Random(seed).sample(split.train, count)
    examples = [task.example(row) for row in chosen]
    if any("prompt" not in example for example in examples):
        raise ValueError(
            f"few_shot={count} needs examples of a prompt and a completion, and those of {task.name} have no prompt"
        )
    shots = "".join(f"{example['prompt']}{example['completion']}\n\n" for example in examples)
    train, evaluation = ([row for row in rows if row not in chosen] for rows in (split.train, split.eval))
    return FewShot(task, shots), Split(train, evaluation, f"{split.origin}, {count} of the training rows as examples")
