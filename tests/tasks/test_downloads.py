import contextlib
import http.server
import threading

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from molf.errors import MolfError
from molf.tasks.downloads import DownloadError, download_once, hub_splits

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serving(body, announced=None):
    """Serve one file; yield its address and the requests for it."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(announced or len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/data/published.json?x=1", asked
        server.shutdown()
        thread.join()


@pytest.fixture
def online(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


def test_a_file_is_downloaded_once(tmp_path, online, capfd):
    folder = tmp_path / "cache" / "fact"
    with serving(b"[1]") as (url, asked):
        copies = {download_once(url, folder) for _ in range(2)}
    assert copies == {folder / "published.json"} == set(folder.iterdir())
    assert (folder / "published.json").read_text() == "[1]" and len(asked) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("body", "announced", "reason"), [(None, None, "404"), (b"12345", 10, "5 bytes read")])
def test_a_failed_download_leaves_nothing_and_says_what_to_do(tmp_path, online, body, announced, reason):
    with (
        serving(body, announced) as (url, _),
        pytest.raises(DownloadError, match=rf"cannot download .*{reason}.*--data_path PATH.*--sample"),
    ):
        download_once(url, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_means_offline_but_a_copy_is_used(tmp_path, online, monkeypatch, switch):
    monkeypatch.setenv(switch, "1")
    with serving(b"[1]") as (url, asked), pytest.raises(DownloadError, match=rf"{switch} is set.*--sample"):
        download_once(url, tmp_path)
    assert asked == []
    (tmp_path / "published.json").write_text("[]")
    assert download_once(url, tmp_path) == tmp_path / "published.json"


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """The caches of the Hub's libraries, empty."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path


def cached(root, commit=COMMIT):
    """What an earlier download of ``someone/things`` left in the cache."""
    repository = root / "hub" / "datasets--someone--things"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    (snapshot / "test.jsonl").write_text('{"n": 3}\n')
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_downloaded_data_set_is_read_at_its_commit_without_a_network(offline_cache, revision):
    cached(offline_cache)
    splits, origin = hub_splits(f"someone/things{revision}", "Help yourself.")
    assert origin == f"someone/things@{COMMIT}"
    (where, row), _ = splits["train"]
    assert (where, row) == (f"{origin}, split train, row 1", {"n": 1})
    assert [row for _, row in splits["test"]] == [{"n": 3}]


def test_the_commit_that_the_hub_names_is_the_one_that_is_read(offline_cache, monkeypatch):
    cached(offline_cache)
    asked = {}

    def snapshot_download(name, **settings):
        asked.update(settings, name=name)
        return str(offline_cache / "hub" / "datasets--someone--things" / "snapshots" / COMMIT)

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub_splits("someone/things@v1", "")[1] == f"someone/things@{COMMIT}"
    assert asked == {"name": "someone/things", "repo_type": "dataset", "revision": "v1", "local_files_only": False}


@pytest.mark.parametrize(
    "name, reason",
    [
        ("someone/things", "HF_HUB_OFFLINE is set and the cache has no copy"),
        ("someone/things@v2", "HF_HUB_OFFLINE is set and the cache has no copy"),
        ("not a name", "Repo id must"),
    ],
)
def test_what_cannot_be_had_says_what_to_do(offline_cache, name, reason):
    with pytest.raises(DownloadError, match=f"cannot get the data set {name} from the Hub: {reason}.*Help yourself"):
        hub_splits(name, "Help yourself.")


def test_what_datasets_cannot_read_is_named(offline_cache):
    cached(offline_cache)
    broken = offline_cache / "hub" / "datasets--someone--things" / "snapshots" / COMMIT / "train.jsonl"
    broken.write_text("{")
    with pytest.raises(MolfError, match=f"someone/things@{COMMIT}: `datasets` cannot read it: .*Help yourself"):
        hub_splits("someone/things", "Help yourself.")
