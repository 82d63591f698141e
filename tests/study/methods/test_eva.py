import pytest
import torch
from peft.tuners.lora import LoraLayer

from molf.study.methods import eva
from molf.study.methods.eva import _groups, add_eva_adapter, initialise_eva

ARGUMENTS = {
    "r": 4, "lora_alpha": 8.0, "target_modules": "all-linear", "init_lora_weights": "eva", "task_type": "CAUSAL_LM",
}  # fmt: skip


def rows(n=12, length=6):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": ids} for ids in torch.randint(2, 320, (n, length), generator=generator).tolist()]


def collate(batch):
    ids = torch.tensor([row["input_ids"] for row in batch])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_start_spans_the_data(tiny_model, use_rslora):
    model = add_eva_adapter(tiny_model, ARGUMENTS | {"use_rslora": use_rslora})
    initialise_eva(model, rows(), collate, seed=0)
    found = layers(model)
    assert len(found) == 14
    ranks = [layer.r["default"] for layer in found.values()]
    assert sum(ranks) == 4 * 14, "the budget is that of equal ranks"
    assert len(set(ranks)) > 1, "but they are not equal"
    assert max(ranks) <= 8
    for layer in found.values():
        A, B, r = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.r["default"]
        torch.testing.assert_close(A @ A.T, torch.eye(r), atol=1e-4, rtol=0)
        assert not B.any()
        assert layer.scaling["default"] == pytest.approx(8 / r**0.5 if use_rslora else 2.0)


def test_the_first_direction_is_the_one_with_most_variance(tiny_model):
    model = add_eva_adapter(tiny_model, ARGUMENTS)
    seen = []
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].flatten(0, 1)))
    data = rows()
    model.eval()(**{k: v for k, v in collate(data).items() if k != "labels"})
    hook.remove()
    inputs = seen[0].detach() - seen[0].detach().mean(0)
    direction = torch.linalg.svd(inputs).Vh[0]
    initialise_eva(model, data, collate, seed=0)
    first = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").lora_A["default"].weight[0]
    assert abs(torch.dot(first, direction)) > 0.95


def test_too_little_data(tiny_model):
    model = add_eva_adapter(tiny_model, ARGUMENTS)
    with pytest.raises(ValueError, match="at least 8 tokens .*there are 6"):
        initialise_eva(model, rows(n=1), collate, seed=0)


def test_a_rank_above_the_inputs(tiny_model):
    with pytest.raises(ValueError, match="lora_rank=33 with method eva exceeds the inputs of a layer, 32"):
        add_eva_adapter(tiny_model, ARGUMENTS | {"r": 33})


def test_directions_that_do_not_converge(tiny_model, monkeypatch):
    monkeypatch.setattr(eva, "MAX_BATCHES", 2)
    with pytest.raises(ValueError, match="not converged after 2 batches"):
        initialise_eva(add_eva_adapter(tiny_model, ARGUMENTS), rows(), collate, seed=0)


def test_every_group_has_enough_tokens():
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    groups = _groups(lengths, 8, seed=1)
    assert sorted(row for group in groups for row in group) == list(range(10))
    assert len(groups) > 1
    assert all(sum(lengths[row] for row in group) >= 8 for group in groups)
    assert _groups(lengths, 8, seed=1) == groups != _groups(lengths, 8, seed=2)
    assert len(_groups([4, 4], 8, seed=0)) == 1
