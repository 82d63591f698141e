import errno
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from safetensors import SafetensorError

from molf.cli.parsing import parse_run
from molf.errors import MolfError
from molf.integrations.checkpoint_folder import checkpoints
from molf.study.config.run_config import RunConfig
from molf.study.results.result import read_result
from molf.study.run.run_folder import check_folder, clear_folder, report_full_disk, run_id
from molf.study.run.train import run
from small_runs import FILES, carry_out


def test_a_finished_run_is_not_overwritten_silently(finished, settings):
    folder = finished.copy(Path(settings["output_dir"]), method="molf_e")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"holds a finished run; pass --overwrite"):
        carry_out(settings)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    carry_out(settings, method="fft", overwrite=True, eval_limit=1)
    left = {path.name for path in folder.iterdir()}
    assert left == FILES, "neither checkpoints nor routing nor experts of the replaced run"


def test_checkpoints_of_an_unfinished_run_are_not_lost_silently(finished, settings):
    folder = finished.copy(Path(settings["output_dir"]), method="molf")
    (folder / "result.json").unlink()
    with pytest.raises(ValueError, match="holds an unfinished run that can resume; pass --overwrite"):
        carry_out(settings)
    assert len(list(folder.glob("checkpoint-*"))) == 2
    assert carry_out(settings, resume_from_checkpoint="True", eval_limit=1).training.steps == 4


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model_name_or_path", ""),
        ("model_name_or_path", "checkpoint-10"),
        ("model_name_or_path", "damaged-checkpoint-2/deep"),
        ("model_name_or_path", ".unfinished/checkpoint-3"),
        ("model_name_or_path", "adapters/lora_r2"),
        ("model_name_or_path", "export-merged"),
        ("chat_template_path", "checkpoint-10"),
        ("data_path", "predictions.jsonl.gz"),
        ("data_path", ""),
        ("eval_path", "result.json"),
        ("retention_path", "predictions_before.jsonl.gz"),
        ("fsdp_config", "config.json"),
        ("accelerator_config", "checkpoint-10"),
        ("chat_template_path", "chat_template.jinja"),
        ("data_path", "model-00001-of-00002.safetensors"),
    ],
)
def test_what_a_run_reads_it_does_not_replace(name, place, settings, tmp_path):
    folder = Path(settings["output_dir"])
    (folder / place).mkdir(parents=True)
    (folder / place / "file").write_text("kept")
    (tmp_path / "link").symlink_to(folder)
    for given in (folder / place, tmp_path / "link" / place):
        with pytest.raises(
            MolfError, match=f"^{name}={given} is .*output_dir={folder}, where the run would replace it"
        ):
            carry_out(settings | {"retention": True, name: str(given)}, overwrite=True)
    assert (folder / place / "file").read_text() == "kept"


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("links", [False, True])
def test_the_file_of_the_settings_is_not_replaced(evaluating, links, settings, tmp_path):
    folder = Path(settings["output_dir"])
    folder.mkdir()
    file = tmp_path / "mine.yaml" if links else folder / "config.yaml"
    del settings["lora_rank"]  # which MoLF does not read
    file.write_text(yaml.safe_dump(settings))
    if links:
        (folder / "config.yaml").symlink_to(file)
    config = parse_run(["--config", str(file), "--only_eval", str(evaluating), "--overwrite", "True"])
    with pytest.raises(MolfError, match=f"^config={file} is in output_dir={folder}, where the run would replace it"):
        run(config)
    assert file.read_text() == yaml.safe_dump(settings)


@pytest.mark.parametrize(
    ("evaluating", "names"),
    [
        (False, ["README.md"]),
        (False, ["adapters", "config.json", "model.safetensors", "tokenizer.json"]),
        (False, ["model-00001-of-00002.safetensors", "routing.png"]),
        (True, ["config.yaml", "predictions.jsonl.gz"]),
    ],
)
@pytest.mark.parametrize("resume", [None, "True"])
def test_files_that_no_run_wrote_are_named_and_kept(evaluating, names, resume, settings, tmp_path):
    folder = Path(settings["output_dir"])
    folder.mkdir()
    for name in [*names, "notes.txt"]:
        (folder / name).symlink_to(tmp_path / "gone")
    changes = {"only_eval": evaluating, "resume_from_checkpoint": resume, "model_name_or_path": "nowhere"}
    with pytest.raises(MolfError, match=f"^{folder} holds {', '.join(names)}, which no run wrote and this one would"):
        carry_out(settings, **changes)
    assert {path.name for path in folder.iterdir()} == {*names, "notes.txt"}
    check_folder(RunConfig.from_dict(settings | changes | {"overwrite": True}))
    (folder / ".run_id").touch()  # of a run that was killed
    check_folder(RunConfig.from_dict(settings | changes))


def test_other_files_may_be_in_the_folder(settings):
    folder = Path(settings["output_dir"])
    folder.mkdir()
    for name in ("notes.txt", "model-mine.safetensors", "data.jsonl"):
        (folder / name).touch()
    check_folder(RunConfig.from_dict(settings))
    (folder / "README.md").touch()  # which no evaluation writes
    check_folder(RunConfig.from_dict(settings | {"only_eval": True}))


@pytest.mark.parametrize("place", ["../run-2", "export-mine", "base", "checkpoint-best", "10"])
def test_other_inputs_may_be_beside_or_in_the_folder(place, settings):
    check_folder(RunConfig.from_dict(settings | {"model_name_or_path": str(Path(settings["output_dir"]) / place)}))


def test_what_would_fail_after_training_is_found_before(settings, tmp_path, monkeypatch):
    with pytest.raises(MolfError, match=r"run_name='a.udcff' is not Unicode text"):
        carry_out(settings, run_name="a\udcff")
    monkeypatch.setenv("LOG_FILE", str(tmp_path))
    with pytest.raises(MolfError, match=f"cannot write {tmp_path}: Is a directory"):
        carry_out(settings)
    assert not Path(settings["output_dir"]).exists()
    monkeypatch.setenv("LOG_FILE", "/dev/full")
    with pytest.raises(MolfError, match="^cannot write /dev/full: No space left on device"):
        carry_out(settings)
    assert not Path(settings["output_dir"]).exists()


@pytest.mark.parametrize("name", ["result.json", "predictions.jsonl.gz", "README.md", "checkpoint-3/log.csv"])
def test_the_log_is_none_of_the_files_of_the_run(name, settings, monkeypatch):
    monkeypatch.setenv("LOG_FILE", log := str(Path(settings["output_dir"]) / name))
    with pytest.raises(MolfError, match=f"^LOG_FILE={log} is in output_dir=.*, where the run would replace it"):
        check_folder(RunConfig.from_dict(settings))


def test_the_log_is_none_of_the_files_that_the_run_reads(settings, tmp_path, monkeypatch):
    (tmp_path / "data.csv").write_text("run_id,prompt,completion\n1,q,a\n")
    (tmp_path / "link").symlink_to("data.csv")
    monkeypatch.setenv("LOG_FILE", str(tmp_path / "link"))
    with pytest.raises(MolfError, match="link is also data_path, which the run reads"):
        check_folder(RunConfig.from_dict(settings | {"data_path": str(tmp_path / "data.csv")}))


def test_a_full_disk_of_the_log_is_named(settings, tmp_path, monkeypatch):
    def full(path, row, key):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("LOG_FILE", str(tmp_path / "log.csv"))
    monkeypatch.setattr("molf.study.run.record.append_csv", full)
    with pytest.raises(MolfError, match=f"the disk of {tmp_path}/log.csv is full"):
        carry_out(settings, only_eval=True, eval_limit=1)


def test_what_was_made_of_a_replaced_run_goes_with_it(settings, tmp_path):
    folder = Path(settings["output_dir"])
    for name in ("adapters/lora_r2", "export-peft", "recipe-routing", "recipe-random-3", "export-mine"):
        (folder / name).mkdir(parents=True)
    for name in ("result.json", "report.html", "notes.txt"):
        (folder / name).touch()
    (folder / "export-merged").symlink_to(tmp_path)
    clear_folder(folder, aside=False)
    assert {path.name for path in folder.iterdir()} == {"export-mine", "notes.txt"} and tmp_path.is_dir()


def test_an_evaluation_leaves_the_model_alone(settings):
    folder = Path(settings["output_dir"])
    (folder / "checkpoint-10").mkdir(parents=True)
    for place in (folder, folder / "checkpoint-10"):
        changes = {"model_name_or_path": str(place), "only_eval": True, "overwrite": True}
        check_folder(RunConfig.from_dict(settings | changes))
    with pytest.raises(MolfError, match="data_path=.*, where the run would replace it"):
        (folder / "predictions.jsonl.gz").touch()
        check_folder(RunConfig.from_dict(settings | changes | {"data_path": str(folder / "predictions.jsonl.gz")}))


def test_an_evaluation_never_replaces_files_of_the_model_that_no_run_wrote(settings):
    folder = Path(settings["output_dir"])
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "config.yaml"):
        (folder / name).touch()
    changes = {"model_name_or_path": str(folder), "only_eval": True, "overwrite": True}
    with pytest.raises(MolfError, match=r"holds config\.yaml, which no run wrote"):
        check_folder(RunConfig.from_dict(settings | changes))


def test_a_finished_run_without_checkpoints_is_not_started_anew(settings):
    """A requeued job may find that it had finished."""
    folder = Path(settings["output_dir"])
    folder.mkdir()
    (folder / "result.json").touch()
    with pytest.raises(ValueError, match="holds a finished run"):
        carry_out(settings, resume_from_checkpoint=True)


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("changes", [{}, {"overwrite": True}, {"resume_from_checkpoint": "True"}, {"only_eval": True}])
def test_a_broken_symlink_for_a_result_is_kept(changes, loops, settings, tmp_path):
    folder = Path(settings["output_dir"])
    folder.mkdir()
    link = folder / "result.json"
    link.symlink_to(link if loops else tmp_path / "unmounted" / "result.json")
    with pytest.raises(MolfError, match=f"{link} is a broken symlink to .*; repair or remove it"):
        carry_out(settings, **changes)
    assert [path.name for path in folder.iterdir()] == ["result.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_finished_run_whose_checkpoints_are_damaged_stays(overwrite, finished, settings, monkeypatch, tmp_path):
    """It is neither trained nor logged again, however it is started."""
    monkeypatch.setenv("LOG_FILE", str(tmp_path / "log.csv"))
    saved = {"save_strategy": "steps", "save_steps": 2, "eval_before": True, "method": "molf"}
    folder = finished.copy(Path(settings["output_dir"]), method="molf")
    for checkpoint in checkpoints(folder):
        (checkpoint / "optimizer.pt").write_bytes(b"cut")
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = (
        settings | saved | read_result(folder).config | {"output_dir": str(folder), "resume_from_checkpoint": "True"}
    )
    assert carry_out(again, overwrite=overwrite) == read_result(folder)
    if not overwrite:
        words = "holds a finished run, and no complete checkpoint to resume from; choose another"
        for change in ({"num_train_epochs": 9}, {"eval_limit": 1}):
            with pytest.raises(MolfError, match=words):
                carry_out(again, **change)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept
    assert not (tmp_path / "log.csv").exists()


@pytest.mark.parametrize("change", [{"eval_limit": 1}, {"eval_before": False}])
def test_a_finished_run_evaluated_otherwise_keeps_the_measurements_of_its_training(change, finished, settings):
    folder = finished.copy(Path(settings["output_dir"]), method="molf")
    before = read_result(folder)
    again = before.config | {"output_dir": str(folder), "resume_from_checkpoint": "True"}
    after = carry_out(again, **change)
    assert after.training == before.training == read_result(folder).training
    assert after.config != before.config


def test_killed_while_it_removes_its_checkpoints_a_finished_run_is_only_tidied(finished, settings):
    folder = finished.copy(Path(settings["output_dir"]), method="molf")
    note = folder / ".trained.json"
    note.write_text("{}")
    (folder / "checkpoint-2" / "optimizer.pt").unlink()
    shutil.rmtree(folder / "checkpoint-4")
    again = read_result(folder).config | {"output_dir": str(folder), "resume_from_checkpoint": "True"}
    assert carry_out(again, clean_ckpt_at_end=True) == read_result(folder)
    assert not checkpoints(folder) and not note.exists()


def test_damaged_checkpoints_are_kept_by_a_run_that_starts_anew(finished, settings):
    folder = finished.copy(Path(settings["output_dir"]), method="molf")
    (folder / "result.json").unlink()
    for checkpoint in checkpoints(folder):
        (checkpoint / "optimizer.pt").write_bytes(b"cut")
    carry_out(settings, eval_limit=1, resume_from_checkpoint=True)
    assert {path.name for path in folder.glob("*checkpoint*")} == {"damaged-checkpoint-2", "damaged-checkpoint-4"}


def test_a_file_in_the_way_of_the_folder(settings, tmp_path):
    (tmp_path / "runs").write_text("")
    settings["output_dir"] = str(tmp_path / "runs" / "mine")
    with pytest.raises(MolfError, match=rf"output_dir={tmp_path}/runs/mine is not writable \({tmp_path}/runs: Not a"):
        carry_out(settings)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250, "x" * 300 + "/run", "a\0b"])
@pytest.mark.parametrize("changes", [{}, {"resume_from_checkpoint": "True"}, {"only_eval": True}])
def test_a_path_that_cannot_name_a_folder(name, changes, settings, tmp_path):
    with pytest.raises(MolfError, match=f"^output_dir={tmp_path}/{name} cannot name a folder: ") as raised:
        carry_out(settings, output_dir=f"{tmp_path}/{name}", **changes)
    assert "\n" not in str(raised.value)


def test_a_symlink_to_nowhere(settings, tmp_path):
    Path(settings["output_dir"]).symlink_to(tmp_path / "nowhere")
    with pytest.raises(MolfError, match=r"is not writable \(.*run: No such file or directory"):
        carry_out(settings)


def test_a_read_only_folder(settings, tmp_path):
    folder = tmp_path / "archive"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a read-only file system is not permitted here")
    try:
        with pytest.raises(MolfError, match=r"archive/run is not writable \(.*archive: Read-only file system"):
            check_folder(RunConfig.from_dict(settings | {"output_dir": str(folder / "run")}))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_asking_leaves_nothing_behind(settings, tmp_path):
    check_folder(RunConfig.from_dict(settings))
    assert not Path(settings["output_dir"]).exists()


def test_a_run_keeps_its_id_until_its_result_is_there(tmp_path):
    folder = tmp_path / "run"
    first = run_id(folder)
    assert run_id(folder) == first
    (folder / "result.json").write_text(f'{{"run_id": "{first}"}}')
    second = run_id(folder)
    assert second == run_id(folder) != first, "a repeated run, which replaces a finished one"


@pytest.mark.parametrize("content", [b"", b"\xff", b"a\nb", b"0" * 31, b"g" * 32])
def test_a_damaged_id_is_replaced_with_a_warning(content, tmp_path, caplog):
    (tmp_path / ".run_id").write_bytes(content)
    (tmp_path / "result.json").write_bytes(b"\xff")
    assert re.fullmatch("[0-9a-f]{32}", run_id(tmp_path)) and run_id(tmp_path) == run_id(tmp_path)
    assert ".run_id is damaged; the run gets a new id" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "?"),
        OSError(errno.EDQUOT, "?"),
        SafetensorError("I/O error: No space left on device"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_message(error, tmp_path):
    with pytest.raises(MolfError, match=f"the disk of {tmp_path} is full: free some space"), report_full_disk(tmp_path):
        raise error


def test_other_errors_of_files_are_left_alone(tmp_path):
    with pytest.raises(OSError, match="broken") as raised, report_full_disk(tmp_path):
        raise OSError(errno.EIO, "broken")
    assert not isinstance(raised.value, MolfError)
