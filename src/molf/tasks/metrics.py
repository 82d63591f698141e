"""Averages over records with bootstrap confidence intervals.

Percentile bootstrap (B. Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979): resample the records with
replacement and report the middle 95 % of the statistic. The draws depend on the number of records only, so equal
predictions give equal intervals, and two models are compared on the same draws.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from molf.errors import MolfError
from molf.tasks.base import Metric

RESAMPLES = 1000
CONFIDENCE = 0.95
_DRAWN_AT_ONCE = 1_000_000  # records, over all resamples in memory


def percentage(outcomes: Iterable[bool]) -> Metric:
    """Return the percentage of true outcomes."""
    return mean([100.0 * bool(outcome) for outcome in outcomes])


def percentage_by(name: str, groups: Iterable[object], outcomes: Iterable[bool]) -> dict[str, Metric]:
    """Return the percentage of true outcomes of every group as ``name/GROUP``; a record's group may be None."""
    found: dict[str, list[bool]] = {}
    for group, outcome in zip(groups, outcomes, strict=True):
        if group:
            found.setdefault(str(group), []).append(outcome)
    return {f"{name}/{group}": percentage(found[group]) for group in sorted(found)}


def mean(values: Sequence[float]) -> Metric:
    """Return the mean of one value per record."""
    return statistic(lambda columns: columns[0].mean(axis=-1), values)


def statistic(compute: Callable[[list[np.ndarray]], np.ndarray], *columns: Sequence[float]) -> Metric:
    """Return a statistic of records, such as the ratio of two columns' sums, with its interval.

    Args:
        compute: Takes every column as an array ``[..., n]`` and reduces the last axis.
        *columns: Values of the same n records.

    Raises:
        MolfError: There are no records, or the columns have different lengths.
    """
    sizes = {len(column) for column in columns}
    if len(sizes) != 1 or not (n := sizes.pop()):
        raise MolfError(f"a metric averages one value per record; got columns of {[len(c) for c in columns]} values")
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    tail = (1 - CONFIDENCE) / 2
    with np.errstate(over="ignore", invalid="ignore"):  # the perplexity of a training that diverged may be infinite
        drawn = np.concatenate([compute([array[draws] for array in arrays]) for draws in _draws(n)])
        low, high = np.quantile(drawn, [tail, 1 - tail])
        value = float(compute(arrays))
    ends = (float("inf") if np.isnan(end) and np.isinf(drawn).any() else float(end) for end in (low, high))
    return Metric(value, n, *ends)


def _draws(n: int) -> Iterator[np.ndarray]:
    """Yield the record numbers of all resamples, in blocks ``[k, n]``."""
    generator = np.random.default_rng(n)
    at_once = max(1, _DRAWN_AT_ONCE // n)
    for first in range(0, RESAMPLES, at_once):
        yield generator.integers(0, n, size=(min(at_once, RESAMPLES - first), n), dtype=np.int32)
