"""Evaluates a model on a task, and keeps what every number was computed from."""

import gzip
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molf.study.engine.inference import answer
from molf.tasks import Answer, Metric, Request, Row, Task
from molf.tasks.data import written_whole


@dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation.

    Attributes:
        metrics: The task's metrics by name.
        predictions: For each row, as plain JSON, its number and the answers with what was asked.
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
) -> Evaluation:
    """Ask the model everything the task wants to know about the rows, and score the answers.

    Args:
        model: A causal language model, or a PEFT model around one.
        tokenizer: Its tokenizer.
        task: The benchmark.
        rows: The rows to evaluate on.
        batch_tokens: The most tokens a batch may have, padding included.
        progress: Show progress bars.

    Raises:
        ValueError: If there are no rows.
        FloatingPointError: If the model gives NaN.
    """
    if not rows:
        raise ValueError(f"no rows to evaluate the task {task.name!r} on")
    requests = [task.requests(row) for row in rows]
    flat = [request for of_row in requests for request in of_row]
    stream = iter(answer(model, tokenizer, flat, batch_tokens=batch_tokens, progress=progress))
    answers = [list(islice(stream, len(of_row))) for of_row in requests]
    predictions = [
        {"row": number, "answers": [_record(request, given) for request, given in zip(asked, got, strict=True)]}
        for number, (asked, got) in enumerate(zip(requests, answers, strict=True))
    ]
    return Evaluation(task.score(rows, answers), predictions)


def _record(request: Request, given: Answer) -> dict[str, Any]:
    """Return a request and its answer as plain JSON."""
    return {**asdict(request), **({"text": given} if isinstance(given, str) else asdict(given))}


def write_predictions(path: Path, predictions: Iterable[dict[str, Any]]) -> None:
    """Write predictions as gzip-compressed JSON Lines; equal predictions give equal bytes.

    Args:
        path: The file, named ``*.jsonl.gz``. It is written whole or not at all.
        predictions: One JSON object per row.

    Raises:
        ValueError: If ``path`` has another name.
    """
    if not path.name.endswith(".jsonl.gz"):
        raise ValueError(f"predictions are gzip-compressed JSON Lines; {path} must end in .jsonl.gz")
    with (
        written_whole(path) as partial,
        partial.open("wb") as raw,
        # Without name and time in its header, so that the bytes depend on the predictions alone.
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file,
    ):
        for prediction in predictions:
            file.write(json.dumps(prediction, ensure_ascii=False).encode() + b"\n")
