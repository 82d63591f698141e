import json

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from molf.tasks.splits import UNNAMED, hub_splits, local_splits

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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
    with pytest.raises(ValueError, match="extra.jsonl: cannot tell the split; .* train, training, validation"):
        local_splits(tmp_path)


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """The caches of the Hub's libraries, empty."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path


def saved(folder):
    """Two splits as ``datasets`` saves them."""
    of = datasets.Dataset.from_list
    both = datasets.DatasetDict({"train": of([{"n": 1}, {"n": 2}]), "valid": of([{"n": 3}])})
    both.save_to_disk(folder / "both")
    both["train"].save_to_disk(folder / "one")


def test_folders_that_datasets_saved(offline_cache):
    saved(offline_cache)
    assert numbers(local_splits(offline_cache / "both")) == {"train": [1, 2], "validation": [3]}
    (where, row), _ = local_splits(offline_cache / "one")[UNNAMED]
    assert (where, row) == (f"{offline_cache / 'one'}, row 1", {"n": 1})


def cached(root, commit=COMMIT):
    """What an earlier download of ``someone/things`` left in the cache."""
    repository = root / "hub" / "datasets--someone--things"
    write(repository / "snapshots" / commit / "train.jsonl", 1, 2)
    write(repository / "snapshots" / commit / "test.jsonl", 3)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_downloaded_data_set_is_read_at_its_commit_without_a_network(offline_cache, revision):
    cached(offline_cache)
    splits, origin = hub_splits(f"someone/things{revision}", "Help yourself.")
    assert origin == f"someone/things@{COMMIT}"
    (where, row), _ = splits["train"]
    assert (where, row) == (f"{origin}, split train, row 1", {"n": 1})
    assert numbers({"test": splits["test"]}) == {"test": [3]}


def test_the_commit_that_the_hub_names_is_the_one_that_is_read(offline_cache, monkeypatch):
    cached(offline_cache)
    asked = {}

    def snapshot_download(name, **settings):
        asked.update(settings, name=name)
        return str(offline_cache / "hub" / "datasets--someone--things" / "snapshots" / COMMIT)

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub_splits("someone/things@v1", "")[1] == f"someone/things@{COMMIT}"
    assert asked == {"name": "someone/things", "repo_type": "dataset", "revision": "v1", "local_files_only": False}


@pytest.mark.parametrize(
    "name, reason",
    [
        ("someone/things", "HF_HUB_OFFLINE is set and no copy is in the cache"),
        ("someone/things@v2", "HF_HUB_OFFLINE is set and no copy is in the cache"),
        ("not a name", "Repo id must"),
    ],
)
def test_what_cannot_be_had_says_what_to_do(offline_cache, name, reason):
    with pytest.raises(ConnectionError, match=f"cannot get the data set {name} from the Hub: {reason}.*Help yourself"):
        hub_splits(name, "Help yourself.")


def test_what_datasets_cannot_read_is_named(offline_cache):
    cached(offline_cache)
    broken = offline_cache / "hub" / "datasets--someone--things" / "snapshots" / COMMIT / "train.jsonl"
    broken.write_text("{")
    with pytest.raises(ValueError, match=f"someone/things@{COMMIT}: `datasets` cannot read it: .*Help yourself"):
        hub_splits("someone/things", "Help yourself.")
