"""The result of a run: one typed value, saved as ``result.json`` and as a row of a CSV file."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molf.errors import MolfError
from molf.files import atomic_write, read_json, typed
from molf.study.engine.predictions import PREDICTIONS_FILE, rescored
from molf.tasks import Metric, get_task
from molf.tasks.retention import Retention

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Training:
    """Measurements of the training of a run.

    Attributes:
        steps: Optimizer steps, including those before the run resumed.
        seconds: Wall time of training since the last start.
        loss: Mean training loss since the last start.
        tokens: Tokens trained on since the last start, or None if no step was taken.
        tokens_per_second: Tokens per second of wall time.
        parameters: Number of the base model's parameters.
        trainable_parameters: Number of those that are trained.
        lora_parameters: Number of LoRA parameters, in the model or in the optimizer.
        dropped_examples: Examples left out because ``max_length`` cuts off all of their targets.
        truncated_examples: Other examples that lose the end of their target to ``max_length``.
        processes: Number of processes that trained together, each on its own batches.
        best_step: Step with the lowest loss on held-out rows, whose weights the run kept (``load_best_model_at_end``).
        validation_loss: The loss on held-out rows at that step, else the last one measured during training.
    """

    steps: int
    seconds: float
    loss: float
    tokens: int | None
    tokens_per_second: float | None
    parameters: int
    trainable_parameters: int
    lora_parameters: int
    dropped_examples: int = 0
    truncated_examples: int = 0
    processes: int = 1
    best_step: int | None = None
    validation_loss: float | None = None


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        config: The resolved settings, flat (``RunConfig.to_dict``).
        headline: Name of the task's main metric.
        metrics: Metrics of the evaluated model, by name.
        metrics_before: The same before training, if measured.
        data_origin: Source of the rows.
        device: Name of the device.
        versions: Versions of the libraries, by name.
        commit: Git commit of this package's source at the start, or None for an installed release.
        seconds: Wall time of the whole run.
        peak_memory_bytes: Peak memory of the accelerator, or of the process on a CPU; None if unknown.
        training: Measurements of the training, or None for an evaluation.
        routing: Share of layers and steps that each expert won, or None without routing.
        retention: What training cost: how much the model forgot; None if it was not measured.
        run_id: Unique id of the run, kept over interruptions; None in results of older versions.
    """

    config: dict[str, Any]
    headline: str
    metrics: dict[str, Metric]
    metrics_before: dict[str, Metric] | None
    data_origin: str
    device: str
    versions: dict[str, str]
    commit: str | None
    seconds: float
    peak_memory_bytes: int | None
    training: Training | None = None
    routing: dict[str, float] | None = None
    retention: Retention | None = None
    run_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Result":
        """Build a result from the values of ``to_dict``."""
        result: Result = typed(cls, values)
        return result

    def row(self) -> dict[str, Any]:
        """Return the result as one flat row: settings, then measurements as ``group/name``."""
        row = {
            name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in self.config.items()
        }
        for group, metrics in (("metric", self.metrics), ("before", self.metrics_before or {})):
            for name, metric in metrics.items():
                row |= {f"{group}/{name}": metric.value, f"{group}/{name}/n": metric.n}
                if metric.low is not None:
                    row |= {f"{group}/{name}/low": metric.low, f"{group}/{name}/high": metric.high}
        if self.training is not None:
            row |= {f"training/{name}": value for name, value in asdict(self.training).items()}
        row |= {f"routing/{name}": share for name, share in (self.routing or {}).items()}
        if self.retention is not None:
            row |= {f"retention/{name}": metric.value for name, metric in self.retention.metrics().items()}
        row |= {f"version/{name}": version for name, version in self.versions.items()}
        plain = ("headline", "data_origin", "device", "commit", "seconds", "peak_memory_bytes", "run_id")
        return row | {name: getattr(self, name) for name in plain}


def write_result(folder: Path, result: Result) -> Path:
    """Write ``result.json`` into a folder and return its path."""
    path = folder / RESULT_FILE
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_result(folder: Path) -> Result:
    """Read the result of a finished run.

    Args:
        folder: The run's folder, or the ``result.json`` itself.

    Raises:
        MolfError: There is no result, or the file is not one.
    """
    path = folder / RESULT_FILE if folder.is_dir() else folder
    check_link(path)
    if not path.is_file():
        raise MolfError(f"{folder} holds no finished run: there is no {RESULT_FILE}")
    try:
        result: Result = read_json(path, Result)
    except MolfError as error:
        raise MolfError(f"{path} is not a result of this version of molf: {error}") from error
    return result


def folder_of(path: Path) -> Path:
    """Return the folder of a run, which users may name by its ``result.json``."""
    return path.parent if path.name == RESULT_FILE else path


def check_link(path: Path) -> None:
    """Refuse a symlink to nowhere: what it stood for may come back, so that it counts as a file that is there.

    Raises:
        MolfError: The path is such a symlink.
    """
    if path.is_symlink() and not os.path.exists(path):
        raise MolfError(f"{path} is a broken symlink to {os.readlink(path)}; repair or remove it")


def check_predictions(folder: Path, result: Result) -> None:
    """Compute the metrics of a run again from its predictions.

    Raises:
        MolfError: The predictions are missing or not usable, or give other metrics.
    """
    path = folder / PREDICTIONS_FILE
    if not path.is_file():
        raise MolfError(f"{folder} has no {PREDICTIONS_FILE}, so its metrics cannot be computed again")
    found = rescored(path, get_task(str(result.config.get("task"))))
    differing = [
        f"{name} {result.metrics.get(name, 'absent')} in the result, {found.get(name, 'absent')} computed again"
        for name in sorted(found.keys() | result.metrics.keys())
        if found.get(name) != result.metrics.get(name)
    ]
    if differing:
        raise MolfError(f"{path} does not give the metrics of the result: {'; '.join(differing)}")
