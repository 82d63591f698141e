"""Explain why ``from_pretrained`` failed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from jinja2 import TemplateError
from safetensors import SafetensorError

from molf.errors import MolfError
from molf.integrations import bundled


class ModelNotLoaded(MolfError, OSError):
    """A model or tokenizer could not be loaded."""


@contextmanager
def explained(failure: str, source: str) -> Iterator[None]:
    """Turn errors of ``from_pretrained`` into ``ModelNotLoaded`` with the reason and what to do.

    Args:
        failure: What failed, the beginning of the message.
        source: The folder or Hub id.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError, TemplateError) as error:
        raise ModelNotLoaded(f"{failure}: {_reason(error, source)}") from error


def _reason(error: BaseException, source: str) -> str:
    causes = list(_chain(error))
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__).removeprefix("Error ")
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return "the folder has no tokenizer files; save the tokenizer there too (tokenizer.save_pretrained)"
    if folder.exists() or not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
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
