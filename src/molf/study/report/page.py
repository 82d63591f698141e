"""One HTML page about finished runs, which needs no network: tables, charts of plotly.js, and examples.

What runs contain is shown as text and never as markup: Jinja2 escapes it in HTML and in the JSON for the page's script, labels
of charts are escaped for plotly.js, and a content security policy allows the page's own two scripts alone.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from molf.files import atomic_write
from molf.integrations.routing_lines import find_log
from molf.study.report.examples import read_examples
from molf.study.report.figures import curve_figures, headline_figure, score_figure
from molf.study.report.routing_map import routing_map
from molf.study.results.history import read_history
from molf.study.results.result import Result, read_result
from molf.study.results.routing import MAX_CELLS
from molf.study.results.routing_reader import read_routing
from molf.tasks.base import Metric

_HERE = Path(__file__).parent
LONGEST_LABEL = 32  # characters
_ALWAYS_OTHER = {"run_name", "output_dir"}


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page about finished runs.

    Args:
        folders: The folders of the runs.
        path: The page, which replaces an older one.

    Raises:
        MolfError: A run is not finished, a file of it is damaged, or the page cannot be written.
    """
    results = [read_result(folder) for folder in folders]
    names = _names(folders, results)
    runs = [
        {"index": index, "name": name, "result": result, "examples": read_examples(folder, result)}
        | _routing(folder, result, len(folders))
        for index, (folder, name, result) in enumerate(zip(folders, names, results, strict=True))
    ]
    labels = _short(names)
    histories = {
        label: read_history(folder)
        for folder, label, result in zip(folders, labels, results, strict=True)
        if result.training is not None
    }
    figures = {"headline": headline_figure(dict(zip(labels, results, strict=True))), **curve_figures(histories)}
    with atomic_write(path) as partial:
        partial.write_text(_rendered(runs, figures), encoding="utf-8")


def _names(folders: Sequence[Path], results: Sequence[Result]) -> list[str]:
    """Return a name for each run: its own, or its folder if another has the same; numbered if that is given twice."""
    own = [str(result.config.get("run_name") or folder) for folder, result in zip(folders, results, strict=True)]
    shared = [name if own.count(name) == 1 else str(folder) for folder, name in zip(folders, own, strict=True)]
    seen: Counter[str] = Counter()
    names = []
    for name in shared:
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def _short(names: Sequence[str]) -> list[str]:
    """Return the ends of long names, where those of runs differ, for charts; the names themselves if the ends are the same."""
    ends = [
        name if len(name) <= LONGEST_LABEL else f"\N{HORIZONTAL ELLIPSIS}{name[1 - LONGEST_LABEL :]}" for name in names
    ]
    return ends if len(set(ends)) == len(names) else list(names)


def _routing(folder: Path, result: Result, runs: int) -> dict[str, Any]:
    log = find_log(folder)
    if result.routing is None or log is None:
        return {"map": None, "scores": None}
    summary = read_routing(log, MAX_CELLS // runs)
    return {"map": routing_map(summary), "scores": score_figure(summary.bins)}


def _rendered(runs: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    scripts = get_plotlyjs(), (_HERE / "page.js").read_text(encoding="utf-8")
    results = [run["result"] for run in runs]
    return environment.get_template("page.html").render(
        runs=runs,
        figures=list(figures),
        data={"figures": figures, "runs": [{"map": run["map"], "scores": run["scores"]} for run in runs]},
        headlines={result.headline for result in results},
        metrics=list(dict.fromkeys(name for result in results for name in result.metrics)),
        facts=_facts(results),
        settings=_settings(results),
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
    )


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _facts(results: Sequence[Result]) -> dict[str, list[Any]]:
    """Return what the results record beside metrics and settings: a value, or None, per run."""
    flat = [
        {
            **{name: getattr(result, name) for name in ("device", "commit", "data_origin")},
            **{name: getattr(result, name) for name in ("seconds", "peak_memory_bytes")},
            **{
                f"training {name}": value
                for name, value in (asdict(result.training) if result.training else {}).items()
            },
            **{f"updates won by {name}": share for name, share in (result.routing or {}).items()},
            **{f"forgetting: {name}, nats a token": metric.value for name, metric in _forgetting(result).items()},
            **{f"version of {name}": version for name, version in result.versions.items()},
        }
        for result in results
    ]
    names = dict.fromkeys(name for own in flat for name in own)
    rows = {name: [own.get(name) for own in flat] for name in names}
    return {name: row for name, row in rows.items() if any(value is not None for value in row)}


def _forgetting(result: Result) -> dict[str, Metric]:
    return {} if result.retention is None else result.retention.metrics()


def _settings(results: Sequence[Result]) -> dict[str, dict[str, list[Any]]]:
    """Return the settings that differ between runs, and those that do not, with a value per run."""
    names = dict.fromkeys(name for result in results for name in result.config)
    rows = {name: [result.config.get(name) for result in results] for name in names if name not in _ALWAYS_OTHER}
    differ = {name: row for name, row in rows.items() if any(value != row[0] for value in row)}
    return {"differ": differ, "same": {name: row for name, row in rows.items() if name not in differ}}
