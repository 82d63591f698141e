import csv
import json
import math

import datasets
import pytest

from molf.errors import MolfError
from molf.tasks import ExampleTokens, TargetScores
from molf.tasks.custom import Custom
from molf.tasks.records import located_splits

PAIRS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(20)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]}
    for n in range(4)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(data_path, limit=None, seed=0, **settings):
    return Custom(**settings).load(data_path, sample=False, limit=limit, seed=seed)


# --- where rows come from ---


def save_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


SAVE = {
    "a.jsonl": write,
    "a.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "a.csv": save_csv,
    "a.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
}


@pytest.mark.parametrize("name", SAVE)
def test_every_format_gives_the_same_rows(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    SAVE[name](tmp_path / name, PAIRS)
    split = load(str(tmp_path / name), eval_fraction=0.25)
    assert (len(split.train), len(split.eval)) == (15, 5)
    assert sorted(split.train + split.eval, key=PAIRS.index) == PAIRS


@pytest.mark.parametrize("name", ["a.parquet", "saved", "a.json"])
def test_conversations_survive_every_nested_format(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    SAVE[name](tmp_path / name, CHATS)
    split = load(str(tmp_path / name))
    assert sorted(split.train + split.eval, key=CHATS.index) == CHATS


def test_a_tenth_is_held_out_by_the_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIRS)
    splits = [load(path, seed=seed) for seed in (0, 0, 1, 2)]
    assert splits[0] == splits[1]
    assert len({json.dumps(split.eval) for split in splits}) > 1
    assert splits[0].origin == f"{path}, evaluation: 0.1 of it by seed 0"
    for split in splits:
        assert (len(split.train), len(split.eval)) == (18, 2)
        assert split.train == [row for row in PAIRS if row not in split.eval]
    assert load(path, limit=1).eval == splits[0].eval[:1]
    assert load(path, limit=3).train == splits[0].train[:3]


def test_a_file_to_evaluate_on(tmp_path):
    train, held = write(tmp_path / "a.jsonl", PAIRS[:5]), write(tmp_path / "b.jsonl", PAIRS[5:])
    split = load(train, eval_path=held, limit=3)
    assert (split.train, split.eval) == (PAIRS[:3], PAIRS[5:8])
    assert split.origin == f"{train}, evaluation: {held}"
    alone = load(None, eval_path=held)
    assert (alone.train, alone.eval, alone.origin) == ([], PAIRS[5:], f"evaluation: {held}")


def test_splits_of_a_folder(tmp_path):
    write(tmp_path / "train.jsonl", PAIRS[:9])
    write(tmp_path / "val.jsonl", PAIRS[9:12])
    write(tmp_path / "test.jsonl", PAIRS[12:])
    assert load(str(tmp_path)).eval == PAIRS[9:12]
    assert load(str(tmp_path), eval_path="test").eval == PAIRS[12:]
    assert load(str(tmp_path), eval_path="test").origin == f"{tmp_path}, evaluation: its test split"
    divided = load(str(tmp_path), eval_fraction=0.3)
    assert sorted(divided.train + divided.eval, key=PAIRS.index) == PAIRS[:9]
    assert load(None, eval_path=str(tmp_path)).eval == PAIRS[9:12]


def test_a_data_set_of_the_hub(monkeypatch):
    def hub_splits(name, advice):
        rows = {"train": PAIRS[:5], "test": PAIRS[5:8], "extra": PAIRS[8:]}
        return {split: [(split, row) for row in own] for split, own in rows.items()}, f"{name}@c0ffee"

    monkeypatch.setattr("molf.tasks.custom.hub_splits", hub_splits)
    split = load("someone/things")
    assert (split.train, split.eval) == (PAIRS[:5], PAIRS[5:8])
    assert split.origin == "someone/things@c0ffee, evaluation: its test split"
    assert load("someone/things", eval_path="extra").eval == PAIRS[8:]


def test_splits_that_mean_the_same_are_all_read_or_one_by_its_name(monkeypatch):
    def hub_splits(name, advice):
        return located_splits({"train_sft": PAIRS[:4], "validation": PAIRS[4:7], "dev": PAIRS[7:8]}, name), name

    monkeypatch.setattr("molf.tasks.custom.hub_splits", hub_splits)
    split = load("a/b", train_split="train_sft")
    assert (split.train, split.eval) == (PAIRS[:4], PAIRS[4:8])
    assert split.origin == "a/b, its train_sft split, evaluation: its validation and dev split"
    assert load("a/b", train_split="train_sft", eval_path="validation").eval == PAIRS[4:7]
    assert load("a/b", train_split="dev", eval_path="train_sft").train == PAIRS[7:8]
    assert load("a/b", train_split="dev").eval == PAIRS[4:7]
    with pytest.raises(MolfError, match="a/b: no train split, only train_sft, validation, dev; .*--train_split"):
        load("a/b")
    with pytest.raises(MolfError, match="a/b: no train_gen split, only train_sft"):
        load("a/b", train_split="train_gen")
    with pytest.raises(MolfError, match="--eval_path dev is the split to train on"):
        load("a/b", train_split="dev", eval_path="dev")


@pytest.mark.parametrize(
    ("asked", "unused"),
    [
        ({}, "test, extra"),
        ({"eval_path": "test"}, "validation, extra"),
        ({"eval_fraction": 0.5}, "validation, test, extra"),
    ],
)
def test_splits_that_are_not_used_are_told(asked, unused, monkeypatch, caplog):
    rows = dict(
        zip(("train", "validation", "test", "extra"), (PAIRS[:4], PAIRS[4:6], PAIRS[6:7], PAIRS[7:8]), strict=True)
    )
    monkeypatch.setattr("molf.tasks.custom.hub_splits", lambda name, advice: (located_splits(rows, name), name))
    load("a/b", **asked)
    assert caplog.messages == [f"a/b: splits that are not used: {unused}"]


def test_a_named_training_split_needs_data_with_splits(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIRS)
    with pytest.raises(MolfError, match="a.jsonl: no train_sft split, only rows without one"):
        load(path, train_split="train_sft")
    with pytest.raises(MolfError, match="task custom needs --data_path"):
        load(None, eval_path=path, train_split="train_sft")


def test_what_makes_no_sense_is_told(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIRS[:1])
    with pytest.raises(MolfError, match="custom has no sample in the package"):
        Custom().load(path, sample=True, limit=None, seed=0)
    with pytest.raises(MolfError, match="task custom needs --data_path.*or --eval_path"):
        load(None)
    with pytest.raises(MolfError, match="--eval_path x and --eval_fraction 0.5 both say"):
        load(path, eval_path="x", eval_fraction=0.5)
    with pytest.raises(MolfError, match="--eval_fraction 1.5 must be between 0 and 1"):
        load(path, eval_fraction=1.5)
    with pytest.raises(MolfError, match="a.jsonl: holding out 1 of 1 rows leaves none"):
        load(path)
    with pytest.raises(MolfError, match="no file or folder .*missing.jsonl"):
        load(str(tmp_path / "missing.jsonl"))
    with pytest.raises(MolfError, match="the training rows have prompt, completion, the evaluation rows messages"):
        load(path, eval_path=write(tmp_path / "b.jsonl", CHATS))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(MolfError, match="empty.jsonl: no records"):
        load(str(tmp_path / "empty.jsonl"))
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "test.jsonl", PAIRS)
    with pytest.raises(MolfError, match="no train split, only test"):
        load(str(tmp_path / "test"))


def test_unusable_rows_are_named_with_file_line_and_column(tmp_path):
    path = write(tmp_path / "a.jsonl", [*PAIRS[:2], {"prompt": "x", "completion": ""}])
    with pytest.raises(MolfError, match="a.jsonl, line 3, column 'completion': empty"):
        load(path)
    (tmp_path / "a.csv").write_text('prompt,completion\n"a\nb",c\nd,\n')
    with pytest.raises(MolfError, match="a.csv, line 4, column 'completion': empty"):
        load(str(tmp_path / "a.csv"))


# --- asking and scoring ---


@pytest.mark.parametrize("row", [PAIRS[0], CHATS[0], {"text": "One."}])
def test_a_row_is_its_own_example_and_request(row):
    task = Custom()
    (request,) = task.requests(row)
    assert isinstance(request, ExampleTokens)
    assert request.example == task.example(row) == row


def scores(*tokens):
    """The scores of tokens, each given as its probability and whether it is the most likely one."""
    return [TargetScores(tuple(math.log(p) for p, _ in tokens), tuple(range(len(tokens))), tuple(g for _, g in tokens))]


def test_metrics_worked_out_by_hand():
    given = [scores((0.5, True), (0.5, True), (0.25, False)), scores((0.5, True))]
    metrics = Custom().score(PAIRS[:2], given)
    assert {name: metric.value for name, metric in metrics.items()} == {
        "loss": pytest.approx(5 * math.log(2) / 4),  # by token, not by row
        "perplexity": pytest.approx(2 ** (5 / 4)),
        "token_accuracy": 75,
        "exact_match": 50,
    }
    assert metrics.keys() == Custom.metrics.keys()
    assert all(metric.n == 2 and metric.low <= metric.value <= metric.high for metric in metrics.values())
    assert "exact_match" not in Custom().score([{"text": "a"}, {"text": "b"}], given)
    assert Custom().score([], []) == {}
