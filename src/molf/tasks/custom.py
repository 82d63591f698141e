"""A user's own data: prompts with completions, conversations, or plain texts."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from molf.tasks.base import Answer, ExampleTokens, Metric, Request, Row, Split, TargetScores
from molf.tasks.custom_rows import usable_rows
from molf.tasks.metrics import percentage, statistic
from molf.tasks.records import SUFFIXES, Located
from molf.tasks.splits import UNNAMED, Splits, hub_splits, local_splits

DEFAULT_EVAL_FRACTION = 0.1
HELD_OUT = ("validation", "test")
_NEEDED = "task custom needs --data_path: a file, a folder or a Hub id to train on, or --eval_path to evaluate only"


@dataclass
class Custom:
    """Training and evaluation on the user's rows.

    Attributes:
        eval_path: What to evaluate on: a file, a folder, a Hub id, or the name of a split of the data.
        eval_fraction: Share of the rows that is held out instead, chosen by the seed.
    """

    name: str = field(default="custom", init=False)
    headline: str = field(default="token_accuracy", init=False)
    eval_path: str | None = None
    eval_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.eval_path is not None and self.eval_fraction is not None:
            raise ValueError(
                f"eval_path={self.eval_path} and eval_fraction={self.eval_fraction} both say what to evaluate on; pass one"
            )
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction} must lie between 0 and 1")

    def load(self, data_path: str | None, *, sample: bool, limit: int | None, seed: int) -> Split:
        """Load the rows.

        What is evaluated on is, in this order: ``eval_path``; the ``eval_fraction`` of the rows to train on; a
        validation or test split of the data; a tenth of the rows to train on.

        Args:
            data_path: A file, a folder or a Hub id; None to load rows to evaluate on alone.
            sample: Not for this task.
            limit: The most rows per split, the first ones; None for all.
            seed: Chooses the rows to hold out.

        Raises:
            ValueError: If the arguments or a row are not usable.
            OSError: If the data cannot be read or downloaded.
        """
        if sample:
            raise ValueError("task custom has no packaged sample; pass your data as --data_path")
        if data_path is None:
            if self.eval_path is None:
                raise ValueError(_NEEDED)
            found, origin = _any_splits(self.eval_path)
            return Split([], _rows(_evaluated(found, origin), limit, origin), f"evaluation: {origin}")
        found, origin = _any_splits(data_path)
        records = _picked(found, "train", origin)
        if self.eval_fraction is None and (held_out := self._held_out(found)) is not None:
            evaluation, eval_origin = held_out
            split = Split(
                _rows(records, limit, origin), _rows(evaluation, limit, eval_origin), f"{origin}, {eval_origin}"
            )
            _check_alike(split)
            return split
        fraction = self.eval_fraction or DEFAULT_EVAL_FRACTION
        train, held = _divided(_rows(records, None, origin), fraction, seed, origin)
        return Split(train[:limit], held[:limit], f"{origin}, evaluation: {fraction:g} of it by seed {seed}")

    def _held_out(self, found: Splits) -> tuple[Iterable[Located], str] | None:
        """Return the records to evaluate on that are no rows to train on, and what to call them."""
        if self.eval_path is None or self.eval_path in found:
            named = self.eval_path or next((name for name in HELD_OUT if name in found), None)
            return None if named is None else (found[named], f"evaluation: its {named} split")
        others, origin = _any_splits(self.eval_path)
        return _evaluated(others, origin), f"evaluation: {origin}"

    def example(self, row: Row) -> dict[str, Any]:
        """Return the row, which is a training example as it is."""
        return row

    def requests(self, row: Row) -> list[Request]:
        """Ask for the tokens that training would count in its loss."""
        return [ExampleTokens(self.example(row))]

    def score(self, rows: list[Row], answers: list[list[Answer]]) -> dict[str, Metric]:
        """Return how well the rows are predicted.

        Returns:
            ``loss``: mean negative log-likelihood of the tokens in the loss, in nats, all tokens alike.
            ``perplexity``: its exponential.
            ``token_accuracy``: percentage of those tokens that are the most likely ones, given the tokens before.
            ``exact_match``: percentage of rows in which all of them are, so that greedy decoding would give exactly the
            completion with its end, or every message of the assistant's. Texts have none.
        """
        if not rows:
            return {}
        scores = [cast(TargetScores, own) for (own,) in answers]
        tokens = [float(len(score.token_ids)) for score in scores]
        lost = [-sum(score.logprobs) for score in scores]
        right = [100.0 * sum(score.greedy) for score in scores]
        metrics = {
            "loss": statistic(_ratio, lost, tokens),
            "perplexity": statistic(lambda columns: np.exp(_ratio(columns)), lost, tokens),
            "token_accuracy": statistic(_ratio, right, tokens),
        }
        if "text" not in rows[0]:
            metrics["exact_match"] = percentage(all(score.greedy) for score in scores)
        return metrics


def _ratio(columns: list[np.ndarray]) -> np.ndarray:
    """Return the sum of the first column over that of the second."""
    return np.asarray(columns[0].sum(axis=-1) / columns[1].sum(axis=-1))


def _any_splits(name: str) -> tuple[Splits, str]:
    """Return the records of a file, a folder or a data set on the Hub, and what to call it."""
    path = Path(name).expanduser()
    is_id = name.count("/") == 1 and not name.startswith((".", "~", "/")) and not name.endswith(SUFFIXES)
    if is_id and not path.exists():
        return hub_splits(name, "Or pass a file or a folder that is on this machine.")
    return local_splits(path), name


def _picked(found: Splits, split: str, origin: str) -> Iterable[Located]:
    if split not in found and UNNAMED not in found:
        raise ValueError(f"{origin}: no {split or 'validation or test'} split, only {', '.join(found)}")
    return found[split] if split in found else found[UNNAMED]


def _evaluated(found: Splits, origin: str) -> Iterable[Located]:
    """Return the rows of a source that is there to be evaluated on."""
    held_out = next((name for name in HELD_OUT if name in found), UNNAMED)
    return _picked(found, held_out, origin)


def _rows(records: Iterable[Located], limit: int | None, origin: str) -> list[Row]:
    rows = usable_rows(islice(records, limit))
    if not rows:
        raise ValueError(f"{origin}: no records")
    return rows


def _check_alike(split: Split) -> None:
    train, evaluation = split.train[0], split.eval[0]
    if train.keys() != evaluation.keys():
        raise ValueError(
            f"{split.origin}: the rows to train on have {', '.join(train)}, those to evaluate on {', '.join(evaluation)}"
        )


def _divided(rows: list[Row], fraction: float, seed: int, origin: str) -> tuple[list[Row], list[Row]]:
    """Return the rows to keep and those to hold out, in their order."""
    count = max(1, round(fraction * len(rows)))
    if count >= len(rows):
        raise ValueError(f"{origin}: holding out {count} of {len(rows)} rows leaves none to train on")
    held = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        [row for number, row in enumerate(rows) if number not in held],
        [row for number, row in enumerate(rows) if number in held],
    )
