from types import SimpleNamespace

import pytest
import torch

from molf import add_lora_experts
from molf.study.methods.trained_base import FILE_NAME, TrainedBase, restore_base, trained_base


@pytest.fixture
def adapted(tiny_model):
    return add_lora_experts(tiny_model, ranks=(2, 4), freeze_base=False)


def save(model, folder, main=True):
    (folder / "checkpoint-3").mkdir()
    state = SimpleNamespace(global_step=3, is_world_process_zero=main)
    TrainedBase().on_save(SimpleNamespace(output_dir=str(folder)), state, None, model=model)
    return folder / "checkpoint-3"


def test_trained_weights_come_back(adapted, tmp_path):
    frozen = adapted.get_submodule("base_model.model.lm_head").weight.requires_grad_(False)
    checkpoint = save(adapted, tmp_path)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(1)
    restore_base(adapted, checkpoint)
    for name, p in adapted.named_parameters():
        assert torch.equal(p, before[name]) == (".lora_" not in name and p is not frozen), name
    assert {path.name for path in checkpoint.iterdir()} == {FILE_NAME}


def test_one_process_writes(adapted, tmp_path):
    assert not list(save(adapted, tmp_path, main=False).iterdir())


def test_another_selection_of_weights_is_refused(adapted, tmp_path):
    checkpoint = save(adapted, tmp_path)
    adapted.get_submodule("base_model.model.lm_head").weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"\(21 of 20\)"):
        restore_base(adapted, checkpoint)
    assert len(trained_base(adapted)) == 20
