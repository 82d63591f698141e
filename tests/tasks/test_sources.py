import hashlib
import json
from dataclasses import replace

import pytest

from molf.errors import MolfError
from molf.tasks import sources
from molf.tasks.records import UNNAMED
from molf.tasks.sources import HubData, Source, UrlFile


def write(path, *numbers):
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in numbers))
    return str(path)


@pytest.fixture
def source(monkeypatch):
    """A benchmark with a packaged slice, whose published data is on a pretended Hub."""

    def load(self):
        rows = {"train": range(10), "validation": range(10, 14), "test": range(20, 23)}
        return {split: [(split, {"n": n}) for n in own] for split, own in rows.items()}, f"{self.name}@c0ffee"

    monkeypatch.setattr(HubData, "load", load)
    return Source(
        published=HubData("someone/things"),
        packaged=("counterfact_sample.jsonl.gz", "counterfact_sample.jsonl.gz"),
        splits=("train", "validation"),
        fields={"n": int},
        problem=lambda row: "n is negative" if row["n"] < 0 else None,
    )


def load(source, data_path=None, sample=False, limit=None):
    split = source.load(data_path, sample=sample, limit=limit)
    return [row["n"] for row in split.train], [row["n"] for row in split.eval], split.origin


def test_published_splits(source):
    assert load(source) == (list(range(10)), [10, 11, 12, 13], "someone/things@c0ffee")
    assert load(source, limit=3)[:2] == ([0, 1, 2], [10, 11, 12])


def test_the_packaged_slice(source, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "_PACKAGED", tmp_path)
    write(tmp_path / "a.jsonl", 1, 2)
    write(tmp_path / "b.jsonl", 3)
    packaged = Source(source.published, packaged=("a.jsonl", "b.jsonl"), splits=("train", "validation"))
    assert load(packaged, sample=True) == ([1, 2], [3], "the package's a.jsonl, b.jsonl")
    shared = Source(source.published, packaged=("a.jsonl",))
    assert load(shared, sample=True, limit=1) == ([1], [1], "the package's a.jsonl")


def test_a_folder_of_the_users(source, tmp_path):
    write(tmp_path / "train.jsonl", 1, 2)
    write(tmp_path / "val.jsonl", 3, 4)
    write(tmp_path / "test.jsonl", 5, 6)
    assert load(source, str(tmp_path), limit=1) == ([1], [3], str(tmp_path))
    (tmp_path / "val.jsonl").unlink()
    assert load(source, str(tmp_path)) == ([1, 2], [5, 6], str(tmp_path))
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(MolfError, match="no rows to evaluate on, only train; add a file with 'validation' in its name"):
        load(source, str(tmp_path))


def test_one_file_is_evaluated_on_unless_the_rows_are_the_same(source, tmp_path):
    path = write(tmp_path / "mine.jsonl", 1, 2)
    assert load(source, path) == ([], [1, 2], path)
    assert load(Source(source.published, packaged=("x",)), path) == ([1, 2], [1, 2], path)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"n": 1}\n{"n": "x"}', "mine.jsonl, line 2: field 'n' must be an integer, found a string"),
        ('{"n": 1}\n{"n": -1}', "mine.jsonl, line 2: n is negative"),
        ("", "mine.jsonl: no records"),
    ],
)
def test_unusable_rows_are_named(source, tmp_path, text, message):
    (tmp_path / "mine.jsonl").write_text(text)
    with pytest.raises(MolfError, match=message):
        load(source, str(tmp_path / "mine.jsonl"))


def test_all_rows_of_a_users_split_are_brought_into_the_published_form_before_the_first_are_taken(source, tmp_path):
    def normalize(rows):
        if len(rows) > 3:
            raise MolfError("too many")
        return [{"n": len(rows)} for _ in rows]

    adjusted = replace(source, normalize=normalize)
    assert load(adjusted, limit=2)[:2] == ([0, 1], [10, 11])  # the published data has that form already
    assert load(adjusted, write(tmp_path / "mine.jsonl", 1, 2, 3), limit=2)[1] == [3, 3]
    with pytest.raises(MolfError, match="mine.jsonl: too many"):
        load(adjusted, write(tmp_path / "mine.jsonl", 1, 2, 3, 4), limit=2)


def test_arguments_that_make_no_sense(source):
    with pytest.raises(MolfError, match="--data_path a.json and --sample are two sources"):
        load(source, "a.json", sample=True)
    with pytest.raises(MolfError, match="this benchmark has no sample in the package"):
        load(replace(source, packaged=()), sample=True)


def test_a_file_by_url_records_its_sum_and_is_held_to_a_known_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLF_CACHE", str(tmp_path))
    (tmp_path / "things").mkdir()
    write(tmp_path / "things" / "a.jsonl", 1)
    found = hashlib.sha256((tmp_path / "things" / "a.jsonl").read_bytes()).hexdigest()
    url = "https://example.org/a.jsonl"
    splits, origin = UrlFile(url, "things", sum=found).load()
    assert origin == f"{url} (sha256 {found})"
    assert [row for _, row in splits[UNNAMED]] == [{"n": 1}]
    assert UrlFile(url, "things").load()[1] == origin
    with pytest.raises(MolfError, match=f"SHA-256 sum is {found}, not 00 as published .*--data_path PATH.*--sample"):
        UrlFile(url, "things", sum="00").load()


def test_without_a_network_both_ways_out_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="someone/things from the Hub: .*--data_path PATH.*--sample"):
        Source(HubData("someone/things"), packaged=("a",)).load(None, sample=False, limit=None)
