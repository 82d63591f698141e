"""Every example runs, on a tiny model instead of the pretrained one."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

import accelerate_loop
import grpo_arithmetic
import own_score
import own_task
import pytorch_loop
import trl_sft
from molf import MoLF
from molf.errors import MolfError
from molf.study.results.result import read_result
from molf.tasks import TASKS, TargetScores

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
    assert len((tmp_path / "routing.jsonl").read_text().splitlines()) == 4, "a header and three steps"
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_grpo_arithmetic(tmp_path):
    """Three of its 150 steps, whose reward is no more than luck."""
    rewards = grpo_arithmetic.main(str(tmp_path), steps=3, batch=8)
    assert len(rewards) == 3 and all(0 <= reward <= 1 for reward in rewards)
    assert grpo_arithmetic.is_right(["7", " 7", "8"], [7, 7, 7]) == [1.0, 1.0, 0.0]


def test_accelerate_loop_and_its_checkpoint(tmp_path):
    _, model, optimizer = accelerate_loop.main(str(tmp_path), steps=4)
    assert type(optimizer) is MoLF and optimizer.routing.chosen.sum() == 2
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, again, resumed = accelerate_loop.main(str(tmp_path), steps=4, resume=True)
    assert float(resumed.state[again[0].weight]["step"]) == 2 * float(optimizer.state[model[0].weight]["step"])
    assert any(not saved[name].equal(p) for name, p in again.named_parameters())


def test_two_processes():
    """With DDP it says the same; that both equal one process is tested with the optimizer."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(EXAMPLES / "ddp_fsdp2.py"), "--fsdp"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().startswith("loss 0.355"), done.stdout.decode()


def test_lightning_module():
    pytest.importorskip("lightning", reason="Lightning is not installed")
    loss, winners = importlib.import_module("lightning_module").main(epochs=2, enable_progress_bar=False)
    assert loss < 1 and winners.keys() == {"net.0", "net.2"}


def test_llama_factory(monkeypatch):
    """Against the two names of LLaMA-Factory's that the example uses; its trainer calls the function as here."""
    package, train, utils, tuner = (
        ModuleType(f"llamafactory{name}") for name in ("", ".train", ".train.trainer_utils", ".train.tuner")
    )
    train.trainer_utils, train.tuner = utils, tuner
    utils.create_custom_optimizer = lambda model, args, finetuning_args: None
    made, args = [], SimpleNamespace(max_grad_norm=0.5, learning_rate=2e-3, weight_decay=0.01)
    tuner.run_exp = lambda settings: made.append(utils.create_custom_optimizer(settings["model"], args, None))
    for module in (package, train, utils, tuner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    importlib.import_module("llama_factory").main({"model": model, "molf": {"ranks": [2]}})
    (optimizer,) = made
    assert type(optimizer) is MoLF and (optimizer.max_grad_norm, args.max_grad_norm) == (0.5, 0.0)
    assert optimizer.param_groups[-1]["lr"] == 2e-3
    model.peft_config = {}
    with pytest.raises(MolfError, match="finetuning_type: lora trains one adapter"):
        importlib.import_module("llama_factory").main({"model": model})


def test_own_score(capsys):
    loss, routing = own_score.main(steps=5)
    assert loss > 0 and routing.chosen.sum() == 2
    assert "won the last step" in capsys.readouterr().out


def test_own_task(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "boolq", own_task.BoolQ())
    rows = [{"passage": f"{n} is a number.", "question": f"is {n} a number", "answer": n % 3 > 0} for n in range(6)]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--task", "boolq", "--data_path", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    assert own_task.main(["train", "--model_name_or_path", tiny_checkpoint, "--ranks", "2", *data]) == 0
    result = read_result(tmp_path / "run")
    assert (result.headline, result.metrics["accuracy"].n) == ("accuracy", 6)
    task = own_task.BoolQ()
    yes, no = TargetScores((-1.0,), (1,), (True,)), TargetScores((-2.0,), (2,), (False,))
    assert task.score(rows, [[yes, no]] * 6)["accuracy"].value == pytest.approx(100 * 4 / 6)
    assert [task.example(row)["completion"] for row in rows[:2]] == [" no", " yes"]


def test_the_page_about_tasks_shows_the_example():
    page = (EXAMPLES.parent / "docs" / "adding-a-task.md").read_text()
    assert f"```python\n{Path(own_task.__file__).read_text()}```" in page
