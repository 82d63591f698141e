"""How long a run waits to add its row to a CSV log of many runs: with the columns that are there, and with a new one.

python benchmarks/csv_log.py
"""

import tempfile
import time
import uuid
from pathlib import Path

from molf.study.results.gather import append_csv

ROWS, COLUMNS = 10_000, 250  # a run has about 250 settings and measurements


def timed(path: Path, row: dict[str, str]) -> float:
    row = {**row, "run_id": uuid.uuid4().hex}
    start = time.perf_counter()
    append_csv(path, row, key="run_id")
    return time.perf_counter() - start


def main() -> None:
    row = {f"column_{number}": f"value {number}" for number in range(COLUMNS)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.csv"
        timed(path, row)
        line = path.read_bytes().partition(b"\n")[2]
        with path.open("ab") as file:
            file.write(line * (ROWS - 1))
        print(f"{ROWS:,} rows of {COLUMNS} columns, {path.stat().st_size / 2**20:.0f} MiB")
        same = min(timed(path, row) for _ in range(5))
        new = min(timed(path, {**row, f"new_{number}": "x"}) for number in range(3))
        print(f"a row of the same columns: {same * 1e3:.0f} ms; a row with a new column: {new * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
