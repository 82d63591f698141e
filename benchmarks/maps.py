"""Do routing maps follow the data? Correlate the share of full fine-tuning by layer between runs that differ in one thing.

python benchmarks/maps.py RUN...    # gathers the maps of finished runs of molf train (those known already stay), and prints
python benchmarks/maps.py           # only prints what was gathered
"""

import argparse
import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

from evidence import GATHERED
from molf.files import atomic_write
from molf.integrations.routing_lines import find_log
from molf.study.results.routing import kind_of
from molf.study.results.routing_reader import read_routing

SETTINGS = ("seed", "learning_rate", "ranks", "task", "score")
FILE = GATHERED / "routing-maps.json"


def read_run(folder: Path) -> dict[str, Any]:
    """Return a run's settings and, by layer, how often full fine-tuning won."""
    config = json.loads((folder / "result.json").read_text())["config"]
    log = find_log(folder)
    if log is None:
        raise FileNotFoundError(f"{folder} has no routing log: it is not a run of method molf")
    shares = {module: round(won.get("fft", 0.0), 4) for module, won in read_routing(log).by_module.items()}
    return {key: config[key] for key in SETTINGS} | {"shares": shares}


def within_kinds(shares: dict[str, float]) -> dict[str, float]:
    """Return the shares less the mean of each kind of projection, which shape may explain."""
    kinds = defaultdict(list)
    for module, share in shares.items():
        kinds[kind_of(module)].append(share)
    return {module: share - fmean(kinds[kind_of(module)]) for module, share in shares.items()}


def agreement(one: dict[str, float], other: dict[str, float]) -> float:
    """Return Pearson's correlation over the layers; not a number if all layers of a run are alike."""
    x, y = ([shares[module] for module in sorted(one)] for shares in (one, other))
    return correlation(x, y) if len(set(x)) > 1 < len(set(y)) else math.nan


def table(runs: list[dict[str, Any]]) -> str:
    """Return, for each setting, how well the maps of runs agree that differ in it alone, but for the seed."""
    pairs = defaultdict(list)
    for one, other in itertools.combinations(runs, 2):
        differing = [key for key in SETTINGS if one[key] != other[key] and key != "seed"] or ["seed"]
        if len(differing) == 1:
            # How well a task agrees with itself is told for each task.
            name = f"seed, {one['task']}" if differing == ["seed"] else differing[0]
            pairs[name].append((one, other))
    lines = ["| runs that differ in | pairs | correlation of maps | within kinds of projections |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for key in sorted(pairs, key=lambda key: SETTINGS.index(key.partition(",")[0])):
        whole = [agreement(one["shares"], other["shares"]) for one, other in pairs[key]]
        within = [agreement(within_kinds(one["shares"]), within_kinds(other["shares"])) for one, other in pairs[key]]
        lines.append(f"| {key.replace('_', ' ')} | {len(whole)} | {fmean(whole):.2f} | {fmean(within):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folders of finished runs")
    args = parser.parse_args()
    known = json.loads(FILE.read_text()) if FILE.exists() else []
    by_settings = {json.dumps([run[key] for key in SETTINGS]): run for run in [*known, *map(read_run, args.runs)]}
    runs = list(by_settings.values())
    if args.runs:
        with atomic_write(FILE) as partial:
            partial.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")
    print(table(runs))


if __name__ == "__main__":
    main()
