"""What ``fsdp`` and ``fsdp_config`` say: read from flags or a file, with the defaults of a sharded run, and no word unread.

The Trainer takes the keys that it knows and passes over the others in silence: a misspelt one would leave a run at the default.
"""

import json
from collections import UserDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from molf.study.config.run_config import suggestion

_PREFIX = "fsdp_"
"""The Trainer takes every key with and without it."""


class _Noted(UserDict[str, Any]):
    """A mapping that notes which keys were asked for, whether it has them or not; all it has, where it is copied.

    Args:
        given: What is in it.
    """

    def __init__(self, given: dict[str, Any]):
        self.asked: set[str] = set()
        super().__init__(given)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


@contextmanager
def settled_fsdp(config: Any) -> Iterator[None]:
    """Settle what a trainer's settings ask of FSDP, and refuse what the Trainer leaves unread while it reads them.

    Unless told otherwise, every rank writes what it holds of a sharded model, and FSDP recomputes the activations.

    Args:
        config: The settings, which are changed. The Trainer reads them inside the ``with`` block.

    Raises:
        ValueError: ``fsdp_config`` is no JSON object, or has a key that the Trainer does not ask for.
    """
    if isinstance(config.fsdp, str) and config.fsdp.lower() in ("true", "false"):
        config.fsdp = config.fsdp.lower() == "true"
    given = {} if config.fsdp_config is None else _read(config.fsdp_config)
    if not config.fsdp:
        yield
        return
    defaults: dict[str, Any] = {"state_dict_type": "SHARDED_STATE_DICT"}
    if config.gradient_checkpointing:  # the Trainer's own would gather a block's weights once more to recompute it
        defaults["activation_checkpointing"] = True
        config.activation_checkpointing = config.gradient_checkpointing = False
    config.fsdp_config = read = _Noted(defaults | given)
    yield
    _refuse_unread(given, read.asked)
    config.fsdp_config = read.data


def _refuse_unread(given: Iterable[str], asked: Iterable[str]) -> None:
    known = sorted(key for key in asked if not key.startswith(_PREFIX))
    for key in given:
        bare = key.removeprefix(_PREFIX)
        if bare not in known:
            raise ValueError(
                f"unknown key {key!r} in fsdp_config{suggestion(bare, known)} "
                f"(transformers {transformers.__version__} reads {', '.join(known)})"
            )


def _read(given: Any) -> dict[str, Any]:
    """Return the object that is given as such, as JSON or as the name of a JSON file."""
    if not isinstance(given, str):
        found = given
    elif not given.startswith("{") and not Path(given).is_file():
        raise ValueError(f"fsdp_config={given} is neither a JSON object nor a file; give one of them")
    else:
        text = given if given.startswith("{") else Path(given).read_text(encoding="utf-8")
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"fsdp_config={text} is no JSON object ({error}); give one, or the name of a JSON file"
            ) from error
    if not isinstance(found, dict):
        raise ValueError(f"fsdp_config={given} is no JSON object but {type(found).__name__}; give one, or leave it out")
    return found
