"""vLLM itself needs a GPU: a stand-in with its interface answers with the saved model, and refuses what vLLM would."""

import importlib.machinery
import sys
import types
from dataclasses import dataclass, field

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molf.errors import MolfError
from molf.study.engine.evaluate import evaluate
from molf.study.engine.generation import end_tokens
from molf.study.engine.inference import answer
from molf.study.engine.vllm_generation import VllmGenerator
from molf.study.run.train import run
from molf.tasks import Generate, Likelihood
from molf.tasks.fact import Fact
from oracles import PROMPT, continue_alone
from small_runs import small_config


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    skip_special_tokens: bool = True


class LLM:
    made: list = []

    def __init__(self, model, dtype, generation_config):
        assert dtype == "float32" and generation_config == "vllm"
        self.source = model
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.made.append(self)

    def generate(self, prompts, sampling_params, use_tqdm):
        return [self._one(prompt["prompt_token_ids"], s) for prompt, s in zip(prompts, sampling_params, strict=True)]

    @torch.no_grad()
    def _one(self, ids, settings):
        assert settings.temperature == 0.0
        new_ids, text = [], ""
        while len(new_ids) < settings.max_tokens and not any(stop in text for stop in settings.stop):
            token = int(self.model(torch.tensor([ids + new_ids])).logits[0, -1].argmax())
            if token in settings.stop_token_ids:
                break
            new_ids.append(token)
            text = self.tokenizer.decode(new_ids, skip_special_tokens=settings.skip_special_tokens)
        for stop in settings.stop:
            text = text.split(stop)[0]
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)])


@pytest.fixture
def saved_model(saved_model, tiny_model):
    """A folder with the very model."""
    tiny_model.save_pretrained(saved_model)
    return saved_model


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in, and how often it was asked for a model."""
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(LLM, "made", [])
    return LLM


def test_answers_equal_those_of_transformers(vllm, tiny_model, tiny_tokenizer, saved_model):
    generate = VllmGenerator(saved_model, tiny_tokenizer, end_tokens(tiny_model, tiny_tokenizer), "float32")
    free = continue_alone(tiny_model, tiny_tokenizer, Generate(PROMPT, 10))
    generations = [Generate(PROMPT, 10, (free[4],)), Generate(PROMPT, 6), Generate("SELECT", 4)]
    requests = [*generations, Likelihood(PROMPT, " Rome")]
    plain = answer(tiny_model, tiny_tokenizer, requests)
    assert answer(tiny_model, tiny_tokenizer, requests, generate=generate) == plain
    assert len(vllm.made) == 1


def test_metrics_equal_those_of_transformers(vllm, tiny_model, tiny_tokenizer, saved_model):
    rows = Fact().load(sample=True, limit=3).eval
    generate = VllmGenerator(saved_model, tiny_tokenizer, end_tokens(tiny_model, tiny_tokenizer), "float32")
    plain = evaluate(tiny_model, tiny_tokenizer, Fact(), rows)
    assert evaluate(tiny_model, tiny_tokenizer, Fact(), rows, generate=generate) == plain


def test_nothing_to_generate_loads_no_model(vllm, tiny_model, tiny_tokenizer, saved_model):
    generate = VllmGenerator(saved_model, tiny_tokenizer, [1], "float32")
    answer(tiny_model, tiny_tokenizer, [Likelihood(PROMPT, " Rome")], generate=generate)
    assert vllm.made == []


def test_an_empty_prompt_is_refused_before_a_model_is_loaded(vllm, tiny_tokenizer, saved_model):
    with pytest.raises(ValueError, match="the prompt is empty"):
        VllmGenerator(saved_model, tiny_tokenizer, [1], "float32")([Generate("", 3)])
    assert vllm.made == []


def evaluation(model, folder, **more):
    settings = {"task": "fact", "sample": True, "limit": 2, "only_eval": True, "disable_tqdm": True, "use_cpu": True}
    settings |= {"bf16": False, "generation_backend": "vllm", "model_name_or_path": model, "output_dir": str(folder)}
    return run(small_config(settings | more))


def test_a_run_generates_with_the_saved_model(vllm, saved_model, tmp_path):
    found = evaluation(saved_model, tmp_path / "one")
    plain = evaluation(saved_model, tmp_path / "other", generation_backend="transformers")
    assert found.metrics == plain.metrics
    assert [llm.source for llm in vllm.made] == [saved_model]
    assert found.config["generation_backend"] == "vllm"


@pytest.mark.parametrize("only_eval", [True, False])
def test_a_run_without_vllm_ends_at_once(saved_model, tmp_path, only_eval, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MolfError, match=r"pip install 'molf\[vllm\]'"):
        evaluation(saved_model, tmp_path / "run", only_eval=only_eval)
    assert not (tmp_path / "run").exists()
