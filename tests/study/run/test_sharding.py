"""Runs whose model is sharded over two and four ranks, against one process and against themselves when interrupted."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, StateDictType
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM

import sharded_runs
from molf.cli import main
from molf.study.methods.recipe import Recipe
from molf.study.results.result import read_result
from molf.study.run.sharding import FOLDER_NAME, TrainedShards, check_sharding
from served import CONTEXT
from small_runs import carry_out, small_run, weights
from tiny_checkpoints import save_tiny_checkpoint

# How far a sharded run may end from one process: float32 sums over ranks have another order, and Adam divides by small roots.
APART = 2e-5
CASES = {
    "molf": {},
    "molf_e": {"method": "molf_e"},
    "beside": {
        "lora_dropout": 0.05,
        "bf16": True,
        "eval_before": True,
    },  # adapters in the model, and the base trains too
    "pissa": {"method": "pissa", "lora_dropout": 0.0},
    "bf16": {"dtype": "bfloat16", "optim_bits": 8},
    "full": {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}},
    "ddp": {"fsdp": False},
}
ALIKE = ["molf", "molf_e", "pissa", "ddp"]
"""Those that do the same on one process: no dropout, whose random numbers are each rank's own, and float32 throughout."""


def settings_of(model, folder, name, size):
    """A run of four steps of eight examples each, whatever the number of ranks."""
    return {
        **small_run(model, folder / f"{name}-{size}"),
        "limit": 16,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4 // size,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": sharded_runs.STEPS // 2,
        "eval_limit": 2,
        "use_cpu": True,
        "gradient_checkpointing": True,  # by FSDP's own means
        "fsdp": size > 1,
        **CASES[name],
    }


def plans(folder):
    """What two ranks do and what four: every case whole (NAME-2) and interrupted (NAME-again), and faults one after another.

    The interruption of the case molf is a truncated checkpoint. Four ranks go on from what two wrote (NAME-four).
    """
    model = str(folder / "model")
    flags = [
        f"--{name}={value}"
        for name, value in {"model_name_or_path": model, "sample": True, "limit": 4, "ranks": 4}.items()
    ]
    arguments = ["train", *flags, f"--output_dir={folder / 'refused'}", "--fsdp=True"]
    two = [("refused", "refused", arguments, "on accelerators only, but this run is on cpu")]
    for name in CASES:
        settings = settings_of(model, folder, name, 2)
        again = settings | {"output_dir": str(folder / f"{name}-again")}
        two.append((name, "whole", settings))
        two.append((f"{name}-again", "half", again, settings["output_dir"], name == "molf"))
    two.append(("faults", "faults", settings_of(model, folder, "molf", 2) | {"output_dir": str(folder / "faults")}))
    four = []
    for name in ("molf", "molf_e"):
        settings = settings_of(model, folder, name, 4) | {"output_dir": str(folder / f"{name}-four")}
        four.append((f"{name}-four", "half", settings, str(folder / f"{name}-2")))
    return {2: two, 4: four}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Both plans carried out: their folder, and what failed by case."""
    folder = tmp_path_factory.mktemp("sharded")
    failures = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOG_FILE", raising=False)
        save_tiny_checkpoint(folder / "model", num_hidden_layers=1, tie_word_embeddings=True)
        for size, plan in plans(folder).items():
            start_processes(
                sharded_runs.carry_out_all, (size, folder, plan), size, start_method=CONTEXT.get_start_method()
            )
            for file in folder.glob(f"{size}ranks-*.json"):
                failures |= json.loads(file.read_text())
    return folder, failures


@pytest.fixture
def folder(ranks):
    return ranks[0]


@pytest.mark.parametrize("name", ["refused", *(f"{name}{end}" for name in CASES for end in ("", "-again")), "faults"])
def test_carried_out(name, ranks):
    """Without which nothing else of a case holds."""
    _, failures = ranks
    assert name not in failures, failures[name]


def furthest(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    return max(float((value.double() - other[name].double()).abs().max()) for name, value in one.items())


@pytest.mark.parametrize("name", ALIKE)
def test_two_ranks_end_where_one_process_does(name, folder, monkeypatch):
    monkeypatch.delenv("LOG_FILE", raising=False)
    carry_out(settings_of(str(folder / "model"), folder, name, 1))
    moved = furthest(folder / f"{name}-1", folder / "model")
    assert furthest(folder / f"{name}-1", folder / f"{name}-2") < APART < moved / 100


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_run_ends_where_the_whole_one_does(name, folder):
    """Difference 0.0, and the same routing log."""
    assert furthest(folder / f"{name}-again", folder / f"{name}-2") == 0.0
    log, again = (folder / f"{name}-{end}" / "routing.jsonl" for end in ("2", "again"))
    assert log.exists() == again.exists() == (name != "pissa")
    if log.exists():
        assert log.read_text() == again.read_text()
        assert len(log.read_text().splitlines()) == 1 + sharded_runs.STEPS


def test_other_numbers_of_ranks_go_on_from_a_checkpoint(folder):
    for name in ("molf", "molf_e"):
        assert furthest(folder / f"{name}-four", folder / f"{name}-2") < APART


def test_the_truncated_checkpoint_was_passed_over(folder):
    assert (folder / "molf-again" / "damaged-checkpoint-4").is_dir()


def test_after_all_faults_a_run_ends_where_the_whole_one_does(folder):
    """A full disk, SIGTERM to one rank in training, SIGTERM in the evaluation."""
    assert furthest(folder / "faults", folder / "molf-2") == 0.0
    one, other = read_result(folder / "faults"), read_result(folder / "molf-2")
    assert one.metrics == other.metrics


def test_how_checkpoints_are_written_changes_nothing(folder):
    assert furthest(folder / "full-2", folder / "molf-2") == 0.0


def test_what_is_left_is_a_plain_checkpoint(folder):
    """It loads without the project, in the dtype that the run was given, its embeddings tied as before."""
    for name, dtype in (("molf", torch.float32), ("molf_e", torch.float32), ("bf16", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(folder / f"{name}-2", dtype="auto")
        assert model.dtype == dtype
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert (folder / f"{name}-2" / "result.json").exists()


def test_experts_of_a_sharded_run_are_peft_adapters(folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapters = folder / "molf_e-2" / "adapters"
    model = PeftModel.from_pretrained(base, adapters / "lora_r2", adapter_name="lora_r2")
    model.load_adapter(adapters / "lora_r4", adapter_name="lora_r4")
    model.base_model.set_adapter(["lora_r2", "lora_r4"])
    merged = model.merge_and_unload(adapter_names=["lora_r2", "lora_r4"])
    left = load_file(folder / "molf_e-2" / "model.safetensors")
    for name, p in merged.named_parameters():
        torch.testing.assert_close(p.detach(), left[name], rtol=0, atol=1e-6)


def test_every_rank_wrote_its_shards(folder):
    for name, parts in (("molf", ("optimizer_0", "pytorch_model_fsdp_0")), ("molf_e", ("optimizer_0", FOLDER_NAME))):
        for part in parts:
            shards = sorted(path.name for path in (folder / f"{name}-2" / "checkpoint-4" / part).glob("*.distcp"))
            assert shards == ["__0_0.distcp", "__1_0.distcp"]


def test_a_sharded_checkpoint_is_not_for_one_process(folder, monkeypatch):
    monkeypatch.delenv("LOG_FILE", raising=False)
    settings = settings_of(str(folder / "model"), folder, "molf", 1)
    checkpoint = folder / "molf-2" / "checkpoint-2"
    with pytest.raises(ValueError, match=r"checkpoint-2 was made with sharded=True \(here False\): use the settings"):
        carry_out(settings, output_dir=str(folder / "elsewhere"), resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_other_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no trained_weights, so no sharded run with adapters wrote it"):
        TrainedShards().restore(nn.Linear(2, 2), tmp_path)


def trainer(version=2, cpu_offload=False, sharded=True, **args):
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    full = StateDictType.FULL_STATE_DICT
    plugin = SimpleNamespace(state_dict_type=full, fsdp_version=version, cpu_offload=offload)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin if sharded else None))
    return SimpleNamespace(
        args=SimpleNamespace(fsdp=None, **args), model=model, accelerator=accelerator, is_fsdp_enabled=sharded
    )


@pytest.mark.parametrize(
    ("changes", "recipe", "words"),
    [
        ({"version": 1}, Recipe(train={}), "use version 2"),
        (
            {},
            Recipe(train={}, molf={}),
            "int16 low parts of bf16 weights cannot be gathered: leave state_dict_type out",
        ),
        (
            {"cpu_offload": True},
            Recipe(train={}),
            "cpu_offload, but the optimizer communicates on the GPU: leave it out",
        ),
        ({}, Recipe(train={}, adalora={"r": 4}), "adalora, eva.* leave --fsdp out"),
        ({}, Recipe(train={}, lora={"init_lora_weights": "eva"}), "adalora, eva.* leave --fsdp out"),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes, recipe, words):
    """Whoever asked for it: ``accelerate launch`` leaves the trainer's own setting unset."""
    with pytest.raises(ValueError, match=words):
        check_sharding(trainer(**changes), recipe)
    check_sharding(trainer(**changes, sharded=False), recipe)
    check_sharding(trainer(), Recipe(train={}, molf={"bf16_update": "stochastic"}))


def test_one_process_does_not_shard(tmp_path, capsys):
    save_tiny_checkpoint(tmp_path / "model")
    line = f"train --model_name_or_path {tmp_path / 'model'} --sample --use_cpu True --fsdp True --output_dir {tmp_path / 'run'}"
    assert main(line.split()) == 1
    assert "torchrun --nproc_per_node N -m molf train" in capsys.readouterr().err
