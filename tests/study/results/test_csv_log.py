import csv
import os
import signal
import subprocess
import sys

import pytest

from molf.study.results.csv_log import append_csv

# A process that adds rows "WRITER-0", "WRITER-1", ... with one of four columns.
WRITER = """
import sys
from pathlib import Path
from molf.study.results.csv_log import append_csv
path, writer, rows = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(rows):
    append_csv(path, {"row": f"{writer}-{number}", f"column {int(writer) % 4}": "x" * 50})
"""


def writer(path, name, rows):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(name), str(rows)])


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_columns_may_grow(tmp_path):
    path = tmp_path / "new" / "log.csv"
    append_csv(path, {"a": 1, "b": "x, y\nz"})
    append_csv(path, {"b": 2, "c": 3})
    append_csv(path, {"a": 4})
    rows = read(path)
    assert list(rows[0]) == ["a", "b", "c"]
    assert [list(row.values()) for row in rows] == [["1", "x, y\nz", ""], ["", "2", "3"], ["4", "", ""]]


@pytest.mark.parametrize("content", ["", "a,b\n1,2", "a,b\r\n1,2\r\n", "a,b\n"])
def test_a_file_from_elsewhere_is_added_to(content, tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(content.encode())
    append_csv(path, {"b": 4, "a": 3})
    assert read(path)[-1] == {"a": "3", "b": "4"}
    assert len(read(path)) == 1 + content.count("1,2")


def test_a_row_with_a_known_key_is_replaced(tmp_path):
    path = tmp_path / "log.csv"
    append_csv(path, {"a": 1}, key="a")
    append_csv(path, {"a": 2, "id": "x1"}, key="id")
    append_csv(path, {"a": "x1", "id": "x2"}, key="id")
    append_csv(path, {"a": 4, "id": "x1", "b": 5}, key="id")
    assert [list(row.values()) for row in read(path)] == [["1", "", ""], ["x1", "x2", ""], ["4", "x1", "5"]]


def test_32_writers_at_once_lose_no_row(tmp_path):
    path = tmp_path / "log.csv"
    writers = [writer(path, name, 3) for name in range(32)]
    assert {process.wait() for process in writers} == {0}
    rows = read(path)
    assert sorted(row["row"] for row in rows) == sorted(f"{name}-{number}" for name in range(32) for number in range(3))
    assert set(rows[0]) == {"row", *(f"column {number}" for number in range(4))}
    for row in rows:
        assert row[f"column {int(row['row'].partition('-')[0]) % 4}"] == "x" * 50


def test_a_killed_writer_leaves_whole_rows_and_no_lock(tmp_path):
    path = tmp_path / "log.csv"
    append_csv(path, {"row": "first"})
    for name in range(3):
        victim = writer(path, name, 1_000_000)
        before = len(read(path))
        while len(read(path)) < before + 20:
            assert victim.poll() is None
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
    append_csv(path, {"row": "last"})
    rows = [row["row"] for row in read(path)]
    assert (rows[0], rows[-1]) == ("first", "last")
    for name in range(3):
        own = [row for row in rows if row.startswith(f"{name}-")]
        assert len(own) >= 20 and own == [f"{name}-{number}" for number in range(len(own))]
