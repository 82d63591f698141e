import numpy as np
import pytest

from molf.study.report.figures import MAX_POINTS, curve_figures, headline_figure, score_figure, shortened
from molf.study.results.routing import RoutingBins
from molf.tasks.base import Metric
from small_runs import small_result


def test_headlines_of_runs_with_their_intervals():
    runs = {"<one>": small_result(), "two": small_result(metrics_before=None, metrics={"score": Metric(10.0, 3)})}
    before, after = headline_figure(runs)["data"]
    assert (before["name"], before["x"], before["y"]) == ("before", [25.0], ["&lt;one&gt;"])
    assert after["x"] == [50.0, 10.0]
    assert after["error_x"]["array"] == [10.5, None] and after["error_x"]["arrayminus"] == [10.0, None]


def test_curves_of_what_was_logged():
    molf = {"loss": [(1, 2.0), (2, 1.0)], "lr/fft": [(1, 0.1)], "lr/lora": [(1, 0.2)], "learning_rate": [(1, 0.1)]}
    fft = {"loss": [(1, 3.0)], "learning_rate": [(1, 0.3)]}
    figures = curve_figures({"molf": molf, "fft": fft})
    assert list(figures) == ["loss", "learning rate"], "no gradient norm was logged"
    assert [curve["name"] for curve in figures["loss"]["data"]] == ["molf training", "fft training"]
    assert [curve["y"] for curve in figures["loss"]["data"]] == [[2.0, 1.0], [3.0]]
    assert [curve["name"] for curve in figures["learning rate"]["data"]] == ["molf fft", "molf lora", "fft"]
    assert curve_figures({}) == curve_figures({"old": {}}) == {}


def test_a_long_curve_is_shortened_to_means():
    points = [(step, float(step)) for step in range(1, 10 * MAX_POINTS + 2)]
    short = shortened(points)
    assert len(short) <= MAX_POINTS
    assert short[0] == (6.0, 6.0), "the mean of the first eleven steps"
    assert shortened(points[:3]) == points[:3] and shortened([]) == []


@pytest.mark.parametrize(("low", "scale"), [(1e-6, "log"), (-1.0, "linear"), (0.0, "linear")])
def test_scores(low, scale):
    scores = np.array([[low, np.nan], [2.0, np.nan]])
    figure = score_figure(RoutingBins([(1, 4), (5, 8)], ["a"], ["fft", "lora_r2"], np.zeros((2, 1, 2)), scores, scores))
    (curve,) = figure["data"]
    assert (curve["x"], curve["y"], figure["layout"]["yaxis"]["type"]) == ([2.5, 6.5], [low, 2.0], scale)


def test_no_scores():
    shares, scores = np.zeros((1, 1, 1)), np.full((1, 1), np.nan)
    assert score_figure(RoutingBins([(1, 1)], ["a"], ["fft"], shares, shares[0], scores)) is None
