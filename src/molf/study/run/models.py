"""Loading the model and the tokenizer that a run names."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from molf.integrations import bundled
from molf.integrations.bundled import locate
from molf.study.config.run_config import ModelConfig


def load_model_and_tokenizer(config: ModelConfig, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    A tokenizer without a padding token pads with its end-of-text token; no token is ever added.

    Args:
        config: What to load and how.
        trust_remote_code: Whether code that ships with a Hub model may run.

    Raises:
        ValueError: No model is named, the folder holds none, or its tokenizer has no token to pad with.
        OSError: The model is neither a folder nor to be had from the Hub.
    """
    source = locate(config.model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    except OSError as error:
        raise OSError(
            f"cannot load the model {config.model_name_or_path!r}: it is no folder with a model here, and the Hub has none "
            f"of that name or cannot be reached. Give a folder, a Hub id or a bundled model "
            f"({', '.join(bundled.PREFIX + name for name in bundled.MODELS)}), which need no network once installed."
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {config.model_name_or_path!r} has neither a padding nor an end-of-text token; "
                "set one of them in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def use_chat_template(tokenizer: Any, path: str) -> None:
    """Give a tokenizer another chat template, as the trainer will; evaluations need it too.

    Args:
        tokenizer: Changed in place.
        path: A Jinja file, or a folder or Hub id of a tokenizer that has the template.

    Raises:
        OSError: There is no such file or tokenizer.
    """
    try:
        if path.endswith((".jinja", ".j2")):
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        else:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(path).chat_template
    except OSError as error:
        raise OSError(f"chat_template_path={path} is neither a Jinja file nor a tokenizer: {error}") from error
