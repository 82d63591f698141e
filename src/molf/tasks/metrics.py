"""Averages over records, each with a bootstrap confidence interval.

The interval is the percentile bootstrap of B. Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979: records are
drawn anew with replacement, and the middle 95 % of the statistic over the draws is reported. The draws depend on the number
of records only, so equal predictions give equal intervals, and two models are judged on the same draws.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from molf.tasks.base import Metric

RESAMPLES = 1000
CONFIDENCE = 0.95
_DRAWN_AT_ONCE = 1_000_000  # records, for all the resamples that are in memory together


def percentage(outcomes: Iterable[bool]) -> Metric:
    """Return how many of the outcomes are true, in percent.

    Raises:
        ValueError: If there are none.
    """
    return mean([100.0 * bool(outcome) for outcome in outcomes])


def mean(values: Sequence[float]) -> Metric:
    """Return the mean of one value a record.

    Raises:
        ValueError: If there are none.
    """
    return statistic(lambda columns: columns[0].mean(axis=-1), values)


def statistic(compute: Callable[[list[np.ndarray]], np.ndarray], *columns: Sequence[float]) -> Metric:
    """Return a statistic of records, such as the ratio of two columns' sums, with its interval.

    Args:
        compute: Gets every column as an array ``[..., n]`` and reduces the last axis.
        *columns: Values of the same n records.

    Raises:
        ValueError: If there are no records, or columns of different lengths.
    """
    sizes = {len(column) for column in columns}
    if len(sizes) != 1 or not (n := sizes.pop()):
        raise ValueError(f"a metric averages one value a record; got columns of {[len(c) for c in columns]} values")
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    tail = (1 - CONFIDENCE) / 2
    drawn = np.concatenate([compute([array[draws] for array in arrays]) for draws in _draws(n)])
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Metric(float(compute(arrays)), n, float(low), float(high))


def _draws(n: int) -> Iterator[np.ndarray]:
    """Yield the records of all resamples, some ``[k, n]`` at a time."""
    generator = np.random.default_rng(n)
    at_once = max(1, _DRAWN_AT_ONCE // n)
    for first in range(0, RESAMPLES, at_once):
        yield generator.integers(0, n, size=(min(at_once, RESAMPLES - first), n), dtype=np.int32)
