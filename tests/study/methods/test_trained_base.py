import pytest
import torch

from molf import add_lora_experts
from molf.study.methods.trainable import trained_base
from molf.study.methods.trained_base import FILE_NAME, TrainedBase


@pytest.fixture
def adapted(tiny_model):
    return add_lora_experts(tiny_model, ranks=(2, 4), freeze_base=False)


def test_trained_weights_come_back(adapted, tmp_path):
    frozen = adapted.get_submodule("base_model.model.lm_head").weight.requires_grad_(False)
    TrainedBase().save(adapted, tmp_path)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(1)
    TrainedBase().restore(adapted, tmp_path)
    for name, p in adapted.named_parameters():
        assert torch.equal(p, before[name]) == (".lora_" not in name and p is not frozen), name
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {FILE_NAME}


def test_another_selection_of_weights_is_refused(adapted, tmp_path):
    TrainedBase().save(adapted, tmp_path)
    adapted.get_submodule("base_model.model.lm_head").weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"\(21 of 20\)"):
        TrainedBase().restore(adapted, tmp_path)
    assert len(trained_base(adapted)) == 20
