"""Settings that the method of a run does not read: they are refused, as ignoring them would be taken for an effect."""

from dataclasses import fields
from typing import get_args

from molf.errors import MolfError
from molf.study.config.fields import READ_BY, STATIC, TRAINER_READ_BY
from molf.study.config.method_config import Method, MethodConfig
from molf.study.config.run_config import SECTIONS, RunConfig
from molf.study.config.sameness import trainer_defaults

_READ_BY: dict[str, tuple[str, ...]] = {
    f.name: f.metadata[READ_BY] for section in SECTIONS.values() for f in fields(section) if READ_BY in f.metadata
} | TRAINER_READ_BY
_COUNTERPARTS = {"ranks": "lora_rank", "lora_rank": "ranks", "weight_decay": "lora_weight_decay"}


def unread(method: str, freeze_non_linear: bool | None = None) -> set[str]:
    """Return the settings that a method does not read.

    Args:
        method: The method.
        freeze_non_linear: The setting of this name; None for the method's default.
    """
    found = {name for name, methods in _READ_BY.items() if method not in methods}
    frozen = method == "molf_e" if freeze_non_linear is None else freeze_non_linear
    if method == "fft" and not frozen:  # everything trains
        found |= {"target_modules", "exclude_modules"}
    if method == STATIC:  # its recipe names the layers
        found |= {"target_modules", "exclude_modules"}
    if method == "molf_e" and frozen:  # no weight trains that has full rank
        found.add("weight_decay")
    return found


def check_read(config: RunConfig) -> None:
    """Check that a run reads all settings that are not at their default. An evaluation has no method, so it takes any of one.

    Raises:
        MolfError: It does not.
    """
    if config.output.only_eval:
        if config.task.retention_path is not None:
            raise MolfError(
                f"retention_path={config.task.retention_path!r} for an evaluation: retention is what a training leaves of a "
                "model, so only `molf train` measures it; leave it out"
            )
        return
    method, given = config.method.method, config.to_dict()
    defaults = RunConfig(method=MethodConfig(method=method)).to_dict()
    ignored = unread(method, config.method.freeze_non_linear) & given.keys()
    changed = [name for name in given if name in ignored and given[name] != defaults.get(name)]
    if not changed:
        return
    defaults = trainer_defaults() | defaults
    changed = [name for name in changed if given[name] != defaults.get(name)]
    if changed:
        words = "; ".join(_refusal(name, given[name], config.method) for name in changed)
        raise MolfError(f"method {method} does not read {words}")


def _refusal(name: str, value: object, method: MethodConfig) -> str:
    others = ", ".join(other for other in get_args(Method) if name not in unread(other))
    frozen = bool(method.freeze_non_linear)
    use = "leave it out"
    if name not in unread(method.method, not frozen):
        use = f"give freeze_non_linear={not frozen} too, or leave it out"
    elif (counterpart := _COUNTERPARTS.get(name, name)) not in unread(method.method, frozen):
        use = f"give {counterpart}"
    return f"{name}={value} (read by {others}): {use}"
