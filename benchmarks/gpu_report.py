"""One table and one JSON for the parts of the GPU programme: every ratio beside its limit."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from timing import machine


@dataclass
class Row:
    """One measurement.

    Attributes:
        part: Of the programme.
        case: What was measured.
        value: The number; None where it could not be had, and ``note`` says why.
        unit: Of the number.
        limit: What it is held against, None for nothing.
        least: Whether the limit is the least that is wanted, rather than the most.
        note: What else there is to say.
    """

    part: str
    case: str
    value: float | None
    unit: str
    limit: float | None = None
    least: bool = False
    note: str = ""

    @property
    def holds(self):
        if self.limit is None or self.value is None:
            return None
        return self.value >= self.limit if self.least else self.value <= self.limit


class Report:
    """The rows so far, written to a file after each part, so that a programme that is cut off has lost nothing.

    Args:
        path: Of the JSON file, None for none.
        budget: Seconds after which no further case is begun; those of a part may end before.
    """

    def __init__(self, path, budget):
        self.rows, self.profiles = [], {}
        self._path = None if path is None else Path(path)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._end = self._last = time.monotonic() + budget

    def begin(self, seconds):
        """Begin a part that may begin cases for so many seconds, within the budget of the whole."""
        self._last = min(self._end, time.monotonic() + seconds)

    def add(self, *args, **kwargs):
        row = Row(*args, **kwargs)
        self.rows.append(row)
        print(line(row), flush=True)
        self._write()

    def attempt(self, part, case, work):
        """Do some work that adds rows; what fails, or comes too late, is a row too and does not end the programme."""
        if time.monotonic() > self._last:
            return self.add(part, case, None, "", note="not begun: out of time")
        try:
            return work()
        except Exception as error:  # Triton's and torch's errors have no base in common but this
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            return self.add(part, case, None, "", note=f"failed: {type(error).__name__}: {first}")

    def to_dict(self):
        rows = [{**asdict(row), "holds": row.holds} for row in self.rows]
        return {"machine": machine(), "rows": rows, "profiles": self.profiles}

    def _write(self):
        if self._path is not None:
            partial = self._path.with_name(self._path.name + ".partial")
            partial.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
            partial.replace(self._path)

    def write_table(self, path):
        """Write the table in Markdown."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.markdown() + "\n", encoding="utf-8")

    def markdown(self):
        """Return the table."""
        lines = ["| part | case | measured | limit | | |", "| --- | --- | ---: | ---: | --- | --- |"]
        lines += ["| " + " | ".join((row.part, row.case, *_numbers(row), row.note)) + " |" for row in self.rows]
        return "\n".join([machine(), "", *lines])


def _numbers(row):
    measured = "" if row.value is None else f"{row.value:,.4g} {row.unit}".strip()
    limit = "" if row.limit is None else f"{'>=' if row.least else '<='} {row.limit:,.4g}"
    return measured, limit, {None: "", True: "holds", False: "**does not hold**"}[row.holds]


def line(row):
    measured, limit, holds = _numbers(row)
    return f"{row.part:9} {row.case:58} {measured:>18} {limit:>10} {holds.strip('*'):>14}  {row.note}".rstrip()


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_bytes():
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def forget():
    """Give the memory of what was dropped back, and measure the peak anew."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
