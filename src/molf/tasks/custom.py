"""A user's own data: prompts with completions, conversations, or plain texts."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from molf.errors import MolfError
from molf.tasks.base import Answer, Better, ExampleTokens, Metric, Request, Row, Split, TargetScores
from molf.tasks.downloads import hub_splits
from molf.tasks.formats import Located, is_readable
from molf.tasks.metrics import percentage, statistic
from molf.tasks.records import UNNAMED, Splits, local_splits, split_names, tell_unused
from molf.tasks.schemas import checked_rows, schema_of

DEFAULT_EVAL_FRACTION = 0.1


@dataclass
class Custom:
    """Training and evaluation on the user's rows.

    Attributes:
        eval_path: What to evaluate on: a file, a folder, a Hub id, or the name of a split of the data.
        eval_fraction: Instead, the share of the rows to hold out, chosen by the seed.
        train_split: The name of the split to train on, if it is not called ``train``.
    """

    name: str = field(default="custom", init=False)
    headline: str = field(default="token_accuracy", init=False)
    metrics: ClassVar[Mapping[str, Better]] = {
        "loss": "less",
        "perplexity": "less",
        "token_accuracy": "more",
        "exact_match": "more",
    }
    eval_path: str | None = None
    eval_fraction: float | None = None
    train_split: str | None = None

    def __post_init__(self) -> None:
        if self.eval_path is not None and self.eval_fraction is not None:
            raise MolfError(
                f"--eval_path {self.eval_path} and --eval_fraction {self.eval_fraction} both say what to evaluate on; "
                "pass one of them"
            )
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise MolfError(f"--eval_fraction {self.eval_fraction} must be between 0 and 1")

    def load(self, data_path: str | None, *, sample: bool, limit: int | None, seed: int) -> Split:
        """Load the rows; arguments as for ``Task.load``, but ``data_path`` may be a Hub id, or None to only evaluate.

        Evaluation uses the first of these that exists: ``eval_path``; ``eval_fraction`` of the training rows; a validation
        or test split of the data; a tenth of the training rows. The seed chooses the rows to hold out.
        """
        if sample:
            raise MolfError("task custom has no sample in the package; pass your data as --data_path")
        if data_path is None:
            if self.eval_path is None or self.train_split is not None:
                raise MolfError(
                    "task custom needs --data_path: a file, a folder or a Hub id to train on, or --eval_path to evaluate only"
                )
            records, origin = _evaluation_rows(self.eval_path, {}, [])
            return Split([], checked_rows(records, limit, origin), origin)
        found, origin = _splits(data_path)
        train = self._training_splits(found, origin)
        records = chain(*(found.pop(name) for name in train))  # what is left may be evaluated on
        if self.train_split:
            origin += f", its {self.train_split} split"
        default = split_names(found, "validation") or split_names(found, "test")
        held = _asked(found, self.eval_path) if self.eval_path else default
        if self.eval_fraction is None and (held or self.eval_path):
            tell_unused([name for name in found if name not in held], origin)
            held_out, eval_origin = _evaluation_rows(self.eval_path, found, held)
            rows, eval_rows = checked_rows(records, limit, origin), checked_rows(held_out, limit, eval_origin)
            if schema_of(rows[0], origin) != schema_of(eval_rows[0], eval_origin):
                raise MolfError(
                    f"{origin}, {eval_origin}: the training rows have {', '.join(rows[0])}, the evaluation rows "
                    f"{', '.join(eval_rows[0])}"
                )
            return Split(rows, eval_rows, f"{origin}, {eval_origin}")
        tell_unused(found, origin)
        fraction = self.eval_fraction or DEFAULT_EVAL_FRACTION
        rows, eval_rows = _hold_out(checked_rows(records, None, origin), fraction, seed, origin)
        return Split(rows[:limit], eval_rows[:limit], f"{origin}, evaluation: {fraction:g} of it by seed {seed}")

    def _training_splits(self, found: Splits, origin: str) -> list[str]:
        default = split_names(found, "train") or split_names(found, UNNAMED)
        train = _asked(found, self.train_split) if self.train_split else default
        if not train:
            there = ", ".join(filter(None, found)) or "rows without one"
            raise MolfError(
                f"{origin}: no {self.train_split or 'train'} split, only {there}; name the one to train on with --train_split"
            )
        if self.eval_path in train:
            raise MolfError(f"--eval_path {self.eval_path} is the split to train on; pass another, or --eval_fraction")
        return train

    def example(self, row: Row) -> dict[str, Any]:
        """Return the row, which already is a training example."""
        return row

    def requests(self, row: Row) -> list[Request]:
        """Ask for the tokens that training would count in its loss."""
        return [ExampleTokens(row)]

    def score(self, rows: list[Row], answers: list[list[Answer]]) -> dict[str, Metric]:
        """Return how well the rows are predicted.

        Returns:
            ``loss``: mean negative log-likelihood of the tokens in the loss, in nats, over all tokens.
            ``perplexity``: its exponential.
            ``token_accuracy``: percentage of those tokens that are the most likely ones, given the tokens before.
            ``exact_match``: percentage of rows in which all of them are: greedy decoding would give exactly the completion
            with its end, or all the assistant's messages. Texts have none.
        """
        if not rows:
            return {}
        scores = [cast(TargetScores, own) for (own,) in answers]
        tokens = [float(len(score.token_ids)) for score in scores]
        losses = [-sum(score.logprobs) for score in scores]
        right = [100.0 * sum(score.greedy) for score in scores]
        metrics = {
            "loss": statistic(_ratio, losses, tokens),
            "perplexity": statistic(lambda columns: np.exp(_ratio(columns)), losses, tokens),
            "token_accuracy": statistic(_ratio, right, tokens),
        }
        if "text" not in rows[0]:
            metrics["exact_match"] = percentage(all(score.greedy) for score in scores)
        return metrics

    def outcomes(self, rows: list[Row], answers: list[list[Answer]]) -> list[dict[str, Any]]:
        """Return the percentage of every row's tokens that are the most likely ones."""
        greedy = [cast(TargetScores, own).greedy for (own,) in answers]
        return [{"token_accuracy": 100.0 * sum(own) / len(own)} for own in greedy]


def _ratio(columns: list[np.ndarray]) -> np.ndarray:
    """Return the sum of the first column over that of the second."""
    return np.asarray(columns[0].sum(axis=-1) / columns[1].sum(axis=-1))


def _splits(name: str) -> tuple[Splits, str]:
    """Return the records of a file, a folder or a data set on the Hub, and their origin."""
    path = Path(name).expanduser()
    is_id = name.count("/") == 1 and not name.startswith((".", "~", "/")) and not is_readable(name)
    if is_id and not path.exists():
        return hub_splits(name, "Or pass a local file or folder.")
    return local_splits(path), name


def _asked(found: Splits, name: str) -> list[str]:
    """Return the names of the splits that a user means: the one of exactly this name, or all that mean it."""
    return [name] if name in found else split_names(found, name)


def _evaluation_rows(eval_path: str | None, found: Splits, held: list[str]) -> tuple[Iterable[Located], str]:
    """Return the records of the held splits or, if there are none, of ``eval_path``, and their origin."""
    origin = f"its {' and '.join(held)} split"
    if not held:
        assert eval_path is not None
        found, origin = _splits(eval_path)
        held = next(filter(None, (split_names(found, name) for name in ("validation", "test", UNNAMED))), [])
        if not held:
            raise MolfError(f"{origin}: no validation or test split, only {', '.join(found)}")
    return chain.from_iterable(found[name] for name in held), f"evaluation: {origin}"


def _hold_out(rows: list[Row], fraction: float, seed: int, origin: str) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those to hold out, in order."""
    count = max(1, round(fraction * len(rows)))
    if count >= len(rows):
        raise MolfError(f"{origin}: holding out {count} of {len(rows)} rows leaves none to train on")
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    kept = [row for number, row in enumerate(rows) if number not in held_out]
    return kept, [row for number, row in enumerate(rows) if number in held_out]
