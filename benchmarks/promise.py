"""Draw what the learning rate, the rank and alpha change, from the gathered runs of the evidence.

python benchmarks/promise.py docs/promise.png
"""

import argparse
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


def scores(runs: list[dict[str, Any]], name: str, rate: float | None = None) -> list[float]:
    """Return the scores of a contender, at one rate or at all."""
    own = (run for run in runs if run["name"] == name and rate in (None, run["settings"]["learning_rate"]))
    return [run["metrics"]["score"]["value"] for run in own]


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
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    args = parser.parse_args()
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    draw_rates(left)
    draw_ranks(right)
    figure.suptitle("SmolLM2-135M learns 100 facts", fontsize=10)
    with atomic_write(args.picture) as partial:
        canvas.print_png(partial)


if __name__ == "__main__":
    main()
