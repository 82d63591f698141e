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
from molf.integrations.routing_lines import LOG_FILES
from molf.study.config.run_config import RunConfig
from molf.study.engine.evaluate import evaluate
from molf.study.engine.examples import tokenize_examples as tokens
from molf.study.results.result import read_result
from molf.study.results.routing_reader import read_routing
from molf.study.run.dry_run import make_plan
from molf.study.run.job import Job
from molf.study.run.train import _evaluate_on_ranks, run
from molf.tasks import get_task
from small_runs import BASELINES, FILES, carry_out, small_config, weights

METHODS = ["molf", "molf_e", "fft", *BASELINES]


@pytest.mark.parametrize(
    ("method", "tied"), [*((m, False) for m in METHODS), ("molf", True), ("molf_e", True), ("pissa", True)]
)
def test_a_run_leaves_a_plain_checkpoint_and_its_record(method, tied, finished, settings, tiny_model, tmp_path):
    start = Path(settings["model_name_or_path"])
    if not tied:
        result, folder = vars(finished(method=method)).values()
    else:
        tiny_model.config.tie_word_embeddings = True
        start = shutil.copytree(start, tmp_path / "tied")
        LlamaForCausalLM(tiny_model.config).save_pretrained(start)
        result = carry_out(settings, method=method, eval_before=True, model_name_or_path=str(start))
        folder = Path(settings["output_dir"])

    extra = {LOG_FILES["compact"], "routing.png"} if "molf" in method else set()
    extra |= {"adapters"} if method == "molf_e" else set()
    extra |= set() if tied else {"checkpoint-2", "checkpoint-4"}
    extra |= {"predictions_before.jsonl.gz"}
    assert {path.name for path in folder.iterdir()} == FILES | extra
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    assert set(weights(folder)) == set(weights(start)), "neither adapters nor a copied lm_head"
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert model.config.use_cache is True

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = get_task("fact").load(None, sample=True, limit=8).eval
    assert evaluate(model, tokenizer, get_task("fact"), rows).metrics == result.metrics
    source = AutoModelForCausalLM.from_pretrained(start)
    for name, metric in evaluate(source, tokenizer, get_task("fact"), rows).metrics.items():
        # PiSSA's residual and adapter add up to the weight but for rounding.
        rounding = 1e-4 if method == "pissa" else 0
        assert metric.value == pytest.approx(result.metrics_before[name].value, rel=rounding, abs=0)

    assert read_result(folder) == result
    assert RunConfig.from_dict(yaml.safe_load((folder / "config.yaml").read_text())).to_dict() == result.config
    predictions = gzip.decompress((folder / "predictions.jsonl.gz").read_bytes()).splitlines()
    assert len(predictions) == 8 and json.loads(predictions[0])["answers"][0]["prompt"]
    assert (result.training.steps, result.training.loss > 0, result.training.tokens > 0) == (4, True, True)


def test_the_picture_is_there_before_the_evaluation(settings, monkeypatch):
    def killed(job, model, source, shard):
        raise KeyboardInterrupt

    picture = Path(settings["output_dir"], "routing.png")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("molf.study.run.train._evaluate", killed)
        carry_out(settings, eval_before=False)
    assert picture.is_file()
    picture.unlink()  # as if killed while it was drawn
    carry_out(settings, eval_before=False, resume_from_checkpoint="True")
    assert picture.is_file()


def changed_weights(start, folder):
    end = weights(folder)
    assert end.keys() == start.keys()
    return {name for name in start if not torch.equal(start[name], end[name])}


def test_what_each_method_trains(finished, shared_model):
    start = weights(shared_model)
    results = {method: finished(method=method).result for method in METHODS}
    changed = {method: changed_weights(start, finished(method=method).folder) for method in METHODS}
    linear = {name for name in start if "proj" in name}
    assert all(changed[method] == linear for method in ("molf_e", *BASELINES))
    assert changed["fft"] == set(start)
    assert set(start) - linear <= changed["molf"]
    total = sum(tensor.numel() for tensor in start.values())
    pairs = sum(sum(start[name].shape) for name in linear)
    outputs = sum(start[name].shape[0] for name in linear)
    trainings = {method: result.training for method, result in results.items()}
    sizes = {method: (t.trainable_parameters, t.lora_parameters) for method, t in trainings.items()}
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
    assert {training.parameters for training in trainings.values()} == {total}


@pytest.mark.parametrize("method", ["molf_e", "lora", "dora", "adalora", "pissa", "eva"])
def test_an_adapter_that_learns_nothing_is_merged_into_nothing(method, settings, shared_model):
    """PiSSA takes its start out of the weights, and DoRA splits them: put together again they are what they were."""
    start = weights(shared_model)
    carry_out(settings, method=method, learning_rate=0.0, max_steps=2, eval_limit=1)
    for name, tensor in weights(settings["output_dir"]).items():
        torch.testing.assert_close(tensor, start[name], atol=1e-5, rtol=0)


def test_at_its_default_alpha_rank_stabilised_lora_is_lora(finished):
    lora, rslora = weights(finished(method="lora").folder), weights(finished(method="rslora").folder)
    assert all(torch.equal(lora[name], rslora[name]) for name in lora)


def test_molf_without_lora_experts_is_full_fine_tuning(settings, tiny_model, saved_model, tmp_path):
    """Nothing but the optimizer differs between the methods: data, schedule, clipping and decay are the same."""
    tiny_model.config.attention_dropout = 0.0  # MoLF draws a seed of its own, which shifts what dropout draws
    tiny_model.save_pretrained(saved_model)
    common = {"max_grad_norm": 0.05, "eval_limit": 1, "model_name_or_path": saved_model}
    carry_out(settings, method="fft", optim="adamw_torch", output_dir=str(tmp_path / "fft"), **common)
    carry_out(settings, method="molf", ranks=[], output_dir=str(tmp_path / "molf"), **common)
    fft, molf = weights(tmp_path / "fft"), weights(tmp_path / "molf")
    for name in fft:
        torch.testing.assert_close(molf[name], fft[name], atol=1e-6, rtol=0)


def test_routing_is_summarised(finished):
    result, folder = vars(finished(method="molf")).values()
    summary = read_routing(folder / LOG_FILES["compact"])
    # The warm-up begins at a rate of 0, at which the base rate's promises decide.
    assert (summary.steps, summary.bins.spans[0]) == (4, (1, 1))
    assert len(summary.by_module) == 7
    assert result.routing == summary.shares
    assert sum(result.routing.values()) == pytest.approx(1)


def test_freezing_all_but_the_routed_weights(settings, shared_model):
    carry_out(settings, freeze_non_linear=True, target_modules=["q_proj", "v_proj"], eval_limit=1)
    changed = changed_weights(weights(shared_model), settings["output_dir"])
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)


RELEASING = {
    "optimizer_in_backward": True,
    "max_grad_norm": 0,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 4,
}
DROPOUT = {"method": "molf", "lora_dropout": 0.1}
WITH_NORMS = {"method": "molf_e", "freeze_non_linear": False}


@pytest.mark.parametrize(
    "changes",
    [
        *({"method": method} for method in METHODS),
        DROPOUT,
        WITH_NORMS,
        {"method": "molf", **RELEASING},
        {"method": "molf_e", **RELEASING},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_resumed_equals_uninterrupted(changes, finished, settings):
    """From a checkpoint by its path, or from the last one."""
    whole = finished(**changes)
    folder = finished.copy(Path(settings["output_dir"]), **changes)
    for name in ("result.json", "model.safetensors"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoint-4")
    resume = True if changes is DROPOUT else str(folder / "checkpoint-2")
    result = carry_out(settings, **changes, eval_limit=1, resume_from_checkpoint=resume)
    assert result.training.steps == 4
    tokens = whole.result.training.tokens
    assert 0 < result.training.tokens < tokens, "those of this start, whose seconds are counted"
    assert not changed_weights(weights(whole.folder), folder)
    if "molf" in changes["method"]:
        assert (folder / LOG_FILES["compact"]).read_text() == (whole.folder / LOG_FILES["compact"]).read_text()


@pytest.mark.parametrize("method", ["molf", "molf_e"])
def test_releasing_gradients_changes_nothing(method, finished, settings):
    carry_out(settings, method=method, **RELEASING | {"optimizer_in_backward": False}, eval_limit=1)
    assert not changed_weights(weights(finished(method=method, **RELEASING).folder), settings["output_dir"])


def test_the_experts_of_molf_efficient_are_kept(finished, shared_model):
    folder = finished(method="molf_e").folder
    assert {path.name for path in (folder / "adapters").iterdir() if path.is_dir()} == {"lora_r2", "lora_r4"}
    model = AutoModelForCausalLM.from_pretrained(shared_model)
    experts = PeftModel.from_pretrained(model, str(folder / "adapters" / "lora_r2"), adapter_name="lora_r2")
    experts.load_adapter(str(folder / "adapters" / "lora_r4"), adapter_name="lora_r4")
    merged = experts.merge_and_unload(adapter_names=["lora_r2", "lora_r4"]).state_dict()
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)


def test_molf_efficient_with_its_norms_and_embeddings(finished, shared_model):
    start = weights(shared_model)
    result, folder = vars(finished(**WITH_NORMS)).values()
    others = sum(tensor.numel() for name, tensor in start.items() if "proj" not in name)
    assert result.training.trainable_parameters == others
    assert changed_weights(start, folder) == set(start)
    assert not (folder / "adapters").exists(), "they are not all that was trained"


@pytest.mark.parametrize("freeze", [False, True])
def test_molf_with_dropout(freeze, finished, settings, shared_model):
    start = weights(shared_model)
    if freeze:
        result = carry_out(settings, **DROPOUT, freeze_non_linear=True, eval_limit=1)
        folder = settings["output_dir"]
    else:
        result, folder = vars(finished(**DROPOUT)).values()
    trained = [tensor for name, tensor in start.items() if "proj" in name or not freeze]
    pairs = sum(sum(tensor.shape) for name, tensor in start.items() if "proj" in name)
    assert result.training.trainable_parameters == sum(tensor.numel() for tensor in trained)
    assert result.training.lora_parameters == 6 * pairs
    assert set(result.routing) == {"fft", "lora_r2", "lora_r4"}
    changed = changed_weights(start, folder)
    assert all((name in changed) is not freeze for name in start if "proj" not in name)


def test_a_run_that_fails_is_not_finished_and_checkpoints_are_removed_on_request(finished, settings, monkeypatch):
    folder = finished.copy(Path(settings["output_dir"]), method="molf")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("molf.study.run.train.save_checkpoint", lambda *given: 1 / 0)
        carry_out(settings, overwrite=True)
    assert not (folder / "result.json").exists()
    carry_out(settings, save_strategy="epoch", overwrite=True, clean_ckpt_at_end=True)
    assert (folder / "result.json").exists() and not [path for path in folder.iterdir() if path.is_dir()]


def test_a_finished_run_that_is_started_again_is_left_as_it_is(finished, settings, caplog):
    folder = finished.copy(Path(settings["output_dir"]), method="molf")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = carry_out(read_result(folder).config, resume_from_checkpoint="True", output_dir=str(folder))
    assert again == read_result(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "nothing is left to do" in caplog.text


def test_evaluation_only(finished, settings, tmp_path):
    result = carry_out(settings, only_eval=True, eval_limit=3)
    folder = Path(settings["output_dir"])
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "predictions.jsonl.gz", "result.json"}
    assert result.training is None
    assert result.metrics["efficacy_score"].n == 3
    assert carry_out(settings, only_eval=True).metrics["efficacy_score"].n == 8, "an evaluation may be repeated"
    trained = finished.copy(tmp_path / "trained", method="molf")
    with pytest.raises(ValueError, match="holds a finished run"):
        carry_out(settings, only_eval=True, output_dir=str(trained))


def test_the_log_file_gets_a_row_per_run(settings, tmp_path, monkeypatch):
    log = tmp_path / "log.csv"
    monkeypatch.setenv("LOG_FILE", str(log))
    results = [carry_out(settings, eval_limit=1), carry_out(settings, method="fft", only_eval=True, overwrite=True)]
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["molf", "fft"]
    scores = [float(row["metric/score"]) for row in rows]
    assert scores == pytest.approx([result.metrics["score"].value for result in results]) and max(scores) > 0
    assert rows[0]["routing/fft"] != rows[1]["routing/fft"] == ""


def test_several_gpus_in_one_process_are_refused_before_anything_is_loaded(settings, monkeypatch):
    """The Trainer would split every batch over them, and multiply it."""
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 4)
    monkeypatch.setattr("molf.study.run.job.load_split", lambda *given, **more: pytest.fail("loaded"))
    words = "4 GPUs are visible to one process: set CUDA_VISIBLE_DEVICES=0 .* torchrun --nproc_per_node 4 -m molf train"
    for change in ({}, {"dry_run": True}):
        with pytest.raises(MolfError, match=words):
            (make_plan if change else run)(small_config(settings | change))


def test_the_commit_is_that_of_the_start_and_rows_are_tokenised_once(settings, monkeypatch):
    commits, calls = iter(["before", "changed during the run"]), []
    monkeypatch.setattr("molf.study.run.record.source_commit", lambda: next(commits))
    watched = "molf.study.run.training_data.tokenize_examples"
    monkeypatch.setattr(watched, lambda *given: calls.append(next(commits)) or tokens(*given))
    monkeypatch.setattr("trl.trainer.sft_trainer._tokenize", lambda *given, **more: pytest.fail("tokenised again"))
    assert carry_out(settings, eval_limit=1).commit == "before"
    assert calls == ["changed during the run"]


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


@pytest.mark.parametrize("method", ["molf", "adalora"])
def test_same_seed_same_result(method, finished, settings):
    first = finished(method=method).result
    again = carry_out(settings, method=method)
    other = carry_out(settings, method=method, overwrite=True, seed=7, eval_limit=1)
    assert first.metrics == again.metrics
    assert first.training.loss == again.training.loss != other.training.loss
