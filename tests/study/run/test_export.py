import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from molf.errors import MolfError
from molf.study.config.run_config import ModelConfig, RunConfig
from molf.study.results.result import write_result
from molf.study.run.export import adapter_folders, export_run, load_experts
from molf.study.run.models import load_model_and_tokenizer
from molf.study.run.train import run as evaluate
from small_runs import small_result


@pytest.fixture
def run(saved_model, tmp_path):
    """The folder of an unfinished run with two experts."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(saved_model),
        LoraConfig(r=2, target_modules="all-linear", use_rslora=True, init_lora_weights=False),
        adapter_name="lora_r2",
    )
    config = LoraConfig(r=6, target_modules="all-linear", use_rslora=True, init_lora_weights=False)
    model.add_adapter("lora_r6", config)
    model.base_model.set_adapter(["lora_r2", "lora_r6"])
    model.save_pretrained(tmp_path / "run/adapters")
    return tmp_path / "run"


def finish(run, saved_model, trainable=0, **settings):
    """Write the run's result."""
    settings |= {"model_name_or_path": saved_model, "output_dir": str(run)}
    config = RunConfig.from_dict(settings).resolved()
    training = replace(small_result().training, trainable_parameters=trainable)
    write_result(run, small_result(config=config.to_dict(), training=training, metrics_before=None))


def logits(model):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        return model.eval()(ids).logits


def test_both_exports_compute_what_the_experts_do(run, saved_model):
    expected = logits(load_experts(adapter_folders(run), saved_model)[0])
    adapter, merged = export_run(run, "peft"), export_run(run, "merged")
    assert adapter[0] == "One PEFT LoRA of rank 8 and scale 1." and adapter[-1] == f"written to {run / 'export-peft'}"
    assert "cast to float32; the cast changed no weight by more than 0." in merged[0]
    base = AutoModelForCausalLM.from_pretrained(saved_model)
    assert (logits(base) - expected).abs().max() > 0.1
    loaded = PeftModel.from_pretrained(base, run / "export-peft")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(run / "export-merged")
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-5)
    for folder in (run / "export-peft", run / "export-merged"):
        assert AutoTokenizer.from_pretrained(folder)("capital") == AutoTokenizer.from_pretrained(saved_model)("capital")


def test_the_cards(run, saved_model, tmp_path):
    unfinished = export_run(run, "peft", tmp_path / "a")
    assert f"Trained from the model {saved_model}." in (tmp_path / "a/README.md").read_text()
    assert "--max-lora-rank 8" in unfinished[1]
    finish(run, saved_model)
    export_run(run, "peft", tmp_path / "b")
    card = (tmp_path / "b/README.md").read_text()
    assert (
        "library_name: peft" in card
        and "| score |  | 50.00 (40.00, 60.50) | 12 |" in card
        and "rank 8 and scale 1" in card
    )
    half = export_run(run, "merged", tmp_path / "c", "bfloat16")
    assert "cast to bfloat16" in half[0] and "by more than 0." in half[0] and "than 0.\n" not in half[0]
    card = (tmp_path / "c/README.md").read_text()
    assert "library_name: transformers" in card and "cast to bfloat16" in card


def test_the_tokenizer_and_the_rights_are_those_of_the_run(run, saved_model, monkeypatch):
    finish(run, saved_model, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(run)
    trusted = []

    def load(config, trust):
        trusted.append(trust)
        return load_model_and_tokenizer(config)

    monkeypatch.setattr("molf.study.run.export.load_model_and_tokenizer", load)
    for kind in ("peft", "merged"):
        export_run(run, kind)
        assert AutoTokenizer.from_pretrained(run / f"export-{kind}").chat_template == tokenizer.chat_template
    assert trusted == [True, True]


def test_a_run_that_trained_more_than_its_experts(run, saved_model):
    finish(run, saved_model, trainable=96)
    with pytest.raises(ValueError, match="trained 96 parameters of the base model .*; use .* itself"):
        export_run(run, "peft")


def test_a_run_without_experts(saved_model, tmp_path):
    with pytest.raises(ValueError, match="a plain checkpoint, which needs no export"):
        export_run(Path(saved_model), "peft")
    with pytest.raises(ValueError, match="Give the folder of a run with --method molf_e"):
        export_run(tmp_path / "nothing", "merged")


def test_an_adapter_has_no_type_to_choose(run):
    with pytest.raises(ValueError, match="dtype=bfloat16 is for merged weights, .*: leave it out, or export to merged"):
        export_run(run, "peft", dtype="bfloat16")


def test_a_failed_export_leaves_nothing(run):
    taken = run / "adapters"
    with pytest.raises(ValueError, match="not empty"):
        export_run(run, "merged", taken)
    assert not list(run.glob(".*"))


def test_an_exported_adapter_is_evaluated_like_the_experts(run, saved_model, tmp_path):
    """``molf eval --model_name_or_path`` takes its folder; so does a run that trains on."""
    export_run(run, "peft")
    export_run(run, "merged")
    model, _ = load_model_and_tokenizer(ModelConfig(model_name_or_path=str(run / "export-peft")))
    expected = logits(load_experts(adapter_folders(run), saved_model)[0])
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-5)
    results = [
        evaluate(
            RunConfig.from_dict(
                {
                    "model_name_or_path": str(run / f"export-{kind}"),
                    "sample": True,
                    "limit": 4,
                    "only_eval": True,
                    "output_dir": str(tmp_path / kind),
                }
            )
        )
        for kind in ("peft", "merged")
    ]
    assert {name: metric.value for name, metric in results[0].metrics.items()} == pytest.approx(
        {name: metric.value for name, metric in results[1].metrics.items()}, abs=1e-5
    )


def test_an_adapter_without_a_base(run):
    export_run(run, "peft")
    file = run / "export-peft" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(MolfError, match="is an adapter, and its adapter_config.json does not name its base model"):
        load_model_and_tokenizer(ModelConfig(model_name_or_path=str(run / "export-peft")))
