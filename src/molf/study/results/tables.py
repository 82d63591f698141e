"""Finished runs for people: tables for a terminal and a picture of the routing."""

import re
from collections import defaultdict
from collections.abc import Mapping
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

from molf.files import atomic_write
from molf.study.results.result import Result
from molf.study.results.routing import RoutingSummary

_DEPTH = re.compile(r"\.(\d+)\.")


def metrics_table(result: Result) -> Table:
    """Return the metrics of a run with their intervals and, if measured, the metrics before training and the change."""
    before = result.metrics_before
    table = Table(title=Text(str(result.config.get("run_name", ""))), title_justify="left", box=box.SIMPLE)
    if any(metric.low is not None for metric in result.metrics.values()):
        table.caption = "(bootstrap 95 % interval)"
        table.caption_justify = "left"
    table.add_column("metric")
    for column in ("before", "after", "change", "n") if before else ("value", "n"):
        table.add_column(column, justify="right")
    for name, metric in result.metrics.items():
        label = Text(name, style="bold" if name == result.headline else "")
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
        cells = (  # as text, in which brackets are no markup
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
        table.add_row(*map(Text, cells))
    return table


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def share_grid(by_module: Mapping[str, Mapping[str, float]]) -> tuple[np.ndarray[Any, Any], list[str], list[str]]:
    """Arrange the share of steps that full fine-tuning won by layer depth and projection.

    Returns:
        Shares [depth, kind], NaN if a depth has no such layer; the labels of depths; the kinds.
    """
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, shares in by_module.items():
        number = _DEPTH.search(f".{name}.")
        cells[number[1] if number else "-", name.rpartition(".")[2]].append(shares.get("fft", 0.0))
    depths = sorted({depth for depth, _ in cells}, key=lambda depth: (depth == "-", int(depth) if depth != "-" else 0))
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    grid = np.full((len(depths), len(kinds)), np.nan)
    for (depth, kind), values in cells.items():
        grid[depths.index(depth), kinds.index(kind)] = sum(values) / len(values)
    return grid, depths, kinds


def draw_routing(summary: RoutingSummary, path: Path, title: str = "") -> None:
    """Draw where and when full fine-tuning won.

    The left half shows the share of steps that the FFT expert won, by layer depth and projection; the right half the share of
    layers that each expert won, by step.
    """
    with plain_text(), atomic_write(path) as partial:
        figure = Figure(figsize=(12, 5.5), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
        figure.suptitle(title or "Routing")
        _draw_grid(figure, left, summary)
        _draw_steps(right, summary)
        canvas.print_png(partial)


def plain_text() -> Any:
    """Return a context in which matplotlib draws names as they are: ``$`` in them begins no formula."""
    return rc_context({"text.parse_math": False})


def _draw_grid(figure: Figure, axes: Any, summary: RoutingSummary) -> None:
    grid, depths, kinds = share_grid(summary.by_module)
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower", interpolation="nearest")
    axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    every = max(1, len(depths) // 16)
    axes.set_yticks(range(0, len(depths), every), depths[::every])
    explained = summary.explained_by_kind()
    kind = "" if explained is None else f"\nthe kind of projection explains {explained:.0%}"
    axes.set(title=f"Share of steps won by full fine-tuning{kind}", ylabel="layer depth")
    figure.colorbar(image, ax=axes, label="FFT share")


def _draw_steps(axes: Any, summary: RoutingSummary) -> None:
    window = max(1, len(summary.steps) // 20)
    for expert, series in summary.by_step.items():
        smooth = pd.Series(series).rolling(window, min_periods=1).mean()
        (line,) = axes.plot(summary.steps, smooth, linewidth=2, label=expert)
        if window > 1:
            axes.plot(summary.steps, series, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axes.set(title="Share of layers won, by step", xlabel="step", ylabel="share of layers", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(title="expert" if window == 1 else f"expert (mean of {window} steps)")
