"""The model card of a trained checkpoint."""

from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCardData

from molf.integrations import bundled
from molf.study.results.result import Result

HUB_DATASETS = {
    "fact": "NeelNanda/counterfact-tracing",
    "med": "openlifescienceai/medmcqa",
    "sql": "gretelai/synthetic_text_to_sql",
}
"""Task -> Hub id of its public data."""

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
    "static": "some layers whole, others by LoRA, merged",
}
"""Method -> its name in a model card."""

LIBRARY_LABELS = {"transformers": "a plain `transformers` checkpoint", "peft": "a PEFT adapter"}
"""Library -> what it loads."""


def model_card(result: Result, library: Literal["transformers", "peft"] = "transformers") -> str:
    """Write the model card of a trained model, in Markdown with a YAML header."""
    config = result.config
    base = hub_id(config)
    own = config.get("sample") or config.get("data_path")
    data = ModelCardData(
        base_model=base,
        library_name=library,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(("molf", config["method"], config["task"]))),
        datasets=[HUB_DATASETS[config["task"]]] if config["task"] in HUB_DATASETS and not own else None,
    )
    measurements = {name: value for name, value in result.row().items() if name not in config}
    return f"""---
{data.to_yaml()}
---

# {config.get("run_name") or "model"}

{f"`{base}`" if base else "A model"} fine-tuned on the task `{config["task"]}` by {METHODS[config["method"]]}, \
with molf {result.versions["molf"]}. It is {LIBRARY_LABELS[library]}.

## Results

{_metrics(result)}

Data: {result.data_origin}. Device: {result.device}.

## Settings

{_yaml_block(config)}

## Result row

{_yaml_block(measurements)}
"""


def hub_id(config: dict[str, Any]) -> str | None:
    """Return the Hub id of the model that was trained; None for a folder, which nobody else has."""
    name = str(config.get("model_name_or_path") or "")
    if bundled.is_bundled(name):
        return bundled.lookup(name).upstream
    is_id = name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~"))
    return name if is_id and not Path(name).exists() else None


def _metrics(result: Result) -> str:
    before = result.metrics_before or {}
    lines = ["| metric | before | after | n |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {name} | {before.get(name, '')} | {metric} | {metric.n} |" for name, metric in result.metrics.items()]
    if any(metric.low is not None for metric in result.metrics.values()):
        lines += ["", "In parentheses: bootstrap 95 % interval over the evaluated records."]
    return "\n".join(lines)


def _yaml_block(values: dict[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()}\n```"
