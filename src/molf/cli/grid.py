"""From settings with several values to the runs that they stand for; ``molf compare`` and ``molf sweep`` share this."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from molf.cli.names import canonical
from molf.cli.parsing import parse_run
from molf.cli.settings import setting_types
from molf.errors import UsageError
from molf.study.config.run_config import RunConfig


def contenders(in_files: Any, in_flags: list[list[Any]]) -> dict[str, dict[str, Any]]:
    """Return the settings of each contender by name.

    Args:
        in_files: ``methods`` of a file: a list of names, or a mapping of a name to settings.
        in_flags: The values of each ``--methods``; the last one chooses among the file's, or names plain methods.

    Raises:
        UsageError: ``methods`` is neither.
    """
    if isinstance(in_files, list):
        in_files = dict.fromkeys(map(str, in_files))
    if in_files is not None and not isinstance(in_files, Mapping):
        raise UsageError(f"methods must be a list, or a mapping of a name to settings, not {in_files!r}")
    known = {str(name): dict(more or {}) for name, more in (in_files or {}).items()}
    chosen = [str(name) for name in in_flags[-1]] if in_flags else list(known)
    return {name: known.get(name, {}) for name in chosen}


def configs(name: str, settings: Mapping[str, Any], grid: Mapping[str, list[Any]]) -> Iterator[RunConfig]:
    """Yield the runs that all combinations of a grid's values make.

    Args:
        name: Whose settings these are, for errors.
        settings: The settings that all runs share.
        grid: Values to combine, by setting.

    Raises:
        UsageError: A setting is unknown or does not fit.
    """
    for values in product(*grid.values()):
        point = {**settings, **dict(zip(grid, values, strict=True))}
        try:
            known = canonical(point.items(), setting_types(), f"the settings of {name}")
        except ValueError as error:
            raise UsageError(str(error)) from error
        yield parse_run([], preset=known)


def as_list(value: Any) -> list[Any]:
    """Return the values of a setting that may have several: a list, or words such as ``1,2`` or ``[1, 2]``."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[]").split(",")]
    return list(value) if isinstance(value, list | tuple) else [value]


def as_switch(name: str, value: Any) -> bool:
    """Return whether a switch is on.

    Raises:
        UsageError: It is neither on nor off.
    """
    if str(value).lower() not in ("true", "false"):
        raise UsageError(f"{name} is true or false, not {value!r}")
    return str(value).lower() == "true"
