"""The names of settings: fields of the configuration, and the published flags as aliases of them."""

from collections.abc import Collection, Iterable
from typing import Any

from molf.errors import UsageError
from molf.study.config.run_config import suggestion

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
}
"""Alias -> field."""

PUBLISHED_VALUES: dict[str, dict[str, str]] = {"score": {"true_projected": "epd", "projected": "pfn"}}
"""Field -> published value -> our value."""


def canonical(settings: Iterable[tuple[str, Any]], known: Collection[str], where: str) -> dict[str, Any]:
    """Return settings by the names of the configuration's fields.

    Args:
        settings: Name and value pairs. A name may have hyphens and may be a published alias; if it is given twice, the later
            value counts.
        known: The names of all fields.
        where: Where the settings come from, for error messages.

    Raises:
        UsageError: A name is unknown, or a field has different values under two names.
    """
    values: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for given, value in settings:
        spelled = given.replace("-", "_")
        name = PUBLISHED_NAMES.get(spelled, spelled)
        if name not in known:
            raise UsageError(f"unknown setting {given!r} in {where}{suggestion(spelled, [*known, *PUBLISHED_NAMES])}")
        value = _own_value(name, value)
        if name in values and given_as[name] != spelled and values[name] != value:
            raise UsageError(
                f"{given_as[name]} and {spelled} in {where} are two names of one setting, but have different values, "
                f"{values[name]!r} and {value!r}; keep one of them"
            )
        values[name], given_as[name] = value, spelled
    return values


def _own_value(name: str, value: Any) -> Any:
    translations = PUBLISHED_VALUES.get(name, {})
    return translations.get(value, value) if isinstance(value, str) else value
