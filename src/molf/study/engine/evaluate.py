"""Evaluates a model on a task and keeps what every metric was computed from."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molf.errors import MolfError
from molf.study.engine.inference import TextGenerator, answer
from molf.study.engine.predictions import as_predictions
from molf.tasks import Answer, Metric, Row, Task


@dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation.

    Attributes:
        metrics: The task's metrics by name.
        predictions: For each row, as plain JSON: its number, its record, and the requests with their answers.
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
    shard: bool = False,
) -> Evaluation:
    """Answer all requests of a task with the model and score the answers.

    Args:
        model: A causal language model, or a PEFT model around one.
        tokenizer: Its tokenizer.
        task: The benchmark.
        rows: The rows to evaluate on.
        batch_tokens: Maximum number of tokens in a batch, padding included.
        progress: Show progress bars; in a sharded evaluation, on rank 0 only.
        generate: Answers the ``Generate`` requests instead of the model.
        shard: Split the rows over the ranks of the default process group, if there is one. Every rank must make this call
            with the same rows and hold the whole model. Rank 0 computes the metrics; every rank returns the same result.

    Raises:
        MolfError: There are no rows, or the model's logits contain NaN.
    """
    if not rows:
        raise MolfError(f"no rows to evaluate the task {task.name!r} on")
    sharded = shard and dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    requests = [task.requests(row) for row in rows[rank::world]]
    flat = [request for of_row in requests for request in of_row]
    show = progress and rank == 0
    stream = iter(answer(model, tokenizer, flat, batch_tokens=batch_tokens, progress=show, generate=generate))
    answers = [list(islice(stream, len(of_row))) for of_row in requests]
    if not sharded:
        return _scored(task, rows, answers)
    shards: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(answers, shards)
    result: list[Any] = [None]
    if shards is not None:
        result[0] = _scored(task, rows, [shards[number % world][number // world] for number in range(len(rows))])
    dist.broadcast_object_list(result)
    evaluation: Evaluation = result[0]
    return evaluation


def _scored(task: Task, rows: list[Row], answers: list[list[Answer]]) -> Evaluation:
    return Evaluation(task.score(rows, answers), as_predictions(task, rows, answers))
