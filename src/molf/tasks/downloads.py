"""Published data sets, downloaded once to a cache."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from molf.errors import MolfError
from molf.tasks.records import Splits, located_splits

ADVICE = "Pass your own copy with --data_path PATH, or use the small sample in the package with --sample."
_OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


class DownloadError(MolfError, ConnectionError):
    """Published data is neither in the cache nor can be downloaded."""


def offline_switch() -> str | None:
    """Return the name of the environment variable that turns the network off, if one does."""
    on = {"1", "ON", "YES", "TRUE"}
    return next((name for name in _OFFLINE_SWITCHES if os.environ.get(name, "").upper() in on), None)


def download_once(url: str, folder: Path) -> Path:
    """Return the local copy of a published file; download it first if there is none."""
    import pooch  # slow to import

    target = folder / Path(urlsplit(url).path).name
    if target.exists():
        return target
    if switch := offline_switch():
        raise DownloadError(f"cannot download {url}: {switch} is set. {ADVICE}")
    pooch.get_logger().setLevel("WARNING")  # it prints the hash of every file
    try:
        return Path(pooch.retrieve(url, known_hash=None, fname=target.name, path=folder))
    except (OSError, ValueError) as error:
        raise DownloadError(f"cannot download {url}: {_first_line(error)}. {ADVICE}") from error


def hub_splits(name: str, advice: str = ADVICE) -> tuple[Splits, str]:
    """Return the records of a data set on the Hub and its version as ``id@commit``.

    The data set is downloaded once. Offline, the commit that was downloaded last is read. Code of the data set is never
    run: ``datasets`` reads plain data files only. ``name`` may end in ``@`` and a branch, tag or commit.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    dataset_id, _, revision = name.partition("@")
    switch = offline_switch()
    try:
        # Not load_dataset(name): offline, it reads the version it read last without saying which.
        folder = Path(
            snapshot_download(
                dataset_id, repo_type="dataset", revision=revision or None, local_files_only=switch is not None
            )
        )
    except (OSError, HFValidationError) as error:
        not_cached = switch is not None and isinstance(error, LocalEntryNotFoundError)
        reason = f"{switch} is set and the cache has no copy" if not_cached else _first_line(error)
        raise DownloadError(f"cannot get the data set {name} from the Hub: {reason}. {advice}") from error
    origin = f"{dataset_id}@{folder.name}"
    try:
        return located_splits(load_dataset(str(folder)), origin), origin
    except (DatasetsError, OSError, ValueError) as error:
        raise MolfError(f"{origin}: `datasets` cannot read it: {_first_line(error)}. {advice}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
