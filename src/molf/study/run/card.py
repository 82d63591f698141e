"""The model card that goes with a trained checkpoint."""

from pathlib import Path
from typing import Any, Literal

import yaml

from molf.integrations import bundled
from molf.study.results.result import Result

HUB_DATASETS = {
    "fact": "NeelNanda/counterfact-tracing",
    "med": "openlifescienceai/medmcqa",
    "sql": "gretelai/synthetic_text_to_sql",
}
"""Task -> the Hub's name of its data."""

METHODS = {
    "molf": "MoLF (full fine-tuning and LoRA, routed)",
    "molf_e": "MoLF-Efficient (LoRA experts on a frozen base, routed), merged",
    "fft": "full fine-tuning",
    "lora": "LoRA, merged",
    "rslora": "rank-stabilised LoRA, merged",
    "dora": "DoRA, merged",
    "adalora": "AdaLoRA, merged",
    "pissa": "PiSSA, merged",
    "eva": "EVA, merged",
    "lora_plus": "LoRA+, merged",
}
"""Method -> what a model card calls it."""


FORMS = {"transformers": "a plain `transformers` checkpoint", "peft": "a PEFT adapter"}
"""Library -> what it loads."""


def model_card(result: Result, library: Literal["transformers", "peft"] = "transformers") -> str:
    """Write the model card of a trained model, in Markdown with a YAML header.

    Args:
        result: The run that made the model.
        library: What loads the model.
    """
    config = result.config
    name = config.get("run_name") or "model"
    return "\n".join(
        [
            "---",
            yaml.safe_dump(_header(config, library), sort_keys=False).strip(),
            "---",
            "",
            f"# {name}",
            "",
            f"{_base_name(config)} fine-tuned on the task `{config['task']}` by {METHODS[config['method']]}, with molf "
            f"{result.versions['molf']}. It is {FORMS[library]}.",
            "",
            "## Results",
            "",
            *_metric_lines(result),
            "",
            f"Data: {result.data_origin}. Device: {result.device}.",
            "",
            "## Settings",
            "",
            "```yaml",
            yaml.safe_dump(config, sort_keys=False, allow_unicode=True).strip(),
            "```",
            "",
            "## Result row",
            "",
            "```yaml",
            yaml.safe_dump(_measurements(result), sort_keys=False, allow_unicode=True).strip(),
            "```",
            "",
        ]
    )


def _header(config: dict[str, Any], library: str) -> dict[str, Any]:
    base, dataset = hub_id(config), HUB_DATASETS.get(config["task"])
    return {
        **({"base_model": base} if base else {}),
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(("molf", config["method"], config["task"]))),
        **({"datasets": [dataset]} if dataset else {}),
    }


def hub_id(config: dict[str, Any]) -> str | None:
    """Return the Hub id of the model that was trained, or None for a folder, which nobody else has."""
    name = str(config.get("model_name_or_path") or "")
    if bundled.is_bundled(name):
        return bundled.lookup(name).upstream
    is_id = name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~"))
    return name if is_id and not Path(name).exists() else None


def _base_name(config: dict[str, Any]) -> str:
    return f"`{hub_id(config)}`" if hub_id(config) else "A model"


def _metric_lines(result: Result) -> list[str]:
    before = result.metrics_before or {}
    lines = ["| metric | before | after | n |", "| --- | ---: | ---: | ---: |"]
    for name, metric in result.metrics.items():
        lines.append(f"| {name} | {before.get(name, '')} | {metric} | {metric.n} |")
    if any(metric.low is not None for metric in result.metrics.values()):
        lines += ["", "In parentheses: bootstrap 95 % interval over the evaluated records."]
    return lines


def _measurements(result: Result) -> dict[str, Any]:
    return {name: value for name, value in result.row().items() if name not in result.config}
