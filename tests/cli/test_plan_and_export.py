import shlex
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

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
    assert call(f"plan --model_name_or_path {model_folder} --methd molf") == 2
    assert "did you mean 'method'" in capsys.readouterr().err


def test_help_of_plan(capsys):
    assert call("plan --help") == 0
    shown = capsys.readouterr().out
    assert "usage: molf plan " in shown and "--memory_gb" in shown


@pytest.fixture
def run(model_folder):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        LoraConfig(r=2, init_lora_weights=False),
        adapter_name="lora_r2",
    )
    model.save_pretrained("run/adapters")
    return "run"


def test_both_exports(run, capsys):
    assert call("export run --to peft") == 0
    shown = capsys.readouterr().out
    assert "One PEFT LoRA of rank 2" in shown and "written to run/export-peft" in shown
    assert call("export run --to merged --dtype bfloat16 --output-dir here") == 0
    shown = capsys.readouterr().out
    assert "cast to bfloat16: the cast changed no weight by more than" in shown and "written to here" in shown
    assert Path("here/model.safetensors").is_file() and Path("here/README.md").is_file()


def test_mistakes_in_an_export(run, model_folder, capsys):
    assert call("export nothing --to peft") == 1
    assert "nothing has no LoRA experts to export" in capsys.readouterr().err
    assert call("export run --to peft --output_dir run") == 1
    assert "not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call("export run")
