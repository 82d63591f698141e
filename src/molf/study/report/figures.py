"""The charts of the page that do not change once they are drawn, as plain JSON for plotly.js."""

import html
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from molf.study.results.result import Result
from molf.study.results.routing import RoutingBins

MAX_POINTS = 400
"""Points of a curve; of a longer one each point is a mean of consecutive ones."""

_DASHES = ("solid", "dash", "dot", "dashdot")
# Okabe and Ito's colours, which people with any colour vision tell apart, without black and yellow.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_CURVES: dict[str, dict[str, str]] = {
    "loss": {"loss": "training", "eval_loss": "held-out rows"},
    "learning rate": {"lr/fft": "fft", "lr/lora": "lora", "learning_rate": ""},
    "gradient norm": {"grad_norm": ""},
}

History = Mapping[str, Sequence[tuple[int, float]]]


def headline_figure(results: Mapping[str, Result]) -> dict[str, Any]:
    """Draw every run's main metric with its interval, before training and after."""
    figure = go.Figure()
    for when, of, colour in (("before", "metrics_before", "#8a939d"), ("after", "metrics", _COLOURS[0])):
        bars = [
            (run, metric)
            for run, result in results.items()
            if (metric := (getattr(result, of) or {}).get(result.headline))
        ]
        if bars:
            ends = [(metric.low, metric.high) for _, metric in bars]
            figure.add_scatter(
                x=[metric.value for _, metric in bars],
                y=[plain(run) for run, _ in bars],
                name=when,
                mode="markers",
                marker={"size": 11, "symbol": "circle-open" if when == "before" else "circle", "color": colour},
                error_x={
                    "symmetric": False,
                    "array": [
                        None if high is None else high - m.value for (_, high), (_, m) in zip(ends, bars, strict=True)
                    ],
                    "arrayminus": [
                        None if low is None else m.value - low for (low, _), (_, m) in zip(ends, bars, strict=True)
                    ],
                },
            )
    names = sorted({plain(result.headline) for result in results.values()})
    figure.update_layout(
        xaxis_title=", ".join(names),
        yaxis={"type": "category", "autorange": "reversed", "categoryarray": [plain(run) for run in results]},
    )
    return _json(figure, height=130 + 34 * len(results))


def curve_figures(histories: Mapping[str, History]) -> dict[str, dict[str, Any]]:
    """Draw loss, learning rates and gradient norm over steps, by title; what no run logged is left out."""
    drawn = {}
    for title, names in _CURVES.items():
        figure = go.Figure()
        for number, (run, history) in enumerate(histories.items()):
            rated = names if title != "learning rate" or "lr/fft" not in history else ("lr/fft", "lr/lora")
            for dash, name in zip(_DASHES, [name for name in rated if name in history], strict=False):
                label = " ".join(filter(None, (run if len(histories) > 1 else "", names[name]))) or title
                _add_curve(figure, label, shortened(history[name]), number, dash)
        if figure.data:
            figure.update_layout(xaxis_title="step", yaxis_title=title)
            drawn[title] = _json(figure)
    return drawn


def score_figure(bins: RoutingBins) -> dict[str, Any] | None:
    """Draw the mean score of each expert over steps; None without scores."""
    figure = go.Figure()
    middles = [(first + last) / 2 for first, last in bins.spans]
    for number, expert in enumerate(bins.experts):
        points = [(x, float(y)) for x, y in zip(middles, bins.scores[:, number], strict=True) if y == y]
        if points:
            _add_curve(figure, expert, points, number, "solid")
    if not figure.data:
        return None
    positive = all(value > 0 for curve in figure.data for value in curve.y)
    figure.update_layout(xaxis_title="step", yaxis={"title": "score", "type": "log" if positive else "linear"})
    return _json(figure)


def shortened(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Return a curve of at most ``MAX_POINTS`` points: itself, or means of equally many consecutive ones."""
    size = max(1, -(-len(points) // MAX_POINTS))
    chunks = [points[first : first + size] for first in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in chunk), statistics.fmean(y for _, y in chunk)) for chunk in chunks]


def plain(text: str) -> str:
    """Return a text that plotly.js, which reads some tags of HTML, shows as it is."""
    return html.escape(text, quote=False)


def _add_curve(figure: go.Figure, label: str, points: Sequence[tuple[float, float]], number: int, dash: str) -> None:
    figure.add_scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        name=plain(label),
        mode="lines" if len(points) > 1 else "markers",
        line={"color": _COLOURS[number % len(_COLOURS)], "dash": dash, "width": 2},
    )


def _json(figure: go.Figure, height: int = 300) -> dict[str, Any]:
    figure.update_layout(template="none", height=height, showlegend=True)
    drawn: dict[str, Any] = json.loads(figure.to_json())  # whose numbers that are not finite are null
    return drawn
