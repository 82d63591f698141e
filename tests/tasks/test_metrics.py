import numpy as np
import pytest

from molf.tasks import metrics
from molf.tasks.metrics import mean, percentage, statistic


def test_mean_and_interval_of_a_known_sample():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    metric = mean(list(values))
    error = values.std() / 20  # of the mean of 400
    assert metric.value == pytest.approx(values.mean()) and metric.n == 400
    assert metric.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert metric.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_percentage_and_its_certain_ends():
    metric = percentage([True, False, True, True])
    assert (metric.value, metric.n) == (75.0, 4)
    assert metric.low < 75.0 <= metric.high
    certain = percentage([True] * 10)
    assert (certain.low, certain.value, certain.high) == (100.0, 100.0, 100.0)


def test_equal_records_give_equal_intervals():
    assert mean([1.0, 2.0, 4.0]) == mean([1.0, 2.0, 4.0])


def test_many_records_are_drawn_in_pieces(monkeypatch):
    values = list(np.random.default_rng(2).normal(size=50))
    whole = mean(values)
    sizes = []

    def spread(columns):
        sizes.append(columns[0].size)
        return columns[0].mean(axis=-1)

    monkeypatch.setattr(metrics, "_DRAWN_AT_ONCE", 320)
    pieces = statistic(spread, values)
    assert (pieces.value, pieces.n) == (whole.value, 50)
    assert (pieces.low, pieces.high) == pytest.approx((whole.low, whole.high), abs=0.02)
    assert max(sizes) == 300 and sum(sizes) == 50 * metrics.RESAMPLES + 50
    monkeypatch.setattr(metrics, "_DRAWN_AT_ONCE", 10)
    assert mean(values).n == 50


def test_a_ratio_of_sums():
    metric = statistic(lambda c: c[0].sum(-1) / c[1].sum(-1), [1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert metric.value == metric.low == metric.high == pytest.approx(0.5)


@pytest.mark.parametrize("columns", [([],), ([1.0], [1.0, 2.0])])
def test_nothing_to_average_is_an_error(columns):
    with pytest.raises(ValueError, match="one value per record"):
        statistic(lambda c: c[0].mean(-1), *columns)


@pytest.mark.filterwarnings("error")
def test_infinite_values_have_infinite_ends_and_no_warning():
    metric = statistic(lambda columns: np.exp(columns[0].mean(-1)), [900.0, 950.0, 800.0])
    assert metric.value == metric.low == metric.high == float("inf")
    some = mean([float("inf"), 1.0, 2.0])
    assert (some.value, some.low, some.high) == (float("inf"), 1.0, float("inf"))
