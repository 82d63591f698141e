"""Where the rows of a benchmark come from: the user's copy, the packaged slice, or the published data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from molf.tasks.base import Row, Split
from molf.tasks.data import BOTH_WAYS, cache_folder, download_once, sha256
from molf.tasks.records import Located, check_fields, records_of
from molf.tasks.splits import UNNAMED, Splits, hub_splits, local_splits

_PACKAGED = Path(__file__).parent / "data"


@dataclass(frozen=True)
class HubData:
    """A data set on the Hub.

    Attributes:
        name: Its id, with ``@`` and a revision where it is not to be the newest.
    """

    name: str

    def load(self) -> tuple[Splits, str]:
        """Return the records by split, and ``id@commit``."""
        return hub_splits(self.name, BOTH_WAYS)


@dataclass(frozen=True)
class UrlFile:
    """A published file, downloaded once to the cache.

    Attributes:
        url: Its address.
        folder: The folder in the cache.
        sum: Its SHA-256 sum in hexadecimal where one is known, which a copy must have.
    """

    url: str
    folder: str
    sum: str | None = None

    def load(self) -> tuple[Splits, str]:
        """Return the records, and the address with the sum of what was downloaded."""
        file = download_once(self.url, cache_folder() / self.folder)
        found = sha256(file)
        if self.sum not in (None, found):
            raise ValueError(
                f"{file}: its SHA-256 sum is {found}, not {self.sum} as published at {self.url}; delete the file to "
                f"download it again. {BOTH_WAYS}"
            )
        return {UNNAMED: records_of(file)}, f"{self.url} (sha256 {found})"


def _no_problem(row: Row) -> str | None:
    return None


@dataclass(frozen=True)
class Source:
    """Where the rows of a benchmark come from, and what they must have.

    Attributes:
        published: The public data.
        packaged: Files of the slice in the package, if there is one: for training and for evaluation, or one for both.
        splits: The published splits to train and to evaluate on; None to do both on all the rows there are.
        fields: Names and types that every row must have; a dot goes into an object.
        problem: Says what else makes a row unusable, or None.
        normal: Brings all the rows of a user's split into the published form, where other forms are around.
    """

    published: HubData | UrlFile
    packaged: tuple[str, ...] = ()
    splits: tuple[str, str] | None = None
    fields: Mapping[str, type] = field(default_factory=dict)
    problem: Callable[[Row], str | None] = _no_problem
    normal: Callable[[list[Row]], list[Row]] | None = None

    def load(self, data_path: str | None, *, sample: bool, limit: int | None) -> Split:
        """Load the rows.

        A folder of the user's names its splits by file (``local_splits``). A single file is evaluated on, unless the
        benchmark trains and evaluates on the same rows.

        Args:
            data_path: A file or folder of the user's; None for the published data.
            sample: Use the slice in the package.
            limit: The most rows per split, the first ones; None for all.

        Raises:
            ValueError: If the arguments contradict each other, or the data is not usable.
            OSError: If the data cannot be read or downloaded.
        """
        if data_path is not None and sample:
            raise ValueError(f"--data_path {data_path} and --sample are two sources of data; pass one of them")
        if sample and not self.packaged:
            raise ValueError("the package has no sample of this benchmark; leave --sample out")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} leaves no rows; use a limit of at least 1, or none for all rows")
        if sample:
            found, origin = self._packaged_splits(), f"the package's {', '.join(self.packaged)}"
        elif data_path is not None:
            found, origin = local_splits(Path(data_path).expanduser()), data_path
        else:
            found, origin = self.published.load()
        normal = self.normal if data_path is not None else None
        if self.splits is None:
            rows = self._rows(chain.from_iterable(found.values()), limit, origin, normal)
            return Split(rows, rows, origin)
        train, evaluation = (self._rows(rows, limit, origin, normal) for rows in _both(found, *self.splits, origin))
        return Split(train, evaluation, origin)

    def _packaged_splits(self) -> Splits:
        return {
            name: records_of(_PACKAGED / file)
            for name, file in zip(self.splits or (UNNAMED,), self.packaged, strict=True)
        }

    def _rows(
        self,
        records: Iterable[Located] | None,
        limit: int | None,
        origin: str,
        normal: Callable[[list[Row]], list[Row]] | None,
    ) -> list[Row]:
        if records is None:
            return []
        usable = self._usable(records)
        # What a row means may show in later rows only: with ``normal``, all of them are looked at.
        rows = list(usable if normal is not None else islice(usable, limit))
        if not rows:
            raise ValueError(f"{origin}: no records")
        if normal is None:
            return rows
        try:
            return normal(rows)[:limit]
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error

    def _usable(self, records: Iterable[Located]) -> Iterator[Row]:
        for where, row in records:
            check_fields(row, self.fields, where)
            if (problem := self.problem(row)) is not None:
                raise ValueError(f"{where}: {problem}")
            yield row


def _both(
    found: Splits, train: str, evaluation: str, origin: str
) -> tuple[Iterable[Located] | None, Iterable[Located]]:
    """Return the rows to train on, if there are any, and those to evaluate on."""
    names = (evaluation, "validation", "test", UNNAMED)
    if (held_out := next((name for name in names if name in found), None)) is None:
        raise ValueError(
            f"{origin}: nothing to evaluate on, only {', '.join(found)}; add a file whose name holds {evaluation!r}"
        )
    return found.get(train), found[held_out]
