import hashlib
import json
import logging
import re

import pytest

from molf.integrations.checkpoint_folder import (
    MANIFEST,
    UNFINISHED,
    can_resume,
    checkpoints,
    commit,
    last_complete,
    recover,
    remove_checkpoints,
    rotate,
    set_aside,
    verify,
    write_manifest,
)

CONTENT = {
    "model.safetensors": b"weights",
    "optimizer.pt": b"moments",
    "adapter/a.bin": b"",
    "made_with.json": b"{}",
    "trainer_state.json": b"{}",
}


def write(folder, content=CONTENT):
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def run(tmp_path):
    """The folder of a run with the complete checkpoints 2, 4 and 10, and files that must not be touched."""
    for step in (4, 10, 2):
        write_manifest(write(tmp_path / f"checkpoint-{step}"))
    write(tmp_path / "checkpoint-best")
    (tmp_path / "checkpoint-7").write_text("no folder")
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_are_in_the_order_of_their_steps(run):
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-3])


def flip(file):
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("optimizer.pt", truncate, "optimizer.pt has 4 of 7 bytes"),
        ("model.safetensors", flip, r"model.safetensors has other contents than were written \(its SHA-256 differs\)"),
        ("adapter/a.bin", lambda file: file.unlink(), "adapter/a.bin is missing"),
        ("adapter/a.bin", lambda file: file.write_text("more"), "adapter/a.bin has 4 of 0 bytes"),
        (MANIFEST, truncate, f"{MANIFEST} is damaged: not JSON"),
        (MANIFEST, lambda file: file.write_text("[]"), f"{MANIFEST} is damaged: the file must be an object"),
        (MANIFEST, lambda file: file.write_text('{"filez": {}}'), f"{MANIFEST} is damaged: no files"),
        (MANIFEST, lambda file: file.write_text('{"files": {"a": {"bites": 3}}}'), f"{MANIFEST} is damaged: no bytes"),
        (MANIFEST, lambda file: file.write_text('{"files": {"a": {"bytes": "3"}}}'), f"{MANIFEST} is damaged: files"),
        (MANIFEST, lambda file: file.write_text("[" * 10_000), f"{MANIFEST} is damaged"),
        (MANIFEST, lambda file: file.unlink(), f"{MANIFEST} is missing"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(run, name, damage, problem, caplog):
    damage(run / "checkpoint-10" / name)
    assert re.match(problem, verify(run / "checkpoint-10"))
    with caplog.at_level(logging.WARNING):
        assert last_complete(run) == run / "checkpoint-4"
    assert "checkpoint-10 is damaged: " in caplog.text and name in caplog.text
    assert (run / "damaged-checkpoint-10").is_dir() and not (run / "checkpoint-10").exists()
    for checkpoint in checkpoints(run):
        truncate(checkpoint / "optimizer.pt")
    assert last_complete(run) is None


def test_a_complete_checkpoint_passes(run):
    assert verify(run / "checkpoint-4") is None
    assert last_complete(run) == run / "checkpoint-10"
    assert json.loads((run / "checkpoint-4" / MANIFEST).read_text())["files"].keys() == CONTENT.keys()


def test_large_files_are_not_hashed(tmp_path):
    """A truncated one is found by its size."""
    folder = write(tmp_path / "checkpoint-1", CONTENT | {"model.safetensors": bytes(2**20 + 1)})
    write_manifest(folder)
    entries = json.loads((folder / MANIFEST).read_text())["files"]
    assert {name for name, entry in entries.items() if "sha256" not in entry} == {"model.safetensors"}
    assert verify(folder) is None
    truncate(folder / "model.safetensors")
    assert verify(folder) == "model.safetensors has 1048574 of 1048577 bytes"


def test_a_manifest_of_an_earlier_version_is_accepted(run):
    """It has digests of large files too."""
    manifest = run / "checkpoint-4" / MANIFEST
    large = run / "checkpoint-4" / "model.safetensors"
    large.write_bytes(bytes(2**20 + 1))
    content = json.loads(manifest.read_text())
    digest = hashlib.sha256(large.read_bytes()).hexdigest()
    content["files"][large.name] = {"bytes": 2**20 + 1, "sha256": digest}
    manifest.write_text(json.dumps(content))
    assert verify(run / "checkpoint-4") is None


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (None, "trainer_state.json is missing"),
        (b'{"global_st', "trainer_state.json is damaged: not JSON"),
        (b"{}", "trainer_state.json is damaged: global_step must be an integer, found null"),
        (b'{"global_step": 3}', None),
    ],
)
def test_a_plain_trainers_checkpoint_is_judged_by_its_last_file(tmp_path, state, problem):
    folder = write(
        tmp_path / "checkpoint-3", {"model.safetensors": b""} | ({"trainer_state.json": state} if state else {})
    )
    found = verify(folder)
    assert found is None if problem is None else found.startswith(problem)


def test_unfinished_ones_are_removed(run):
    write(run / UNFINISHED / "checkpoint-12")
    before = names(run)
    recover(run)
    assert names(run) == [name for name in before if name != UNFINISHED]


@pytest.mark.parametrize("step", [10, 12], ids=["in place of another", "new"])
def test_a_complete_one_that_was_not_renamed_yet_is_recovered(run, step):
    """Killed after writing the manifest, or while removing an older checkpoint of the same step."""
    write_manifest(write(run / UNFINISHED / f"checkpoint-{step}", CONTENT | {"new": b"!"}))
    if step == 10:
        (run / "checkpoint-10" / "optimizer.pt").unlink()
    recover(run)
    assert last_complete(run) == run / f"checkpoint-{step}" and (run / f"checkpoint-{step}" / "new").exists()
    assert not (run / UNFINISHED).exists()


def test_a_partly_removed_one_is_removed(run):
    (run / UNFINISHED).mkdir()
    (run / "checkpoint-2").rename(run / UNFINISHED / "removing-checkpoint-2")
    recover(run)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4", "checkpoint-10"]
    assert not (run / UNFINISHED).exists()


def test_a_commit_replaces_an_older_checkpoint(run):
    write_manifest(write(run / "new", CONTENT | {"more": b"1"}))
    commit(run / "new", run / "checkpoint-4")
    assert (run / "checkpoint-4" / "more").exists() and not (run / "new").exists()


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 10]), (0, None, [2, 4, 10]), (3, None, [2, 4, 10]), (2, None, [4, 10]), (1, None, [10]),
        (2, 2, [2, 10]), (1, 2, [2, 10]), (1, 10, [10]),
    ],
)  # fmt: skip
def test_rotation_keeps_the_latest_and_the_best(run, limit, best, left):
    rotate(run, limit, best and str(run / f"checkpoint-{best}"))
    assert [path.name for path in checkpoints(run)] == [f"checkpoint-{step}" for step in left]
    assert (run / "checkpoint-best").is_dir()


def test_a_symlinked_checkpoint_is_one_and_only_its_link_is_removed(run, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (run / "checkpoint-10").rename(outside / "real")
    (run / "checkpoint-10").symlink_to(outside / "real")
    assert last_complete(run) == run / "checkpoint-10"
    write_manifest(write(run / "new"))
    commit(run / "new", run / "checkpoint-10")
    assert not (run / "checkpoint-10").is_symlink()
    for step in (3, 12):
        (run / f"checkpoint-{step}").symlink_to(outside / "real")
    (run / "checkpoint-20").symlink_to("nowhere")
    rotate(run, 4, None)
    remove_checkpoints(run)
    assert names(run) == ["checkpoint-20", "checkpoint-7", "checkpoint-best"] and verify(outside / "real") is None


def test_names_that_are_almost_those_of_checkpoints(run):
    for name in ("checkpoint-²", "checkpoint-1-2", "checkpoint-", "checkpoint--1"):
        (run / name).mkdir()
    assert len(checkpoints(run)) == 3


def test_all_that_is_set_aside_is_kept(run):
    for name in ("damaged-checkpoint-10", "damaged-checkpoint-10-2", "damaged-checkpoint-10-3"):
        write(run / "checkpoint-10", {"which": name.encode()})
        assert set_aside(run / "checkpoint-10", "damaged") == run / name
        assert (run / name / "which").read_text() == name
    remove_checkpoints(run)
    assert names(run) == ["checkpoint-7", "checkpoint-best"]


def test_what_is_removed_is_no_checkpoint_at_any_moment(run, monkeypatch):
    monkeypatch.setattr("shutil.rmtree", lambda path, **more: None)  # killed before anything in it is removed
    remove_checkpoints(run)
    assert not checkpoints(run) and not can_resume(run)


def test_resuming_needs_one_complete_checkpoint(run, tmp_path):
    for checkpoint in checkpoints(run):
        assert can_resume(run)
        truncate(checkpoint / "optimizer.pt")
    assert not can_resume(run)
    write(run / UNFINISHED / "checkpoint-12")
    assert not can_resume(run)
    write_manifest(run / UNFINISHED / "checkpoint-12")
    before = names(run)
    assert can_resume(run) and names(run) == before


def test_resuming_needs_the_state_of_an_optimizer(run):
    for checkpoint in checkpoints(run):
        (checkpoint / "optimizer.pt").unlink()
        write_manifest(checkpoint)
    assert not can_resume(run)


def test_all_are_removed(run):
    truncate(run / "checkpoint-10" / "optimizer.pt")
    last_complete(run)
    write(run / UNFINISHED / "checkpoint-12")
    remove_checkpoints(run)
    assert names(run) == ["checkpoint-7", "checkpoint-best"]
