import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from torch.distributed.fsdp import fully_shard

from conftest import TOLERANCE
from molf import add_lora_experts
from molf.integrations.joint_forward import JointLinear
from small import tiny_llama

IDS = torch.arange(18).view(2, 9)


def experts(dtype=torch.float64, **options):
    """A model whose experts have nonzero B."""
    model = add_lora_experts(tiny_llama(dtype), ranks=(2, 4), **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


def one_by_one(model):
    """The same model with PEFT's own layers."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module) is JointLinear:
            module.__class__ = lora.Linear
    return twin


def gradients(model):
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def joint_layers(model):
    return [module for module in model.modules() if type(module) is JointLinear]


def test_equals_pefts_passes_one_by_one():
    model = experts(freeze_base=False)
    twin = one_by_one(model)
    assert len(joint_layers(model)) == 14 and not joint_layers(twin)
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=0, atol=TOLERANCE[torch.float64])
    got, want = gradients(model), gradients(twin)
    assert got.keys() == want.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], rtol=0, atol=TOLERANCE[torch.float64], msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_and_low_precision(dtype):
    model = experts(dtype)
    twin = one_by_one(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=0.05, atol=0.05)
    assert model(IDS).logits.dtype == dtype


def test_without_gradients_or_with_adapters_off_it_is_pefts_own():
    model = experts()
    twin = one_by_one(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, twin(IDS).logits)
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(model(IDS).logits, twin(IDS).logits)
    model.base_model.set_adapter("lora_r4")
    twin.base_model.set_adapter("lora_r4")
    assert torch.equal(model(IDS).logits, twin(IDS).logits)
    assert torch.equal(model.merge_and_unload()(IDS).logits, twin.merge_and_unload()(IDS).logits)


def test_biases_of_an_adapter_that_was_added_later_count():
    model = add_lora_experts(tiny_llama(torch.float64, attention_bias=True), ranks=(2,), target_modules=["q_proj"])
    config = LoraConfig(r=3, lora_bias=True, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter("biased", config)
    model.base_model.set_adapter(["lora_r2", "biased"])
    torch.testing.assert_close(model(IDS).logits, one_by_one(model)(IDS).logits, rtol=0, atol=TOLERANCE[torch.float64])


def test_dropout_has_one_mask_like_one_adapter():
    model = experts(lora_dropout=0.5).train()
    layer = joint_layers(model)[0]
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.5)
    want = layer.base_layer(x)
    for name in layer.active_adapters:
        want = want + layer.lora_B[name](layer.lora_A[name](dropped)) * layer.scaling[name]
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[torch.float64])


def test_pickles_and_saves_like_peft(tmp_path):
    model = experts()
    want = model(IDS).logits
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, want)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(torch.float64), tmp_path / "lora_r2", adapter_name="lora_r2")
    loaded.load_adapter(tmp_path / "lora_r4", "lora_r4")
    loaded.base_model.set_adapter(["lora_r2", "lora_r4"])
    torch.testing.assert_close(loaded(IDS).logits, want, rtol=0, atol=TOLERANCE[torch.float64])


def test_a_single_expert_runs_pefts_own():
    model = add_lora_experts(tiny_llama(), ranks=(2,))
    assert torch.equal(model(IDS).logits, one_by_one(model)(IDS).logits)


@pytest.mark.parametrize("alone", [False, True], ids=["with their block", "one by one"])
def test_sharded_adapters(tmp_path, alone):
    """The joint pass works if FSDP gathers adapters with their block, and PEFT's pass is used if it shards them one by one."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = experts()
        expected = model(input_ids=IDS).logits.detach()
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and "lora_" in name if alone else isinstance(module, JointLinear):
                fully_shard(module)
        fully_shard(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=TOLERANCE[torch.float64])
    finally:
        dist.destroy_process_group()
