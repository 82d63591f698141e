"""The benchmarks by name. A new one is a file in this folder and a line in ``TASKS``."""

import difflib

from molf.errors import MolfError
from molf.tasks.base import (
    Answer,
    ExampleTokens,
    Generate,
    Likelihood,
    Metric,
    NextToken,
    OptionScores,
    Request,
    Row,
    Split,
    TargetScores,
    Task,
)
from molf.tasks.custom import Custom
from molf.tasks.fact import Fact
from molf.tasks.med import Med
from molf.tasks.sql import Sql

__all__ = [
    "TASKS",
    "Answer",
    "ExampleTokens",
    "Generate",
    "Likelihood",
    "Metric",
    "NextToken",
    "OptionScores",
    "Request",
    "Row",
    "Split",
    "TargetScores",
    "Task",
    "get_task",
]

TASKS: dict[str, Task] = {"fact": Fact(), "med": Med(), "sql": Sql(), "custom": Custom()}


def get_task(name: str) -> Task:
    """Return the benchmark called ``name``.

    Raises:
        MolfError: There is none.
    """
    if name in TASKS:
        return TASKS[name]
    nearest = difflib.get_close_matches(name, TASKS, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    raise MolfError(f"unknown task {name!r}{hint}; the tasks are: {', '.join(TASKS)}")
