"""Rows to choose settings by: never those that the chosen settings are judged on."""

from molf.study.config.run_config import TaskConfig
from molf.tasks import Row, Split, Task


def load_split(task: Task, config: TaskConfig, seed: int) -> Split:
    """Load the rows of a run.

    Args:
        task: The benchmark.
        config: Which of its rows; with ``selection_limit`` those of ``selection_split``.
        seed: For tasks that split or choose at random.

    Raises:
        ValueError: The data is not usable, or there are too few rows left to choose settings by.
        OSError: The data cannot be read or fetched.
    """
    split = task.load(config.data_path, sample=config.sample, limit=config.limit, seed=seed)
    if config.selection_limit is None:
        return split
    everything = split
    if split.train == split.eval:
        everything = task.load(config.data_path, sample=config.sample, limit=None, seed=seed)
    return selection_split(split, everything.train, config.selection_limit)


def selection_split(split: Split, everything: list[Row], count: int) -> Split:
    """Return what to train and evaluate on while settings are chosen; no row of it is in ``split.eval``.

    Usually the last ``count`` training rows are held out and evaluated on, and the rest is trained on. Where a benchmark
    evaluates the very rows that it trains on, as edits of facts, that would measure something else: there the first
    ``count`` other rows are both trained and evaluated on.

    Args:
        split: The rows of the runs to come.
        everything: All training rows there are.
        count: How many rows to evaluate on.

    Raises:
        ValueError: There are not enough rows.
    """
    judged = {row_key(row) for row in split.eval}
    same = split.train == split.eval
    free = [row for row in (everything if same else split.train) if row_key(row) not in judged]
    if len(free) < count + (not same):
        raise ValueError(
            f"selection_limit={count} needs as many rows of {split.origin} that are not evaluated on, and there are "
            f"{len(free)}{'' if same else ' to train on and to hold out'}; lower selection_limit or limit"
        )
    train, held_out = (free[:count], free[:count]) if same else (free[:-count], free[-count:])
    return Split(train, held_out, f"{split.origin}, rows for selection")


def row_key(row: Row) -> str:
    """Return a text that only equal rows share."""
    return repr(sorted(row.items()))
