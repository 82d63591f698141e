"""Each family of models in both forms: a step, saved, loaded by plain libraries, and the same outputs."""

import logging

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from families import COMMAND, FAMILIES, output, split_page, table
from molf import MoLF, add_lora_experts, merge
from molf.integrations.lora_targets import find_targets
from molf.setup.peft_adapters import base_parameters


def steps(model, optimizer, batch):
    for _ in range(2):
        optimizer.zero_grad()
        output(model, batch).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def outputs(model, batch):
    return output(model.eval(), batch)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "GPT-2" not in name])
def test_merged(name, tmp_path):
    family = FAMILIES[name]
    model, batch = family.build(), family.batch()
    before = outputs(model, batch)
    optimizer = MoLF(model, ranks=(2,), lr=1e-2)
    steps(model, optimizer, batch)
    after = outputs(model, batch)
    assert optimizer.routing.modules and not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path), batch), after)


@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to"
)  # PEFT's loading, of models with Conv1D and nn.Linear layers
@pytest.mark.parametrize("name", FAMILIES)
def test_efficient(name, tmp_path, caplog):
    family = FAMILIES[name]
    plain, batch = family.build(), family.batch()
    plain.save_pretrained(tmp_path / "base")
    frozen = {id(p): p.detach().clone() for p in plain.parameters()}
    targets = find_targets(plain)
    with caplog.at_level(logging.INFO):
        model = add_lora_experts(plain, ranks=(2, 4))
    assert str(targets) in caplog.text
    adapted = sum(base_parameters(layer)[0].numel() for layer in model.modules() if isinstance(layer, LoraLayer))
    assert targets.share == pytest.approx(adapted / sum(p.numel() for p in frozen.values()))
    before = outputs(model, batch)
    optimizer = MoLF(model, lr=1e-2)
    steps(model, optimizer, batch)
    after = outputs(model, batch)
    assert not torch.equal(after, before)
    assert all(torch.equal(p, frozen[id(p)]) for p in model.parameters() if id(p) in frozen)
    model.save_pretrained(tmp_path / "adapters")
    base = type(plain).from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapters" / "lora_r2", adapter_name="lora_r2")
    loaded.load_adapter(tmp_path / "adapters" / "lora_r4", "lora_r4")
    loaded.base_model.set_adapter(["lora_r2", "lora_r4"])
    assert torch.equal(outputs(loaded, batch), after)
    torch.testing.assert_close(outputs(merge(model), batch), after, rtol=0, atol=1e-5)


def test_the_table_is_up_to_date():
    assert split_page()[1] == table(), f"docs/models.md is out of date: run {COMMAND}"
