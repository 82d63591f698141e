import pytest

from molf.study.config.run_config import RunConfig
from molf.study.methods.recipe import Recipe
from molf.study.run.dry_run import contradictions, make_plan, seen_in_training
from molf.study.run.job import load_job, make_trainer
from molf.study.sizing.parameters import Count, base_count
from molf.tasks import Split
from small_runs import small_config, weights


def test_a_plan_writes_nothing(settings, tmp_path):
    plan = make_plan(small_config(settings))
    assert not (tmp_path / "run").exists()
    assert plan.rows == (8, 8)
    assert plan.config["output_dir"] == settings["output_dir"]


def test_the_loss_is_on_the_completion_only(settings):
    config = small_config(settings)
    job = load_job(config)
    example = job.task.example(job.split.train[0])
    (prompt, in_prompt), (completion, in_completion) = make_plan(config).example
    assert (prompt, in_prompt) == (example["prompt"], False)
    assert (completion, in_completion) == (example["completion"] + "</s>", True)


@pytest.mark.parametrize(("method", "lora"), [("fft", 0), ("molf", 6), ("lora", 4)])
def test_its_needs_are_those_of_the_plan(method, lora, settings, shared_model):
    tensors = weights(shared_model)
    total = sum(tensor.numel() for tensor in tensors.values())
    pairs = sum(sum(tensor.shape) for name, tensor in tensors.items() if "proj" in name)
    needs = make_plan(small_config(settings | {"method": method})).needs
    assert base_count(needs.parameters) == Count(total, 0 if method == "lora" else total)
    assert needs.parameters["LoRA"] == Count(lora * pairs, lora * pairs)
    assert needs.memory.weights == 4 * total


@pytest.mark.parametrize(
    ("method", "dtype", "told"),
    [("fft", "bfloat16", True), ("molf", "bfloat16", False), ("lora", "bfloat16", False), ("fft", "float32", False)],
)
def test_steps_that_rounding_loses_are_told(method, dtype, told, settings):
    warnings = make_plan(small_config(settings | {"method": method, "dtype": dtype})).warnings
    assert any("--dtype float32" in warning for warning in warnings) is told


def test_no_repository_is_created(settings, monkeypatch):
    monkeypatch.setattr("molf.study.config.trainer_config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *given, **more: pytest.fail("created"))
    make_plan(small_config(settings, push_to_hub=True, save_strategy="epoch"))


def test_contradictions():
    examples = [("a", "1"), ("a", "2"), ("b", "1"), ("b", "1"), ("c", "1"), ("c", "2"), ("c", "3")]
    assert contradictions([{"prompt": prompt, "completion": completion} for prompt, completion in examples]) == 2
    assert contradictions([]) == 0


def test_contradicting_and_truncated_rows_are_told(settings, monkeypatch):
    class Odd:
        name = "odd"
        headline = "score"

        def load(self, data_path, *, sample, limit, seed):
            rows = [{"p": "Same", "c": " one"}, {"p": "Same", "c": " two"}, {"p": "word " * 50, "c": " cut off"}]
            return Split(rows, rows[:1], "here")

        def example(self, row):
            return {"prompt": row["p"], "completion": row["c"]}

        def requests(self, row):
            return []

    monkeypatch.setattr("molf.study.run.job.get_task", lambda name: Odd())
    plan = make_plan(small_config(settings | {"max_length": 20}))
    contradicting, seen, cut = plan.warnings
    assert contradicting.startswith("1 prompts occur with different completions")
    assert seen == "1 evaluation rows are also training rows"
    assert cut.startswith("1 examples have no completion within max_length=20")
    assert make_plan(small_config(settings | {"max_length": None})).warnings == [contradicting, seen]


def test_rows_seen_in_training_are_told_unless_a_benchmark_wants_that():
    rows = [{"n": 1}, {"n": 2}]
    assert seen_in_training(Split(rows, [{"n": 2}, {"n": 3}], "here")) == 1
    assert seen_in_training(Split(rows, [{"n": 3}], "here")) == 0
    assert seen_in_training(Split(rows, list(rows), "here")) == 0


def test_no_rows_to_train_on(settings):
    job = load_job(RunConfig.from_dict(settings).resolved())
    object.__setattr__(job, "split", Split([], [], "an empty file"))
    with pytest.raises(ValueError, match="no training rows in an empty file"):
        make_trainer(job, Recipe(train={}))
