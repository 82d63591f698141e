import copy
import json
from pathlib import Path

import pytest

from molf.study.config.run_config import ModelConfig
from molf.study.run.models import load_model_and_tokenizer, use_chat_template


def test_a_folder_loads_and_pads_with_its_end_of_text(saved_model, tiny_model):
    model, tokenizer = load_model_and_tokenizer(ModelConfig(saved_model, dtype="bfloat16"))
    assert str(model.dtype) == "torch.bfloat16"
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert len(tokenizer) == tiny_model.config.vocab_size


def test_an_own_padding_token_is_kept(saved_model):
    path = Path(saved_model) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<s>"}))
    assert load_model_and_tokenizer(ModelConfig(saved_model))[1].pad_token == "<s>"


def test_a_tokenizer_that_cannot_pad_is_refused(saved_model):
    path = Path(saved_model) / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: value for name, value in settings.items() if name not in ("eos_token", "pad_token")})
    )
    with pytest.raises(ValueError, match="neither a padding nor an end-of-text token"):
        load_model_and_tokenizer(ModelConfig(saved_model))


def test_an_unreachable_hub_id_says_what_else_there_is():
    with pytest.raises(OSError, match=r"'no-such-org/no-such-model'.*bundled:smollm2-135m"):
        load_model_and_tokenizer(ModelConfig("no-such-org/no-such-model"))


def test_a_chat_template_comes_from_a_file_or_from_another_tokenizer(tiny_tokenizer, tmp_path):
    own, other = copy.deepcopy(tiny_tokenizer), copy.deepcopy(tiny_tokenizer)
    (tmp_path / "chat.jinja").write_text("from a file")
    use_chat_template(own, str(tmp_path / "chat.jinja"))
    assert own.chat_template == "from a file"
    other.chat_template = "of another"
    other.save_pretrained(tmp_path / "other")
    use_chat_template(own, str(tmp_path / "other"))
    assert own.chat_template == "of another"
    for missing in ("missing.jinja", str(tmp_path / "missing")):
        with pytest.raises(OSError, match="is neither a Jinja file nor a tokenizer"):
            use_chat_template(own, missing)
