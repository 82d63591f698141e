"""The mixin on the stock Trainer: failing writes, damaged checkpoints, rotation, and resuming each other's checkpoints."""

import errno
import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import molf
from molf import RoutingLog
from molf.errors import MolfError
from molf.integrations.checkpoint_folder import MANIFEST, UNFINISHED, checkpoints, verify
from molf.integrations.whole_checkpoints import WholeCheckpoints
from small import tiny_llama


class WholeTrainer(WholeCheckpoints, Trainer):
    pass


def rows():
    ids = torch.randint(3, 40, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def make(folder, kind=WholeTrainer, **options):
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    shape = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "max_grad_norm": 0,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    trainer = kind(
        tiny_llama(),
        TrainingArguments(output_dir=str(folder), **{**quiet, **shape, **options}),
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=[RoutingLog(folder)],
    )
    return molf.use_in(trainer, ranks=(2,), lr=5e-3)


def steps(folder):
    return [int(path.name.removeprefix("checkpoint-")) for path in checkpoints(folder)]


def same_weights(one, two):
    return all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = make(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def test_every_checkpoint_has_a_manifest_and_holds_what_a_plain_one_does(whole, tmp_path):
    plain = make(tmp_path, Trainer)
    plain.train()
    folder = Path(whole.args.output_dir)
    assert steps(folder) == steps(tmp_path) == [2, 4, 6]
    assert not (folder / UNFINISHED).exists()
    for checkpoint in checkpoints(folder):
        assert verify(checkpoint) is None
        there = {path.name for path in (tmp_path / checkpoint.name).iterdir()}
        assert {path.name for path in checkpoint.iterdir()} == there | {MANIFEST}
    assert same_weights(whole, plain)


@pytest.mark.parametrize(("first", "second"), [(WholeTrainer, Trainer), (Trainer, WholeTrainer)])
def test_a_plain_trainer_and_this_one_resume_each_others_checkpoints(first, second, whole, tmp_path):
    make(tmp_path, first, save_total_limit=2).train()
    assert steps(tmp_path) == [4, 6]
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = make(tmp_path, second)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_weights(resumed, whole)


def test_the_best_one_is_known_by_its_name(tmp_path):
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_total_limit=1)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert Path(best) in checkpoints(tmp_path) and verify(Path(best)) is None
    assert UNFINISHED not in (checkpoints(tmp_path)[-1] / "trainer_state.json").read_text()


def test_a_truncated_one_is_reported_and_the_one_before_used(whole, tmp_path, caplog):
    make(tmp_path).train()
    with (tmp_path / "checkpoint-6" / "optimizer.pt").open("r+b") as file:
        file.truncate(1000)
    resumed = make(tmp_path)
    with caplog.at_level(logging.WARNING):
        checkpoint = resumed.find_checkpoint(True)
    assert checkpoint == tmp_path / "checkpoint-4"
    assert "checkpoint-6 is damaged: optimizer.pt has 1000 of" in caplog.text
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same_weights(resumed, whole)
    assert steps(tmp_path) == [2, 4, 6]


@pytest.mark.parametrize("given", [True, "checkpoint-6"])
def test_one_without_optimizer_state_is_not_resumed_from(given, tmp_path):
    make(tmp_path, save_only_model=True).train()
    with pytest.raises(MolfError, match=r"checkpoint-6 has no optimizer state \(save_only_model\).*--overwrite"):
        make(tmp_path).find_checkpoint(given if given is True else str(tmp_path / given))


def test_nothing_to_go_on_from(tmp_path, caplog):
    trainer = make(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert trainer.find_checkpoint(True) is None
    assert f"no checkpoint in {tmp_path} yet: training starts from the beginning" in caplog.text
    assert trainer.find_checkpoint(False) is None


def test_a_given_one_that_is_not_whole_is_refused(tmp_path):
    make(tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "scheduler.pt").unlink()
    trainer = make(tmp_path)
    words = r"checkpoint-2 is not a complete checkpoint: scheduler.pt is missing; give another one, or True"
    with pytest.raises(ValueError, match=words):
        trainer.find_checkpoint(str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="there is no folder"):
        trainer.find_checkpoint(str(tmp_path / "checkpoint-3"))


def test_going_on_from_an_earlier_one_sets_the_later_ones_aside(whole, tmp_path):
    """Otherwise the next start would resume from steps of another continuation."""
    make(tmp_path).train()
    trainer = make(tmp_path, max_steps=4, save_total_limit=2)
    checkpoint = trainer.find_checkpoint(str(tmp_path / "checkpoint-2"))
    assert steps(tmp_path) == [2]
    assert {path.name for path in tmp_path.glob("superseded-*")} == {f"superseded-checkpoint-{n}" for n in (4, 6)}
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert steps(tmp_path) == [2, 4]


@pytest.mark.parametrize("name", ["superseded-checkpoint-2", "latest", "copy"])
def test_going_on_from_a_checkpoint_of_any_name(name, whole, tmp_path):
    make(tmp_path).train()
    given = tmp_path / name
    if name == "latest":
        given.symlink_to("checkpoint-2")
    else:
        (tmp_path / "checkpoint-2").rename(given)
        shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-2")  # of another continuation
    trainer = make(tmp_path)
    checkpoint = trainer.find_checkpoint(str(given))
    assert checkpoint == given and given.is_dir()
    assert steps(tmp_path) == ([2] if name == "latest" else [])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert same_weights(trainer, whole)


def test_a_checkpoint_without_a_manifest_is_used_with_a_warning_or_not_at_all(tmp_path, caplog):
    make(tmp_path).train()
    (tmp_path / "checkpoint-6" / MANIFEST).unlink()
    with caplog.at_level(logging.WARNING):
        assert make(tmp_path).find_checkpoint(True) == tmp_path / "checkpoint-6"
    assert f"checkpoint-6 has no {MANIFEST}: only that a Trainer wrote it to its end is known" in caplog.text
    (tmp_path / "checkpoint-6" / "made_with.json").write_text("{}")  # a run's, which had one
    assert make(tmp_path).find_checkpoint(True) == tmp_path / "checkpoint-4"


def failing(original, at):
    """Make the ``at``-th call of a function fail as on a full disk."""
    calls = iter(range(at))

    def write(*given, **options):
        if next(calls, None) == at - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*given, **options)

    return write


@pytest.mark.parametrize("name", ["_save_optimizer_and_scheduler", "_save_rng_state", "save_model"])
def test_a_write_that_fails_leaves_the_last_good_one(name, tmp_path, monkeypatch):
    trainer = make(tmp_path, save_total_limit=1)
    monkeypatch.setattr(trainer, name, failing(getattr(trainer, name), at=2))
    words = (
        r"checkpoint-4 cannot be written: .*No space left.* MiB free there\); the last complete one is .*checkpoint-2"
    )
    with pytest.raises(OSError, match=words):
        trainer.train()
    assert steps(tmp_path) == [2] and verify(tmp_path / "checkpoint-2") is None
    assert not (tmp_path / UNFINISHED).exists()


def test_an_error_of_another_kind_stays_what_it_is(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        trainer.train()


@pytest.mark.parametrize("kilobytes", [300, 360, 460])
def test_a_disk_that_is_full(kilobytes, whole, tmp_path):
    """A real full disk: torch and safetensors raise different errors."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        with pytest.raises(OSError, match=r"checkpoint-\d cannot be written: .* MiB free there"):
            make(folder, save_steps=1).train()
        there = steps(folder)
        assert there and all(verify(path) is None for path in checkpoints(folder))
        shutil.move(folder / f"checkpoint-{there[-1]}", tmp_path / f"checkpoint-{there[-1]}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    resumed = make(tmp_path / "more")
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{there[-1]}"))
    assert same_weights(resumed, whole)
