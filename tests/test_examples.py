"""Every example runs, on a tiny model instead of the pretrained one."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import own_score
import pytorch_loop
import trl_sft

EXAMPLES = Path(own_score.__file__).parent


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 40


def test_pytorch_loop(tiny_checkpoint, capsys):
    losses = pytorch_loop.main(tiny_checkpoint, rank=2, steps=4)
    assert losses[-1] < losses[0]
    assert "full fine-tuning won" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # no accelerator here
def test_trl_sft(tiny_checkpoint, tmp_path):
    trainer = trl_sft.main(tiny_checkpoint, str(tmp_path), rank=2, steps=3)
    assert trainer.state.global_step == 3
    assert len((tmp_path / "molf_expert_selection.jsonl").read_text().splitlines()) == 3
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_own_score(capsys):
    loss, routing = own_score.main(steps=5)
    assert loss > 0 and routing.chosen.sum() == 2
    assert "won the last step" in capsys.readouterr().out
