"""What a model forgets: text that a run does not train on, and the measurements on it."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from molf.errors import MolfError
from molf.tasks.base import Metric, Row
from molf.tasks.fact import Fact, true_fact
from molf.tasks.formats import READ, is_readable, json_name, records_of
from molf.tasks.med import Med, answered_question
from molf.tasks.sources import SourceTask
from molf.tasks.sql import Sql, answered_query

__all__ = ["Retention", "background_texts"]

ROWS = 16
"""Rows of each source."""

_PACKAGED: dict[str, tuple[SourceTask, Callable[[Row], str]]] = {
    "fact": (Fact(), true_fact),
    "med": (Med(), answered_question),
    "sql": (Sql(), answered_query),
}


@dataclass(frozen=True)
class Retention:
    """What training cost.

    Attributes:
        loss_before: Mean loss of the base model on the texts, in nats per token.
        loss_after: The same of the trained model.
        loss_rise: Their difference, text by text.
        kl: KL(base || tuned) on the task's prompts, in nats per token.
        origin: Where the texts are from.
        seconds: How long both measurements took.
    """

    loss_before: Metric
    loss_after: Metric
    loss_rise: Metric
    kl: Metric | None
    origin: str
    seconds: float

    def metrics(self) -> dict[str, Metric]:
        """Return the measurements by name, in nats per token."""
        found = {name: getattr(self, name) for name in ("loss_before", "loss_after", "loss_rise", "kl")}
        return {name: metric for name, metric in found.items() if metric is not None}


def background_texts(task: str, path: str | None = None) -> tuple[list[str], str]:
    """Return texts that training on a task does not touch, and where they are from.

    Args:
        task: The task that is trained on. By default the texts are the first rows of the other tasks' packaged samples: true
            facts, answered medical questions, and answered questions about tables.
        path: The user's own file instead: records with ``text``, or with ``prompt`` and ``completion``, of which the first
            ``3 * ROWS`` are taken.

    Raises:
        MolfError: The file cannot be read, has no records, or one without such fields.
    """
    if path is not None:
        return _own_texts(Path(path).expanduser()), path
    texts = []
    others = [name for name in _PACKAGED if name != task]
    for name in others:
        source, text = _PACKAGED[name]
        texts += [text(row) for row in source.load(sample=True, limit=ROWS).eval]
    return texts, f"the package's samples of {', '.join(others)}"


def _own_texts(file: Path) -> list[str]:
    if not file.is_file():
        raise MolfError(f"retention_path={str(file)!r} is no file: give one of {READ}, or set retention: 'off'")
    if not is_readable(file.name):
        raise MolfError(f"retention_path={str(file)!r}: its format cannot be read; give one of {READ}")
    texts = [_text(row, where) for where, row in islice(records_of(file), 3 * ROWS)]
    if not texts:
        raise MolfError(f"retention_path={str(file)!r} has no records")
    return texts


def _text(row: Row, where: str) -> str:
    parts = [row.get("text")] if "text" in row else [row.get("prompt"), row.get("completion")]
    text = "".join(part for part in parts if isinstance(part, str))
    if not text.strip() or not all(isinstance(part, str) for part in parts):
        found = ", ".join(f"{name!r} ({_kind(value)})" for name, value in row.items())
        raise MolfError(
            f"{where}: retention is measured on records with a 'text', or with a 'prompt' and a 'completion', all of them "
            f"strings; found {found or 'nothing'}"
        )
    return text


def _kind(value: Any) -> str:
    return "blank" if isinstance(value, str) and not value.strip() else json_name(value)
