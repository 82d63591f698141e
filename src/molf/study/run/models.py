"""Loading the model and the tokenizer that a run names."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from molf.errors import MolfError
from molf.integrations import bundled
from molf.integrations.bundled import locate
from molf.study.config.run_config import ModelConfig


class ModelNotLoaded(MolfError, OSError):
    """A model or tokenizer could not be loaded."""


def load_model_and_tokenizer(config: ModelConfig, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    A tokenizer without a padding token pads with its end-of-text token; no token is ever added.

    Raises:
        MolfError: No model is named, it cannot be loaded, or its tokenizer has no token to pad with.
    """
    source = locate(config.model_name_or_path)
    with _explained(f"cannot load the model {config.model_name_or_path!r}", source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise MolfError(
                f"the tokenizer of {config.model_name_or_path!r} has neither a padding nor an end-of-text token; "
                "set one of them in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def use_chat_template(tokenizer: Any, path: str) -> None:
    """Replace the chat template of a tokenizer, in place: evaluations need the one that training uses.

    Args:
        tokenizer: The tokenizer.
        path: A Jinja file (``.jinja``, ``.j2``), or a folder or Hub id of a tokenizer with the template.
    """
    with _explained(f"chat_template_path={path} is neither a Jinja file nor a tokenizer", path):
        if path.endswith((".jinja", ".j2")):
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        else:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(path).chat_template


@contextmanager
def _explained(failure: str, source: str) -> Iterator[None]:
    """Raise what goes wrong in ``from_pretrained`` with the reason and what to do."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelNotLoaded(f"{failure}: {_reason(error, source)}") from error


def _reason(error: BaseException, source: str) -> str:
    causes = list(_chain(error))
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__).removeprefix("Error ")
    if Path(source).exists() or not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
        return first_line
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"access is restricted. Accept the terms on https://huggingface.co/{source}, then log in with `hf auth login` "
            "or set HF_TOKEN"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        reason = "the Hub has no model of that name, or it is private (log in with `hf auth login` or set HF_TOKEN)"
    elif os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "on", "yes"):
        reason = "it is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it"
    else:
        reason = first_line
    names = ", ".join(bundled.PREFIX + name for name in bundled.MODELS)
    return f"{reason}. Give a folder, a Hub id or a bundled model ({names}), which needs no network once installed"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
