"""The evaluation harness that everybody uses scores what a run leaves, and agrees with our own numbers."""

import gzip
import json
from statistics import fmean

import pytest
import yaml

from molf.study.run.export import export_run

TASK = {
    "task": "edits",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{targets}}",
    "doc_to_target": 0,
    "target_delimiter": "",  # targets begin with their own space
    "metric_list": [{"metric": "acc"}],
}


def write_task(folder, pairs):
    """Write a task for lm_eval: choose between the two targets of every edit; the first is right."""
    docs = [{"prompt": pair[0]["prompt"], "targets": [scores["target"] for scores in pair]} for pair in pairs]
    folder.mkdir()
    (folder / "edits.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    files = {"data_files": {"test": str(folder / "edits.jsonl")}, "cache_dir": str(folder / "cache")}
    (folder / "edits.yaml").write_text(yaml.safe_dump(TASK | {"dataset_kwargs": files}))


def score(folder, **model_args):
    """Return lm_eval's accuracy, and what it answered about every prompt: log-probability and greedy flag per target."""
    import lm_eval  # takes seconds

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"dtype": "float32", **model_args},
        tasks=["edits"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    answers = {sample["doc"]["prompt"]: sample["filtered_resps"] for sample in found["samples"]["edits"]}
    return found["results"]["edits"]["acc,none"], answers


def test_lm_eval_agrees_with_our_evaluation(finished, shared_model, tmp_path):
    result, folder = vars(finished(method="molf_e")).values()
    with gzip.open(folder / "predictions.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line)["answers"][:2] for line in file]  # the edit's own prompt, new and true target
    write_task(tmp_path / "task", pairs)
    export_run(folder, "peft", tmp_path / "adapter")
    for model_args in ({"pretrained": str(folder)}, {"pretrained": shared_model, "peft": str(tmp_path / "adapter")}):
        accuracy, answers = score(tmp_path / "task", **model_args)
        wins, mean_wins = [], []
        for pair in pairs:
            ours = [sum(scores["logprobs"]) for scores in pair]
            theirs, greedy = zip(*answers[pair[0]["prompt"]], strict=True)
            assert [float(total) for total in theirs] == pytest.approx(ours, abs=1e-3)
            assert list(greedy) == [all(scores["greedy"]) for scores in pair]
            wins.append(ours[0] > ours[1])
            new, true = (float(t) / len(scores["logprobs"]) for t, scores in zip(theirs, pair, strict=True))
            mean_wins.append(new > true)
        assert accuracy == fmean(wins)
        assert 100 * fmean(mean_wins) == result.metrics["efficacy_score"].value
    assert 0 < accuracy < 1
