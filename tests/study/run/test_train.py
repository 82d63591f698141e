import csv
import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from forked import on_two_ranks
from molf.errors import MolfError
from molf.study.config.run_config import RunConfig
from molf.study.engine.evaluate import evaluate
from molf.study.engine.examples import tokenize_examples as tokens
from molf.study.results.result import read_result
from molf.study.results.routing import ROUTING_FILE, read_routing
from molf.study.run.dry_run import make_plan
from molf.study.run.job import Job, make_trainer
from molf.study.run.train import _evaluate_on_ranks, run
from molf.tasks import get_task
from small_runs import BASELINES, FILES, carry_out, weights


@pytest.mark.parametrize(
    ("method", "tied"),
    [
        *((method, True) for method in ("molf", "molf_e", "fft", *BASELINES)),
        *((method, False) for method in ("molf", "molf_e", "fft", "lora")),
    ],
)
def test_a_run_leaves_a_plain_checkpoint_and_its_record(method, tied, settings, tiny_model, tmp_path):
    tiny_model.config.tie_word_embeddings = tied
    source = LlamaForCausalLM(tiny_model.config)
    source.save_pretrained(settings["model_name_or_path"])
    result = carry_out(settings, method=method, eval_before=True)
    folder = Path(settings["output_dir"])

    extra = {ROUTING_FILE, "routing.png"} if "molf" in method else set()
    extra |= {"adapters"} if method == "molf_e" else set()
    assert {path.name for path in folder.iterdir()} == FILES | extra
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    assert set(weights(folder)) == set(weights(settings["model_name_or_path"])), "neither adapters nor a copied lm_head"
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert model.config.use_cache is True

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = get_task("fact").load(None, sample=True, limit=8).eval
    assert evaluate(model, tokenizer, get_task("fact"), rows).metrics == result.metrics
    source.eval()
    for name, metric in evaluate(source, tokenizer, get_task("fact"), rows).metrics.items():
        # PiSSA's residual and adapter add up to the weight but for rounding.
        assert metric.value == pytest.approx(
            result.metrics_before[name].value, rel=1e-4 if method == "pissa" else 0, abs=0
        )

    assert read_result(folder) == result
    assert RunConfig.from_dict(yaml.safe_load((folder / "config.yaml").read_text())).to_dict() == result.config
    assert len(gzip.decompress((folder / "predictions.jsonl.gz").read_bytes()).splitlines()) == 8
    assert (result.training.steps, result.training.loss > 0, result.training.tokens > 0) == (4, True, True)


def test_what_each_method_trains(settings, tmp_path):
    changed, results = {}, {}
    start = weights(settings["model_name_or_path"])
    for method in ("fft", "molf", "molf_e", *BASELINES):
        results[method] = carry_out(settings, method=method, output_dir=str(tmp_path / method))
        end = weights(tmp_path / method)
        changed[method] = {name for name in start if not torch.equal(start[name], end[name])}
    linear = {name for name in start if "proj" in name}
    assert all(changed[method] == linear for method in ("molf_e", *BASELINES))
    assert changed["fft"] == set(start)
    assert set(start) - linear <= changed["molf"]
    total = sum(tensor.numel() for tensor in start.values())
    pairs = sum(sum(start[name].shape) for name in linear)
    outputs = sum(start[name].shape[0] for name in linear)
    sizes = {
        method: (result.training.trainable_parameters, result.training.lora_parameters)
        for method, result in results.items()
    }
    directions = sizes.pop("eva")
    assert directions[0] == 0
    assert 0 < directions[1] <= 8 * pairs, "EVA gives its ranks to the layers with most need"
    assert sizes == {
        "fft": (total, 0),
        "molf": (total, 6 * pairs),
        "molf_e": (0, 6 * pairs),
        **dict.fromkeys(("lora", "rslora", "pissa", "lora_plus"), (0, 4 * pairs)),
        "dora": (0, 4 * pairs + outputs),
        "adalora": (0, 6 * (pairs + len(linear))),
    }
    assert {result.training.parameters for result in results.values()} == {total}


@pytest.mark.parametrize("method", ["molf_e", *BASELINES])
def test_an_adapter_that_learns_nothing_is_merged_into_nothing(method, settings):
    """PiSSA takes its start out of the weights, and DoRA splits them: put together again they are what they were."""
    start = weights(settings["model_name_or_path"])
    carry_out(settings, method=method, learning_rate=0.0)
    for name, tensor in weights(settings["output_dir"]).items():
        torch.testing.assert_close(tensor, start[name], atol=1e-5, rtol=0)


def test_at_its_default_alpha_rank_stabilised_lora_is_lora(settings, tmp_path):
    carry_out(settings, method="lora", output_dir=str(tmp_path / "lora"))
    carry_out(settings, method="rslora", output_dir=str(tmp_path / "rslora"))
    lora, rslora = weights(tmp_path / "lora"), weights(tmp_path / "rslora")
    assert all(torch.equal(lora[name], rslora[name]) for name in lora)


def test_molf_without_lora_experts_is_full_fine_tuning(settings, tiny_model, tmp_path):
    """Nothing but the optimizer differs between the methods: data, schedule, clipping and decay are the same."""
    tiny_model.config.attention_dropout = 0.0  # MoLF draws a seed of its own, which shifts what dropout draws
    tiny_model.save_pretrained(settings["model_name_or_path"])
    common = {"max_grad_norm": 0.05, "optim": "adamw_torch"}
    carry_out(settings, method="fft", output_dir=str(tmp_path / "fft"), **common)
    carry_out(settings, method="molf", ranks=[], output_dir=str(tmp_path / "molf"), **common)
    fft, molf = weights(tmp_path / "fft"), weights(tmp_path / "molf")
    for name in fft:
        torch.testing.assert_close(molf[name], fft[name], atol=1e-6, rtol=0)


def test_routing_is_summarised(settings):
    result = carry_out(settings)
    summary = read_routing(Path(settings["output_dir"]) / ROUTING_FILE)
    assert summary.steps == [2, 3, 4]  # the first step of the warm-up has a rate of 0
    assert len(summary.by_module) == 14
    assert result.routing == summary.shares()
    assert sum(result.routing.values()) == pytest.approx(1)


def test_freezing_all_but_the_routed_weights(settings):
    start = weights(settings["model_name_or_path"])
    carry_out(settings, freeze_non_linear=True, target_modules=["q_proj", "v_proj"])
    end = weights(settings["output_dir"])
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)


RELEASING = {"optimizer_in_backward": True, "max_grad_norm": 0, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(
    "changes",
    [
        *({"method": method} for method in ("molf", "molf_e", "fft", *BASELINES)),
        {"method": "molf", "lora_dropout": 0.1},
        {"method": "molf_e", "freeze_non_linear": False},
        {"method": "molf", **RELEASING, "per_device_train_batch_size": 4},
        {"method": "molf_e", **RELEASING, "per_device_train_batch_size": 4},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_resumed_equals_uninterrupted(changes, settings, tmp_path):
    routed = "molf" in changes["method"]
    first = carry_out(settings, **changes, save_strategy="steps", save_steps=2)
    folder = Path(settings["output_dir"])
    whole, routing = weights(folder), (folder / ROUTING_FILE).read_text() if routed else ""
    for name in ("result.json", "model.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoint-4")
    result = carry_out(settings, **changes, resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert result.training.steps == 4
    assert 0 < result.training.tokens < first.training.tokens, "those of this start, whose seconds are counted"
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, whole[name]), name
    if routed:
        assert (folder / ROUTING_FILE).read_text() == routing


@pytest.mark.parametrize("method", ["molf", "molf_e"])
def test_releasing_gradients_changes_nothing(method, settings, tmp_path):
    for name, released in (("usual", False), ("released", True)):
        changes = {**RELEASING, "optimizer_in_backward": released, "output_dir": str(tmp_path / name)}
        carry_out(settings, method=method, **changes)
    usual, released = weights(tmp_path / "usual"), weights(tmp_path / "released")
    assert usual.keys() == released.keys()
    assert all(torch.equal(usual[name], released[name]) for name in usual)


def test_the_last_checkpoint_is_found(settings):
    changes = {"lora_dropout": 0.1, "save_strategy": "epoch"}
    carry_out(settings, **changes)
    whole = weights(settings["output_dir"])
    carry_out(settings, **changes, resume_from_checkpoint=True)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(settings["output_dir"]).items())


def test_checkpoints_of_other_settings_are_refused(settings):
    carry_out(settings, method="molf_e", save_strategy="epoch")
    with pytest.raises(ValueError, match=r"was made with method=molf_e \(here molf\)"):
        carry_out(settings, lora_dropout=0.1, resume_from_checkpoint=True)


def test_the_experts_of_molf_efficient_are_kept(settings):
    carry_out(settings, method="molf_e")
    folder = Path(settings["output_dir"])
    assert {path.name for path in (folder / "adapters").iterdir() if path.is_dir()} == {"lora_r2", "lora_r4"}
    model = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"])
    experts = PeftModel.from_pretrained(model, str(folder / "adapters" / "lora_r2"), adapter_name="lora_r2")
    experts.load_adapter(str(folder / "adapters" / "lora_r4"), adapter_name="lora_r4")
    merged = experts.merge_and_unload(adapter_names=["lora_r2", "lora_r4"]).state_dict()
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)
    carry_out(settings, method="fft", overwrite=True)
    assert not (folder / "adapters").exists(), "they belong to the replaced run"


def test_molf_efficient_with_its_norms_and_embeddings(settings):
    start = weights(settings["model_name_or_path"])
    result = carry_out(settings, method="molf_e", freeze_non_linear=False)
    others = sum(tensor.numel() for name, tensor in start.items() if "proj" not in name)
    assert result.training.trainable_parameters == others
    end = weights(settings["output_dir"])
    assert all(not torch.equal(start[name], end[name]) for name in start)
    assert not (Path(settings["output_dir"]) / "adapters").exists(), "they are not all that was trained"


@pytest.mark.parametrize("freeze", [False, True])
def test_molf_with_dropout(freeze, settings):
    start = weights(settings["model_name_or_path"])
    result = carry_out(settings, lora_dropout=0.1, freeze_non_linear=freeze)
    trained = [tensor for name, tensor in start.items() if "proj" in name or not freeze]
    pairs = sum(sum(tensor.shape) for name, tensor in start.items() if "proj" in name)
    assert result.training.trainable_parameters == sum(tensor.numel() for tensor in trained)
    assert result.training.lora_parameters == 6 * pairs
    assert set(result.routing) == {"fft", "lora_r2", "lora_r4"}
    end = weights(settings["output_dir"])
    assert set(end) == set(start)
    assert all(torch.equal(start[name], end[name]) == freeze for name in start if "proj" not in name)


def test_a_run_that_fails_is_not_finished(settings, monkeypatch):
    carry_out(settings)
    monkeypatch.setattr("molf.study.run.train.save_checkpoint", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        carry_out(settings, overwrite=True)
    assert not (Path(settings["output_dir"]) / "result.json").exists()


def test_checkpoints_are_removed_on_request(settings):
    carry_out(settings, save_strategy="epoch")
    folder = Path(settings["output_dir"])
    assert len(list(folder.glob("checkpoint-*"))) == 2
    carry_out(settings, save_strategy="epoch", overwrite=True, clean_ckpt_at_end=True)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set()


def test_evaluation_only(settings, tmp_path):
    start = weights(settings["model_name_or_path"])
    result = carry_out(settings, only_eval=True, eval_limit=3)
    folder = Path(settings["output_dir"])
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "predictions.jsonl.gz", "result.json"}
    assert result.training is None
    assert result.metrics["efficacy_score"].n == 3
    assert carry_out(settings, only_eval=True).metrics["efficacy_score"].n == 8, "an evaluation may be repeated"
    carry_out(settings, overwrite=True)
    with pytest.raises(ValueError, match="holds a finished run"):
        carry_out(settings, only_eval=True)
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(settings["model_name_or_path"]).items())


def test_the_log_file_gets_a_row_per_run(settings, tmp_path, monkeypatch):
    log = tmp_path / "log.csv"
    monkeypatch.setenv("LOG_FILE", str(log))
    carry_out(settings)
    carry_out(settings, method="fft", overwrite=True)
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["molf", "fft"]
    assert all(float(row["metric/score"]) > 0 for row in rows)
    assert rows[0]["routing/fft"] != rows[1]["routing/fft"] == ""


def test_several_gpus_in_one_process_are_refused_before_anything_is_loaded(settings, monkeypatch):
    """The Trainer would split every batch over them, and multiply it."""
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 4)
    monkeypatch.setattr("molf.study.run.job.load_split", lambda *given, **more: pytest.fail("loaded"))
    words = "4 GPUs are visible to one process: set CUDA_VISIBLE_DEVICES=0 .* torchrun --nproc_per_node 4 -m molf train"
    for change in ({}, {"dry_run": True}):
        with pytest.raises(MolfError, match=words):
            (make_plan if change else run)(RunConfig.from_dict(settings | change))


def test_the_commit_is_that_of_the_start(settings, monkeypatch):
    monkeypatch.setattr("molf.study.run.record.source_commit", lambda: "before")

    def make(*given, **more):
        monkeypatch.setattr("molf.study.run.record.source_commit", lambda: "changed during the run")
        return make_trainer(*given, **more)

    monkeypatch.setattr("molf.study.run.train.make_trainer", make)
    assert carry_out(settings).commit == "before"


def test_the_training_rows_are_tokenised_once(settings, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "molf.study.run.training_data.tokenize_examples", lambda *given: calls.append(1) or tokens(*given)
    )
    monkeypatch.setattr("trl.trainer.sft_trainer._tokenize", lambda *given, **more: pytest.fail("tokenised again"))
    carry_out(settings)
    assert calls == [1]


@pytest.mark.parametrize(
    ("everywhere", "backend", "shards"),
    [(True, "transformers", True), (False, "transformers", False), (True, "vllm", False)],
)
def test_all_ranks_evaluate_if_all_have_the_model(everywhere, backend, shards, settings, monkeypatch, tmp_path):
    job = Job(RunConfig.from_dict(settings | {"generation_backend": backend}), None, None, None, None)
    monkeypatch.setattr("molf.study.run.train._evaluate", lambda job, model, source, shard: shard)

    def rank_of_two(rank):
        own = dataclasses.replace(job, model=torch.nn.Module() if everywhere or rank == 0 else None)
        return _evaluate_on_ranks(own, rank == 0, torch.device("cpu"), ""), torch.distributed.is_initialized()

    expected = [(True, False)] * 2 if shards else [(False, False), (None, False)]
    assert on_two_ranks(rank_of_two, tmp_path) == expected


def test_mistakes_stop_a_run_before_it_writes(settings):
    mistakes = (
        ({"task": "facts"}, "did you mean 'fact'"),
        ({"learning_rte": 1.0}, "did you mean 'learning_rate'"),
        ({"method": "eva", "lora_rank": 64}, "lora_rank=64 with method eva exceeds"),
        ({"model_name_or_path": "/no/such/folder"}, "does not exist"),
        ({**RELEASING, "max_grad_norm": 1.0}, "optimizer_in_backward=True with max_grad_norm=1.0"),
    )
    for change, message in mistakes:
        with pytest.raises(ValueError, match=message):
            carry_out(settings, **change)
    assert not Path(settings["output_dir"]).exists()


@pytest.mark.parametrize("method", ["molf", "molf_e", "lora", "adalora", "eva"])
def test_same_seed_same_result(method, settings):
    first = carry_out(settings, method=method)
    again = carry_out(settings, method=method, overwrite=True)
    other = carry_out(settings, method=method, overwrite=True, seed=7)
    assert first.metrics == again.metrics
    assert first.training.loss == again.training.loss != other.training.loss


def test_predictions_say_what_was_asked(settings):
    carry_out(settings, only_eval=True, eval_limit=1)
    content = gzip.decompress((Path(settings["output_dir"]) / "predictions.jsonl.gz").read_bytes())
    (prediction,) = map(json.loads, content.splitlines())
    assert prediction["answers"][0]["prompt"]
