"""The settings of a run: their names, the published flags as aliases of them, and their types."""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from molf.errors import UsageError
from molf.study.config.method_config import Method
from molf.study.config.run_config import SECTIONS, suggestion
from molf.study.config.unread import unread

logger = logging.getLogger(__name__)

PUBLISHED_NAMES: dict[str, str] = {
    "dataset_type": "task",
    "mode": "method",
    "molf_score_fn": "score",
    "molf_topk": "top_k",
    "molf_lora_ranks": "ranks",
    "molf_fft": "fft_expert",
    "molf_freeze_non_linear": "freeze_non_linear",
    "per_device_batch_size": "per_device_train_batch_size",
    "warm_up_ratio": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "ckpt_dir_root": "output_root",
    "lora_lr": "lora_learning_rate",  # its name in Python
}
"""Alias -> field."""

PUBLISHED_METHOD = ("mode", "molf_score_fn", "molf_topk", "molf_lora_ranks", "molf_fft", "molf_freeze_non_linear")
"""Aliases that nobody uses but with the published settings: they choose the published recipe and routing log."""

_OWN_SCALE = ("adalora", "rslora")
"""Modes that fix what use_rslora chooses."""

PUBLISHED_VALUES: dict[str, dict[str, str]] = {"score": {"true_projected": "epd", "projected": "pfn"}}
"""Field -> published value -> our value."""


def canonical(settings: Iterable[tuple[str, Any]], known: Collection[str], where: str) -> dict[str, Any]:
    """Return settings by the names of the configuration's fields.

    Args:
        settings: Name and value pairs. A name may have hyphens and may be a published alias; if it is given twice, the later
            value counts.
        known: The names of all fields.
        where: Where the settings come from, for error messages.
    """
    values: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for given, value in settings:
        spelled = given.replace("-", "_")
        name = PUBLISHED_NAMES.get(spelled, spelled)
        if name not in known:
            raise UsageError(f"unknown setting {given!r} in {where}{suggestion(spelled, [*known, *PUBLISHED_NAMES])}")
        if isinstance(value, str):
            value = PUBLISHED_VALUES.get(name, {}).get(value, value)
        if name in values and given_as[name] != spelled and values[name] != value:
            raise UsageError(
                f"{given_as[name]} and {spelled} in {where} are two names of one setting, but have different values, "
                f"{values[name]!r} and {value!r}; keep one of them"
            )
        values[name], given_as[name] = value, spelled
    if set(given_as.values()) & set(PUBLISHED_METHOD):
        for name in ("recipe", "routing_log"):
            values.setdefault(name, "published")
    if given_as.get("method") == "mode":
        _leave_out_unread(values, given_as)
    return values


def _leave_out_unread(values: dict[str, Any], given_as: Mapping[str, str]) -> None:
    """Leave out what a published mode does not read: the published command gives all settings to all modes."""
    mode = values["method"]
    own = {"use_rslora"} if mode in _OWN_SCALE else set()
    for name in sorted((unread(mode) | own) & values.keys()) if mode in get_args(Method) else []:
        del values[name]
        if name in given_as:
            logger.warning("%s is left out: mode %s does not read it", given_as[name], mode)


def config_types() -> list[Any]:
    """Return the dataclasses whose fields are settings; importing the trainer's takes seconds."""
    from molf.study.config.trainer_config import TrainConfig

    return [*SECTIONS.values(), TrainConfig]


@cache
def setting_types() -> Mapping[str, Any]:
    """Return the declared type of every setting, by name."""
    found: dict[str, Any] = {}
    for kind in config_types():
        hints = get_type_hints(kind)
        found |= {f.name: hints[f.name] for f in fields(kind) if f.init}
    return found


def allows(declared: Any, kind: type) -> bool:
    """Return whether a declared type, or one alternative of it, is a plain type such as bool, dict or list."""
    return any(option is kind or get_origin(option) is kind for option in _alternatives(declared))


def is_list(declared: Any) -> bool:
    """Return whether a declared type is a list, or a list or None."""
    return all(get_origin(option) is list for option in _alternatives(declared) if option is not NoneType)


def _alternatives(declared: Any) -> tuple[Any, ...]:
    return get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
