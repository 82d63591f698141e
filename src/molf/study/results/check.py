"""Holds the metrics of a finished run against the predictions beside them."""

from pathlib import Path

from molf.study.engine.predictions import PREDICTIONS_FILE, rescored
from molf.study.results.result import Result
from molf.tasks import get_task


def check_predictions(folder: Path, result: Result) -> None:
    """Compute the metrics of a run anew from its predictions.

    Args:
        folder: The run's folder.
        result: Its result.

    Raises:
        ValueError: The predictions are not usable, or give other metrics.
        OSError: There are none.
    """
    path = folder / PREDICTIONS_FILE
    found = rescored(path, get_task(result.config["task"]))
    differing = [
        f"{name} {result.metrics.get(name, 'absent')} in the result, {found.get(name, 'absent')} computed anew"
        for name in sorted(found.keys() | result.metrics.keys())
        if found.get(name) != result.metrics.get(name)
    ]
    if differing:
        raise ValueError(f"{path} does not give the metrics of the result: {'; '.join(differing)}")
