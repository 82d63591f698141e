"""Gather the finished runs of a study in one small JSON file, and print them as a table with means over seeds.

"One expert" is the share of layers in which one expert won at least 95 % of the steps.

molf compare --config configs/compare/smollm2-promise.yaml                       # hours; gather what is finished at any time
python benchmarks/evidence.py runs/compare/smollm2-promise smollm2-fact-promise
python benchmarks/evidence.py smollm2-fact-promise                               # only print what was gathered
"""

import argparse
import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

from molf.files import atomic_write
from molf.integrations.routing_lines import find_log
from molf.study.results.routing_reader import read_routing

GATHERED = Path(__file__).parent / "results/evidence"
METRICS = {
    "score": "score",
    "efficacy_score": "efficacy",
    "paraphrase_score": "paraphrase",
    "neighborhood_score": "neighbourhood",
    "exact_new": "exact new",
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "execution_accuracy_filled": "execution, filled",
    "valid_sql": "valid SQL",
    "bleu": "BLEU",
}
FORMS = {"kl": "{:.2f}"}
SETTINGS = ("task", "method", "allocation", "score", "ranks", "lora_alpha", "match_lora_rate", "top_k", "learning_rate")
SETTINGS += ("lora_learning_rate", "dtype", "bf16_update", "num_train_epochs", "limit", "seed")


def gather(folder: Path) -> list[dict[str, Any]]:
    """Return settings, metrics, routing shares and forgetting of every finished run, and how many layers kept one expert."""
    found = []
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text())
        metrics = {metric: result["metrics"][metric] for metric in METRICS if metric in result["metrics"]}
        settings = {key: result["config"][key] for key in SETTINGS if result["config"].get(key) is not None}
        kept = {key: value for key, value in (result.get("retention") or {}).items() if isinstance(value, dict)}
        run = {"name": re.sub(r"-lr.*", "", path.parent.name), "settings": settings, "metrics": metrics}
        run |= {"routing": result.get("routing"), **({"retention": kept} if kept else {})}
        if (log := find_log(path.parent)) is not None:
            won = [max(shares.values()) / sum(shares.values()) for shares in read_routing(log).by_module.values()]
            run["one_expert"] = mean(share >= 0.95 for share in won)
        found.append(run)
    return found


def family(name: str) -> str:
    """Return the name of a contender without its rank and alpha."""
    return re.sub(r"_r\d+(_alpha\d+)?$", "", name)


def table(runs: list[dict[str, Any]]) -> str:
    """Return the runs as a Markdown table, then a row of means for every contender and rate with several seeds."""
    columns = [metric for metric in METRICS if any(metric in run["metrics"] for run in runs)]
    columns += ["kl"] if any("kl" in run.get("retention", {}) for run in runs) else []
    names = [*(METRICS.get(name, "KL") for name in columns), "won by FFT", "one expert", "forgotten"]
    lines = [f"| contender | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    seeds: dict[tuple[str, Any, Any], list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: (family(run["name"]), run["name"])):
        settings = run["settings"]
        rates = settings["learning_rate"], settings.get("lora_learning_rate")
        seeds.setdefault((re.sub(r"_\d+$", "", run["name"]), *rates), []).append(run)  # random_0: one of several draws
        lines.append(row(f"{label(run['name'], *rates)}, seed {settings['seed']}", [run], columns))
    for key, own in seeds.items():
        if len(own) > 1:
            lines.append(row(f"{label(*key)}, mean of {len(own)}", own, columns))
    return "\n".join(lines)


def label(name: str, rate: float, lora_rate: float | None) -> str:
    """Return how a table calls a contender at its rates."""
    return f"{name.replace('_', ' ')}, {rate:g}" + (f" / {lora_rate:g}" if lora_rate is not None else "")


def row(name: str, runs: list[dict[str, Any]], columns: list[str]) -> str:
    """Return a row with the means of the runs; a value that a run lacks leaves its cell empty."""
    values = [{**run.get("retention", {}), **run["metrics"]} for run in runs]
    cells = [average((own.get(name, {}).get("value") for own in values), FORMS.get(name, "{:.1f}")) for name in columns]
    won = average(((run["routing"] or {}).get("fft") for run in runs), "{:.0%}")
    one = average((run.get("one_expert") for run in runs), "{:.0%}")
    forgotten = average((run.get("retention", {}).get("loss_rise", {}).get("value") for run in runs), "{:.2f}")
    return f"| {name} | {' | '.join([*cells, won, one, forgotten])} |"


def average(values: Any, form: str) -> str:
    """Return the mean in the form, or nothing where a value is missing."""
    known = list(values)
    return "" if None in known else form.format(mean(known))


def read(name: str) -> list[dict[str, Any]]:
    """Return the runs that were gathered under a name."""
    runs: list[dict[str, Any]] = json.loads((GATHERED / f"{name}.json").read_text())
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="folder of finished runs; what was gathered is read if left out"
    )
    parser.add_argument("name", help=f"file under {GATHERED}, without .json")
    args = parser.parse_args()
    if args.folder is not None:
        runs = gather(args.folder)
        if not runs:
            parser.error(f"no finished run (a folder with result.json) under {args.folder}")
        with atomic_write(GATHERED / f"{args.name}.json") as partial:
            partial.write_text(json.dumps(runs, indent=1) + "\n")
    print(table(read(args.name)))


if __name__ == "__main__":
    main()
