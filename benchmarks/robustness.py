"""Gather the finished runs of a robustness study in one small JSON file, and draw it.

molf compare --config configs/compare/smollm2-robustness.yaml        # hours; what is finished can be gathered at any time
python benchmarks/robustness.py runs/compare/smollm2-robustness      # --draw only redraws from the JSON file
python benchmarks/robustness.py runs/compare/smollm2-promise --into smollm2-fact-promise.json   # another study, not drawn
"""

import argparse
import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from molf.files import atomic_write

ROOT = Path(__file__).parents[1]
GATHERED = ROOT / "benchmarks/results/evidence/smollm2-fact-robustness.json"
PICTURE = ROOT / "docs/robustness.png"
METRICS = ("score", "efficacy_score", "paraphrase_score", "neighborhood_score", "exact_new")
SETTINGS = ("method", "score", "ranks", "lora_alpha", "match_lora_rate", "learning_rate", "top_k", "limit", "seed")
FAMILIES = {"epd": "published rule (EPD)", "matched_epd": "EPD, matched", "matched_random": "random routing, matched"}


def gather(folder: Path) -> list[dict[str, Any]]:
    """Return settings, metrics and routing shares of every finished run."""
    found = []
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text())
        name = re.sub(r"-lr.*", "", path.parent.name)
        metrics = {metric: result["metrics"][metric] for metric in METRICS}
        settings = {key: result["config"].get(key) for key in SETTINGS}
        kept = {key: value for key, value in (result.get("retention") or {}).items() if isinstance(value, dict)}
        run = {"name": name, "settings": settings, "metrics": metrics, "routing": result.get("routing")}
        found.append({**run, "retention": kept} if kept else run)
    return found


def family(name: str) -> str:
    """Return the name of a contender without its rank and alpha."""
    return re.sub(r"_r\d+(_alpha\d+)?$", "", name)


def table(runs: list[dict[str, Any]]) -> str:
    """Return the runs as a Markdown table."""
    lines = [
        "| contender | score | efficacy | paraphrase | neighbourhood | exact new | won by FFT | forgotten |",
        "| --- |" + " ---: |" * 7,
    ]
    several = len({run["name"] for run in runs}) < len(runs)
    for run in sorted(runs, key=lambda run: (family(run["name"]), run["name"])):
        values = " | ".join(f"{value:.1f}" for value in values_of(run))
        share = f"{100 * run['routing']['fft']:.0f} %" if run["routing"] else ""
        rise = run.get("retention", {}).get("loss_rise")
        which = f", {run['settings']['learning_rate']:g}, seed {run['settings']['seed']}" if several else ""
        forgotten = f"{rise['value']:.2f}" if rise else ""
        lines.append(f"| {run['name'].replace('_', ' ')}{which} | {values} | {share} | {forgotten} |")
    return "\n".join([*lines, *means(runs)])


def values_of(run: dict[str, Any]) -> list[float]:
    """Return the metrics of a run in the order of ``METRICS``."""
    return [run["metrics"][metric]["value"] for metric in METRICS]


def means(runs: list[dict[str, Any]]) -> list[str]:
    """Return a row for each contender and rate of which there are several seeds."""
    seeds: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for run in runs:
        seeds.setdefault((run["name"], run["settings"]["learning_rate"]), []).append(run)
    lines = []
    for (name, rate), own in seeds.items():
        if len(own) > 1:
            values = " | ".join(f"{mean(column):.1f}" for column in zip(*map(values_of, own), strict=True))
            rises = [run["retention"]["loss_rise"]["value"] for run in own if "loss_rise" in run.get("retention", {})]
            forgotten = f"{mean(rises):.2f}" if len(rises) == len(own) else ""
            lines.append(f"| {name.replace('_', ' ')}, {rate:g}, mean of {len(own)} | {values} | | {forgotten} |")
    return lines


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the score of every contender by rank and alpha, with full fine-tuning as a line."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    labels: list[str] = []
    for key, label in FAMILIES.items():
        own = [run for run in runs if family(run["name"]) == key]
        own.sort(key=lambda run: [int(number) for number in re.findall(r"\d+", run["name"])])
        heights = [run["metrics"]["score"]["value"] for run in own]
        bars = axes.bar(range(len(labels), len(labels) + len(own)), heights, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
        labels += [run["name"][len(key) + 1 :].replace("_alpha", "\nalpha ").replace("r", "r ", 1) for run in own]
    full = [run["metrics"]["score"]["value"] for run in runs if run["name"] == "fft"]
    if full:
        axes.axhline(full[0], color="black", linewidth=1, linestyle="--", label="full fine-tuning, same rate")
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set(ylabel="harmonic mean of the three scores", ylim=(0, 75))
    axes.set_title("SmolLM2-135M learns 100 facts at one learning rate: what alpha and the rank change", fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
    with atomic_write(path) as partial:
        canvas.print_png(partial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--into", metavar="NAME", help="file beside the others in benchmarks/results/evidence")
    args = parser.parse_args()
    if args.into and args.folder:
        runs = gather(args.folder)
        with atomic_write(GATHERED.with_name(args.into)) as partial:
            partial.write_text(json.dumps(runs, indent=1) + "\n")
        print(table(runs))
        return
    if not args.draw:
        if args.folder is None:
            parser.error("give the folder of the comparison, or --draw")
        with atomic_write(GATHERED) as partial:
            partial.write_text(json.dumps(gather(args.folder), indent=1) + "\n")
    runs = json.loads(GATHERED.read_text())
    draw(runs, PICTURE)
    print(table(runs))


if __name__ == "__main__":
    main()
