import gzip
import json
import random
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import molf.tasks
from molf.study.engine.evaluate import evaluate
from molf.tasks import Generate
from molf.tasks.sql import Sql, reference

SQL = Sql()
ROWS = (
    "CREATE TABLE pets (name TEXT, age INT); INSERT INTO pets VALUES ('Rex', 3), ('Tom', 5), ('Ann', 5), ('Tom', NULL);"
)


def make_row(sql, context=ROWS, question="Which pets?", **changes):
    return {"id": 1, "sql_prompt": question, "sql_context": context, "sql": sql, **changes}


def score(*pairs, **changes):
    """The metrics' values and counts for pairs of what was written and the reference."""
    metrics = SQL.score([make_row(right, **changes) for _, right in pairs], [[written] for written, _ in pairs])
    return {name: (metric.value, metric.n) for name, metric in metrics.items()}


@pytest.fixture(scope="module")
def sample():
    return SQL.load(sample=True)


@pytest.fixture(scope="module")
def published():
    """Records as published, with sql_complexity, with rows in many contexts."""
    path = Path(molf.tasks.__file__).parent / "data" / "synthetic_text_to_sql_sample.jsonl.gz"
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


# --- rows ---


def test_the_packaged_slices(sample):
    assert (len(sample.train), len(sample.eval)) == (2000, 500)
    asked = [{row["sql_prompt"] for row in rows} for rows in (sample.train, sample.eval)]
    assert [len(questions) for questions in asked] == [2000, 500]
    assert not asked[0] & asked[1]
    assert all(row["sql"].endswith(";") and ";" not in reference(row) for row in sample.train + sample.eval)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sql_prompt": " "}, "line 1: sql_prompt is empty"),
        ({"sql": " ;\n"}, "line 1: sql is empty"),
        ({"sql": None}, "line 1: field 'sql' must be a string, found null"),
    ],
)
def test_bad_records_are_named(tmp_path, changes, message):
    (tmp_path / "test.jsonl").write_text(json.dumps(make_row("SELECT 1") | changes))
    with pytest.raises(ValueError, match=message):
        SQL.load(str(tmp_path))


# --- training and asking ---


def test_the_prompt_of_evaluation_is_that_of_training():
    row = make_row("SELECT name\nFROM pets ;\n", context=" CREATE TABLE pets (name TEXT);\n", question=" Which? ")
    prompt = "Context:\nCREATE TABLE pets (name TEXT);\nQuestion: Which?\nSQL:"
    assert SQL.example(row) == {"prompt": prompt, "completion": " SELECT name\nFROM pets;"}
    assert SQL.requests(row) == [Generate(prompt, 256, (";",))]


def test_prompts_are_the_tokens_of_training(tiny_checkpoint, sample, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    args = SFTConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True, dataloader_pin_memory=False)
    examples = Dataset.from_list([SQL.example(row) for row in sample.eval[:5]])
    trained = SFTTrainer(model, args, train_dataset=examples, processing_class=tokenizer).train_dataset
    for row, example in zip(sample.eval, trained, strict=False):
        (asked,) = SQL.requests(row)
        prompt = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label == -100]
        assert prompt == tokenizer(asked.prompt)["input_ids"]


# --- scoring ---


def test_metrics_worked_out_by_hand():
    right = "SELECT name FROM pets WHERE age = 5"
    found = score(
        (" select name from PETS where age=5", right + ";"),  # the same text
        ("SELECT p.name AS n FROM pets AS p WHERE 5 = p.age", right),  # the same logic
        ("SELECT name FROM pets WHERE age > 4", right),  # the same result
        ("SELECT name FROM pets WHERE age = 3", right),  # another result
        ("SELECT title FROM pets", right),  # does not run
        ("", right),
        ("SELECT title FROM pets", "SELECT title FROM pets"),  # neither does the reference
        (right, "SELECT YEAR(age) FROM pets"),
    )
    assert found.keys() == SQL.metrics.keys() - {"execution_accuracy_filled"}
    assert found.pop("bleu")[1] == 8
    assert found == {
        "exact_match": (25, 8),
        "logic_match": (37.5, 8),
        "valid_sql": (pytest.approx(100 * 4 / 6), 6),
        "execution_accuracy": (50, 6),
        "unusable_gold": (2, 8),
    }
    assert SQL.score([], []) == {}


@pytest.mark.parametrize(
    "written, right, same",
    [
        ("SELECT name FROM pets ORDER BY age DESC, name", "SELECT name FROM pets", True),
        ("SELECT name FROM pets ORDER BY name", "SELECT name FROM pets ORDER BY name DESC", False),
        ("SELECT DISTINCT name FROM pets", "SELECT name FROM pets", False),  # Tom is there twice
        ("SELECT age, name FROM pets", "SELECT name, age FROM pets", False),
        ("SELECT SUM(age) / 3.0 FROM pets", "SELECT AVG(age) FROM pets", True),
        ("SELECT COUNT(*) FROM pets", "SELECT COUNT(age) FROM pets", False),  # a NULL
        ("SELECT age FROM pets WHERE name = 'Tom'", "SELECT age FROM pets WHERE name = 'Tom' ORDER BY age", False),
        ("SELECT age FROM pets WHERE age > 9", "SELECT name FROM pets WHERE age > 8", True),  # nothing
        ("UPDATE pets SET age = 4 WHERE age < 4", "UPDATE pets SET age = 4 WHERE name = 'Rex'", True),
        ("UPDATE pets SET age = 4", "UPDATE pets SET age = 4 WHERE name = 'Rex'", False),
        ("DELETE FROM pets", "DROP TABLE pets", False),
        ("SELECT name FROM pets WHERE name = 'x'", "DELETE FROM pets", False),
    ],
)
def test_results_are_compared_on_the_rows_of_the_context(written, right, same):
    assert score((written, right))["execution_accuracy"] == (100 * same, 1)


def test_contexts_without_rows_are_filled():
    context = "CREATE TABLE pets (name TEXT, age INT);"
    right = "SELECT name FROM pets WHERE age > 5"
    found = score((right, right), ("SELECT name FROM pets WHERE age >= 5", right), context=context)
    assert found["execution_accuracy_filled"] == (50, 2)
    assert "execution_accuracy" not in found


def test_exact_match_by_complexity():
    rows = [make_row("SELECT 1", sql_complexity=name) for name in ("subqueries", "basic SQL", "subqueries", None)]
    metrics = SQL.score(rows, [["SELECT 1"], ["SELECT 2"], ["SELECT 3"], ["SELECT 4"]])
    by_complexity = {name: (metric.value, metric.n) for name, metric in metrics.items() if "/" in name}
    assert by_complexity == {"exact_match/basic SQL": (0, 1), "exact_match/subqueries": (50, 2)}


def test_outcomes_tell_why():
    size, age = "SELECT size FROM pets", "SELECT age FROM pets"
    rows = [make_row("SELECT name FROM pets"), make_row(size), make_row(age)]
    outcomes = SQL.outcomes(rows, [[f"```sql\n{size};\n```"], [age], [age]])
    assert [outcome["sql"] for outcome in outcomes] == [size, age, age]
    assert outcomes[0]["error"] == "no such column: size" and outcomes[1]["unusable_gold"] == "no such column: size"
    assert outcomes[2] == {
        "sql": "SELECT age FROM pets", "exact_match": True, "logic_match": True, "valid_sql": True,
        "execution_accuracy": True,
    }  # fmt: skip


def test_metrics_and_outcomes_of_other_answers_are_computed_anew():
    row = make_row("SELECT 1")
    assert SQL.score([row], [["SELECT 1"]])["exact_match"].value == 100
    assert SQL.outcomes([row], [["SELECT 2"]])[0]["exact_match"] is False
    assert SQL.score([make_row("SELECT 2")], [["SELECT 2"]])["exact_match"].value == 100


def check_gold(rows, unusable):
    metrics = SQL.score(rows, [[SQL.example(row)["completion"]] for row in rows])
    assert metrics.pop("unusable_gold").value == unusable
    assert {round(metric.value, 9) for metric in metrics.values()} == {100}
    return {name: metric.n for name, metric in metrics.items()}


def test_gold_as_prediction_is_always_right(sample, published):
    counts = check_gold(sample.eval, unusable=9)
    assert counts == {
        "exact_match": 500, "logic_match": 500, "valid_sql": 491, "execution_accuracy_filled": 491, "bleu": 500,
    }  # fmt: skip
    counts = check_gold(published, unusable=7)
    assert (counts["execution_accuracy"], counts["execution_accuracy_filled"]) == (11, 7)
    assert counts["exact_match/basic SQL"] == 9


def test_shuffled_golds_are_at_chance(sample, published):
    for rows in (sample.eval[:100], published):
        golds = [[row["sql"]] for row in rows]
        random.Random(0).shuffle(golds)
        metrics = SQL.score(rows, golds)
        assert metrics["bleu"].value < 30
        names = {"exact_match", "logic_match", "valid_sql", "execution_accuracy_filled", "execution_accuracy"}
        assert all(metrics[name].value < 5 for name in names & metrics.keys())


def test_predictions_hold_the_outcomes(tiny_checkpoint, sample):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    predictions = evaluate(model, tokenizer, SQL, sample.eval[:4]).predictions
    assert len(predictions) == 4
    assert all({"sql", "exact_match", "valid_sql"} <= prediction["outcome"].keys() for prediction in predictions)
