"""What ``molf sweep`` is asked for: from a file and a command line to a grid of runs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from molf.cli.grid import as_list, as_switch, configs, contenders
from molf.cli.names import PUBLISHED_NAMES
from molf.cli.parsing import CONFIG_FLAG, read_flags, read_yaml
from molf.cli.settings import allows, setting_types
from molf.errors import UsageError
from molf.study.config.run_config import RunConfig, suggestion
from molf.study.grids.slurm import SlurmSettings
from molf.study.grids.spec import RunSpec, make_spec

PREFIXES = {
    "learning_rate": "lr",
    "lora_learning_rate": "lora",
    "seed": "s",
    "lora_rank": "r",
    "ranks": "r",
    "limit": "n",
    **dict.fromkeys(("lr_scheduler_type", "model_name_or_path", "task", "score"), ""),
}
"""How the value of an axis begins in a run's name, where that is not the axis' own name."""

ENGINES = ("local", "slurm")
_OWN: dict[str, Any] = {
    "engine": "local", "jobs": 1, "nproc_per_node": 1, "retry": False, "keep_models": False, "dry_run": False, "wait": True
}  # fmt: skip
_SLURM = {f.name: get_type_hints(SlurmSettings)[f.name] for f in fields(SlurmSettings)}


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        cells: The runs.
        folder: Parent of all that is written.
        own: Settings of the sweep itself.
        slurm: What each SLURM job asks for.
    """

    cells: list[RunSpec]
    folder: Path
    own: dict[str, Any]
    slurm: SlurmSettings


def parse_sweep(argv: Sequence[str]) -> Request:
    """Build a sweep from files and flags; flags win over files, and what a method sets over both.

    Raises:
        UsageError: A setting is unknown, misplaced or not usable.
        OSError: A file cannot be read.
    """
    first = next((number for number, token in enumerate(argv) if token.startswith("--")), len(argv))
    flags = read_flags(argv[first:])
    files = [*argv[:first], *(value for name, value in flags if name == CONFIG_FLAG)]
    settings: dict[str, Any] = {"output_root": "runs/sweep"}
    methods: Any = None
    slurm: dict[str, Any] = {}
    for path in files:
        given = read_yaml(path)
        methods = given.pop("methods", methods)
        slurm |= _section(path, given.pop("slurm", None))
        settings |= {_field(name): value for name, value in given.items()}
    named = [as_list(value) for name, value in flags if name == "methods"]
    given_flags = {_field(name): value for name, value in flags if name not in (CONFIG_FLAG, "methods")}
    slurm_flags = {name: given_flags.pop(name) for name in list(given_flags) if name in _SLURM}
    # One value for an axis of the file chooses among the grid's runs, which keep their names.
    settings |= {name: [value] if _is_axis(name, settings.get(name)) and not isinstance(value, list) else value
                 for name, value in given_flags.items()}  # fmt: skip
    own = _own({**_OWN, **{name: settings.pop(name) for name in _OWN if name in settings}})
    if slurm_flags and own["engine"] != "slurm":
        raise UsageError(f"{next(iter(slurm_flags))} is a setting of SLURM jobs; add --engine slurm")
    root = Path(str(settings.pop("output_root")))
    if methods is None and not named:
        methods = as_list(settings.pop("method", "molf"))
    chosen = contenders(methods, named)
    runs = [run for name, more in chosen.items() for run in _runs(name, {**settings, **_fields(more)})]
    cells = [make_spec(root, label, config, own["nproc_per_node"]) for label, config in runs]
    return Request(cells, root, own, _slurm_settings({**slurm, **slurm_flags}))


def _runs(name: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, RunConfig]]:
    axes = {field: value for field, value in settings.items() if _is_axis(field, value)}
    for config in configs(name, {"method": name, **settings}, axes):
        yield "-".join([name, *(_label(field, config) for field in axes)]), config


def _is_axis(field: str, value: Any) -> bool:
    """Say whether a setting has several values: a list, or a list of lists where its value is a list."""
    if not isinstance(value, list):
        return False
    return not allows(setting_types().get(field), list) or any(isinstance(item, list) for item in value)


def _label(field: str, config: RunConfig) -> str:
    value = config.to_dict()[field]
    words = value if isinstance(value, list) else [value]
    if field == "model_name_or_path":
        words = [Path(str(value).rpartition(":")[2]).name]
    shown = "_".join(f"{word:g}" if isinstance(word, float) else str(word) for word in words)
    return PREFIXES.get(field, field) + re.sub(r"[^\w.+-]", "_", shown)


def _field(name: str) -> str:
    spelled = name.replace("-", "_")
    field = PUBLISHED_NAMES.get(spelled, spelled)
    if field in ("output_dir", "run_name", "only_eval", "resume_from_checkpoint", "overwrite"):
        raise UsageError(f"{name} is set for every run by the sweep; use output_root")
    known = [*setting_types(), *_OWN, *_SLURM, "methods", "slurm"]
    if field not in known:
        raise UsageError(f"unknown setting {name!r}{suggestion(spelled, [*known, *PUBLISHED_NAMES])}")
    return field


def _fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {_field(name): value for name, value in settings.items()}


def _own(given: dict[str, Any]) -> dict[str, Any]:
    if given["engine"] not in ENGINES:
        raise UsageError(f"engine is {' or '.join(ENGINES)}, not {given['engine']!r}")
    switches = {name: as_switch(name, given[name]) for name, value in _OWN.items() if isinstance(value, bool)}
    return {**given, **switches, **{name: _count(name, given[name]) for name in ("jobs", "nproc_per_node")}}


def _count(name: str, value: Any) -> int:
    try:
        if (count := int(value)) < 1:
            raise ValueError
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name} is a number, 1 or more, not {value!r}") from error
    return count


def _section(path: Any, given: Any) -> dict[str, Any]:
    section = {} if given is None else given
    if not isinstance(section, Mapping):
        raise UsageError(f"slurm in {path} must be a mapping of setting to value, not {given!r}")
    for name in section:
        if name not in _SLURM:
            raise UsageError(f"unknown setting {name!r} under slurm in {path}{suggestion(str(name), _SLURM)}")
    return dict(section)


def _slurm_settings(given: Mapping[str, Any]) -> SlurmSettings:
    typed: dict[str, Any] = {}
    for name, value in given.items():
        container = get_origin(_SLURM[name])
        if container in (list, dict):
            if not isinstance(value, container):
                raise UsageError(f"{name} is a {container.__name__}, given in a file under slurm, not {value!r}")
            typed[name] = value
            continue
        kind = next(option for option in (*get_args(_SLURM[name]), _SLURM[name]) if option is not type(None))
        try:
            typed[name] = kind(value)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{name} cannot be {value!r}: {error}") from error
    try:
        return SlurmSettings(**typed)
    except ValueError as error:
        raise UsageError(str(error)) from error
