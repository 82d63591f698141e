import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from molf.errors import MolfError
from molf.study.results.result import read_result
from small_runs import carry_out
from tiny_checkpoints import SENTENCE, byte_tokenizer


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


def test_a_model_of_few_positions_reads_as_much_as_it_can(settings, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=40, n_embd=32, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer([SENTENCE], 300, pad_token="</s>").save_pretrained(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{row}?", "completion": " yes"}) + "\n" for row in range(8)))
    few = {"model_name_or_path": str(tmp_path / "model"), "task": "custom", "data_path": str(data), "sample": False}
    result = carry_out(settings, method="fft", retention=True, max_length=40, **few)
    assert result.retention.loss_rise.n == 48


def test_a_text_with_a_token_that_the_model_lacks_is_named(settings, shared_model, tmp_path):
    for file in Path(shared_model).iterdir():
        shutil.copy(file, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["Zweiundvierzig"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "kept.jsonl").write_text(json.dumps({"text": "It is Zweiundvierzig."}) + "\n")
    with pytest.raises(MolfError, match="a text of .*kept.jsonl has the token 'Zweiundvierzig' of id"):
        carry_out(
            settings, model_name_or_path=str(tmp_path), retention=True, retention_path=str(tmp_path / "kept.jsonl")
        )
