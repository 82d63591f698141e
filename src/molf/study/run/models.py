"""Loading the model and the tokenizer that a run names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from molf.errors import MolfError
from molf.integrations.bundled import is_adapter, locate
from molf.integrations.loading import explained
from molf.integrations.merge import merge
from molf.study.config.run_config import ModelConfig
from molf.study.engine.bounded import bounded


def load_model_and_tokenizer(config: ModelConfig, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    The folder of a PEFT adapter gives its base model with the adapter merged into it.

    A tokenizer without a padding token pads with its end-of-text token; no token is ever added.

    Raises:
        MolfError: No model is named, it cannot be loaded, or its tokenizer has no token to pad with.
    """
    source = locate(config.model_name_or_path)
    if is_adapter(source):
        return _base_with_adapter(source, config, trust_remote_code)
    with explained(f"cannot load the model {config.model_name_or_path!r}", source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            source,
            output_loading_info=True,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    if missing := sorted(loaded["missing_keys"]):
        raise MolfError(
            f"{config.model_name_or_path!r} has no weights for {missing[0]} ({len(missing)} missing), which would be random; it "
            "is the checkpoint of another kind of model, such as a classifier, or incomplete: give a whole causal language model"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise MolfError(
                f"the tokenizer of {config.model_name_or_path!r} has neither a padding nor an end-of-text token; "
                "set one of them in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _base_with_adapter(folder: str, config: ModelConfig, trust_remote_code: bool) -> tuple[Any, Any]:
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not base:
        raise MolfError(
            f"{folder} is an adapter, and its adapter_config.json does not name its base model: write it there"
        )
    model, tokenizer = load_model_and_tokenizer(replace(config, model_name_or_path=base), trust_remote_code)
    with explained(f"cannot load the adapter {folder}", folder):
        model = merge(PeftModel.from_pretrained(model, folder))
        if any(Path(folder).glob("tokenizer*")):
            tokenizer.chat_template = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            ).chat_template
    return model, tokenizer


def use_chat_template(tokenizer: Any, path: str) -> None:
    """Replace the chat template of a tokenizer, in place: evaluations need the one that training uses.

    Args:
        tokenizer: The tokenizer.
        path: A Jinja file (``.jinja``, ``.j2``), or a folder or Hub id of a tokenizer with the template.
    """
    with explained(f"chat_template_path={path} is neither a Jinja template nor a tokenizer", path):
        if path.endswith((".jinja", ".j2")):
            template = Path(path).read_text(encoding="utf-8")
            with bounded():  # Jinja computes constants here
                _compile_jinja_template(template)
            tokenizer.chat_template = template
        else:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(path).chat_template


def use_end_token(tokenizer: Any, token: str) -> None:
    """Replace the token that ends texts, in place: rows are tokenised before the trainer would do so.

    Args:
        tokenizer: The tokenizer.
        token: The text of a token that it has.

    Raises:
        MolfError: It has no such token.
    """
    if token not in tokenizer.get_vocab():
        raise MolfError(f"eos_token={token!r} is no token of the tokenizer; give one that it has, or leave it out")
    tokenizer.eos_token = token
