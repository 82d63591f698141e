import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import TrainerCallback

from molf.study.config.run_config import RunConfig
from molf.study.methods.adalora import AdaLoraAllocation, orthogonality
from molf.study.run.job import job_recipe, load_job, make_trainer

LAYERS = 7
START, TARGET = 6, 4


@pytest.fixture
def make(saved_model, tmp_path):
    """Makes the trainer of an AdaLoRA run with eight steps."""

    def trainer(**changes):
        settings = {
            "model_name_or_path": saved_model, "sample": True, "limit": 8, "method": "adalora", "lora_rank": TARGET,
            "lora_dropout": 0.0, "learning_rate": 1e-2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
            "disable_tqdm": True, "output_dir": str(tmp_path / "run"),
        }  # fmt: skip
        job = load_job(RunConfig.from_dict(settings | changes))
        job.model.config.attention_dropout = 0.0
        for layer in job.model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        return make_trainer(job, job_recipe(job))

    return trainer


class Recorder(TrainerCallback):
    """Records the ranks after every step and the gradients of the first."""

    def __init__(self):
        self.ranks, self.gradients = [], None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.ranks.append(allocated_ranks(model))


def allocated_ranks(model):
    """The number of nonzero singular values of each adapted layer."""
    values = {name: p for name, p in model.named_parameters() if ".lora_E." in name}
    return {name.partition(".lora_E")[0]: int(p.count_nonzero()) for name, p in values.items()}


def train(trainer):
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


def test_the_ranks_move_to_the_target(make):
    trainer = make()
    ranks = train(trainer).ranks
    totals = [sum(step.values()) for step in ranks[1:]]  # the first step of the warm-up has a rate of 0
    assert len(ranks[0]) == LAYERS
    assert totals[0] < LAYERS * START
    assert totals[-1] == LAYERS * TARGET
    assert totals == sorted(totals, reverse=True), "the budget only shrinks"
    assert len(set(totals)) > 2, "and by and by"
    assert len(set(ranks[-1].values())) > 1, "some layers are worth more than others"
    config = trainer.model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (8, 1, 2)
    assert ranks[-3] == ranks[-2] == ranks[-1], "the last share of the steps changes no rank"


def test_without_the_callback_they_do_not(make):
    trainer = make()
    trainer.remove_callback(AdaLoraAllocation)
    ranks = train(trainer).ranks
    assert all(set(step.values()) == {START} for step in ranks[1:])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_orthogonality_is_in_the_gradient_once(make, accumulation):
    """With any number of batches per step, although TRL's loss lacks the term."""
    gradients = {}
    for weight in (0.0, 0.5):
        trainer = make(gradient_accumulation_steps=accumulation, max_steps=2, max_grad_norm=0.0)
        trainer.remove_callback(AdaLoraAllocation)
        trainer.add_callback(AdaLoraAllocation(orthogonality=weight))
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".lora_" in n}
        gradients[weight] = train(trainer).gradients
    factors = {n: p.requires_grad_() for n, p in start.items() if ".lora_E." not in n}
    expected = torch.autograd.grad(0.5 * orthogonality(factors), list(factors.values()))
    for name, gradient in zip(factors, expected, strict=True):
        assert gradient.any()
        torch.testing.assert_close(gradients[0.5][name] - gradients[0.0][name], gradient, atol=1e-6, rtol=1e-4)
    for name in start.keys() - factors.keys():
        torch.testing.assert_close(gradients[0.5][name], gradients[0.0][name])


def test_the_term_is_that_of_peft(tiny_model):
    tiny_model.config.attention_dropout = 0.0
    ranks = {"init_r": 3, "target_r": 2, "total_step": 10}
    config = AdaLoraConfig(**ranks, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model, config).eval()
    ids = torch.arange(12).reshape(2, 6)
    losses = {}
    for weight in (0.0, 0.5):
        model.peft_config["default"].orth_reg_weight = weight
        losses[weight] = model(input_ids=ids, labels=ids).loss.detach()
    factors = {n: p for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}
    torch.testing.assert_close(losses[0.5] - losses[0.0], 0.5 * orthogonality(factors).detach(), rtol=1e-5, atol=1e-6)


def test_orthonormal_factors_are_at_distance_0():
    eye = torch.eye(5)
    assert orthogonality({"lora_A": eye[:3], "lora_B": eye[:, :2]}) == 0
    assert orthogonality({"lora_A": 2 * eye[:1]}) == 3


def test_a_run_of_one_step_is_refused(make):
    with pytest.raises(ValueError, match="at least two steps"):
        make(max_steps=1).train()


def test_checkpoints_on_the_way_change_nothing(make):
    plain, saving = make(), make(save_strategy="steps", save_steps=3)
    assert train(plain).ranks == train(saving).ranks
    for (name, p), q in zip(plain.model.named_parameters(), saving.model.parameters(), strict=True):
        assert torch.equal(p, q), name
