"""Published files that are downloaded once."""

import hashlib
import http.client
import os
import shutil
import urllib.parse
import urllib.request
from pathlib import Path

from molf.files import atomic_write

_OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_ON = {"1", "ON", "YES", "TRUE"}
_TIMEOUT_SECONDS = 60
BOTH_WAYS = "Either pass a copy of your own with --data_path PATH, or use the small slice in the package with --sample."
"""What to do where the published data cannot be had."""


def cache_folder() -> Path:
    """Return the folder for downloads: ``$MOLF_CACHE``, else ``molf`` in the user's cache folder."""
    if chosen := os.environ.get("MOLF_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "molf"


def download_once(url: str, folder: Path) -> Path:
    """Return the local copy of a published file, downloading it if it is not there yet.

    Args:
        url: The file's address; its last part becomes the name of the copy.
        folder: Where the copy is kept. It is made if missing.

    Raises:
        ConnectionError: If the file is not there and cannot be had, or the network is switched off by
            ``HF_HUB_OFFLINE`` or ``HF_DATASETS_OFFLINE``.
    """
    target = folder / Path(urllib.parse.urlsplit(url).path).name
    if target.exists():
        return target
    if switch := offline_switch():
        raise ConnectionError(_no_download(url, f"{switch} is set"))
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as partial:
        try:
            _download(url, partial)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(_no_download(url, str(error) or type(error).__name__)) from error
    return target


def _download(url: str, target: Path) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, target.open("wb") as file:
        shutil.copyfileobj(response, file)
        announced = response.headers.get("Content-Length")
        # A connection that closes early looks like the end of the file to copyfileobj.
        if announced is not None and file.tell() != int(announced):
            raise OSError(f"got {file.tell()} of {announced} bytes")


def offline_switch() -> str | None:
    """Return the environment variable that switches the network off, if one does."""
    return next((name for name in _OFFLINE_SWITCHES if os.environ.get(name, "").upper() in _ON), None)


def _no_download(url: str, reason: str) -> str:
    return f"cannot download {url}: {reason}. {BOTH_WAYS}"


def sha256(file: Path) -> str:
    """Return the SHA-256 sum of a file, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
