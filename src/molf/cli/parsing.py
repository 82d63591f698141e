"""From a command line and YAML files to a ``RunConfig``.

All sources are merged by field name first, then typed once by transformers' ``HfArgumentParser``, so that a value means the same
in a file and on the command line. Importing this module is cheap; parsing imports torch.
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import Field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

import yaml

from molf.cli.settings import PUBLISHED_NAMES, allows, canonical, config_types, is_list, setting_types
from molf.cli.yaml_text import load_yaml
from molf.errors import MolfError, UsageError
from molf.study.config.fields import READ_BY, SHAPES
from molf.study.config.run_config import RunConfig
from molf.study.config.unread import check_read

CONFIG_FLAG = "config"
Options = TypeVar("Options")


def parse_run(argv: Sequence[str], preset: Mapping[str, Any] | None = None) -> RunConfig:
    """Build the configuration of a run.

    Args:
        argv: Flags, with any number of ``--config FILE``. Flags override files, later files override earlier ones.
        preset: Settings that files and flags override.

    Raises:
        UsageError: A name is unknown, a value does not fit its setting, two settings contradict each other, or one is not read by
            the method.
        MolfError: A configuration file does not exist.
    """
    parser = _parser()
    known = setting_types()
    flags = read_flags(argv)
    settings = dict(preset or {})
    files = [value for name, value in flags if name == CONFIG_FLAG]
    for path in files:
        settings |= canonical(read_yaml(path).items(), known, str(path))
    given = [(name, value) for name, value in positive_flags(flags, known) if name != CONFIG_FLAG]
    settings |= canonical(given, known, "the command line")
    typed = _typed(settings, known, parser)
    try:
        config = replace(RunConfig.from_dict(typed), files=tuple(map(str, files)))
        check_read(config)
    except MolfError as error:
        raise UsageError(str(error)) from None
    return config


def build(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """Build a dataclass of options from values of flags or files, typed as the settings of a run are.

    Raises:
        UsageError: A value does not fit its option.
    """
    try:
        return kind(**_typed(given, get_type_hints(kind), _parser([kind])))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def read_flags(argv: Sequence[str]) -> list[tuple[str, Any]]:
    """Split a command line into names and values.

    A flag without a value gives True, with one value a string, with several a list of strings.
    """
    found: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            found.append((name.replace("-", "_"), [value] if equals else []))
        elif found:
            found[-1][1].append(token)
        else:
            raise UsageError(f"unexpected {token!r}; settings are given as --name value")
    return [(name, values if len(values) > 1 else values[0] if values else True) for name, values in found]


def positive_flags(flags: Sequence[tuple[str, Any]], known: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Read ``--no_x`` as ``--x False``, as HfArgumentParser does."""
    negated = {f"no_{name}": name for name, hint in known.items() if allows(hint, bool)}
    return [(negated[name], False) if name in negated and value is True else (name, value) for name, value in flags]


def user_path(text: str) -> Path:
    """Return a path with the user's home for ``~``, which a shell leaves alone in ``--html=~/page.html``."""
    return Path(text).expanduser()


def read_yaml(path: Any) -> dict[str, Any]:
    """Read a configuration file: one flat mapping of setting to value."""
    if not isinstance(path, str | Path):
        given = "none" if path is True else repr(path)
        raise UsageError(f"--{CONFIG_FLAG} needs one file, got {given}")
    path = Path(path).expanduser()
    if not path.is_file():
        raise MolfError(f"there is no configuration file {path}")
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not UTF-8, an integer too long, lists too deep
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise UsageError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"{path} must hold one mapping of setting to value, such as 'learning_rate: 5e-5'")
    return content


def print_help(command: str) -> None:
    """Print every setting with its default."""
    parser = _parser()
    parser.usage = f"molf {command} [--{CONFIG_FLAG} FILE] [--SETTING VALUE ...]"
    parser.epilog = "The published flags also work: " + ", ".join(
        f"--{alias} (--{name})" for alias, name in PUBLISHED_NAMES.items()
    )
    parser.add_argument(
        f"--{CONFIG_FLAG}", metavar="FILE", help="YAML file of settings by the same names; flags override it"
    )
    parser.print_help()


def _parser(kinds: Sequence[Any] = ()) -> Any:
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):  # type: ignore[misc]  # transformers is not typed here
        @staticmethod
        def _parse_dataclass_field(parser: Any, field: Field[Any]) -> None:
            own = copy.copy(field)  # the original belongs to its dataclass
            plain = {
                key: value for key, value in field.metadata.items() if key not in (SHAPES, READ_BY)
            }  # not argparse's
            own.metadata = MappingProxyType(plain)
            HfArgumentParser._parse_dataclass_field(parser, own)

        def error(self, message: str) -> None:
            raise UsageError(message)

    return Parser(kinds or config_types(), formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)


def _typed(settings: Mapping[str, Any], hints: Mapping[str, Any], parser: Any) -> dict[str, Any]:
    """Give every value the type of its field."""
    direct: dict[str, Any] = {}
    tokens: list[str] = []
    for name, given in settings.items():
        value = _items(given) if is_list(hints[name]) else given
        if allows(hints[name], bool) and isinstance(value, str) and value.lower() in ("on", "off"):
            value = value.lower() == "on"  # as YAML reads them
        if value is False and not allows(hints[name], bool) and allows(hints[name], str):
            value = "no"  # YAML reads a bare no as false
        if isinstance(value, str) and value.startswith("~/"):  # a shell expands it only where a word begins
            value = str(Path(value).expanduser())
        if "" in (value if isinstance(value, list) else [value]):  # such as of a variable that a shell does not know
            raise UsageError(f"{name} is empty, or has an empty item: give it a value, or leave it out")
        if isinstance(value, bool) and not allows(hints[name], bool):
            raise UsageError(f"{name} needs a value other than true or false")
        plain_list = isinstance(value, list) and not is_list(hints[name]) and allows(hints[name], list)
        if value is None or value == [] or isinstance(value, dict) or plain_list:
            # argparse cannot parse these: they keep their value.
            if not allows(hints[name], type(value)):
                raise UsageError(f"{name} cannot be {value!r}")
            direct[name] = value
        elif isinstance(value, list) and len(value) > 1 and not is_list(hints[name]):
            raise UsageError(f"{name} takes one value, got {len(value)}: {', '.join(map(str, value))}")
        else:
            tokens += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    parsed = vars(parser.parse_args(tokens))
    return {name: direct[name] if name in direct else parsed[name] for name in settings}


def _items(value: Any) -> Any:
    """Read a list written as ``[32,128]``, ``32,128`` or ``32 128``; return other values unchanged."""
    words = value if isinstance(value, list) else [value]
    if not words or not all(isinstance(word, str) for word in words):
        return words if value is not None else None
    if words[0].startswith("["):
        try:
            return load_yaml(" ".join(words))
        except yaml.YAMLError as error:
            raise UsageError(f"{' '.join(words)!r} is not a list such as [32,128]") from error
    return [part.strip() for word in words for part in word.split(",")]
