import json
import math
import random
from collections import Counter

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from molf.study.engine.evaluate import evaluate
from molf.tasks import Generate, NextToken, OptionScores
from molf.tasks.med import Med, count_from_zero, question_prompt, written_letter

MED = Med()


def make_row(cop=0, subject=None, question="Which bone is the longest?", **changes):
    options = {"opa": "Femur", "opb": "Tibia", "opc": "Ulna", "opd": "Radius"}
    return {"id": "x", "question": question, **options, "cop": cop, "subject_name": subject, **changes}


def answers(chosen, text):
    """The answers of a model that finds one letter the most likely, and writes a text."""
    logprobs = [math.log(0.1)] * 4
    logprobs["ABCD".index(chosen)] = math.log(0.3)
    return [OptionScores(tuple(logprobs), (1, 2, 3, 4)), text]


def write(path, *cops):
    path.write_text("".join(json.dumps(make_row(cop)) + "\n" for cop in cops))
    return str(path)


@pytest.fixture(scope="module")
def sample():
    return MED.load(sample=True)


# --- rows ---


def test_the_packaged_slices(sample):
    assert (len(sample.train), len(sample.eval)) == (1828, 500)
    assert Counter(row["cop"] for row in sample.eval) == {0: 143, 1: 119, 2: 136, 3: 102}
    assert len({row["id"] for row in sample.eval}) == 500
    assert len({row["subject_name"] for row in sample.eval}) == 20
    asked = {question_prompt(row) for row in sample.train}
    assert len(asked) == 1828
    assert not asked & {question_prompt(row) for row in sample.eval}
    assert not {row["question"] for row in sample.train} & {row["question"] for row in sample.eval}


def test_a_folder_of_the_users_in_either_counting(tmp_path):
    write(tmp_path / "train.jsonl", 0, 1, 2, 3)
    write(tmp_path / "dev.jsonl", 1, 2, 2, 4)  # as the authors count
    split = MED.load(str(tmp_path), limit=3)
    assert [row["cop"] for row in split.train] == [0, 1, 2]
    assert [row["cop"] for row in split.eval] == [0, 1, 1]  # though none of these three is a 4


@pytest.mark.parametrize(
    "cops, message",
    [
        ((0, 4), "dev.jsonl: cop is 0 in some rows and 4 in others"),
        ((1, 3), "dev.jsonl: cop is 1, 3 in all rows, so it may count from 0 or from 1"),
        ((0, 5), "dev.jsonl, line 2: cop=5 names no option"),
        ((0, -1), "dev.jsonl, line 2: cop=-1 names no option; .* test split has no answers"),
    ],
)
def test_unclear_or_missing_answers_are_refused(tmp_path, cops, message):
    with pytest.raises(ValueError, match=message):
        MED.load(write(tmp_path / "dev.jsonl", *cops))


def test_rows_that_already_count_from_zero_stay():
    rows = [make_row(0), make_row(2)]
    assert count_from_zero(rows) is rows


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": " "}, "line 1: the question is empty"),
        ({"opc": None}, "line 1: field 'opc' must be a string, found null"),
        ({"cop": "A"}, "line 1: field 'cop' must be an integer, found a string"),
    ],
)
def test_bad_records_are_named(tmp_path, change, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({**make_row(), **change}))
    with pytest.raises(ValueError, match=message):
        MED.load(str(tmp_path / "a.jsonl"))


# --- training and asking ---


def test_the_prompt_of_evaluation_is_that_of_training():
    row = make_row(2, question=" Which bone is short? ")
    prompt = "Question: Which bone is short?\nA. Femur\nB. Tibia\nC. Ulna\nD. Radius\nAnswer:"
    assert MED.example(row) == {"prompt": prompt, "completion": " C"}
    assert MED.requests(row) == [NextToken(prompt, (" A", " B", " C", " D")), Generate(prompt, 4)]


# --- scoring ---


@pytest.mark.parametrize(
    "text, letter",
    [
        (" A", "A"), ("D", "D"), (" B)", "B"), (" C. Ulna", "C"), ("\nA\nQuestion", "A"), (" A ", "A"), (" Aorta", None),
        (" A nerve", None), (" A,", None), (" E", None), (" a", None), (" (A)", None), ("The answer is A", None), ("", None),
    ],
)  # fmt: skip
def test_only_a_letter_by_itself_counts(text, letter):
    assert written_letter(text) == letter


def test_metrics_worked_out_by_hand():
    rows = [make_row(0, "Anatomy"), make_row(1, "Anatomy"), make_row(2, "Surgery"), make_row(3)]
    given = [answers("A", " A"), answers("C", " B."), answers("C", " Ulna"), answers("D", " A\n")]
    metrics = MED.score(rows, given)
    assert {name: (metric.value, metric.n) for name, metric in metrics.items()} == {
        "accuracy": (75, 4),
        "accuracy_generated": (50, 4),
        "invalid_answers": (25, 4),
        "accuracy/Anatomy": (50, 2),
        "accuracy/Surgery": (100, 1),
    }
    assert all(metric.low <= metric.value <= metric.high for metric in metrics.values())
    assert MED.outcomes(rows, given)[2] == {"accuracy": True, "right": "C", "chosen": "C", "written": None}
    assert MED.score([], []) == {}
    assert {name.partition("/")[0] for name in metrics} == MED.metrics.keys()


def test_gold_as_prediction_is_always_right(sample):
    given = [answers("ABCD"[row["cop"]], MED.example(row)["completion"]) for row in sample.eval]
    metrics = MED.score(sample.eval, given)
    assert {metric.value for name, metric in metrics.items() if name != "invalid_answers"} == {100}
    assert metrics["invalid_answers"].value == 0
    assert sum(metric.n for name, metric in metrics.items() if "/" in name) == 500


def test_shuffled_labels_are_at_chance(sample):
    letters = ["ABCD"[row["cop"]] for row in sample.eval]
    random.Random(0).shuffle(letters)
    metrics = MED.score(sample.eval, [answers(letter, f" {letter}") for letter in letters])
    assert metrics["accuracy"] == metrics["accuracy_generated"]
    assert metrics["accuracy"].low < 25 < metrics["accuracy"].high


# --- with a model ---


@pytest.fixture
def model_and_tokenizer(tiny_checkpoint):
    """A tiny random model, and its tokenizer with a token for each letter."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.add_tokens([f" {letter}" for letter in "ABCD"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.get_output_embeddings().weight.data.normal_()
    return model.eval(), tokenizer


def test_the_engine_reads_letters_at_the_very_tokens_of_training(model_and_tokenizer, sample, tmp_path):
    model, tokenizer = model_and_tokenizer
    rows = sorted(sample.eval, key=lambda row: len(question_prompt(row)))[:6]
    examples = Dataset.from_list([MED.example(row) for row in rows])
    args = SFTConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True, dataloader_pin_memory=False)
    trained = SFTTrainer(model, args, train_dataset=examples, processing_class=tokenizer).train_dataset
    wanted = []
    for example in trained:
        *prompt, letter, end = example["input_ids"]
        assert [label != -100 for label in example["labels"]] == [False] * len(prompt) + [True, True]
        assert tokenizer.decode(letter) in (" A", " B", " C", " D") and end == tokenizer.eos_token_id
        logits = model(torch.tensor([prompt])).logits[0, -1]
        letters = tokenizer.convert_tokens_to_ids([f" {letter}" for letter in "ABCD"])
        wanted.append(logits.log_softmax(-1)[letters].tolist())
    found = [prediction["answers"][0]["logprobs"] for prediction in evaluate(model, tokenizer, MED, rows).predictions]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-4)
