"""The settings of a run and their types: the fields of the configuration's dataclasses and of the trainer's."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from molf.study.config.run_config import SECTIONS


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
