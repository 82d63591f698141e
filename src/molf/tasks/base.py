"""What all benchmarks share: requests to a model, their answers, metrics, and the task protocol.

A task never sees a model. It turns each row into requests, an engine answers them, and the task turns the answers into
metrics. A benchmark is therefore one file without tensors, and all benchmarks share the batched inference.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from molf.errors import MolfError

Row: TypeAlias = dict[str, Any]
"""One record of a benchmark, with its published field names."""


@dataclass(frozen=True)
class Likelihood:
    """Ask how likely ``target`` is as the continuation of ``prompt``.

    Attributes:
        prompt: The text that the model reads.
        target: The text to score, with its leading white space, for example ``" English"``.
    """

    prompt: str
    target: str


@dataclass(frozen=True)
class NextToken:
    """Ask which of several tokens is the most likely one after ``prompt``.

    Attributes:
        prompt: The text that the model reads.
        options: The texts to choose from, with their leading white space, for example ``(" A", " B")``. Each must be
            exactly one token after the prompt.
    """

    prompt: str
    options: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.options)) < max(2, len(self.options)):
            raise MolfError(f"options={self.options!r} must be two or more different texts")


@dataclass(frozen=True)
class Generate:
    """Ask for the greedy continuation of ``prompt``.

    Attributes:
        prompt: The text that the model reads.
        max_new_tokens: Maximum number of tokens to generate; the end-of-text token stops earlier.
        stop: Strings that end the continuation. The answer is cut before the first one.
    """

    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ExampleTokens:
    """Ask how likely the tokens of a training example are that training counts in its loss.

    Attributes:
        example: A result of ``Task.example``. It is tokenized as for training, with chat template and end token.
    """

    example: Mapping[str, Any]


@dataclass(frozen=True)
class TargetScores:
    """The answer to a ``Likelihood`` or an ``ExampleTokens``.

    Attributes:
        logprobs: For each token of the target, its natural-log probability given all tokens before it.
        token_ids: The target's tokens.
        greedy: For each token, whether no other one is more likely.
    """

    logprobs: tuple[float, ...]
    token_ids: tuple[int, ...]
    greedy: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert self.token_ids and len(self.logprobs) == len(self.token_ids) == len(self.greedy)

    @property
    def mean_logprob(self) -> float:
        """The mean of ``logprobs``, comparable between targets of different lengths."""
        return math.fsum(self.logprobs) / len(self.logprobs)

    @property
    def probability(self) -> float:
        """The geometric mean of the tokens' probabilities."""
        return math.exp(self.mean_logprob)


@dataclass(frozen=True)
class OptionScores:
    """The answer to a ``NextToken``.

    Attributes:
        logprobs: The natural-log probability of each option among all tokens, in the order of the options.
        token_ids: The options' tokens.
    """

    logprobs: tuple[float, ...]
    token_ids: tuple[int, ...]

    @property
    def best(self) -> int:
        """The index of the most likely option; ties go to the first."""
        return self.logprobs.index(max(self.logprobs))


Request: TypeAlias = Likelihood | NextToken | Generate | ExampleTokens
Answer: TypeAlias = TargetScores | OptionScores | str
"""``TargetScores`` for a ``Likelihood`` or ``ExampleTokens``, ``OptionScores`` for a ``NextToken``, the generated text for a
``Generate``."""


Better: TypeAlias = Literal["more", "less"]
"""Which of two values of a metric is the better one."""


@dataclass(frozen=True)
class Metric:
    """One metric of an evaluation.

    Attributes:
        value: A percentage, unless the metric's name says otherwise.
        n: Number of records averaged.
        low: Lower end of the bootstrap 95 % interval, if any.
        high: Upper end.
    """

    value: float
    n: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" ({self.low:.2f}, {self.high:.2f})"
        return f"{self.value:.2f}{interval}"


@dataclass(frozen=True)
class Split:
    """The rows of a benchmark.

    Attributes:
        train: Rows to train on.
        eval: Rows to evaluate on.
        origin: Where the rows came from, for the run's result.
    """

    train: list[Row]
    eval: list[Row]
    origin: str


class Task(Protocol):
    """A benchmark: its rows, the training example and the requests of a row, and the metrics.

    Attributes:
        name: The name of ``--task``.
        headline: The metric to compare runs by.
    """

    name: str
    headline: str

    def load(self, data_path: str | None, *, sample: bool, limit: int | None, seed: int) -> Split:
        """Load the rows.

        Args:
            data_path: The user's file or folder; None for the published data.
            sample: Use the small sample in the package.
            limit: Maximum number of rows per split; None for all.
            seed: For tasks that split or choose at random.

        Raises:
            MolfError: The data or the arguments cannot be used, or the data cannot be downloaded.
        """
        ...

    def example(self, row: Row) -> dict[str, Any]:
        """Return the training example of ``row``, ``{"prompt": ..., "completion": ...}``.

        The completion starts with its white space and has no end-of-text token, which the trainer adds. Alternatives are
        ``{"messages": [{"role": ..., "content": ...}, ...]}`` and ``{"text": ...}``.
        """
        ...

    def requests(self, row: Row) -> list[Request]:
        """Return the requests to the model about ``row``."""
        ...

    def score(self, rows: list[Row], answers: list[list[Answer]]) -> dict[str, Metric]:
        """Turn answers into metrics.

        Args:
            rows: The evaluated rows.
            answers: For each row, the answers to ``requests(row)`` in order.

        Returns:
            Metrics by name. A metric without any row that decides it is absent, never 0.
        """
        ...


@runtime_checkable
class DeclaresMetrics(Protocol):
    """A task that says which metrics it has, for comparisons by another one than its headline.

    Attributes:
        metrics: Names, without those of a part of the rows, ``NAME/PART``, and which value is the better one.
    """

    metrics: Mapping[str, Better]


def less_is_better(task: Task, metric: str) -> bool:
    """Return whether the smaller of two values of a metric is the better one.

    Raises:
        MolfError: The task declares no such metric.
    """
    declared = task.metrics if isinstance(task, DeclaresMetrics) else {task.headline: "more"}
    name = metric.partition("/")[0]
    if name in declared:
        return declared[name] == "less"
    declare = (
        "" if isinstance(task, DeclaresMetrics) else f', or declare it in the task: metrics = {{"{name}": "more"}}'
    )
    raise MolfError(
        f"the task {task.name} has no metric {metric!r}, only {', '.join(declared)}; choose one of these{declare}"
    )


@runtime_checkable
class HasRowResults(Protocol):
    """A task that also has a result for every row, kept in the file of predictions."""

    def outcomes(self, rows: list[Row], answers: list[list[Answer]]) -> list[dict[str, Any]]:
        """Return one plain JSON object per row; arguments as for ``score``.

        The report counts a row as right if the value under the headline's name is true or 100.
        """
        ...
