"""The product on a real pretrained model: SmolLM2-135M learns real CounterFact edits with MoLF."""

import pytest
from transformers import AutoModelForCausalLM

from molf.study.config.run_config import RunConfig
from molf.study.run.train import run


@pytest.mark.pretrained
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_smollm2_learns_facts(tmp_path):
    settings = {
        "model_name_or_path": "bundled:smollm2-135m",
        "task": "fact",
        "sample": True,
        "limit": 16,
        "method": "molf",
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 6,
        "gradient_checkpointing": False,
        "eval_before": True,
        "retention": False,  # a minute
        "disable_tqdm": True,
        "output_dir": str(tmp_path),
    }
    result = run(RunConfig.from_dict(settings))
    before, after = result.metrics_before["efficacy_score"], result.metrics["efficacy_score"]
    assert before.n == after.n == 16
    assert before.value < 50 and after.value >= 95
    assert 0 < result.routing["fft"] < 1, "both experts win somewhere"
    assert (tmp_path / "routing.png").stat().st_size > 10_000
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
