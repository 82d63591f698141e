import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from molf.errors import MolfError
from molf.study.config.run_config import PUBLISHED_RECIPE, MethodConfig, RunConfig, TaskConfig, folder_name


def test_the_published_recipe_fills_in_what_is_not_given():
    config = RunConfig(train={"learning_rate": 1e-4})
    assert config.train["learning_rate"] == 1e-4
    assert config.train["weight_decay"] == 0.1
    effective = (config.train["per_device_train_batch_size"], config.train["gradient_accumulation_steps"])
    assert effective == (8, 4)
    assert PUBLISHED_RECIPE["learning_rate"] == 5e-5, "a run must not change the recipe"


@pytest.mark.parametrize("method", ["molf_e", "lora", "rslora", "adalora"])
def test_every_setting_survives_yaml(method):
    settings = {
        "model_name_or_path": "org/model",
        "task": "sql",
        "limit": 7,
        "method": method,
        "ranks": [4, 8],
        "lora_learning_rate": 3e-5,
        "learning_rate": 1e-5,
        "max_length": None,
        "output_dir": "somewhere",
    }
    config = RunConfig.from_dict(settings)
    again = RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.resolved().to_dict())))
    assert again == config.resolved()
    assert {name: again.to_dict()[name] for name in settings} == settings


def test_secrets_are_never_written():
    assert "hub_token" not in RunConfig(train={"hub_token": "hf_secret"}).to_dict()


def test_a_folder_may_begin_with_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = RunConfig.from_dict({"output_dir": "~/here"}).resolved()
    assert (config.output_dir, config.train["output_dir"]) == (tmp_path / "here", str(tmp_path / "here"))
    assert RunConfig.from_dict({"output_root": "~/runs", "run_name": "mine"}).output_dir == tmp_path / "runs" / "mine"


def test_output_dir_is_named_after_what_differs():
    base = {"model_name_or_path": "org/Small-1B", "output_root": "root"}
    names = [
        RunConfig.from_dict(base | change).output_dir.name
        for change in (
            {},
            {"method": "fft"},
            {"method": "lora"},
            {"method": "dora"},
            {"method": "molf_e"},
            {"lora_dropout": 0.05},
            {"lora_learning_rate": 1e-4},
            {"learning_rate": 1e-4},
            {"ranks": [8, 32]},
            {"score": "pfn"},
            {"task": "med"},
            {"limit": 5},
            {"seed": 1},
            {"lr_scheduler_type": "linear"},
            {"only_eval": True},
            {"model_name_or_path": "bundled:smollm2-135m"},
        )
    ]
    assert len(set(names)) == len(names)
    assert names[0] == "molf-Small-1B-fact-r128-epd-lr5e-05-cosine-s42"
    assert RunConfig.from_dict(base).output_dir.parent.name == "root"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"recipe": "published"}, "molf-m-fact-r128-epd-lr5e-05-lora5e-05-cosine-s42"),
        ({"top_k": 2}, "molf-m-fact-r128-epd-k2-lr5e-05-cosine-s42"),
        ({"method": "molf_e"}, "molf_e-m-fact-r32_128-epd-lr5e-05-cosine-s42"),
    ],
)
def test_a_name_tells_rates_and_top_k(changes, name):
    config = RunConfig.from_dict({"model_name_or_path": "m", "task": "fact", "method": "molf", **changes})
    assert config.run_name == name


def test_a_given_folder_and_name_win():
    config = RunConfig.from_dict({"output_dir": "here", "run_name": "mine"}).resolved()
    assert str(config.output_dir) == "here"
    assert config.train["run_name"] == "mine"


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, False), ("True", True), (True, True), ("false", False), ("runs/x/checkpoint-3", "runs/x/checkpoint-3")],
)
def test_resume_from(given, expected):
    assert RunConfig(train={"resume_from_checkpoint": given}).resume_from == expected


@pytest.mark.parametrize("name", ["limit", "selection_limit", "eval_limit", "eval_batch_tokens"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        TaskConfig(**{name: 0})


def test_lists_are_not_shared_between_configurations():
    MethodConfig().ranks.append(4)
    assert MethodConfig().ranks == [128]


def test_what_a_method_fills_in():
    molf, efficient, lora = MethodConfig(), MethodConfig(method="molf_e"), MethodConfig(method="lora")
    assert (molf.ranks, molf.fft_expert, molf.freeze_non_linear, molf.use_rslora) == ([128], True, False, True)
    assert (efficient.ranks, efficient.fft_expert, efficient.freeze_non_linear) == ([32, 128], False, True)
    assert (lora.use_rslora, MethodConfig(method="rslora").use_rslora) == (False, True)
    assert MethodConfig(method="molf_e", ranks=[4], freeze_non_linear=False).ranks == [4]
    assert MethodConfig(method="molf_e", freeze_non_linear=False).freeze_non_linear is False


def test_molf_without_its_fft_expert_is_molf_efficient():
    assert MethodConfig(fft_expert=False) == MethodConfig(method="molf_e")
    assert MethodConfig(method="lora", fft_expert=False).method == "lora", "molf's settings mean nothing to others"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "molf_e", "fft_expert": True}, "fft_expert=True with method molf_e"),
        ({"method": "rslora", "use_rslora": False}, "use method lora"),
        ({"method": "adalora", "use_rslora": True}, "alpha/rank"),
        ({"method": "lora_plus", "loraplus_lr_ratio": 0.5}, "loraplus_lr_ratio=0.5"),
        ({"ranks": [0]}, r"ranks=\[0\]: give ranks of at least 1, each once"),
        ({"ranks": [8, 8]}, r"ranks=\[8, 8\]: give ranks of at least 1, each once"),
        ({"method": "lora", "lora_rank": 0}, "lora_rank=0 must be at least 1"),
        ({"lora_alpha": 0.0}, r"lora_alpha=0\.0 must be a finite number above 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf must be a finite number above 0"),
        ({"lora_dropout": 2.0}, r"lora_dropout=2\.0 must be at least 0 and below 1"),
        ({"lora_dropout": -0.5}, r"lora_dropout=-0\.5 must be at least 0 and below 1"),
        ({"lora_dropout": float("nan")}, "lora_dropout=nan must be at least 0 and below 1"),
        ({"lora_learning_rate": -1e-3}, r"lora_learning_rate=-0\.001 must be a finite number, 0 or more"),
        ({"lora_weight_decay": float("nan")}, "lora_weight_decay=nan must be a finite number, 0 or more"),
        ({"method": "lora_plus", "loraplus_lr_ratio": float("nan")}, "loraplus_lr_ratio=nan must be a finite number"),
        ({"top_k": 3}, "top_k=3: choose between 1 and 2, the number of experts"),
        ({"method": "molf_e", "top_k": 0}, "top_k=0: choose between 1 and 2, the number of experts"),
    ],
)
def test_contradictions(settings, message):
    with pytest.raises(ValueError, match=message):
        MethodConfig(**settings)


def test_configuration_needs_no_torch():
    code = "import sys, molf.study.config.run_config, molf.study.config.sameness; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


NO_NAMES = ["", ".", "..", ".hidden", "../up", "a/b", "/abs", "a\nb", "a\0b", "\ud800", "x" * 201, "é" * 101]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_cannot_name_a_folder_is_refused(name):
    with pytest.raises(MolfError, match=r"^run_name=.* cannot name a folder: give up to 200 printable characters"):
        folder_name(name, "run_name")
    if name:  # an empty one is none: the name is made up
        with pytest.raises(MolfError, match="cannot name a folder"):
            RunConfig(train={"run_name": name}).resolved()
        assert RunConfig(train={"run_name": name, "output_dir": "x"}).output_dir == Path("x")


@pytest.mark.parametrize("name", ["a", "a..b", "Ünï 1", "molf-r2_4-lr0.0001", "-", "x" * 200])
def test_plain_names_of_folders(name):
    assert folder_name(name, "?") == name
