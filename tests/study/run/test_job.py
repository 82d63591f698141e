import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from molf.errors import MolfError
from molf.study.config.run_config import RunConfig
from molf.study.methods.recipe import Recipe
from molf.study.run.job import load_job, make_trainer

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '</s>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def settings(saved_model, tmp_path, **more):
    return {"model_name_or_path": saved_model, "output_dir": str(tmp_path / "run"), "method": "fft", **more}


def job(*arguments, **more):
    return load_job(RunConfig.from_dict(settings(*arguments, **more)).resolved())


def test_limits_of_rows(saved_model, tmp_path):
    few = job(saved_model, tmp_path, task="med", sample=True, limit=6, eval_limit=4)
    assert (len(few.split.train), len(few.split.eval), len(few.eval_rows)) == (6, 6, 4)
    assert few.eval_rows == few.split.eval[:4]
    assert len(job(saved_model, tmp_path, task="med", sample=True, limit=3, eval_limit=4).eval_rows) == 3
    assert len(job(saved_model, tmp_path, task="med", sample=True, limit=6, selection_limit=2).eval_rows) == 2


def test_few_shot_examples_stand_before_every_prompt(saved_model, tmp_path):
    shown = job(saved_model, tmp_path, task="med", sample=True, limit=6, few_shot=2)
    assert len(shown.split.train) == 4
    starts = {example["prompt"].rsplit("Question:", 1)[0] for example in shown.examples}
    (start,) = starts
    assert start.count("Answer: ") == 2
    assert all(request.prompt.startswith(start) for request in shown.task.requests(shown.eval_rows[0]))
    with pytest.raises(ValueError, match="few_shot=-1 must not be negative"):
        RunConfig.from_dict({"few_shot": -1})


@pytest.fixture
def conversations(tmp_path):
    says = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "the king"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": says}) + "\n") * 4)
    return str(tmp_path / "rows.jsonl")


def test_of_a_conversation_only_what_the_assistant_says_is_learned(saved_model, tmp_path, conversations):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    told = {"task": "custom", "data_path": conversations, "chat_template_path": str(tmp_path / "chat.jinja")}
    loaded = job(saved_model, tmp_path, **told, eval_fraction=0.5)
    assert (len(loaded.split.train), len(loaded.split.eval)) == (2, 2)
    row = make_trainer(loaded, Recipe(train={})).train_dataset[0]
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert loaded.tokenizer.decode(row["input_ids"]) == "<user>Who?<assistant>the king</s>"
    assert loaded.tokenizer.decode(learned) == "the king</s>"


def test_a_template_of_another_tokenizer_adds_no_token(saved_model, tmp_path, conversations):
    other = AutoTokenizer.from_pretrained(saved_model)
    other.chat_template = TEMPLATE
    other.add_tokens(["<of_another>"])
    other.save_pretrained(tmp_path / "other")
    told = {"task": "custom", "data_path": conversations, "chat_template_path": str(tmp_path / "other")}
    loaded = job(saved_model, tmp_path, **told)
    tokens, weights = len(loaded.tokenizer), loaded.model.get_input_embeddings().weight.shape
    trainer = make_trainer(loaded, Recipe(train={}))
    assert loaded.tokenizer.decode(trainer.train_dataset[0]["input_ids"]) == "<user>Who?<assistant>the king</s>"
    assert (len(loaded.tokenizer), loaded.model.get_input_embeddings().weight.shape) == (tokens, weights)


def test_another_end_token_ends_the_rows_of_training_and_of_evaluation(saved_model, tmp_path):
    loaded = job(saved_model, tmp_path, sample=True, limit=2, eos_token="<s>")
    rows = make_trainer(loaded, Recipe(train={})).train_dataset
    assert [loaded.tokenizer.decode(row["input_ids"][-1]) for row in rows] == ["<s>", "<s>"]
    evaluated = job(saved_model, tmp_path, sample=True, limit=2, eos_token="<s>", only_eval=True)
    assert evaluated.tokenizer.eos_token == "<s>"
    with pytest.raises(MolfError, match="eos_token='<none>' is no token of the tokenizer; give one that it has"):
        job(saved_model, tmp_path, sample=True, eos_token="<none>")


def test_conversations_need_a_chat_template(saved_model, tmp_path, conversations):
    bare = job(saved_model, tmp_path, task="custom", data_path=conversations)
    with pytest.raises(ValueError, match="no chat template; pass one with --chat_template_path"):
        make_trainer(bare, Recipe(train={}))
    with pytest.raises(OSError, match="chat_template_path=missing.jinja is neither a Jinja template nor a tokenizer"):
        job(saved_model, tmp_path, task="custom", data_path=conversations, chat_template_path="missing.jinja")


@pytest.mark.parametrize("name, value", [("eval_path", "x.jsonl"), ("eval_fraction", 0.5), ("train_split", "x")])
def test_benchmarks_say_themselves_what_they_are_evaluated_on(saved_model, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}={value} is for the task custom; the task fact has its own"):
        job(saved_model, tmp_path, sample=True, **{name: value})


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_quantised_model_is_refused_before_its_training(saved_model, tmp_path, bits):
    quantised = AutoModelForCausalLM.from_pretrained(
        saved_model, quantization_config=BitsAndBytesConfig(**bits), device_map="cpu"
    )
    quantised.save_pretrained(saved_model)
    for method in ("molf_e", "lora", "fft"):
        with pytest.raises(
            MolfError, match=r"quantised \(bitsandbytes\), but .* unquantised weights, or .* own script"
        ):
            job(saved_model, tmp_path, sample=True, method=method)
    assert job(saved_model, tmp_path, sample=True, only_eval=True).model.is_quantized


def test_a_model_without_gradient_checkpointing_says_what_to_do(saved_model, tmp_path, monkeypatch):
    loaded = job(saved_model, tmp_path, task="fact", sample=True, limit=2)
    monkeypatch.setattr(type(loaded.model), "supports_gradient_checkpointing", False)
    with pytest.raises(MolfError, match=r"LlamaForCausalLM does not support.*--gradient_checkpointing False"):
        make_trainer(loaded, Recipe(train={}))
    assert make_trainer(loaded, Recipe(train={"gradient_checkpointing": False})).train_dataset
