"""The export of a MoLF-Efficient run: one LoRA adapter, or merged weights."""

from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer

from molf.errors import MolfError
from molf.integrations.export import export_merged, export_peft, vllm_max_lora_rank, whole_folder
from molf.integrations.loading import explained
from molf.study.config.run_config import ModelConfig
from molf.study.methods.adapters import ADAPTERS_FOLDER
from molf.study.results.result import RESULT_FILE, read_result
from molf.study.run.card import model_card
from molf.study.run.models import load_model_and_tokenizer

_CONFIG = "adapter_config.json"


def export_run(
    run: Path,
    to: Literal["peft", "merged"],
    output_dir: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> list[str]:
    """Write the LoRA experts of a run as one PEFT adapter, or merge them into their base model.

    The base model is loaded in float32, the experts from the run's ``adapters`` folder, and the tokenizer as the run saved it.

    Args:
        run: Folder of the run.
        to: ``peft`` for an adapter of rank ``r1 + r2 + ...``, ``merged`` for a plain checkpoint.
        output_dir: Where to write; by default ``export-peft`` or ``export-merged`` in the run's folder.
        dtype: Data type of merged weights; an adapter is float32.

    Returns:
        What to know about the export, one sentence each.

    Raises:
        MolfError: An adapter is asked for in another type, the run has no adapters or trained other weights too, the folder is
            not empty, or the base model cannot be loaded.
    """
    if to == "peft" and dtype != "float32":
        raise MolfError(
            f"dtype={dtype} is for merged weights, an adapter is float32: leave it out, or export to merged"
        )
    folders = adapter_folders(run)
    result = read_result(run) if (run / RESULT_FILE).is_file() else None
    training = result.training if result else None
    if training is not None and training.trainable_parameters:
        raise MolfError(
            f"{run} trained {training.trainable_parameters:,} parameters of the base model besides its LoRA experts, and an "
            f"export of the experts would lose them; use {run} itself, which is a plain merged checkpoint"
        )
    folder = output_dir or run / f"export-{to}"
    adapter = PeftConfig.from_pretrained(str(next(iter(folders.values()))))
    base = str(result.config["model_name_or_path"] if result else adapter.base_model_name_or_path)
    trust = bool(result and result.config.get("trust_remote_code"))
    model, tokenizer = load_experts(folders, base, trust)
    if (run / "tokenizer_config.json").is_file():  # with the chat template that it was trained with
        with explained(f"cannot load the tokenizer of {run}", str(run)):
            tokenizer = AutoTokenizer.from_pretrained(run, trust_remote_code=trust)
    with whole_folder(folder) as partial:
        if to == "peft":
            notes = _notes(export_peft(model, partial))
        else:
            cast = export_merged(model, partial, getattr(torch, dtype))
            notes = [f"Merged in float32, then cast to {dtype}; the cast changed no weight by more than {cast:.3g}."]
        tokenizer.save_pretrained(partial)
        library: Literal["peft", "transformers"] = "peft" if to == "peft" else "transformers"
        if result is not None:
            card = model_card(result, library)
        else:  # the run is not finished, so there are no metrics
            card = (
                f"---\nlibrary_name: {library}\ntags:\n- molf\n---\n\n# {run.name}\n\nTrained from the model {base}.\n"
            )
        (partial / "README.md").write_text(f"{card}\n## Export\n\n{' '.join(notes)}\n", encoding="utf-8")
    return [*notes, f"written to {folder}"]


def adapter_folders(run: Path) -> dict[str, Path]:
    """Return the folder of each adapter of a run, by the adapter's name."""
    root = run / ADAPTERS_FOLDER
    found = {path.parent.name: path.parent for path in sorted(root.glob(f"*/{_CONFIG}"))}
    if not found:
        what = "Give the folder of a run with --method molf_e"
        if (run / "config.json").is_file():
            what = "It is a plain checkpoint, which needs no export"
        raise MolfError(f"{run} has no LoRA experts to export: there is no {ADAPTERS_FOLDER}/NAME/{_CONFIG}. {what}")
    return found


def load_experts(folders: dict[str, Path], base: str, trust_remote_code: bool = False) -> tuple[PeftModel, Any]:
    """Load a base model in float32 with all of its adapters active, and its tokenizer."""
    (first, folder), *others = folders.items()
    model, tokenizer = load_model_and_tokenizer(ModelConfig(model_name_or_path=base), trust_remote_code)
    wrapped = PeftModel.from_pretrained(model, str(folder), adapter_name=first)
    for adapter, path in others:
        wrapped.load_adapter(str(path), adapter_name=adapter)
    wrapped.base_model.set_adapter(list(folders), inference_mode=True)
    return wrapped.eval(), tokenizer


def _notes(rank: int) -> list[str]:
    served = vllm_max_lora_rank(rank)
    limit = f"--max-lora-rank {served}" if served else "a higher rank than it supports, so use the merged checkpoint"
    return [
        f"One PEFT LoRA of rank {rank} and scale 1.",
        f"To serve it, vLLM (whose default is rank 16) needs {limit}.",
    ]
