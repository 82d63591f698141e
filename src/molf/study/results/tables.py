"""Finished runs for people: tables for a terminal and a picture of the routing."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from molf.errors import visible
from molf.files import atomic_write
from molf.integrations.routing_lines import find_log
from molf.study.results.result import Result
from molf.study.results.routing import RoutingBins, RoutingSummary, depth_of, in_order, kind_of
from molf.study.results.routing_reader import RoutingReader

PICTURE_FILE = "routing.png"


def metrics_table(result: Result) -> Table:
    """Return the metrics of a run with their intervals and, if measured, the metrics before training and the change."""
    before = result.metrics_before
    table = Table(title=_text(str(result.config.get("run_name", ""))), title_justify="left", box=box.SIMPLE)
    if any(metric.low is not None for metric in result.metrics.values()):
        table.caption = "(bootstrap 95 % interval)"
        table.caption_justify = "left"
    table.add_column("metric")
    for column in ("before", "after", "change", "n") if before else ("value", "n"):
        table.add_column(column, justify="right")
    for name, metric in result.metrics.items():
        label = _text(name, style="bold" if name == result.headline else "")
        if before is None:
            table.add_row(label, str(metric), str(metric.n))
            continue
        earlier = before.get(name)
        change = "" if earlier is None else f"{metric.value - earlier.value:+.2f}"
        table.add_row(label, str(earlier or ""), str(metric), change, str(metric.n))
    return table


def runs_table(results: Mapping[str, Result]) -> Table:
    """Return one row per run: its main metric, the share of updates that full fine-tuning won, speed, memory, time."""
    table = Table(title="runs", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold", min_width=12)
    for column in ("method", "task", "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("value", "n", "fft", "tok/s", "GiB", "min"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, result in results.items():
        metric = result.metrics.get(result.headline)
        speed = result.training.tokens_per_second if result.training else None
        cells = (  # in text, brackets are no markup
            label,
            str(result.config.get("method")) if result.training else "eval",
            str(result.config.get("task")),
            result.headline,
            _number(metric.value if metric else None, ".2f"),
            _number(metric.n if metric else None, "d"),
            _number((result.routing or {}).get("fft"), ".0%"),
            _number(speed, ".0f"),
            _number(None if result.peak_memory_bytes is None else result.peak_memory_bytes / 2**30, ".2f"),
            _number(result.seconds / 60, ".1f"),
        )
        table.add_row(*map(_text, cells))
    return table


def _text(name: str, style: str = "") -> Text:
    """Return a name of a file or of its author as text, which moves no cursor."""
    return Text(visible(name), style=style)


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def share_grid(by_module: Mapping[str, Mapping[str, float]]) -> tuple[np.ndarray[Any, Any], list[str], list[str]]:
    """Arrange the share of steps that full fine-tuning won by layer depth and projection; a mean over stacked experts.

    Returns:
        Shares [depth, kind], NaN if a depth has no such layer; the labels of depths; the kinds.
    """
    return _grid([(depth_of(name), kind_of(name), shares) for name, shares in by_module.items()])


def expert_grids(
    by_module: Mapping[str, Mapping[str, float]],
) -> dict[str, tuple[np.ndarray[Any, Any], list[str], list[str]]]:
    """Arrange the same share of a mixture's matrices by layer depth and expert, for each kind of projection."""
    stacks: dict[str, list[tuple[str, str, Mapping[str, float]]]] = defaultdict(list)
    for name, shares in by_module.items():
        if name.endswith("]"):
            stacks[kind_of(name)].append((depth_of(name), name.rpartition("[")[2][:-1], shares))
    return {kind: _grid(cells) for kind, cells in stacks.items()}


def _grid(
    entries: Iterable[tuple[str, str, Mapping[str, float]]],
) -> tuple[np.ndarray[Any, Any], list[str], list[str]]:
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for depth, column, shares in entries:
        cells[depth, column].append(shares.get("fft", 0.0))
    depths = in_order(depth for depth, _ in cells)
    columns = list(dict.fromkeys(column for _, column in cells))
    grid = np.full((len(depths), len(columns)), np.nan)
    for (depth, column), values in cells.items():
        grid[depths.index(depth), columns.index(column)] = sum(values) / len(values)
    return grid, depths, columns


def draw_routing(summary: RoutingSummary, path: Path, title: str = "") -> None:
    """Draw where and when full fine-tuning won.

    The left half shows the share of steps that the FFT expert won, by layer depth and projection; the right half the share of
    layers that each expert won, by step. Of a mixture, a second row shows the share by layer depth and expert.
    """
    with plain_text(), atomic_write(path) as partial:
        _routing_canvas(summary, title).print_png(partial)


def draw_log(folder: Path, title: str) -> RoutingSummary | None:
    """Draw the routing of a run from its log as ``PICTURE_FILE``, and return it; None if no step was logged."""
    if (log := find_log(folder)) is None:
        return None
    reader = RoutingReader(log)
    reader.poll()
    if (routing := reader.summary()) is not None:
        draw_routing(routing, folder / PICTURE_FILE, title)
    return routing


def routing_pixels(summary: RoutingSummary, title: str = "") -> np.ndarray[Any, Any]:
    """Return the same picture as pixels [height, width, 3] of 0 to 255."""
    with plain_text():
        canvas = _routing_canvas(summary, title)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _routing_canvas(summary: RoutingSummary, title: str) -> FigureCanvasAgg:
    mixtures = expert_grids(summary.by_module)
    figure = Figure(figsize=(12, 9.5 if mixtures else 5.5), layout="constrained")
    figure.suptitle(title or "Routing")
    above, *below = figure.subfigures(2 if mixtures else 1, 1, squeeze=False)[:, 0]
    left, right = above.subplots(1, 2, width_ratios=(1, 1.3))
    explained = summary.explained_by_kind()
    kind = "" if explained is None else f"\nthe kind of projection explains {explained:.0%}"
    _draw_grid(above, left, share_grid(summary.by_module), f"Share of steps won by full fine-tuning{kind}")
    left.tick_params(axis="x", rotation=45)
    _draw_steps(right, summary.bins)
    for lower in below:
        for axes, (name, grid) in zip(
            lower.subplots(1, len(mixtures), squeeze=False)[0], mixtures.items(), strict=True
        ):
            _draw_grid(lower, axes, grid, f"{name}: share won by full fine-tuning")
            axes.set_xlabel("expert")
    return FigureCanvasAgg(figure)


@contextmanager
def plain_text() -> Iterator[None]:
    """Let matplotlib draw names as they are: ``$`` begins no formula, and a character without a glyph is a box and no warning."""
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font", UserWarning)
        yield


def _draw_grid(figure: Any, axes: Any, grid: tuple[np.ndarray[Any, Any], list[str], list[str]], title: str) -> None:
    shares, depths, columns = grid
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower", interpolation="nearest")
    for set_ticks, labels in ((axes.set_xticks, columns), (axes.set_yticks, depths)):
        every = max(1, len(labels) // 16)
        set_ticks(range(0, len(labels), every), labels[::every])
    axes.set(title=title, ylabel="layer depth")
    figure.colorbar(image, ax=axes, label="FFT share")


def _draw_steps(axes: Any, bins: RoutingBins) -> None:
    steps = [(first + last) / 2 for first, last in bins.spans]
    window = max(1, len(steps) // 20)
    for expert, series in zip(bins.experts, bins.layers.T, strict=True):
        smooth = pd.Series(series).rolling(window, min_periods=1).mean()
        (line,) = axes.plot(steps, smooth, linewidth=2, label=expert)
        if window > 1:
            axes.plot(steps, series, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axes.set(title="Share of layers won, by step", xlabel="step", ylabel="share of layers", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(title="expert" if window == 1 else f"expert (mean of {window} points)")
