import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from molf import add_lora_experts
from molf.study.methods.checkpoint_parts import ADALORA_FILE, BASE_FILE, AdaLoraState, TrainedBase
from molf.study.methods.trainable import trained_base

TOTAL, SETTLED = 8, 2


def adapted(config, rank=3, seed=0):
    torch.manual_seed(seed)
    schedule = {"total_step": TOTAL, "tinit": 1, "tfinal": SETTLED, "orth_reg_weight": 0.0}
    targets = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(LlamaForCausalLM(config), AdaLoraConfig(init_r=rank, target_r=1, **schedule, **targets))


def train(model, steps):
    """Take gradient descent steps and allocate ranks after each."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in steps:
        ids = torch.randint(0, 300, (2, 6), generator=torch.Generator().manual_seed(step))
        gradients = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained)
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = gradient
            p.data.sub_(0.1 * gradient)
        model.base_model.update_and_allocate(step)


@pytest.fixture
def config(tiny_model):
    tiny_model.config.attention_dropout = 0.0
    return tiny_model.config


# PEFT takes a layer that lost all its ranks for one that was not gathered.
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")
@pytest.mark.parametrize("stop", [1, 3, TOTAL - SETTLED, TOTAL - 1], ids=["uncut", "cutting", "last cut", "settled"])
def test_going_on_is_as_if_nothing_had_happened(stop, config, tmp_path):
    model = adapted(config)
    train(model, range(1, stop + 1))
    model.save_pretrained(tmp_path)  # what the Trainer does too: PEFT cuts its copy
    AdaLoraState().save(model, tmp_path)
    other = adapted(config, seed=1)
    other.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" not in n}, strict=False)
    AdaLoraState().restore(other, tmp_path)
    for one in (model, other):
        train(one, range(stop + 1, TOTAL + 1))
    for (name, p), q in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name
    kept = [int(p.count_nonzero()) for name, p in model.named_parameters() if ".lora_E." in name]
    assert sum(kept) == len(kept), "the ranks were cut to the target"
    assert {path.name for path in tmp_path.glob("adalora*")} == {ADALORA_FILE}


def test_another_rank_is_refused(config, tmp_path):
    AdaLoraState().save(adapted(config), tmp_path)
    words = (
        r"layers\.0\.mlp\.down_proj\.lora_A\.default is \[3, 64\] there and \[4, 64\] here; resume with the settings"
    )
    with pytest.raises(ValueError, match=words):
        AdaLoraState().restore(adapted(config, rank=4), tmp_path)


def test_a_checkpoint_of_another_method_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="was not written by a run with method adalora"):
        AdaLoraState().restore(adapted(config), tmp_path)


@pytest.fixture
def beside(tiny_model):
    return add_lora_experts(tiny_model, ranks=(2, 4), freeze_base=False)


def test_trained_weights_come_back(beside, tmp_path):
    frozen = beside.get_submodule("base_model.model.lm_head").weight.requires_grad_(False)
    TrainedBase().save(beside, tmp_path)
    before = {name: p.detach().clone() for name, p in beside.named_parameters()}
    with torch.no_grad():
        for p in beside.parameters():
            p.add_(1)
    TrainedBase().restore(beside, tmp_path)
    for name, p in beside.named_parameters():
        assert torch.equal(p, before[name]) == (".lora_" not in name and p is not frozen), name
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {BASE_FILE}


def test_another_selection_of_weights_is_refused(beside, tmp_path):
    TrainedBase().save(beside, tmp_path)
    beside.get_submodule("base_model.model.lm_head").weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"\(21 of 20\)"):
        TrainedBase().restore(beside, tmp_path)
    assert len(trained_base(beside)) == 20
