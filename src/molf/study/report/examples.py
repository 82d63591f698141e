"""Examples from the predictions of a run: which rows it got right, before training and after, and what the model wrote."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molf.study.engine.predictions import PREDICTIONS_BEFORE_FILE, PREDICTIONS_FILE, readable
from molf.study.results.result import Result
from molf.tasks import TASKS
from molf.tasks.formats import records_of

SHOWN = 8  # examples of a group
LONGEST = 600  # characters of a text


@dataclass(frozen=True)
class Example:
    """A row: what the model read, what would be right, and what it wrote."""

    row: int
    prompt: str
    expected: str
    before: str | None
    after: str


@dataclass
class Group:
    """Rows of one kind: how many there are, and the first of them."""

    title: str
    count: int = 0
    examples: list[Example] = field(default_factory=list)


def read_examples(folder: Path, result: Result) -> list[Group] | None:
    """Group the rows of a run by whether they were right before training and after it.

    A row is right if the outcome that its task kept of it under the headline's name is true or 100.

    Returns:
        The rows that changed, then those that did not; right and wrong ones if there are no predictions before. Nothing if
        there are no predictions, or the task keeps no such outcome. None if the task is not known here, such as one of a script:
        what a row asks is known to its task alone.

    Raises:
        MolfError: The predictions are damaged.
    """
    after = folder / PREDICTIONS_FILE
    if not after.is_file():
        return []
    if (task := TASKS.get(str(result.config.get("task")))) is None:
        return None
    file = folder / PREDICTIONS_BEFORE_FILE
    before = _earlier(file, result.headline) if result.metrics_before is not None and file.is_file() else {}
    groups = {
        (False, True): Group("wrong before, right after"),
        (True, False): Group("right before, wrong after"),
        (None, False): Group("wrong"),
        (None, True): Group("right"),
        (False, False): Group("wrong before and after"),
        (True, True): Group("right before and after"),
    }
    for where, row, right, prediction, wrote_now in _judged(after, result.headline):
        was_right, wrote_then = before.get(row, (None, None))
        group = groups[was_right, right]
        group.count += 1
        if len(group.examples) < SHOWN:
            with readable(where):
                prompt, expected = _asked(task.example(prediction["record"]))
            group.examples.append(Example(row, _end(prompt), _end(expected), wrote_then, wrote_now))
    return [group for group in groups.values() if group.count]


def _earlier(file: Path, headline: str) -> dict[int, tuple[bool, str]]:
    return {row: (right, wrote) for _, row, right, _, wrote in _judged(file, headline)}


def _judged(file: Path, headline: str) -> Iterator[tuple[str, int, bool, dict[str, Any], str]]:
    """Yield where a row's line is, its number, whether it is right, the line and what was written; nothing without an outcome."""
    for where, prediction in records_of(file):
        with readable(where):
            value = prediction.get("outcome", {}).get(headline)
            if not isinstance(value, bool | int | float):
                continue
            row, wrote = prediction["row"], _written(prediction["answers"])
            if type(row) is not int:
                raise TypeError(f"row {row!r} is not an integer")
        yield where, row, value is True or value == 100, prediction, wrote


def _asked(example: Mapping[str, Any]) -> tuple[str, str]:
    """Return the prompt and the right answer of a training example."""
    if "messages" in example:
        *earlier, last = example["messages"]
        return "\n".join(_content(message) for message in earlier), _content(last)
    if "text" in example:
        return "", str(example["text"])
    return _content(example["prompt"]), _content(example["completion"])


def _content(value: Any) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        return str(value["content"])
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _written(answers: Sequence[Mapping[str, Any]]) -> str:
    """Return what the model wrote or chose, or how much of the right answer it predicts."""
    for answer in reversed(answers):
        if "text" in answer:
            text = str(answer["text"])
            return text if len(text) <= LONGEST else f"{text[:LONGEST]}\N{HORIZONTAL ELLIPSIS}"
    if "options" in answers[0]:
        return str(answers[0]["options"][max(enumerate(answers[0]["logprobs"]), key=lambda option: option[1])[0]])
    greedy = answers[0]["greedy"]
    return f"{sum(greedy)} of the {len(greedy)} tokens of the answer are the most likely ones"


def _end(text: str) -> str:
    """Return the end of a long text, where the question is."""
    return text if len(text) <= LONGEST else f"\N{HORIZONTAL ELLIPSIS}{text[-LONGEST:]}"
