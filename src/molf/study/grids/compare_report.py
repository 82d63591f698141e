"""Reports of a comparison: a table, a bar chart, CSV, JSON and Markdown files, and a verdict."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from molf.files import atomic_write
from molf.study.grids.compare import Contender, Outcome, best
from molf.study.results.tables import plain_text

BASELINES = ("fft", "lora", "rslora")
"""Baselines of MoLF: full fine-tuning and plain LoRA, with either scale."""

ADAPTIVE = ("adalora", "dora", "eva", "pissa", "rslora", "lora_plus")
"""Baselines of MoLF-Efficient: LoRA variants that adapt ranks, initialization, directions or learning rates."""

NAME = "comparison"


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    """Return one plain row per contender; None is unknown.

    The metric is given as mean and standard deviation (``/spread``) over the ``seeds`` whose runs have it, memory as its largest
    value, everything else as a mean.
    """
    return [_row(contender, outcome.metric) for contender in outcome.contenders]


def _row(contender: Contender, metric: str) -> dict[str, Any]:
    results = contender.results
    trainings = [result.training for result in results if result.training is not None]
    memory = [result.peak_memory_bytes for result in results if result.peak_memory_bytes is not None]
    speeds = [training.tokens_per_second for training in trainings if training.tokens_per_second is not None]
    others = [name for name in dict.fromkeys(name for result in results for name in result.metrics) if name != metric]
    return {
        "name": contender.name,
        "method": contender.method,
        "chosen": contender.chosen,
        "seeds": len(contender.values(metric)),
        metric: contender.mean(metric),
        f"{metric}/spread": contender.spread(metric),
        **{name: contender.mean(name) for name in others},
        **_forgetting(contender),
        "trainable_parameters": trainings[0].trainable_parameters + trainings[0].lora_parameters if trainings else None,
        "tokens_per_second": fmean(speeds) if speeds else None,
        "peak_memory_bytes": max(memory, default=None),
        "seconds": fmean(result.seconds for result in results) if results else None,
    }


def _forgetting(contender: Contender) -> dict[str, float]:
    """Return the mean rise of the loss on other text, and KL(base || tuned), in nats per token, as far as they were measured."""
    found = [result.retention.metrics() for result in contender.results if result.retention is not None]
    names = ("loss_rise", "kl") if found else ()
    values = {name: [own[name].value for own in found if name in own] for name in names}
    return {f"retention/{name}": fmean(own) for name, own in values.items() if own}


def verdict(outcome: Outcome) -> str:
    """Say in one sentence how MoLF and MoLF-Efficient compare with their baselines."""
    present = {contender.method for contender in outcome.contenders if contender.results}
    both = "fft" in present and present.intersection(BASELINES[1:])
    baseline = "the better of full fine-tuning and LoRA" if both else "the baseline"
    parts = [
        _distance(outcome, "molf", BASELINES, "MoLF", baseline),
        _distance(outcome, "molf_e", ADAPTIVE, "MoLF-Efficient", "the best adaptive LoRA"),
    ]
    found = " and ".join(part for part in parts if part)
    return f"{found}." if found else "Nothing to say about MoLF: it or its baselines are missing."


def _distance(outcome: Outcome, method: str, against: Sequence[str], label: str, others: str) -> str | None:
    ours = _leader(outcome, (method,))
    theirs = _leader(outcome, against)
    if ours is None or theirs is None:
        return None
    (name, value), (other, reference) = ours, theirs
    difference = reference - value if outcome.less_is_better else value - reference
    points = "" if outcome.less_is_better else " points"  # a loss has no points
    where = (
        f"{abs(difference):.2f}{points} {'ahead of' if difference > 0 else 'behind'}" if difference else "level with"
    )
    shown = label if name == method else f"{label} ({name})"
    less = " (less is better)" if outcome.less_is_better else ""
    return f"{shown} is {where} {others} ({other}) in {outcome.metric}{less}, {value:.2f} to {reference:.2f}"


def _leader(outcome: Outcome, methods: Sequence[str]) -> tuple[str, float] | None:
    means = {
        c.name: mean for c in outcome.contenders if c.method in methods and (mean := c.mean(outcome.metric)) is not None
    }
    leader = best(means, outcome.less_is_better)
    return None if leader is None else (leader, means[leader])


def comparison_table(outcome: Outcome) -> Table:
    """Return the comparison for a terminal: without the task's other metrics, which the files have."""
    header, *lines = _text_table(outcome, others=False)
    table = Table(title="comparison", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for number, title in enumerate(header):
        table.add_column(title, justify="left" if number < 2 else "right", no_wrap=number != 1)
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def markdown(outcome: Outcome) -> str:
    """Return the comparison as Markdown: the table, how settings were chosen, what failed, the verdict."""
    header, *lines = _text_table(outcome)
    rules = ["---", "---", *["---:"] * (len(header) - 2)]
    table = [f"| {' | '.join(line)} |" for line in (header, rules, *lines)]
    chosen = [
        f"- {c.name}: " + ", ".join(f"{label} {value:.2f}" for label, value in c.selection.items())
        for c in outcome.contenders
        if c.selection
    ]
    failed = [f"- {f.cell}: status {f.status}, see {f.log}" for f in outcome.failures]
    lists = {
        f"Settings by {outcome.metric} on the rows for selection:": chosen,
        "Failed:": failed,
        "Not finished:": [f"- {name}" for name in outcome.unfinished],
    }
    parts = [[title, "", *items, ""] for title, items in lists.items() if items]
    return "\n".join([*table, "", verdict(outcome), "", *(line for part in parts for line in part)])


def _text_table(outcome: Outcome, others: bool = True) -> list[list[str]]:
    """Return the header and a line per contender; without ``others``, of further metrics only how the loss on other text rose."""
    rows, metric = rows_of(outcome), outcome.metric
    costs = {  # column: (title, unit)
        "trainable_parameters": ("trainable M", 1e6),
        "tokens_per_second": ("tok/s", 1.0),
        "peak_memory_bytes": ("peak GiB", 2**30),
        "seconds": ("min", 60.0),
    }
    known = {"name", "method", "chosen", "seeds", metric, f"{metric}/spread", *costs}
    more = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in known]
    if not others:
        more = [name for name in more if name == "retention/loss_rise"]
    titles = [name.replace("retention/loss_rise", "forgotten") for name in more]
    lines = [["method", "chosen", metric, "n", *titles, *(title for title, _ in costs.values())]]
    for row in rows:
        spread = row[f"{metric}/spread"]
        value = _number(row[metric]) + (f" ± {spread:.2f}" if spread is not None else "")
        measured = [_number(row.get(name)) for name in more]
        spent = [_number(row[name], unit, digits=1) for name, (_, unit) in costs.items()]
        lines.append([row["name"], row["chosen"] or "none", value, str(row["seeds"]), *measured, *spent])
    return lines


def _number(value: float | None, unit: float = 1.0, digits: int = 2) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def write_comparison(outcome: Outcome, folder: Path) -> list[Path]:
    """Write ``comparison.csv``, ``.json``, ``.md`` and ``.png`` into a folder and return their paths."""
    record = {
        "metric": outcome.metric,
        "verdict": verdict(outcome),
        "rows": rows_of(outcome),
        "selection": {c.name: c.selection for c in outcome.contenders},
        "runs": {c.name: {c.chosen or "": c.results, **c.others} for c in outcome.contenders},
        "failures": [asdict(failure) for failure in outcome.failures],
        "unfinished": outcome.unfinished,
    }

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value.to_dict()

    texts = {
        ".csv": pd.DataFrame(rows_of(outcome), dtype=object).to_csv(index=False),
        ".json": json.dumps(record, indent=2, ensure_ascii=False, default=plain) + "\n",
        ".md": markdown(outcome),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in texts.items():
        with atomic_write(folder / f"{NAME}{suffix}") as partial:
            partial.write_text(text, encoding="utf-8")
    draw_bars(outcome, folder / f"{NAME}.png")
    pictures = [folder / f"{NAME}.png"]
    if any(_forgetting(contender) for contender in outcome.contenders):
        pictures.append(folder / f"{NAME}-forgetting.png")
        draw_forgetting(outcome, pictures[-1])
    return [folder / f"{NAME}{suffix}" for suffix in texts] + pictures


def draw_bars(outcome: Outcome, path: Path) -> None:
    """Draw the mean of the metric as one bar per contender, with its spread and a dot per seed, into a PNG file."""
    metric, shown = outcome.metric, [c for c in outcome.contenders if c.values(outcome.metric)]
    with plain_text(), atomic_write(path) as partial:
        figure = Figure(figsize=(max(4.0, 1.1 * len(shown) + 1.5), 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for place, contender in enumerate(shown):
            color = "#2a6f97" if contender.method.startswith("molf") else "#b0b7bf"
            mean = fmean(values := contender.values(metric))
            axes.bar(place, mean, yerr=contender.spread(metric), color=color, capsize=4, width=0.7)
            if len(values) > 1:
                axes.plot([place] * len(values), values, "o", color="black", markersize=3)
            axes.annotate(f"{mean:.1f}", (place, mean), xytext=(0, 4), textcoords="offset points", ha="center")
        axes.set_xticks(range(len(shown)), [contender.name for contender in shown], rotation=30, ha="right")
        axes.set(ylabel=metric)
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(partial, dpi=150, format="png")


def draw_forgetting(outcome: Outcome, path: Path) -> None:
    """Draw what was gained against what was forgotten, a dot per contender: the upper left is best."""
    costs = [(c, _forgetting(c).get("retention/loss_rise"), c.mean(outcome.metric)) for c in outcome.contenders]
    shown = [(c, cost, gain) for c, cost, gain in costs if cost is not None and gain is not None]
    with plain_text(), atomic_write(path) as partial:
        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for contender, cost, gain in shown:
            color = "#2a6f97" if contender.method.startswith("molf") else "#6b7280"
            axes.plot(cost, gain, "o", color=color)
            axes.annotate(contender.name, (cost, gain), xytext=(5, 3), textcoords="offset points", fontsize=8)
        axes.set(xlabel="rise of the loss on other text (nats per token)", ylabel=outcome.metric)
        axes.margins(x=0.25, y=0.15)
        if outcome.less_is_better:
            axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(partial, dpi=150, format="png")
