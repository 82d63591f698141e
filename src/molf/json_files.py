"""JSON files that may be damaged or someone else's: read, checked, and turned into values of declared types."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from molf.errors import MolfError

__all__ = ["read_json", "typed"]

_DEEPEST = 100  # levels; Python's own limit depends on its version and on the caller
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
}


def read_json(file: Path, kind: Any = Any) -> Any:
    """Read a JSON file as a value of a type (see ``typed``).

    Raises:
        MolfError: What is wrong, without the file's name: it is not JSON, or not of that type; lists are nested too deeply; an
            integer exceeds 64 bits; a string has half of a character (a lone surrogate), which no file takes.
        OSError: The file cannot be read.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MolfError(f"not JSON ({str(error).splitlines()[0]})") from error
    _check(value)
    return typed(kind, value)


def _check(value: Any, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise MolfError(f"more than {_DEEPEST} lists and objects are nested")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise MolfError(f"half of a character, {value[error.start]!r}") from error
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise MolfError("an integer of more than 64 bits")
    elif isinstance(value, dict | list):
        for item in value if isinstance(value, list) else [*value, *value.values()]:
            _check(item, depth + 1)


def typed(kind: Any, value: Any, where: str = "") -> Any:
    """Return a JSON value as a value of a declared type.

    Args:
        kind: ``Any``, a plain type, ``dict[str, ...]``, a dataclass of such types, or one of these or None; int fits float.
        value: The value.
        where: Where it was found, for the error message.

    Raises:
        MolfError: It is of another type; an object lacks a field or has one too many.
    """
    if kind is Any:
        return value
    if get_origin(kind) in (Union, UnionType):
        (inner,) = set(get_args(kind)) - {NoneType}
        return None if value is None else typed(inner, value, where)
    plain = dict if is_dataclass(kind) else get_origin(kind) or kind
    number = kind is float and isinstance(value, int)
    if not (isinstance(value, plain) or number) or (isinstance(value, bool) and kind is not bool):
        raise MolfError(f"{where or 'the file'} must be {_NAMES[plain]}, found {_name_of(value)}")
    if is_dataclass(kind):
        return _build(kind, value, where)
    if plain is dict:
        return {name: typed(get_args(kind)[1], item, f"{where}[{name!r}]") for name, item in value.items()}
    return float(value) if number else value


def _build(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    inside = f" in {where}" if where else ""
    if missing := [name for name in required if name not in value]:
        raise MolfError(f"no {', '.join(missing)}{inside}")
    if unknown := sorted(value.keys() - hints.keys()):
        raise MolfError(f"unknown {', '.join(unknown)}{inside}")
    return kind(**{name: typed(hints[name], item, f"{where}.{name}".lstrip(".")) for name, item in value.items()})


def _name_of(value: Any) -> str:
    return "null" if value is None else _NAMES[type(value)]
