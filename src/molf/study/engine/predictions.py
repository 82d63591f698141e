"""The file of predictions, and metrics recomputed from it."""

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molf.errors import MolfError
from molf.files import atomic_write
from molf.tasks import Answer, Metric, OptionScores, Request, Row, TargetScores, Task
from molf.tasks.base import HasRowResults
from molf.tasks.formats import records_of
from molf.tasks.records import check_fields

PREDICTIONS_FILE = "predictions.jsonl.gz"
PREDICTIONS_BEFORE_FILE = "predictions_before.jsonl.gz"
"""Those of the model before training, if it was evaluated."""
_FIELDS: dict[str, type] = {"row": int, "record": dict, "answers": list}


def as_predictions(task: Task, rows: list[Row], answers: list[list[Answer]]) -> list[dict[str, Any]]:
    """Return one plain JSON object per row: its number, its record, its requests with their answers, any outcome."""
    outcomes = task.outcomes(rows, answers) if isinstance(task, HasRowResults) else None
    return [
        {
            "row": number,
            "record": json.loads(json.dumps(row, default=str)),  # dates, which Parquet has, become text
            "answers": [_record(request, given) for request, given in zip(task.requests(row), own, strict=True)],
            **({"outcome": outcomes[number]} if outcomes is not None else {}),
        }
        for number, (row, own) in enumerate(zip(rows, answers, strict=True))
    ]


def _record(request: Request, given: Answer) -> dict[str, Any]:
    """Return a request and its answer as plain JSON."""
    # Not asdict, which copies every value: an evaluation has many thousands of answers.
    return {**vars(request), **({"text": given} if isinstance(given, str) else vars(given))}


def _answer(record: dict[str, Any]) -> Answer:
    """Return the answer that ``_record`` wrote."""
    if "text" in record:
        return str(record["text"])
    logprobs, token_ids = tuple(record["logprobs"]), tuple(record["token_ids"])
    if "options" in record:
        return OptionScores(logprobs, token_ids)
    return TargetScores(logprobs, token_ids, tuple(record["greedy"]))


def rescored(path: Path, task: Task) -> dict[str, Metric]:
    """Recompute the metrics from a file of predictions, without a model.

    Raises:
        MolfError: The file is damaged, or not of this task.
    """
    rows, answers = [], []
    for where, prediction in records_of(path):
        check_fields(prediction, _FIELDS, where)
        with readable(where):
            answers.append([_answer(record) for record in prediction["answers"]])
        rows.append(prediction["record"])
    with readable(str(path)):
        return task.score(rows, answers)


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn what reading a damaged prediction raises into a ``MolfError``."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise MolfError(
            f"{where}: not a prediction of this version of molf: {error!r}; evaluate the model again with `molf eval`"
        ) from error


def write_predictions(path: Path, predictions: Iterable[dict[str, Any]]) -> None:
    """Write predictions as gzip-compressed JSON Lines; equal predictions give equal bytes."""
    with (
        atomic_write(path) as partial,
        partial.open("wb") as raw,
        # No name and time in the header, so that the bytes depend on the predictions alone.
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file,
    ):
        for prediction in predictions:
            file.write(json.dumps(prediction, ensure_ascii=False).encode() + b"\n")
