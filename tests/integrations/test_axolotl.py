"""The plugin against axolotl's own classes where it is installed, else against its documented interface."""

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
from transformers import Trainer, TrainingArguments

from molf import MoLF
from molf.errors import MolfError
from small import tiny_llama


class BasePlugin:
    """What axolotl's base class does: nothing, in every hook."""

    def register(self, cfg):
        pass

    def get_input_args(self):
        return None

    def post_trainer_create(self, cfg, trainer):
        pass

    def create_optimizer(self, cfg, trainer):
        return None


class AxolotlTrainer(Trainer):
    """Calls a factory as axolotl's trainers do, with the Trainer's arguments after the model."""

    def create_optimizer(self, model=None):
        factory, options = self.optimizer_cls_and_kwargs
        self.optimizer = factory()(model or self.model, self.args, **options)
        return self.optimizer


@pytest.fixture
def plugin(monkeypatch):
    if importlib.util.find_spec("axolotl") is None:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
    monkeypatch.delitem(sys.modules, "molf.integrations.axolotl", raising=False)
    return importlib.import_module("molf.integrations.axolotl").MoLFPlugin()


def trainer_in(folder):
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(output_dir=str(folder), max_steps=2, learning_rate=2e-3, **quiet)
    return AxolotlTrainer(tiny_llama(), args, train_dataset=rows)


def test_names_are_checked_before_anything_is_loaded(plugin):
    arguments = sys.modules["molf.integrations.axolotl"].MoLFArgs
    assert arguments(molf={"ranks": [32]}).molf == {"ranks": [32]} and arguments().molf is None
    with pytest.raises(ValueError, match="molf: molf.MoLF has no option 'rank': did you mean 'ranks'"):
        arguments(molf={"rank": [32]})


def test_it_trains_with_molf(plugin, tmp_path):
    trainer = trainer_in(tmp_path)
    plugin.post_trainer_create(SimpleNamespace(adapter=None, molf={"ranks": [2, 3]}), trainer)
    for optimizer in (plugin.create_optimizer(SimpleNamespace(), trainer), trainer.create_optimizer()):
        assert type(optimizer) is MoLF
        assert (optimizer.param_groups[-1]["lr"], optimizer.param_groups[-1]["ranks"]) == (2e-3, (2, 3))
    trainer.optimizer = None
    trainer.train()
    assert trainer.optimizer.optimizer.routing is not None


def test_its_entry_is_part_of_the_configuration(plugin):
    module, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)
    assert arguments(molf={"ranks": [8]}).molf == {"ranks": [8]} and arguments().molf is None


def test_what_is_refused(plugin, tmp_path):
    trainer = trainer_in(tmp_path)
    with pytest.raises(MolfError, match="adapter: lora trains one LoRA on a frozen base"):
        plugin.post_trainer_create(SimpleNamespace(adapter="lora", molf=None), trainer)
    with pytest.raises(TypeError, match="'rank'"):
        plugin.post_trainer_create(SimpleNamespace(adapter=None, molf={"rank": 8}), trainer)
