import json

from fake_runs import RESULT
from molf.cli import main


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


def test_unreadable_results_are_named_counted_and_an_error_on_request(tmp_path, capsys):
    leave(tmp_path / "good", json.dumps(RESULT))
    leave(tmp_path / "torn", "{")
    assert main(["results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"skipped: {tmp_path / 'torn' / 'result.json'}" in shown and "1 unreadable results skipped" in shown
    assert main(["results", str(tmp_path), "--strict"]) == 1
    assert "1 of 2 results cannot be read" in capsys.readouterr().err
    assert main(["results", str(tmp_path / "torn")]) == 1


def test_no_results(tmp_path, capsys):
    assert main(["results", str(tmp_path)]) == 1
    assert "there is no result.json" in capsys.readouterr().err
