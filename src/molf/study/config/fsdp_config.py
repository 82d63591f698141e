"""The settings ``fsdp`` and ``fsdp_config``: read from flags or a file, checked, with the defaults of a sharded run.

The Trainer ignores keys that it does not know, so a misspelt one would silently leave its setting at the default.
"""

import json
from pathlib import Path
from typing import Any

from molf.errors import MolfError
from molf.study.config.run_config import suggestion

_KEYS = (
    "activation_checkpointing",
    "auto_wrap_policy",
    "cpu_offload",
    "cpu_ram_efficient_loading",
    "min_num_params",
    "reshard_after_forward",
    "state_dict_type",
    "transformer_layer_cls_to_wrap",
    "version",
    "xla",
    "xla_fsdp_grad_ckpt",
    "xla_fsdp_v2",
)
"""What the Trainer reads for FSDP2, with or without ``fsdp_`` in front."""


def resolve_fsdp(config: Any) -> None:
    """Complete a trainer's FSDP settings, in place, before the Trainer's own ``__post_init__`` reads them.

    By default every rank saves its own shards, and FSDP recomputes the activations.

    Raises:
        MolfError: ``fsdp_config`` is not a JSON object, or has a key that the Trainer does not read.
    """
    if isinstance(config.fsdp, str) and config.fsdp.lower() in ("true", "false"):
        config.fsdp = config.fsdp.lower() == "true"
    given = {} if config.fsdp_config is None else _read(config.fsdp_config)
    if not config.fsdp:
        return
    for key in given:
        if (bare := key.removeprefix("fsdp_")) not in _KEYS:
            raise MolfError(
                f"unknown key {key!r} in fsdp_config{suggestion(bare, _KEYS)} (the Trainer reads {', '.join(_KEYS)})"
            )
    defaults: dict[str, Any] = {"state_dict_type": "SHARDED_STATE_DICT"}
    if config.gradient_checkpointing:  # the Trainer's own would gather a block's weights once more to recompute it
        defaults["activation_checkpointing"] = True
        config.activation_checkpointing = config.gradient_checkpointing = False
    config.fsdp_config = defaults | given


def _read(given: Any) -> dict[str, Any]:
    """Return the object, which may be given as JSON or as the name of a JSON file."""
    text = given
    if isinstance(given, str) and not given.startswith("{"):
        if not Path(given).is_file():
            raise MolfError(f"fsdp_config={given} is neither a JSON object nor a file; give one of them")
        text = Path(given).read_text(encoding="utf-8")
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except ValueError as error:
        raise MolfError(
            f"fsdp_config={text} is not a JSON object ({error}); give one, or the name of a JSON file"
        ) from error
    if not isinstance(found, dict):
        raise MolfError(
            f"fsdp_config={given} is not a JSON object but {type(found).__name__}; give one, or leave it out"
        )
    return found
