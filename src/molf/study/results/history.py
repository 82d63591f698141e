"""What the Trainer logged during a run: loss, learning rates, gradient norm by step."""

import math
from pathlib import Path
from typing import Any

from molf.errors import MolfError
from molf.files import atomic_write, read_json, typed

HISTORY_FILE = "trainer_state.json"
"""The Trainer's own file of its state, as ``Trainer.save_state`` writes it."""


def write_history(folder: Path, state: Any) -> None:
    """Write the state of a Trainer (``TrainerState``) into the folder of a run."""
    with atomic_write(folder / HISTORY_FILE) as partial:
        state.save_to_json(partial)


def read_history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values that a run logged, by name; none if the folder has no state of a Trainer.

    Numbers that are not finite are left out.

    Raises:
        MolfError: The file is damaged.
    """
    path = folder / HISTORY_FILE
    if not path.is_file():
        return {}
    series: dict[str, dict[int, float]] = {}
    try:
        for logged in typed(list, read_json(path, dict[str, Any]).get("log_history"), "log_history"):
            entry = typed(dict[str, Any], logged, "log_history")
            step = typed(int, entry.pop("step", None), "log_history.step")
            for name, value in entry.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    series.setdefault(name, {})[step] = float(value)
    except MolfError as error:
        raise MolfError(f"{path} is not the state of a Trainer: {error}; repair or remove it") from error
    return {name: sorted(values.items()) for name, values in series.items()}
