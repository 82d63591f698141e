"""Runs whose model is sharded over two and four ranks, against one process and against themselves when interrupted."""

import socket
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import multiprocessing, nn
from transformers import AutoModelForCausalLM

import sharded_runs
from molf.study.methods.recipe import Recipe
from molf.study.sharding import FOLDER_NAME, TrainedShards, check_sharded, check_sharding
from small import save_tiny_checkpoint
from small_runs import carry_out, small_run, weights

# How far a sharded run may end from one process: float32 sums over ranks have another order, and Adam divides by small roots.
APART = 2e-5
CASES = {
    "molf": {},
    "molf_e": {"method": "molf_e"},
    "beside": {"lora_dropout": 0.05},  # adapters in the model, and the base trains too
    "pissa": {"method": "pissa", "lora_dropout": 0.0},
    "bf16": {"dtype": "bfloat16"},
    "autocast": {"bf16": True},
    "few_bits": {"optim_bits": 8},
    "full": {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}},
}
ALIKE = ["molf", "molf_e", "pissa"]
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
        "fsdp": size > 1,
        **CASES[name],
    }


def start(size, plan):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(sharded_runs.carry_out_all, (size, port, plan), nprocs=size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every case on two ranks, whole (NAME-2) and interrupted (NAME-again); and one that four ranks went on from (four)."""
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOG_FILE", raising=False)
        save_tiny_checkpoint(folder / "model", num_hidden_layers=1, tie_word_embeddings=True)
        model = str(folder / "model")
        start(2, [(settings_of(model, folder, name, 2), folder / f"{name}-again") for name in CASES])
        on_four = {**settings_of(model, folder, "molf", 4), "output_dir": str(folder / "molf-2")}
        start(4, [(on_four, folder / "four")])
    return folder


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
    log, again = (folder / f"{name}-{end}" / "molf_expert_selection.jsonl" for end in ("2", "again"))
    assert log.exists() == again.exists() == (name != "pissa")
    if log.exists():
        assert log.read_text() == again.read_text()
        assert len(log.read_text().splitlines()) == sharded_runs.STEPS


def test_other_numbers_of_ranks_go_on_from_a_checkpoint(folder):
    assert furthest(folder / "four", folder / "molf-2") < APART


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
    with pytest.raises(
        ValueError, match=r"checkpoint-2 was made with sharded=True \(here False\): go on with the settings"
    ):
        carry_out(settings, output_dir=str(folder / "elsewhere"), resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_other_runs_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="has no trained_weights: it was not written by a sharded run that trains adapters"
    ):
        TrainedShards().restore(nn.Linear(2, 2), tmp_path)


def arguments(**changes):
    parallel = SimpleNamespace(value=changes.pop("parallel", "distributed"))
    return SimpleNamespace(**{"fsdp": True, "fsdp_config": {}, "parallel_mode": parallel, "device": "cpu", **changes})


@pytest.mark.parametrize(
    ("changes", "recipe", "words"),
    [
        ({"parallel": "not_distributed"}, Recipe(train={}), "torchrun --nproc_per_node N -m molf train"),
        ({"fsdp_config": {"version": 1}}, Recipe(train={}), "use version 2"),
        ({}, Recipe(train={}, adalora={"r": 4}), "adalora, eva.* leave fsdp out"),
        ({}, Recipe(train={}, lora={"init_lora_weights": "eva"}), "adalora, eva.* leave fsdp out"),
    ],
)
def test_what_cannot_be_sharded_is_refused(changes, recipe, words):
    with pytest.raises(ValueError, match=words):
        check_sharding(arguments(**changes), recipe)
    check_sharding(arguments(**{**changes, "fsdp": False}), recipe)


def test_a_run_on_cpus_is_not_silently_another():
    """accelerate takes DDP there."""
    with pytest.raises(ValueError, match="on accelerators only, and this run is on cpu; leave fsdp out"):
        check_sharded(SimpleNamespace(args=arguments(), is_fsdp_enabled=False))
    check_sharded(SimpleNamespace(args=arguments(fsdp=False), is_fsdp_enabled=False))
