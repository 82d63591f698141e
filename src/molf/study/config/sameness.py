"""Which settings two runs must share to have the same result, the same trained model, or each other's checkpoints."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, get_args

from molf.errors import MolfError
from molf.study.config.fields import SHAPES, TRAINER_LEVELS, Level
from molf.study.config.run_config import SECTIONS, RunConfig

_DECLARED: dict[str, Level] = {
    f.name: f.metadata[SHAPES] for section in SECTIONS.values() for f in fields(section)
} | TRAINER_LEVELS


def shaping(level: Level) -> list[str]:
    """Return the settings that declare exactly this level, in the order of declaration."""
    return [name for name, declared in _DECLARED.items() if declared == level]


def differing(there: Mapping[str, Any], here: RunConfig, level: Level) -> list[str]:
    """Return what two runs have different among the settings of a level and the levels after it, in words.

    A setting that one of them does not have is at its default there. Names that this version does not know are skipped.

    Args:
        there: Flat settings, as an earlier run wrote them (``RunConfig.to_dict``).
        here: This run.
        level: What the settings shape.

    Returns:
        One ``"seed=42 (here 7)"`` per difference.

    Raises:
        MolfError: The settings of the earlier run are not those of a run.
    """
    try:
        earlier, now = _plain(RunConfig.from_dict(there)), _plain(here)
    except (TypeError, AttributeError) as error:  # such as a word for a number
        raise MolfError(f"the settings of the earlier run are not those of a run: {error}") from error
    defaults = trainer_defaults() if earlier.keys() != now.keys() else {}
    levels = get_args(Level)
    found = []
    for name in earlier | now:
        if levels.index(_DECLARED.get(name, "training")) < levels.index(level):
            continue
        if (name in earlier and name in now) or name in defaults:
            before, after = (settings.get(name, defaults.get(name)) for settings in (earlier, now))
            if before != after:
                found.append(f"{name}={before} (here {after})")
    return found


def _plain(config: RunConfig) -> dict[str, Any]:
    """Return the settings as a file would give them back."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return plain


def trainer_defaults() -> dict[str, Any]:
    """Return the trainer's settings that have a plain default, by name."""
    from molf.study.config.trainer_config import TrainConfig  # imports torch and TRL

    return {f.name: f.default for f in fields(TrainConfig) if f.default is not MISSING}
