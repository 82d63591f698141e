import gzip
import json
import os
import re

import datasets
import pytest

from molf.errors import MolfError
from molf.tasks.records import UNNAMED, check_fields, local_splits, located_splits, split_names


def read(path):
    """All records of a file or folder."""
    return [record for _, record in local_splits(path)[UNNAMED]]


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"id": 2}')
    (tmp_path / "a.json").write_text('[{"id": 1}]')
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "c.jsonl").write_text('{"id": 3}')
    assert read(tmp_path) == [{"id": 1}, {"id": 2}]


def test_every_format_of_a_folder_and_linked_folders_are_read(tmp_path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write(folder / "a.JSONL", 1)
    (folder / "b.csv.gz").write_bytes(gzip.compress(b"n\n2\n"))
    write(elsewhere / "deep" / "c.jsonl", 3)
    (folder / "linked").symlink_to(elsewhere)
    assert [row["n"] for row in read(folder)] == [1, "2", 3]


@pytest.mark.parametrize("name", ["a.arrow", "notes.txt", "b.jsonl.lz4", "deep/c.xlsx", "d.parquet.gz"])
def test_what_a_folder_has_and_is_not_read_is_refused_by_name(tmp_path, name):
    write(tmp_path / "train.jsonl", 1)
    write(tmp_path / name)
    with pytest.raises(MolfError, match=f"{name}: cannot tell the format; .* Move it out"):
        local_splits(tmp_path)


@pytest.mark.parametrize(
    "target, message", [("nowhere", "a.jsonl: not a file"), (".", "a.jsonl: a link to a folder that it is")]
)
def test_links_that_lead_nowhere_or_back_are_refused(tmp_path, target, message):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / target)
    with pytest.raises(MolfError, match=message):
        local_splits(tmp_path)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", 1)
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(MolfError, match="closed: cannot be read: Permission denied"):
        local_splits(tmp_path)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"a": {"c": 1}, "z": 0}, "no field 'a.b'; 'b' is missing from: c"),
        ({"z": 0, "y": 1}, "no field 'a.b'; 'a' is missing from: z, y"),
        ({}, "no field 'a.b'; 'a' is missing from: nothing"),
        ({"a": "text"}, "no field 'a.b'; 'b' is missing from: a string"),
        ({"a": {"b": None}}, "field 'a.b' must be a string, found null"),
    ],
)
def test_fields_are_checked_where_they_stand(record, message):
    check_fields({"a": {"b": "good"}}, {"a.b": str}, "x.jsonl, line 1")
    with pytest.raises(MolfError, match=re.escape(f"x.jsonl, line 2: {message}")):
        check_fields(record, {"a.b": str}, "x.jsonl, line 2")


def test_nothing_there(tmp_path):
    with pytest.raises(MolfError, match="no file or folder .*missing.json"):
        local_splits(tmp_path / "missing.json")
    with pytest.raises(MolfError, match="no .json, .* file in the folder"):
        local_splits(tmp_path)


# --- folders by split ---


def write(path, *numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in numbers))


def numbers(splits):
    return {split: [row["n"] for _, row in rows] for split, rows in splits.items()}


def test_names_tell_the_split(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", 1)
    write(tmp_path / "train-00001-of-00002.jsonl", 2)
    write(tmp_path / "medmcqa_dev.jsonl", 3)
    write(tmp_path / "test" / "part.jsonl", 4)
    assert numbers(local_splits(tmp_path)) == {"train": [1, 2], "validation": [3], "test": [4]}


def test_names_that_tell_nothing_are_one_split(tmp_path):
    write(tmp_path / "b.jsonl", 2)
    write(tmp_path / "contest.jsonl", 3)  # no word of a split
    write(tmp_path / "a.jsonl", 1)
    assert numbers(local_splits(tmp_path)) == {UNNAMED: [1, 2, 3]}
    assert numbers(local_splits(tmp_path / "b.jsonl")) == {UNNAMED: [2]}


def test_a_file_without_a_split_among_others_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", 1)
    write(tmp_path / "extra.jsonl", 2)
    with pytest.raises(MolfError, match="extra.jsonl: cannot tell the split; .* train, training, validation"):
        local_splits(tmp_path)


def saved(folder):
    """Two splits as ``datasets`` saves them."""
    of = datasets.Dataset.from_list
    both = datasets.DatasetDict({"train": of([{"n": 1}, {"n": 2}]), "valid": of([{"n": 3}])})
    both.save_to_disk(folder / "both")
    both["train"].save_to_disk(folder / "one")


def test_splits_that_mean_the_same_keep_their_names():
    found = located_splits({"train": [{"n": 1}], "Validation": [{"n": 2}], "dev": [{"n": 3}], "TEST": [{"n": 4}]}, "d")
    assert numbers(found) == {"train": [1], "Validation": [2], "dev": [3], "test": [4]}
    assert split_names(found, "validation") == ["Validation", "dev"]


def test_a_damaged_saved_folder_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    saved(tmp_path)
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(MolfError, match="one: `datasets` cannot read it"):
        local_splits(tmp_path / "one")


@pytest.mark.parametrize("content", ["{}", "[]", '{"splits": 3}', '{"splits": ["no"]}'])
def test_a_damaged_list_of_splits_is_told(tmp_path, content):
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises(MolfError, match="`datasets` cannot read it"):
        local_splits(tmp_path)


def test_folders_that_datasets_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    saved(tmp_path)
    assert numbers(local_splits(tmp_path / "both")) == {"train": [1, 2], "validation": [3]}
    (where, row), _ = local_splits(tmp_path / "one")[UNNAMED]
    assert (where, row) == (f"{tmp_path / 'one'}, row 1", {"n": 1})
