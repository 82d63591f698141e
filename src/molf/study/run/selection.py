"""The rows of a run, and rows to choose settings or checkpoints on that the final evaluation does not use."""

from molf.errors import MolfError
from molf.study.config.run_config import TaskConfig
from molf.tasks import Row, Split, Task

VALIDATION_SHARE = 0.1
"""Share of the training rows to hold out for evaluations during training."""


def load_split(task: Task, config: TaskConfig, seed: int) -> Split:
    """Load the rows of a run."""
    split = task.load(config.data_path, sample=config.sample, limit=config.limit, seed=seed)
    if config.selection_limit is None:
        return split
    everything = split
    if split.train == split.eval:
        everything = task.load(config.data_path, sample=config.sample, limit=None, seed=seed)
    return selection_split(split, everything.train, config.selection_limit)


def selection_split(split: Split, everything: list[Row], count: int) -> Split:
    """Return the rows to choose settings on; none of them is in ``split.eval``.

    The last ``count`` training rows are held out for evaluation, and rows that equal them are not trained on. A benchmark that
    evaluates the very rows it trains on, such as edits of facts, would measure something else that way: there the first ``count``
    other rows serve as both.
    """
    same = split.train == split.eval
    free = _others(everything if same else split.train, split.eval)
    held_out = free[:count] if same else free[-count:]
    train = held_out if same else _others(free, held_out)
    if len(held_out) < count or not train:
        raise MolfError(
            f"selection_limit={count} needs {count} rows of {split.origin} that are not evaluated on"
            f"{'' if same else ', and at least one more to train on'}, but there are {len(free)}; lower selection_limit or limit"
        )
    return Split(train, held_out, f"{split.origin}, rows for selection")


def validation_split(split: Split, config: TaskConfig) -> tuple[Split, list[Row]]:
    """Return the rows of a run that is evaluated during its training, and the rows that this uses.

    They are those for selection, if there are any, else the last training rows, which are then neither trained on nor evaluated
    on afterwards: their loss may choose a checkpoint, and a number that chose one says too little about other rows.
    """
    if config.selection_limit is not None:
        return split, split.eval
    same = split.train == split.eval
    count = config.validation_limit or max(1, round(VALIDATION_SHARE * len(split.train)))
    held_out = _others(split.train, [] if same else split.eval)[-count:]
    train = _others(split.train, held_out)
    if len(held_out) < count or not train:
        raise MolfError(
            f"eval_strategy holds out {count} of the {len(split.train)} training rows of {split.origin}, which leaves none to "
            "train on, or too few that are not evaluated on; lower validation_limit, or pass --eval_strategy no"
        )
    origin = f"{split.origin}, without {len(held_out)} training rows for validation"
    return Split(train, train if same else split.eval, origin), held_out


def _others(rows: list[Row], left_out: list[Row]) -> list[Row]:
    """Return the rows that equal none of those that are left out."""
    keys = {row_key(row) for row in left_out}
    return [row for row in rows if row_key(row) not in keys]


def row_key(row: Row) -> str:
    """Return a key that is the same for equal rows only."""
    return repr(sorted(row.items()))
