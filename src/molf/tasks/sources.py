"""The rows of a benchmark: from the user's files, the sample in the package, or the published data."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from molf.errors import MolfError
from molf.files import cache_folder
from molf.tasks.base import Row, Split
from molf.tasks.downloads import ADVICE, download_once, hub_splits
from molf.tasks.formats import Located, records_of
from molf.tasks.records import UNNAMED, Splits, check_fields, local_splits, split_names, tell_unused

_PACKAGED = Path(__file__).parent / "data"


@dataclass(frozen=True)
class HubData:
    """A data set on the Hub.

    Attributes:
        name: Its id, optionally followed by ``@`` and a revision.
    """

    name: str

    def load(self) -> tuple[Splits, str]:
        """Return the records by split, and ``id@commit``."""
        return hub_splits(self.name)


@dataclass(frozen=True)
class UrlFile:
    """A published file, downloaded once to the cache.

    Attributes:
        url: Its address.
        folder: The folder in the cache.
        sum: Its SHA-256 sum in hexadecimal, if known; a copy with another one is rejected.
    """

    url: str
    folder: str
    sum: str | None = None

    def load(self) -> tuple[Splits, str]:
        """Return the records, and the address with the copy's SHA-256 sum."""
        import pooch  # slow to import

        file = download_once(self.url, cache_folder() / self.folder)
        found = pooch.file_hash(str(file))
        if self.sum not in (None, found):
            raise MolfError(
                f"{file}: its SHA-256 sum is {found}, not {self.sum} as published at {self.url}; delete the file to "
                f"download it again. {ADVICE}"
            )
        return {UNNAMED: records_of(file)}, f"{self.url} (sha256 {found})"


@dataclass(frozen=True)
class Source:
    """Where the rows of a benchmark come from, and what makes a row usable.

    Attributes:
        published: The public data.
        packaged: Files of the sample in the package, if any: one per name in ``splits``, or one for both.
        splits: Names of the splits to train and to evaluate on; None to use all rows for both.
        fields: Names and types of the fields that every row must have; a dot goes into an object.
        problem: Returns what else makes a row unusable, or None.
        normalize: Brings all rows of a split of the user's into the published form, if other forms exist.
    """

    published: HubData | UrlFile
    packaged: tuple[str, ...] = ()
    splits: tuple[str, str] | None = None
    fields: Mapping[str, type] = field(default_factory=dict)
    problem: Callable[[Row], str | None] = lambda row: None
    normalize: Callable[[list[Row]], list[Row]] | None = None

    def load(self, data_path: str | None, *, sample: bool, limit: int | None) -> Split:
        """Load the rows; arguments as for ``Task.load``.

        In a folder of the user's, file names tell the splits (``local_splits``). A single file is evaluated on; it is also
        trained on if ``splits`` is None.
        """
        if data_path is not None and sample:
            raise MolfError(f"--data_path {data_path} and --sample are two sources of data; pass one of them")
        if sample and not self.packaged:
            raise MolfError("this benchmark has no sample in the package; leave out --sample")
        normalize = None
        if sample:
            files = zip(self.splits or (UNNAMED,), self.packaged, strict=True)
            found: Splits = {split: records_of(_PACKAGED / file) for split, file in files}
            origin = f"the package's {', '.join(self.packaged)}"
        elif data_path is not None:
            found, origin, normalize = local_splits(Path(data_path).expanduser()), data_path, self.normalize
        else:
            found, origin = self.published.load()

        def rows(records: Iterable[Located]) -> list[Row]:
            # A row's form may show only in later rows, so normalize sees all of them.
            usable = []
            for where, row in islice(records, None if normalize else limit):
                check_fields(row, self.fields, where)
                if (problem := self.problem(row)) is not None:
                    raise MolfError(f"{where}: {problem}")
                usable.append(row)
            if not usable:
                raise MolfError(f"{origin}: no records")
            try:
                return normalize(usable)[:limit] if normalize else usable
            except MolfError as error:
                raise MolfError(f"{origin}: {error}") from error

        if self.splits is None:
            everything = rows(chain.from_iterable(found.values()))
            return Split(everything, everything, origin)
        train, evaluation = self.splits
        held = next(
            (own for name in (evaluation, "validation", "test", UNNAMED) if (own := split_names(found, name))), []
        )
        if not held:
            raise MolfError(
                f"{origin}: no rows to evaluate on, only {', '.join(found)}; add a file with {evaluation!r} in its name"
            )
        if data_path is not None:
            tell_unused([name for name in found if name not in [*split_names(found, train), *held]], origin)
        trained, evaluated = (
            chain.from_iterable(found[name] for name in own) for own in (split_names(found, train), held)
        )
        return Split(rows(trained) if split_names(found, train) else [], rows(evaluated), origin)


class SourceTask:
    """Base of tasks whose rows come from a ``Source``."""

    source: Source

    def load(
        self, data_path: str | None = None, *, sample: bool = False, limit: int | None = None, seed: int = 0
    ) -> Split:
        """Load the rows; arguments as for ``Task.load``, but the seed is not used: ``limit`` takes the first rows."""
        return self.source.load(data_path, sample=sample, limit=limit)
