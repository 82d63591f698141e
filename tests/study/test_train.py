import csv
import gzip
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from molf.study.config import RunConfig
from molf.study.evaluate import evaluate
from molf.study.results import read_result
from molf.study.routing import ROUTING_FILE, read_routing
from molf.study.train import run
from molf.tasks import get_task

# PEFT asks transformers by a name that the present version renamed.

FILES = {
    "README.md",
    "config.json",
    "config.yaml",
    "generation_config.json",
    "model.safetensors",
    "predictions.jsonl.gz",
    "result.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def settings(saved_model, tmp_path, monkeypatch):
    """Settings of a run of four steps on six facts, which takes a fraction of a second."""
    monkeypatch.delenv("LOG_FILE", raising=False)
    return {
        "model_name_or_path": saved_model,
        "sample": True,
        "limit": 8,
        "ranks": [2, 4],
        "lora_rank": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "run"),
    }


def carry_out(settings, **changes):
    return run(RunConfig.from_dict(settings | changes))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["molf", "fft", "lora"])
def test_a_run_leaves_a_plain_checkpoint_and_its_record(method, tied, settings, tiny_model, tmp_path):
    tiny_model.config.tie_word_embeddings = tied
    source = LlamaForCausalLM(tiny_model.config)
    source.save_pretrained(settings["model_name_or_path"])
    result = carry_out(settings, method=method, eval_before=True)
    folder = Path(settings["output_dir"])

    extra = {ROUTING_FILE, "routing.png"} if method == "molf" else set()
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
    assert evaluate(source, tokenizer, get_task("fact"), rows).metrics == result.metrics_before

    assert read_result(folder) == result
    assert RunConfig.from_dict(yaml.safe_load((folder / "config.yaml").read_text())).to_dict() == result.config
    assert len(gzip.decompress((folder / "predictions.jsonl.gz").read_bytes()).splitlines()) == 8
    assert (result.training.steps, result.training.loss > 0, result.training.tokens > 0) == (4, True, True)


def test_what_each_method_trains(settings, tmp_path):
    changed, results = {}, {}
    start = weights(settings["model_name_or_path"])
    for method in ("fft", "molf", "lora"):
        results[method] = carry_out(settings, method=method, output_dir=str(tmp_path / method))
        end = weights(tmp_path / method)
        changed[method] = {name for name in start if not torch.equal(start[name], end[name])}
    linear = {name for name in start if "proj" in name}
    assert changed["lora"] == linear
    assert changed["fft"] == set(start)
    assert set(start) - linear <= changed["molf"]
    total = sum(tensor.numel() for tensor in start.values())
    pairs = sum(sum(start[name].shape) for name in linear)
    sizes = {
        method: (result.training.trainable_parameters, result.training.lora_parameters)
        for method, result in results.items()
    }
    assert sizes == {"fft": (total, 0), "molf": (total, 6 * pairs), "lora": (0, 4 * pairs)}
    assert {result.training.parameters for result in results.values()} == {total}


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


@pytest.mark.parametrize("method", ["molf", "fft", "lora"])
def test_resumed_equals_uninterrupted(method, settings, tmp_path):
    carry_out(settings, method=method, save_strategy="steps", save_steps=2)
    folder = Path(settings["output_dir"])
    whole, routing = weights(folder), (folder / ROUTING_FILE).read_text() if method == "molf" else ""
    for name in ("result.json", "model.safetensors"):
        (folder / name).unlink()
    result = carry_out(settings, method=method, resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert result.training.steps == 4
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, whole[name]), name
    if method == "molf":
        assert (folder / ROUTING_FILE).read_text() == routing


def test_a_finished_run_is_not_overwritten_silently(settings):
    carry_out(settings, save_strategy="epoch")
    folder = Path(settings["output_dir"])
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"holds a finished run; pass --overwrite"):
        carry_out(settings)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    carry_out(settings, method="fft", overwrite=True)
    assert {path.name for path in folder.iterdir()} == FILES, "neither checkpoints nor routing of the replaced run"


def test_checkpoints_of_an_unfinished_run_are_not_lost_silently(settings):
    carry_out(settings, save_strategy="epoch")
    folder = Path(settings["output_dir"])
    (folder / "result.json").unlink()
    with pytest.raises(ValueError, match="holds checkpoints of an unfinished run; pass --overwrite"):
        carry_out(settings)
    assert len(list(folder.glob("checkpoint-*"))) == 2
    assert carry_out(settings, resume_from_checkpoint="True").training.steps == 4


def test_the_model_to_be_trained_is_not_written_over(settings):
    with pytest.raises(ValueError, match="is the folder of the model to be trained"):
        carry_out(settings, output_dir=settings["model_name_or_path"], overwrite=True)


def test_a_run_that_fails_is_not_finished(settings, monkeypatch):
    carry_out(settings)
    monkeypatch.setattr("molf.study.train.save_checkpoint", lambda *given: 1 / 0)
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


def test_mistakes_stop_a_run_before_it_writes(settings):
    mistakes = (
        ({"task": "facts"}, "did you mean 'fact'"),
        ({"learning_rte": 1.0}, "did you mean 'learning_rate'"),
        ({"lora_dropout": 0.1}, "not available yet"),
        ({"model_name_or_path": "/no/such/folder"}, "does not exist"),
    )
    for change, message in mistakes:
        with pytest.raises(ValueError, match=message):
            carry_out(settings, **change)
    assert not Path(settings["output_dir"]).exists()


def test_same_seed_same_result(settings, tmp_path):
    first = carry_out(settings)
    again = carry_out(settings, overwrite=True)
    other = carry_out(settings, overwrite=True, seed=7)
    assert first.metrics == again.metrics
    assert first.training.loss == again.training.loss != other.training.loss


def test_predictions_say_what_was_asked(settings):
    carry_out(settings, only_eval=True, eval_limit=1)
    content = gzip.decompress((Path(settings["output_dir"]) / "predictions.jsonl.gz").read_bytes())
    (prediction,) = map(json.loads, content.splitlines())
    assert prediction["answers"][0]["prompt"]
