"""Draw the evidence from its gathered runs: all tasks, and what the learning rate, the rank and alpha change on one.

python benchmarks/promise.py docs/tasks.png docs/promise.png
"""

import argparse
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evidence import read
from molf.files import atomic_write

RATES = {"fft": "full fine-tuning", "lora_r32": "LoRA, r 32", "epd_r32": "MoLF, r 32"}
COLOURS = {"fft": "black", "lora_r32": "tab:orange", "epd_r32": "tab:blue"}
# Title, files, metric, and the rates that other rows chose; the paper's margin of 1.5 points is drawn.
TASKS: tuple[tuple[str, tuple[str, ...], str, dict[str, float]], ...] = (
    (
        "facts, SmolLM2",
        ("smollm2-fact-aligned", "smollm2-fact-promise"),
        "score",
        {"fft": 1e-4, "lora_r32": 1e-3, "molf": 1e-4, "random_r32": 2e-4},
    ),
    (
        "facts, Gemma",
        ("gemma-fact",),
        "score",
        {"fft": 8.8e-6, "lora_r32": 1.8e-4, "molf": 1.8e-5, "random_r32": 1.8e-5},
    ),
    (
        "text-to-SQL,\n64 rows, SmolLM2",
        ("smollm2-sql-few",),
        "exact_match",
        {"fft": 1e-4, "lora_r32": 1.5e-3, "molf": 1e-4, "random_r32": 3e-4},
    ),
    (
        "text-to-SQL,\n500 rows, SmolLM2",
        ("smollm2-sql",),
        "exact_match",
        {"fft": 1e-4, "lora_r32": 1.5e-3, "molf": 1e-4, "random_r32": 3e-4},
    ),
)
MARGIN, SEEDS = 1.5, 3
# Contender: what its rate is called above, label, colour, place.
SHOWN = {
    "fft": ("fft", "full fine-tuning", "black", -0.3),
    "lora_r32": ("lora_r32", "LoRA, r 32", "tab:orange", -0.2),
    "epd_r8": ("molf", "MoLF, r 8", "#7fb3d8", 0.0),
    "epd_r32": ("molf", "MoLF, r 32", "tab:blue", 0.1),
    "epd_r128": ("molf", "MoLF, r 128", "#0b4f8a", 0.2),
    "random_r32": ("random_r32", "control: random routing", "0.6", 0.35),
}


def scores(runs: list[dict[str, Any]], name: str, rate: float | None = None, metric: str = "score") -> list[float]:
    """Return the scores of a contender, at one rate or at all."""
    own = (run for run in runs if run["name"] == name and rate in (None, run["settings"]["learning_rate"]))
    return [run["metrics"][metric]["value"] for run in own]


def several(runs: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return the runs of a contender at the rates that have three seeds."""
    own = [run for run in runs if run["name"] == name]
    seeds = Counter(run["settings"]["learning_rate"] for run in own)
    return [run for run in own if seeds[run["settings"]["learning_rate"]] == SEEDS]


def draw_tasks(axes: Axes) -> None:
    """Draw means and seeds of every task, against the better of full fine-tuning and LoRA."""
    for place, (_, files, metric, rates) in enumerate(TASKS):
        # The first file that has a contender counts: an earlier rule of matched rates is in the second.
        runs = {
            name: next(own for file in files if (own := several(read(file), name)) or file == files[-1])
            for name in SHOWN
        }
        best = max(mean(scores(runs[name], name, rates[name], metric)) for name in ("fft", "lora_r32"))
        for name, (key, label, colour, shift) in SHOWN.items():
            for rate in sorted({run["settings"]["learning_rate"] for run in runs[name]}):
                values = scores(runs[name], name, rate, metric)
                chosen = rate == rates[key]
                fill: dict[str, Any] = {"label": label if place == 0 else None} if chosen else {"fillstyle": "none"}
                axes.plot(place + shift, mean(values) - best, "D", color=colour, **fill)
                if chosen:
                    axes.plot([place + shift] * len(values), [x - best for x in values], ".", color=colour, alpha=0.4)
    axes.plot([], [], "D", color="0.3", fillstyle="none", label="hollow: other rates tried")
    axes.axhspan(-MARGIN, 0, color="tab:green", alpha=0.12, linewidth=0, label=f"within {MARGIN} points")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(TASKS)), [title for title, *_ in TASKS])
    axes.set(ylabel="points ahead of the better one", xlim=(-0.5, len(TASKS) - 0.5))


def draw_rates(axes: Axes) -> None:
    """Draw the score over the learning rate, on the edits that rates are chosen on."""
    runs = read("smollm2-fact-rates")
    for name, label in RATES.items():
        rates = sorted({run["settings"]["learning_rate"] for run in runs if run["name"] == name})
        axes.plot(rates, [mean(scores(runs, name, x)) for x in rates], "o-", color=COLOURS[name], label=label)
    axes.set(xscale="log", xlabel="learning rate", ylabel="score", ylim=(30, 66))
    axes.set_title("what the rate changes (selection edits, one seed)", fontsize=9)
    axes.legend(loc="lower left", fontsize=8)


def draw_ranks(axes: Axes) -> None:
    """Draw every seed and the means over rank and alpha, on the edits that are evaluated."""
    own, tuned, published = read("smollm2-fact-aligned"), read("smollm2-fact-promise"), read("smollm2-fact-robustness")
    columns: dict[str, tuple[str, list[float]]] = {}
    for rate in (1e-4, 2e-4):
        for rank in (8, 32, 128):
            label = f"r {rank}\nany alpha\n{rate:.0e}".replace("e-0", "e-")
            columns[label] = "tab:blue", scores(own, f"epd_r{rank}", rate)
    for alpha in (8, 128):
        columns[f"r 32\nalpha {alpha}\n2e-4"] = "tab:red", scores(published, f"epd_r32_alpha{alpha}")
    columns = {label: column for label, column in columns.items() if column[1]}
    for x, (colour, values) in enumerate(columns.values()):
        axes.plot([x] * len(values), values, "o", color=colour, alpha=0.5, markersize=5)
        axes.plot([x - 0.25, x + 0.25], [mean(values)] * 2, color=colour, linewidth=2)
    for name in ("fft", "lora_r32"):
        axes.axhline(mean(scores(tuned, name)), color=COLOURS[name], linestyle="--", linewidth=1)
    axes.set_xticks(range(len(columns)), list(columns), fontsize=7)
    axes.set(ylim=(46, 66))
    axes.set_title("what rank and alpha change (evaluated edits): MoLF, and the paper's rule", fontsize=9)
    axes.text(0, 65, "lines: full fine-tuning and LoRA, each at its own best rate", fontsize=7, va="top")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path, help="the PNG file of all tasks to write")
    parser.add_argument("promise", type=Path, help="the one of the learning rate, the rank and alpha")
    args = parser.parse_args()
    figure = Figure(figsize=(10, 4), layout="constrained")
    draw_tasks(figure.add_subplot())
    figure.legend(loc="outside right center", fontsize=8)
    figure.suptitle(
        "One rate per task, chosen on other rows: against the better of full fine-tuning and LoRA", fontsize=10
    )
    save(figure, args.tasks)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    draw_rates(left)
    draw_ranks(right)
    figure.suptitle("SmolLM2-135M learns 100 facts", fontsize=10)
    save(figure, args.promise)


def save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as partial:
        FigureCanvasAgg(figure).print_png(partial)


if __name__ == "__main__":
    main()
