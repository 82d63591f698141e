import shlex
from pathlib import Path

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


def test_help_of_plan(capsys):
    assert call("plan --help") == 0
    shown = capsys.readouterr().out
    assert "usage: molf plan " in shown and "--memory_gb" in shown
