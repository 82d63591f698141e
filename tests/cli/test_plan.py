import shlex
from pathlib import Path

import pytest

from families import FAMILIES
from molf.cli import main


def call(line):
    return main(shlex.split(line))


def test_a_plan_reads_no_weights(model_folder, capsys):
    Path(model_folder, "model.safetensors").unlink()
    line = f"plan --model_name_or_path {model_folder} --method molf --ranks 4 --per_device_batch_size 2 --max_length 32"
    assert call(f"{line} --memory_gb 8") == 0
    shown = capsys.readouterr().out
    for expected in (
        "base weight",
        "LoRA",
        "2 x 32 tokens",
        "gradient checkpointing",
        "peak",
        "it fits: 0.0 of 8.0 GiB",
    ):
        assert expected in shown
    assert call(f"{line} --memory-gb 0.0001") == 0
    assert "warning: it does not fit" in capsys.readouterr().out


def test_mistakes_in_a_plan(model_folder, capsys):
    assert call("plan --method molf") == 1
    assert "model_name_or_path is required" in capsys.readouterr().err
    for method in ("molf", "molf_e"):
        assert call(f"plan --model_name_or_path {model_folder} --method {method} --ranks 4096") == 1
        assert "ranks=(4096,) exceeds the smallest routed layer" in capsys.readouterr().err
    assert call(f"plan --model_name_or_path {model_folder} --methd molf") == 2
    assert "did you mean 'method'" in capsys.readouterr().err
    for memory in ("nan", "inf", "0", "-1"):
        assert call(f"plan --model_name_or_path {model_folder} --memory_gb={memory}") == 2
        assert f"memory_gb={float(memory)} must be a finite number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["molf", "molf_e", "lora"])
@pytest.mark.parametrize("name", ["Mixtral", "Llama 4", "Mamba", "BLOOM", "BERT masked"])
def test_plans_of_other_families(name, method, tmp_path, capsys):
    FAMILIES[name].build().config.save_pretrained(tmp_path)
    line = f"plan --model_name_or_path {tmp_path} --method {method} --per_device_batch_size 2 --max_length 16"
    ranks = "--lora_rank 2" if method == "lora" else "--ranks 2"
    assert call(f"{line} {ranks}") == 0
    assert "peak" in capsys.readouterr().out


def test_a_plan_of_adapters_on_conv1d(tmp_path, capsys):
    FAMILIES["GPT-2"].build().config.save_pretrained(tmp_path)
    line = f"plan --model_name_or_path {tmp_path} --max_length 16 --method"
    assert call(f"{line} molf_e --ranks 2") == 0
    assert call(f"{line} molf --ranks 2") == 1
    assert "are Conv1D" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["T5", "DeBERTa-v2 classifier", "ViT classifier"])
def test_a_plan_of_what_no_run_trains(name, tmp_path, capsys):
    FAMILIES[name].build().config.save_pretrained(tmp_path)
    assert call(f"plan --model_name_or_path {tmp_path} --method molf --ranks 2") == 1
    assert "is no causal language model: Unrecognized configuration" in capsys.readouterr().err


def test_help_of_plan(capsys):
    assert call("plan --help") == 0
    shown = capsys.readouterr().out
    assert "usage: molf plan " in shown and "--memory_gb" in shown
