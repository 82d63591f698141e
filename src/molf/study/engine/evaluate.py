"""Evaluates a model on a task, and keeps what every number was computed from."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molf.study.engine.inference import TextGenerator, answer
from molf.study.engine.predictions import as_predictions
from molf.tasks import Metric, Row, Task


@dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation.

    Attributes:
        metrics: The task's metrics by name.
        predictions: For each row, as plain JSON, its number, its record, and the answers with what was asked.
    """

    metrics: dict[str, Metric]
    predictions: list[dict[str, Any]]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: list[Row],
    *,
    batch_tokens: int = 4096,
    progress: bool = False,
    generate: TextGenerator | None = None,
) -> Evaluation:
    """Ask the model everything the task wants to know about the rows, and score the answers.

    Args:
        model: A causal language model, or a PEFT model around one.
        tokenizer: Its tokenizer.
        task: The benchmark.
        rows: The rows to evaluate on.
        batch_tokens: The most tokens a batch may have, padding included.
        progress: Show progress bars.
        generate: Answers the ``Generate`` requests in place of the model.

    Raises:
        ValueError: If there are no rows.
        FloatingPointError: If the model gives NaN.
    """
    if not rows:
        raise ValueError(f"no rows to evaluate the task {task.name!r} on")
    requests = [task.requests(row) for row in rows]
    flat = [request for of_row in requests for request in of_row]
    stream = iter(answer(model, tokenizer, flat, batch_tokens=batch_tokens, progress=progress, generate=generate))
    answers = [list(islice(stream, len(of_row))) for of_row in requests]
    return Evaluation(task.score(rows, answers), as_predictions(task, rows, requests, answers))
