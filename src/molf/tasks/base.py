"""What every benchmark shares: requests to a model, the answers, the metrics, and the task protocol.

A task never sees a model. It turns each row into requests, an engine answers them, and the task turns the answers
into metrics. So a benchmark is one file without any tensor, and every benchmark gets the same batched inference.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

Row: TypeAlias = dict[str, Any]
"""One record of a benchmark, with the field names its authors published."""


@dataclass(frozen=True)
class Likelihood:
    """Ask how likely ``target`` is as the continuation of ``prompt``.

    Attributes:
        prompt: The text the model is given.
        target: The text to score; it begins with its own white space, for example ``" English"``.
    """

    prompt: str
    target: str


@dataclass(frozen=True)
class NextToken:
    """Ask which of a few tokens is the most likely one after ``prompt``.

    Attributes:
        prompt: The text the model is given.
        options: The texts to choose from, each exactly one token after the prompt; they begin with their own white
            space, for example ``(" A", " B")``.
    """

    prompt: str
    options: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.options)) < max(2, len(self.options)):
            raise ValueError(f"options={self.options!r} must be two or more different texts")


@dataclass(frozen=True)
class Generate:
    """Ask for the greedy continuation of ``prompt``.

    Attributes:
        prompt: The text the model is given.
        max_new_tokens: The most tokens to generate; the end-of-text token stops earlier.
        stop: Strings that end the continuation; the answer is cut before the first of them.
    """

    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ExampleTokens:
    """Ask how likely those tokens of a training example are that training counts in its loss.

    Attributes:
        example: What ``Task.example`` gives. It is tokenized as for training, chat template and end token included.
    """

    example: Mapping[str, Any]


@dataclass(frozen=True)
class TargetScores:
    """The answer to a ``Likelihood`` or an ``ExampleTokens``.

    Attributes:
        logprobs: The natural-log probability of each token of the target, given all tokens before it.
        token_ids: The target's tokens, one for each of ``logprobs``.
        greedy: For each token whether no other one was more likely, given all tokens before it.
    """

    logprobs: tuple[float, ...]
    token_ids: tuple[int, ...]
    greedy: tuple[bool, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.logprobs), len(self.token_ids), len(self.greedy)}
        if not self.token_ids or len(sizes) > 1:
            raise ValueError(
                f"TargetScores needs one log-probability and one greedy flag per target token and at least one token; got "
                f"{len(self.logprobs)} log-probabilities and {len(self.greedy)} flags for {len(self.token_ids)} tokens"
            )

    @property
    def mean_logprob(self) -> float:
        """The mean of ``logprobs``: comparable between targets of different lengths."""
        return math.fsum(self.logprobs) / len(self.logprobs)

    @property
    def probability(self) -> float:
        """The geometric mean of the tokens' probabilities, in 0..1."""
        return math.exp(self.mean_logprob)


@dataclass(frozen=True)
class OptionScores:
    """The answer to a ``NextToken``.

    Attributes:
        logprobs: The natural-log probability of each option, in the order of the options, among all tokens there are.
        token_ids: The options' tokens.
    """

    logprobs: tuple[float, ...]
    token_ids: tuple[int, ...]

    @property
    def best(self) -> int:
        """The index of the most likely option; of equally likely ones, the first."""
        return self.logprobs.index(max(self.logprobs))


Request: TypeAlias = Likelihood | NextToken | Generate | ExampleTokens
Answer: TypeAlias = TargetScores | OptionScores | str
"""``TargetScores`` to a ``Likelihood`` or ``ExampleTokens``, ``OptionScores`` to a ``NextToken``, the generated text to a
``Generate``."""


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation.

    Attributes:
        value: A percentage, unless the metric's name says otherwise.
        n: How many things were averaged.
        low: Lower end of the bootstrap 95 % interval, in the unit of ``value``; None where there is none.
        high: Upper end.
    """

    value: float
    n: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:.2f}, {self.high:.2f})"
        return f"{self.value:.2f}{interval}"


@dataclass(frozen=True)
class Split:
    """The rows of a benchmark.

    Attributes:
        train: Rows to train on.
        eval: Rows to evaluate on.
        origin: Where the rows came from, for the record of the run.
    """

    train: list[Row]
    eval: list[Row]
    origin: str


class Task(Protocol):
    """A benchmark: its rows, how to train on one, what to ask about one, and the metrics.

    Attributes:
        name: The name users select it by.
        headline: The metric that runs are compared by.
    """

    name: str
    headline: str

    def load(self, data_path: str | None, *, sample: bool, limit: int | None, seed: int) -> Split:
        """Load the rows.

        Args:
            data_path: A file or folder of the user's; None for the published data.
            sample: Use the small slice that is part of the package.
            limit: The most rows per split; None for all.
            seed: For tasks that split or choose at random.

        Raises:
            ValueError: If the data or the arguments are not usable.
            OSError: If the data cannot be read or downloaded.
        """
        ...

    def example(self, row: Row) -> dict[str, Any]:
        """Return the training example of ``row``, ``{"prompt": ..., "completion": ...}``.

        The completion begins with its own white space and has no end-of-text token: the trainer adds it. Other forms
        are ``{"messages": [{"role": ..., "content": ...}, ...]}`` and ``{"text": ...}``.
        """
        ...

    def requests(self, row: Row) -> list[Request]:
        """Return what to ask the model about ``row``."""
        ...

    def score(self, rows: list[Row], answers: list[list[Answer]]) -> dict[str, Metric]:
        """Turn answers into metrics.

        Args:
            rows: The evaluated rows.
            answers: For each row the answers to ``requests(row)``, in that order.

        Returns:
            Metrics by name. A metric that no row could decide is absent, never 0.
        """
        ...


@runtime_checkable
class HasRowResults(Protocol):
    """A task that can also tell what came of every row, for the file of predictions."""

    def outcomes(self, rows: list[Row], answers: list[list[Answer]]) -> list[dict[str, Any]]:
        """Return one plain JSON object per row, such as ``{"correct": true}``; the arguments are those of ``score``."""
        ...
