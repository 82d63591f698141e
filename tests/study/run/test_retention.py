import json
from pathlib import Path

import pytest

from molf.errors import MolfError
from molf.study.results.result import read_result
from small_runs import carry_out


@pytest.mark.parametrize("method", ["molf", "molf_e", "pissa"])
def test_a_run_says_what_the_model_forgot(method, settings):
    result = carry_out(settings, method=method, retention=True)
    found = result.retention
    assert found.loss_before.value > 0 and found.loss_rise.n == 32 and found.kl.value > 0
    assert found.loss_rise.value == pytest.approx(found.loss_after.value - found.loss_before.value)
    assert found.origin == "the package's samples of med, sql" and found.seconds > 0
    assert read_result(Path(settings["output_dir"])) == result
    assert result.row()["retention/loss_rise"] == found.loss_rise.value


def test_all_methods_start_from_the_same_base(settings, tmp_path):
    before = [
        carry_out(
            settings, method=method, retention=True, output_dir=str(tmp_path / method)
        ).retention.loss_before.value
        for method in ("fft", "molf_e")
    ]
    assert before[0] == pytest.approx(before[1], abs=1e-5)


def test_own_text_and_none(settings, tmp_path):
    file = tmp_path / "kept.jsonl"
    file.write_text(json.dumps({"text": "The king of France speaks French."}) + "\n")
    result = carry_out(settings, retention=True, retention_path=str(file))
    assert result.retention.origin == str(file) and result.retention.loss_rise.n == 1
    assert carry_out(settings, retention=False, overwrite=True).retention is None
    with pytest.raises(MolfError, match="is no file"):
        carry_out(settings, retention=True, retention_path=str(tmp_path / "none.jsonl"), overwrite=True)
    with pytest.raises(MolfError, match="with retention off"):
        carry_out(settings, retention=False, retention_path=str(file))
