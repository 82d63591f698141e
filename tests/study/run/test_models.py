import copy
import json
from pathlib import Path

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import LlamaForSequenceClassification

from molf.errors import MolfError
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


def test_a_model_without_a_language_model_head_is_refused(saved_model, tiny_model):
    LlamaForSequenceClassification(tiny_model.config).save_pretrained(saved_model)
    with pytest.raises(
        MolfError, match=r"has no weights for lm_head.weight \(1 missing\), which would be random; .*classifier"
    ):
        load_model_and_tokenizer(ModelConfig(saved_model))


def test_a_tokenizer_that_cannot_pad_is_refused(saved_model):
    path = Path(saved_model) / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: value for name, value in settings.items() if name not in ("eos_token", "pad_token")})
    )
    with pytest.raises(ValueError, match="neither a padding nor an end-of-text token"):
        load_model_and_tokenizer(ModelConfig(saved_model))


def test_offline_a_hub_id_says_what_else_there_is():
    with pytest.raises(OSError, match=r"'no-such/model': it is not in the local cache.*bundled:smollm2-135m") as raised:
        load_model_and_tokenizer(ModelConfig("no-such/model"))
    assert isinstance(raised.value, MolfError) and raised.value.__cause__ is not None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (GatedRepoError, r"access is restricted. Accept the terms on https://huggingface.co/org/model, then log in"),
        (RepositoryNotFoundError, "the Hub has no model of that name, or it is private .*bundled:"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(kind, words, monkeypatch):
    def refuse(*given, **more):
        raise OSError("we cannot") from kind.__new__(kind)

    monkeypatch.setattr("molf.study.run.models.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(MolfError, match=words):
        load_model_and_tokenizer(ModelConfig("org/model"))


def test_a_folder_without_weights_is_not_said_to_be_missing(saved_model):
    Path(saved_model, "model.safetensors").unlink()
    with pytest.raises(MolfError, match=f"cannot load the model '{saved_model}': .*no file named model.safetensors"):
        load_model_and_tokenizer(ModelConfig(saved_model))


def test_damaged_weights_are_told(saved_model):
    Path(saved_model, "model.safetensors").write_bytes(b"damaged!")
    with pytest.raises(MolfError, match="cannot load the model"):
        load_model_and_tokenizer(ModelConfig(saved_model))


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
        with pytest.raises(OSError, match="is neither a Jinja template nor a tokenizer"):
            use_chat_template(own, missing)
