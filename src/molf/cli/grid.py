"""What ``molf compare`` and ``molf sweep`` share: their command line, the runs that it stands for, and where these run."""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_type_hints

from molf.cli.parsing import CONFIG_FLAG, build, parse_run, positive_flags, read_flags, read_yaml
from molf.cli.settings import PUBLISHED_NAMES, allows, canonical, setting_types
from molf.errors import MolfError, UsageError
from molf.study.config.method_config import Method
from molf.study.config.run_config import RunConfig, suggestion
from molf.study.config.unread import unread
from molf.study.faults.preemption import Preempted, stop_request
from molf.study.grids.slurm import SlurmEngine, SlurmSettings
from molf.study.grids.spec import Failure, RunSpec

if TYPE_CHECKING:
    from molf.study.grids.runner import Engine

ENGINE_HELP = """  --engine local|slurm    processes of this machine, or SLURM job arrays (default: local)
  --jobs N                local: how many runs at a time (default: 1)
  --nproc_per_node N      how many processes of one machine train a run together, as with torchrun (default: 1)
  --partition NAME, --time MINUTES, --gpus_per_node N, --cpus_per_task N, --mem_gb N, --account NAME, --qos NAME,
  --constraint NAME, --array_parallelism N, --signal_delay_s SECONDS
                          slurm: what each job asks for; in a file under `slurm:`, together with `setup` and `sbatch`
  --keep_models           keep the trained weights
  --dry_run               list the runs and their commands, and stop"""

PREFIXES = {
    "learning_rate": "lr",
    "lora_learning_rate": "lora",
    "seed": "s",
    "lora_rank": "r",
    "ranks": "r",
    "limit": "n",
    **dict.fromkeys(("lr_scheduler_type", "model_name_or_path", "task", "score"), ""),
}
"""How the value of a setting begins in a run's name, if that is not the setting's own name."""

_PER_RUN = ("output_dir", "run_name", "only_eval", "resume_from_checkpoint", "overwrite")


@dataclass(frozen=True)
class GridOptions(SlurmSettings):
    """Options of both commands, beside the settings of their runs."""

    output_root: str = "runs"
    engine: Literal["local", "slurm"] = "local"
    jobs: int = 1
    nproc_per_node: int = 1
    keep_models: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("jobs", "nproc_per_node"):
            if getattr(self, name) < 1:
                raise MolfError(f"{name}={getattr(self, name)} must be at least 1")
        if self.engine == "slurm":
            self.make_engine(lambda line: None)  # refuses what its scripts cannot say, also for a dry run

    def make_engine(self, log: Callable[[str], None], wait: bool = True) -> "Engine":
        """Return what executes the runs."""
        if self.engine == "slurm":
            settings = SlurmSettings(**{name: getattr(self, name) for name in _SLURM})
            return SlurmEngine(Path(self.output_root) / "jobs", settings, self.keep_models, wait, log)

        from molf.study.grids.local import LocalEngine, visible_devices

        return LocalEngine(self.jobs, visible_devices(), self.keep_models)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Say what becomes of the runs if Ctrl-C or a stop signal comes meanwhile."""
        try:
            with stop_request():
                yield
        except (KeyboardInterrupt, Preempted):
            runs = "the runs have saved what they could" if self.engine == "local" else "the jobs stay in the queue"
            raise Preempted(f"interrupted; {runs}, and the same command continues") from None


_SLURM = [f.name for f in fields(SlurmSettings)]
Options = TypeVar("Options", bound=GridOptions)


def read_grid(
    argv: Sequence[str], kind: type[Options], per_run: Sequence[str] = (), default_methods: Sequence[str] = ()
) -> tuple[dict[str, dict[str, Any]], Options]:
    """Read files and flags. Flags override files, and a method's own settings override both.

    Args:
        argv: Files, then flags.
        kind: The command's options.
        per_run: Settings that the command makes itself, beside those that both commands make.
        default_methods: Methods, if none are given.

    Returns:
        The settings of each method's runs, by the name to show, and the options.
    """
    first = next((number for number, token in enumerate(argv) if token.startswith("--")), len(argv))
    names = [f.name for f in fields(kind)]
    flags = positive_flags(read_flags(argv[first:]), {**setting_types(), **get_type_hints(kind)})

    def canonical_name(name: str) -> str:
        spelled = name.replace("-", "_")
        field, known = PUBLISHED_NAMES.get(spelled, spelled), [*setting_types(), *names]
        if field in (*_PER_RUN, *per_run):
            raise UsageError(f"{name} is set for every run by this command; leave it out")
        if field not in known:
            raise UsageError(f"unknown setting {name!r}{suggestion(spelled, [*known, *PUBLISHED_NAMES])}")
        return field

    settings: dict[str, Any] = {}
    methods: Any = None
    for path in [*argv[:first], *(value for name, value in flags if name == CONFIG_FLAG)]:
        content = read_yaml(path)
        methods = content.pop("methods", methods)
        slurm = content.pop("slurm", None) or {}
        if not isinstance(slurm, Mapping) or not all(name in _SLURM for name in slurm):
            raise UsageError(f"slurm in {path} must be a mapping with any of {', '.join(_SLURM)}, not {slurm!r}")
        settings |= {canonical_name(name): value for name, value in {**content, **slurm}.items()}
    for name, value in flags:
        if name in (CONFIG_FLAG, "methods"):
            continue
        field = canonical_name(name)
        if is_axis(field, settings.get(field)):
            # One value for an axis of the file selects a part of the grid, whose runs keep their names.
            value = value if isinstance(value, list) else [value]
            value = [value] if allows(setting_types().get(field), list) else value  # one value is a list there
        settings[field] = value
    options = build(kind, {name: settings.pop(name) for name in names if name in settings})
    if options.engine != "slurm" and (misplaced := [name for name, _ in flags if name in _SLURM]):
        raise UsageError(f"{misplaced[0]} is a setting of SLURM jobs; add --engine slurm")
    chosen = [as_list(value) for name, value in flags if name == "methods"]
    if methods is None and not chosen:
        methods = as_list(settings.pop("method", default_methods))
    known, selected = _select_methods(methods, chosen[-1] if chosen else None)
    own = {name: {canonical_name(key): value for key, value in more.items()} for name, more in known.items()}
    whole = _with_shared(own, settings)
    return {name: whole[name] for name in selected}, options


def _with_shared(own: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Add the settings of all methods to each method's own, but for those that it does not read and another one does.

    What none of them reads stays, and is refused with its name.
    """
    whole = {name: {"method": name, **settings, **more} for name, more in own.items()}
    ignored = {name: _unread(point) for name, point in whole.items()}
    by_all = set(settings).intersection(*ignored.values())
    return {
        name: {
            field: value for field, value in point.items() if field in own[name] or field not in ignored[name] - by_all
        }
        for name, point in whole.items()
    }


def _unread(settings: Mapping[str, Any]) -> set[str]:
    """Return what a method of a grid does not read, or none of several; nothing for unknown ones, which are refused later."""
    freezes = settings.get("freeze_non_linear")
    frozen = None if freezes is None else str(freezes).lower() in ("true", "yes", "t", "y", "1")
    methods = [method for method in as_list(settings["method"]) if method in get_args(Method)]
    return set.intersection(*(unread(method, frozen) for method in methods)) if methods else set()


def _select_methods(in_files: Any, chosen: Sequence[Any] | None) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the own settings of a file's list or mapping of methods and of further chosen ones; and which are chosen."""
    if isinstance(in_files, list):
        in_files = dict.fromkeys(map(str, in_files))
    if in_files is not None and not isinstance(in_files, Mapping):
        raise UsageError(f"methods must be a list, or a mapping of a name to settings, not {in_files!r}")
    known = {str(name): _own_settings(str(name), more) for name, more in (in_files or {}).items()}
    selected = [*known] if chosen is None else list(map(str, chosen))
    return {**dict.fromkeys(selected, {}), **known}, selected


def _own_settings(name: str, given: Any) -> dict[str, Any]:
    """Return what a mapping of methods says about one of them; nothing stands for no settings."""
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(key, str) for key in given)):
        raise UsageError(
            f"methods: {name} must have a mapping of setting to value, such as {{method: lora, lora_rank: 8}}, not {given!r}"
        )
    return dict(given or {})


def configs(name: str, settings: Mapping[str, Any], axes: Mapping[str, list[Any]]) -> Iterator[RunConfig]:
    """Yield the run of every combination of the axes' values.

    Raises:
        UsageError: An axis has no value, or a value does not fit.
    """
    if empty := [field for field, values in axes.items() if not values]:
        raise UsageError(f"{empty[0]} of {name} is an empty list: give it one or more values, or leave it out")
    for values in product(*axes.values()):
        point = {**settings, **dict(zip(axes, values, strict=True))}
        yield parse_run([], preset=canonical(point.items(), setting_types(), f"the settings of {name}"))


def is_axis(field: str, value: Any) -> bool:
    """Say whether a setting has several values: a list, or a list of lists for a setting whose value is a list."""
    if not isinstance(value, list):
        return False
    return not allows(setting_types().get(field), list) or any(isinstance(item, list) for item in value)


def label(field: str, config: RunConfig) -> str:
    """Return the part of a run's name that tells its value of a setting."""
    value = config.to_dict()[field]
    words = value if isinstance(value, list) else [value]
    if field == "model_name_or_path":
        words = [Path(str(value).rpartition(":")[2]).name]
    shown = "_".join(f"{word:g}" if isinstance(word, float) else str(word) for word in words)
    return PREFIXES.get(field, field) + re.sub(r"[^\w.+-]", "_", shown)


def as_list(value: Any) -> list[Any]:
    """Return the values of a setting that may have several: a list, or words such as ``1,2`` or ``[1, 2]``."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[]").split(",")]
    return list(value) if isinstance(value, list | tuple) else [value]


def show_runs(specs: Sequence[RunSpec], engine: str, log: Callable[[str], None], later: int = 0) -> None:
    """List runs that a dry run does not start, and say how many would follow when the settings of these are chosen."""
    for spec in specs:
        log(f"{spec.state:<11}  {shlex.join(spec.command)}")
    follow = f", and {later} more with the settings that they choose" if later else ""
    log(f"dry run: nothing was started; {len(specs)} runs{follow}, by --engine {engine}")


def check_ended(failures: Sequence[Failure], unfinished: Sequence[str], retry: str, log: Callable[[str], None]) -> None:
    """Show why runs failed."""
    for failure in failures:
        log(str(failure))
    problems = [f"{len(failures)} runs failed: {retry} runs them again"] if failures else []
    if unfinished:
        problems.append(f"{len(unfinished)} runs are not finished: the same command resumes them")
    if problems:
        raise MolfError("; ".join(problems))
