import json
import os
import shlex
from pathlib import Path

import pandas as pd
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fake_runs import RESULT
from molf.cli import main
from report_runs import write_run


def leave(folder, content):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(content)


def test_a_table_and_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        leave(tmp_path / "runs" / name, json.dumps(RESULT))
    assert main(["results", "runs", "--csv", "all.csv", "--parquet", "all.parquet", "--strict"]) == 0
    shown = capsys.readouterr().out
    assert "runs/one" in shown and "runs/two" in shown and "2 runs written to all.csv" in shown
    assert (tmp_path / "all.csv").is_file() and (tmp_path / "all.parquet").read_bytes().startswith(b"PAR1")

    assert main(["results", "runs", "--csv", "all.csv", "--parquet", "all.parquet"]) == 0, "they are replaced"


@pytest.mark.parametrize("flag", ["--csv", "--parquet"])
@pytest.mark.parametrize("name", ["data.jsonl", "run/result.json", "data.csv", "data.parquet"])
def test_a_file_that_is_no_table_of_runs_is_not_replaced(flag, name, tmp_path, capsys):
    leave(tmp_path / "run", json.dumps(RESULT))
    (tmp_path / "data.jsonl").write_text('{"prompt": "q"}\n')
    (tmp_path / "data.csv").write_text("prompt,completion\nq,a\n")
    pd.DataFrame({"prompt": ["q"]}).to_parquet(tmp_path / "data.parquet")
    before = (tmp_path / name).read_bytes()
    assert main(["results", str(tmp_path), flag, str(tmp_path / name)]) == 1
    assert str(tmp_path / name) in capsys.readouterr().err and (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("flag", ["--csv", "--parquet"])
def test_a_table_that_cannot_be_written_is_one_line(flag, tmp_path, capsys):
    leave(tmp_path / "run", json.dumps(RESULT))
    assert main(["results", str(tmp_path), flag, "/dev/full"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("molf results: cannot write /dev/full: No space left on device") and said.count("\n") == 1


def test_unreadable_results_are_named_counted_and_an_error_on_request(tmp_path, capsys):
    leave(tmp_path / "good", json.dumps(RESULT))
    leave(tmp_path / "torn", "{")
    assert main(["results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"skipped: {tmp_path / 'torn' / 'result.json'}" in shown and "1 unreadable results skipped" in shown
    assert main(["results", str(tmp_path), "--strict"]) == 1
    assert "1 of 2 results cannot be read" in capsys.readouterr().err
    assert main(["results", str(tmp_path / "torn")]) == 1


def call(line):
    return main(shlex.split(line))


@pytest.fixture
def run(model_folder):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        LoraConfig(r=2, init_lora_weights=False),
        adapter_name="lora_r2",
    )
    model.save_pretrained("run/adapters")
    return "run"


def test_both_exports(run, capsys):
    assert call("export run --to peft") == 0
    shown = capsys.readouterr().out
    assert "One PEFT LoRA of rank 2" in shown and "written to run/export-peft" in shown
    assert call("export run --to merged --dtype bfloat16 --output-dir here") == 0
    shown = capsys.readouterr().out
    assert "cast to bfloat16; the cast changed no weight by more than" in shown and "written to here" in shown
    assert Path("here/model.safetensors").is_file() and Path("here/README.md").is_file()


def test_mistakes_in_an_export(run, model_folder, capsys):
    assert call("export nothing --to peft") == 1
    assert "nothing has no LoRA experts to export" in capsys.readouterr().err
    assert call("export run --to peft --output_dir run") == 1
    assert "not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call("export run")


def test_results_whose_folders_are_no_text_or_hold_none(tmp_path, capsys):
    leave(tmp_path / os.fsdecode(b"\xff"), json.dumps(RESULT))
    leave(tmp_path / os.fsdecode(b"[red]\xfe"), '{"metrics": 1}')
    assert main(["results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "\\xff" in said and "skipped: " in said and "1 unreadable results skipped" in said


@pytest.mark.parametrize("more", [["--check"], ["--html", "x.html"], ["another"]])
def test_following_is_for_one_run(more, capsys):
    assert main(["report", "runs/x", *more, "--follow"]) == 2
    assert "--follow shows one run" in capsys.readouterr().err


def test_a_run_to_follow_may_be_given_by_its_result(tmp_path, monkeypatch):
    followed = []
    monkeypatch.setattr("molf.study.run.follow.follow", lambda run, console: followed.append(run))
    assert main(["report", str(tmp_path / "run" / "result.json"), "--follow"]) == 0
    assert followed == [tmp_path / "run"]


def test_a_run_given_twice_or_by_its_result_is_shown_once_and_whole(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run")
    page = tmp_path / "page.html"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["report", str(run), str(run / "result.json"), "--html=~/page.html"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("efficacy_score") == 1 and f"routing: {run / 'routing.png'}" in shown
    assert 'id="routing"' in page.read_text() and 'id="examples"' in page.read_text()


def test_a_picture_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (run / "routing.png").mkdir()
    assert main(["report", str(run), "--html", str(tmp_path / "page.html")]) == 0
    shown = capsys.readouterr().out
    assert f"no picture, as {run / 'routing.png'} cannot be written (Is a directory)" in shown
    assert (tmp_path / "page.html").is_file()
