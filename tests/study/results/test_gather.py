import csv
import json
import os
from pathlib import Path

import pytest
from pyarrow import parquet

from fake_runs import RESULT, write_rows
from molf.errors import MolfError
from molf.study.results.gather import append_csv, check_log, gather
from served import CONTEXT


def leave(folder, **config):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({**RESULT, "config": config}))


@pytest.fixture
def runs(tmp_path):
    """Three runs at two depths, and two files that are none."""
    leave(tmp_path / "b", method="fft", warmup_steps=0.1, seed=1)
    leave(tmp_path / "a" / "deep", method="lora", warmup_steps=5, seed="two")
    leave(tmp_path / "c", method="molf", warmup_steps=None, ranks=[4, 8])
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "result.json").write_text('{"config": {')
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "result.json").write_text("{}")
    return tmp_path


def test_results_are_found_at_any_depth_and_what_is_none_is_named(runs):
    found = gather([runs])
    assert list(found.results) == [str(runs / name) for name in ("a/deep", "b", "c")]
    assert set(found.unreadable) == {str(runs / name / "result.json") for name in ("torn", "older")}
    assert all("is not a result of this version" in reason for reason in found.unreadable.values())


def test_a_folder_whose_name_is_no_text(runs, tmp_path):
    leave(tmp_path / os.fsdecode(b"\xff"), method="fft")
    found = gather([runs])
    assert f"{tmp_path}/\\xff" in found.results
    found.write_csv(tmp_path / "all.csv")
    found.write_parquet(tmp_path / "all.parquet")


def test_settings_of_all_types_go_into_parquet(tmp_path):
    for number, value in enumerate([True, 1, 2**63 - 1, 0.5, "x", None, [1], {"a": 1}]):
        leave(tmp_path / str(number), odd=value, other=[value], third=value if number < 4 else None)
    gather([tmp_path]).write_parquet(tmp_path / "all.parquet")
    assert parquet.read_table(tmp_path / "all.parquet").num_rows == 8


def test_a_run_given_twice_counts_once(runs):
    assert list(gather([runs / "b", runs / "b" / "result.json", runs / "a"]).results) == [
        str(runs / name) for name in ("a/deep", "b")
    ]


def test_symlinks_are_followed_and_each_run_counts_once(tmp_path):
    leave(tmp_path / "store" / "real")
    leave(tmp_path / "elsewhere" / "run")
    runs = tmp_path / "runs"
    leave(runs / "b")
    (runs / "a").symlink_to(runs / "b")
    (runs / "linked").symlink_to(tmp_path / "store" / "real")
    (runs / "more").symlink_to(tmp_path / "elsewhere")
    (runs / "b" / "up").symlink_to(runs)
    found = gather([runs, tmp_path / "store"])
    assert list(found.results) == [str(runs / name) for name in ("b", "linked", "more/run")] and not found.unreadable


def test_broken_symlinks_are_named_and_counted(tmp_path):
    (tmp_path / "run").mkdir()
    links = [tmp_path / "run" / "result.json", tmp_path / "loop", tmp_path / "gone"]
    for link in links:
        link.symlink_to(link if link.name == "loop" else tmp_path / "nowhere")
    found = gather([tmp_path])
    assert set(found.unreadable) == set(map(str, links)) and not found.results
    assert all("is a broken symlink to" in reason for reason in found.unreadable.values())
    assert gather(links).unreadable.keys() == found.unreadable.keys()


def test_csv(runs, tmp_path):
    gather([runs]).write_csv(tmp_path / "new" / "all.csv")
    with (tmp_path / "new" / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["lora", "fft", "molf"]
    assert [row["ranks"] for row in rows] == ["", "", "[4, 8]"]
    assert {row["metric/score"] for row in rows} == {"1.0"}


def test_parquet(runs, tmp_path):
    gather([runs]).write_parquet(tmp_path / "new" / "all.parquet")
    table = parquet.read_table(tmp_path / "new" / "all.parquet").to_pydict()
    assert table["folder"] == [str(runs / name) for name in ("a/deep", "b", "c")]
    assert table["warmup_steps"] == [5.0, 0.1, None]  # numbers stay numbers
    assert table["seed"] == ["two", "1", None]  # words and numbers become words
    assert table["metric/score"] == [1.0] * 3


def test_nothing_to_gather(tmp_path):
    with pytest.raises(ValueError, match=r"there is no result\.json in"):
        gather([tmp_path])
    with pytest.raises(ValueError, match="there is no .*nowhere"):
        gather([tmp_path / "nowhere"])


def writer(path, name, rows):
    """Start a process that adds rows "NAME-0", "NAME-1", ... with one of four columns."""
    process = CONTEXT.Process(target=write_rows, args=(path, name, rows))
    process.start()
    return process


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_columns_may_grow(tmp_path):
    path = tmp_path / "new" / "log.csv"
    append_csv(path, {"a": 1, "b": "x, y\nz"})
    append_csv(path, {"b": 2, "c": 3})
    append_csv(path, {"a": 4})
    rows = rows_of(path)
    assert list(rows[0]) == ["a", "b", "c"]
    assert [list(row.values()) for row in rows] == [["1", "x, y\nz", ""], ["", "2", "3"], ["4", "", ""]]


@pytest.mark.parametrize("content", ["", "a,b\n1,2", "a,b\r\n1,2\r\n", "a,b\n"])
def test_a_file_from_elsewhere_is_added_to(content, tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(content.encode())
    append_csv(path, {"b": 4, "a": 3})
    assert rows_of(path)[-1] == {"a": "3", "b": "4"}
    assert len(rows_of(path)) == 1 + content.count("1,2")


def test_a_row_with_a_known_key_is_replaced(tmp_path):
    path = tmp_path / "log.csv"
    append_csv(path, {"a": 1}, key="a")
    append_csv(path, {"a": 2, "id": "x1"}, key="id")
    append_csv(path, {"a": "x1", "id": "x2"}, key="id")
    append_csv(path, {"a": 4, "id": "x1", "b": 5}, key="id")
    assert [list(row.values()) for row in rows_of(path)] == [["1", "", ""], ["x1", "x2", ""], ["4", "x1", "5"]]


def test_8_writers_at_once_lose_no_row(tmp_path):
    path = tmp_path / "log.csv"
    writers = [writer(path, name, 3) for name in range(8)]
    for process in writers:
        process.join()
    assert {process.exitcode for process in writers} == {0}
    rows = rows_of(path)
    assert sorted(row["row"] for row in rows) == sorted(f"{name}-{number}" for name in range(8) for number in range(3))
    assert set(rows[0]) == {"row", *(f"column {number}" for number in range(4))}
    for row in rows:
        assert row[f"column {int(row['row'].partition('-')[0]) % 4}"] == "x" * 50


def test_a_killed_writer_leaves_whole_rows_and_no_lock(tmp_path):
    path = tmp_path / "log.csv"
    append_csv(path, {"row": "first"})
    for name in range(3):
        victim = writer(path, name, 1_000_000)
        before = len(rows_of(path))
        while len(rows_of(path)) < before + 20:
            assert victim.is_alive()
        victim.kill()
        victim.join()
    append_csv(path, {"row": "last"})
    rows = [row["row"] for row in rows_of(path)]
    assert (rows[0], rows[-1]) == ("first", "last")
    for name in range(3):
        own = [row for row in rows if row.startswith(f"{name}-")]
        assert len(own) >= 20 and own == [f"{name}-{number}" for number in range(len(own))]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (os.mkfifo, "it is a named pipe, which needs a reader"),
        (lambda path: path.write_bytes(b"a,b\n\xff,1\n"), "is not CSV in UTF-8"),
        (lambda path: path.write_bytes(b"a,b\n1,2,3\n"), "is not CSV in UTF-8"),
        (lambda path: path.write_bytes(b'a\n"open\n'), "is not CSV in UTF-8"),
        (lambda path: path.write_bytes(b"\n\n"), "is not CSV in UTF-8"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.write_text('{"prompt": "q", "completion": "a"}\n'), "its header has no run_id"),
        (lambda path: path.write_text("Plain words.\n"), "its header has no run_id"),
        (lambda path: path.write_text("prompt,completion\nq,a\n"), "its header has no run_id"),
        (lambda path: path.write_text("a;run_id\n1;2\n"), "its header has no run_id"),
        (lambda path: path.write_text("run_id,a,a\n1,2,3\n"), "names 'a' twice"),
        (lambda path: path.write_text("run_id,,a\n1,2,3\n"), "has a column without a name"),
    ],
    ids=range(13),
)
def test_a_log_that_cannot_get_a_row_is_named_before_there_is_one(make, words, tmp_path):
    make(tmp_path / "log")
    before = os.lstat(tmp_path / "log")
    with pytest.raises(MolfError, match=words):
        check_log(tmp_path / "log")
    after = os.lstat(tmp_path / "log")
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)


@pytest.mark.parametrize("content", ["", "a,run_id\n", "\ufeffrun_id,a\r\n1,2\r\n"])
def test_a_log_of_runs_and_an_empty_file_get_rows(content, tmp_path):
    (tmp_path / "log.csv").write_text(content)
    check_log(tmp_path / "log.csv")


def test_a_log_in_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MolfError, match="Not a directory"):
        check_log(tmp_path / "file" / "log.csv")


def test_asking_leaves_no_log(tmp_path):
    check_log(tmp_path / "new" / "log.csv")
    check_log(Path("/dev/null"))
    assert not list(tmp_path.iterdir())


def test_a_symlinked_log_stays_and_its_file_gets_the_rows(tmp_path):
    (tmp_path / "shared").mkdir()
    real, link = tmp_path / "shared" / "log.csv", tmp_path / "log.csv"
    link.symlink_to(real)
    append_csv(real, {"a": 1})
    append_csv(link, {"a": 2})
    assert link.is_symlink() and [row["a"] for row in rows_of(real)] == ["1", "2"]
    assert not (tmp_path / "log.csv.lock").exists()  # both names have one lock


def test_a_log_that_is_a_stream_gets_the_row_and_stays(tmp_path, capfd):
    append_csv(Path("/dev/null"), {"a": 1})
    append_csv(Path("/dev/stdout"), {"a": 2})
    assert Path("/dev/null").is_char_device() and not Path("/dev/null.lock").exists()
    assert capfd.readouterr().out.split() == ["a", "2"]
