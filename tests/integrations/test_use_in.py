"""``molf.use_in`` in every trainer of transformers and TRL, on tiny models."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer
from transformers import TrainingArguments as Arguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import molf
from molf import MoLF, add_lora_experts
from molf.errors import MolfError
from molf.integrations.lora_experts import unsaved_parameters
from molf.integrations.use_in import InUse
from small import tiny_llama
from tiny_checkpoints import save_tiny_checkpoint

PAIRS = [("the king", " is French."), ("the mother", " of the king"), ("tongue", " is the"), ("French", " king is")]


def tokens(texts):
    return [{"input_ids": list(text.encode()[:8]), "labels": list(text.encode()[:8])} for text, _ in texts]


def reward(completions, **_):
    return [float(len(text) % 3) for text in completions]


PREFERENCE = [{"prompt": prompt, "chosen": end, "rejected": end[::-1]} for prompt, end in PAIRS]
SAMPLED = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
TRAINERS = {
    "Trainer": (Trainer, Arguments, tokens(PAIRS), {}),
    "SFT": (SFTTrainer, SFTConfig, [{"prompt": prompt, "completion": end} for prompt, end in PAIRS], {}),
    "Reward": (RewardTrainer, RewardConfig, PREFERENCE, {}),
    "DPO": (DPOTrainer, DPOConfig, PREFERENCE, {}),
    "KTO": (
        KTOTrainer,
        KTOConfig,
        [{"prompt": prompt, "completion": end, "label": i % 2 == 0} for i, (prompt, end) in enumerate(PAIRS)],
        {},
    ),
    "GRPO": (GRPOTrainer, GRPOConfig, [{"prompt": prompt} for prompt, _ in PAIRS], SAMPLED),
    "RLOO": (RLOOTrainer, RLOOConfig, [{"prompt": prompt} for prompt, _ in PAIRS], SAMPLED),
}
REFERENCES = ["DPO", "KTO", "GRPO", "RLOO"]

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # no accelerator here


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(folder)
    return str(folder)


def load(checkpoint, kind="DPO"):
    if kind == "Reward":
        return AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1, pad_token_id=1)
    return AutoModelForCausalLM.from_pretrained(checkpoint)


def make(kind, folder, checkpoint, model=None, ref_model=None, **options):
    trainer, config, rows, own = TRAINERS[kind]
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False, "save_strategy": "no"}
    shape = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    more = {"ref_model": ref_model} if ref_model is not None else {}
    if kind in ("GRPO", "RLOO"):
        more["reward_funcs"] = reward
    return trainer(
        model=load(checkpoint, kind) if model is None else model,
        args=config(output_dir=str(folder), **{**quiet, **shape, **own, **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        **more,
    )


def optimizer_of(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_trainer(kind, tmp_path, checkpoint):
    trainer = make(kind, tmp_path, checkpoint)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert molf.use_in(trainer, ranks=(2,), lora_weight_decay=0.0) is trainer
    trainer.train()
    optimizer = optimizer_of(trainer)
    assert type(optimizer) is MoLF and optimizer.routing.chosen.any(1).all()
    moved = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])]
    assert len([name for name in moved if "_proj" in name]) == 14
    assert trainer.lr_scheduler.get_last_lr()[0] == 0 < optimizer.param_groups[0]["initial_lr"] == 1e-2


@pytest.mark.parametrize("kind", REFERENCES)
def test_the_reference_of_lora_experts_is_the_base_model(kind, tmp_path, checkpoint):
    """The first loss of a policy that equals its reference is known, and all experts train to the end."""
    model = add_lora_experts(load(checkpoint), ranks=(2, 4))
    trainer = molf.use_in(make(kind, tmp_path, checkpoint, model, max_steps=3), lr=1e-1)
    seen = watch_reference(trainer, load(checkpoint))
    trainer.train()
    assert seen and max(seen) < 1e-5, "the reference is the base model, whatever the experts have learned"
    assert "ref" not in model.peft_config and model.active_adapters == ["lora_r2", "lora_r4"]
    assert {group["experts"] for group in optimizer_of(trainer).param_groups} == {("lora_r2", "lora_r4")}
    for name, p in model.named_parameters():
        assert p.requires_grad == (".lora_" in name)


def watch_reference(trainer, base):
    """Collect how far the model without gradients and with other adapters than the experts is from a base model."""
    seen, model = [], trainer.model

    def compare(module, arguments, keywords, output):
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        if torch.is_grad_enabled() or (layer.active_adapters == ["lora_r2", "lora_r4"] and not layer.disable_adapters):
            return
        ids = keywords["input_ids"] if "input_ids" in keywords else arguments[0]
        with torch.no_grad():
            own = module.model(ids, attention_mask=keywords.get("attention_mask")).last_hidden_state
            want = base.model(ids, attention_mask=keywords.get("attention_mask")).last_hidden_state
        seen.append(float((own - want).abs().max()))

    model.get_base_model().register_forward_hook(compare, with_kwargs=True)
    return seen


def test_a_precomputed_reference(tmp_path, checkpoint):
    """TRL computes it in the constructor, with its copy of one adapter, and leaves one adapter active."""
    model = add_lora_experts(load(checkpoint), ranks=(2, 4))
    trainer = make("DPO", tmp_path, checkpoint, model, precompute_ref_log_probs=True)
    molf.use_in(trainer).train()
    assert model.active_adapters == ["lora_r2", "lora_r4"]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: the policy is its reference


def test_a_reference_that_would_train_is_refused(tmp_path, checkpoint):
    model = add_lora_experts(load(checkpoint), ranks=(2,), freeze_base=False)
    with pytest.raises(MolfError, match=r"the base model, which trains too .*: give the trainer .*ref_model="):
        molf.use_in(make("DPO", tmp_path, checkpoint, model))
    again = add_lora_experts(load(checkpoint), ranks=(2,), freeze_base=False)
    molf.use_in(make("DPO", tmp_path, checkpoint, again, ref_model=load(checkpoint))).train()


@pytest.mark.parametrize(("kind", "advice"), [("KTO", "ref_model="), ("GRPO", "merged")])
def test_a_reference_that_forgets_the_start_is_refused(kind, advice, tmp_path, checkpoint):
    model = add_lora_experts(load(checkpoint), ranks=(2, 4))
    model.get_parameter("base_model.model.model.layers.1.mlp.up_proj.lora_B.lora_r4.weight").data += 1
    with pytest.raises(MolfError, match=rf"experts that have trained \(.*lora_r4.weight\): .*{advice}"):
        molf.use_in(make(kind, tmp_path, checkpoint, model))
    if kind == "GRPO":
        molf.use_in(make(kind, tmp_path, checkpoint, add_lora_experts(molf.merge(model), ranks=(2, 4))))


def test_what_is_not_given_comes_from_the_arguments(tmp_path):
    rates = {
        "learning_rate": 2e-3,
        "weight_decay": 0.005,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-7,
        "max_grad_norm": 0.5,
    }
    args = Arguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **rates)
    one, two = (Trainer(tiny_llama(), args) for _ in range(2))
    molf.use_in(one, ranks=(2,))
    molf.use_in(two, ranks=(2,), lr=3e-3, weight_decay=0.2, betas=(0.8, 0.9), max_grad_norm=2.0)
    assert (one.args.max_grad_norm, two.args.max_grad_norm, args.max_grad_norm) == (0.0, 0.0, 0.5)
    one.args.learning_rate = 4e-3  # as a hyperparameter search does
    one, two = one.create_optimizer(), two.create_optimizer()
    group = one.param_groups[-1]
    assert (group["lr"], group["weight_decay"], group["lora_weight_decay"]) == (4e-3, 0.005, 0.005)
    assert (group["betas"], group["eps"], one.max_grad_norm) == ((0.9, 0.99), 1e-7, 0.5)
    group = two.param_groups[-1]
    assert (group["lr"], group["weight_decay"], group["lora_weight_decay"]) == (3e-3, 0.2, 0.01)
    assert (group["betas"], group["eps"], two.max_grad_norm) == ((0.8, 0.9), 1e-7, 2.0)
    assert not any(group["weight_decay"] for group in two.param_groups if all(p.ndim == 1 for p in group["params"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"is_deepspeed_enabled": True}, r"DeepSpeed.* use FSDP2.*TrainingArguments\(fsdp=True\)"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, r"has an optimizer already \(SGD\)"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, r"has an optimizer already \(SGD\)"),
    ],
    ids=["deepspeed", "optimizers", "optimizer_cls_and_kwargs"],
)
def test_trainers_that_are_refused(change, words, tmp_path):
    trainer = Trainer(tiny_llama(), Arguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    vars(trainer).update(change)
    given = trainer.optimizer_cls_and_kwargs
    with pytest.raises(MolfError, match=words):
        molf.use_in(trainer)
    assert trainer.optimizer_cls_and_kwargs is given


def test_options_that_are_refused(tmp_path, checkpoint):
    args = Arguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, gradient_accumulation_steps=2)
    for wrong, words in (
        ({"rank": 2}, "no option 'rank': did you mean 'ranks'"),
        ({"learning_rate": 1e-4}, "no option 'learning_rate': did you mean 'lr'"),
        ({"zzz": 1}, "no option 'zzz': It has ranks, lr, lora_lr"),
    ):
        with pytest.raises(TypeError, match=words):
            molf.use_in(Trainer(tiny_llama(), args), **wrong)
    for given, words in ((tiny_llama(), "got LlamaForCausalLM"), (Trainer, "got the class Trainer")):
        with pytest.raises(TypeError, match=words):
            molf.use_in(given)
    with pytest.raises(MolfError, match="optimizer_in_backward=True with gradient_accumulation_steps=2"):
        molf.use_in(Trainer(tiny_llama(), args), optimizer_in_backward=True)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    args = Arguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **best)
    trainer = Trainer(add_lora_experts(tiny_llama(), ranks=(2, 4)), args, eval_dataset=tokens(PAIRS))
    with pytest.raises(MolfError, match="load_best_model_at_end with the adapters lora_r2, lora_r4"):
        molf.use_in(trainer)


class OwnOptimizer(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        return self.optimizer


def test_a_trainer_that_makes_another_optimizer_does_not_train(tmp_path):
    args = Arguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = molf.use_in(OwnOptimizer(tiny_llama(), args, train_dataset=tokens(PAIRS)))
    with pytest.raises(MolfError, match="this trainer built AdamW although molf.use_in gave it MoLF"):
        trainer.train()


def test_another_call_replaces_the_first(tmp_path):
    trainer = Trainer(
        tiny_llama(), Arguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_grad_norm=0)
    )
    molf.use_in(molf.use_in(trainer, ranks=(2,), max_grad_norm=1.0), ranks=(3,))
    assert trainer.create_optimizer().param_groups[-1]["ranks"] == (3,)
    assert sum(isinstance(callback, InUse) for callback in trainer.callback_handler.callbacks) == 1


def test_another_call_keeps_the_clipping_of_the_arguments(tmp_path):
    trainer = Trainer(
        tiny_llama(), Arguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_grad_norm=0.5)
    )
    molf.use_in(molf.use_in(trainer, ranks=(2,), max_grad_norm=None), ranks=(3,))
    assert trainer.create_optimizer().max_grad_norm == 0.5 and trainer.args.max_grad_norm == 0
    trainer.optimizer = None
    with pytest.raises(MolfError, match=r"optimizer_in_backward=True with max_grad_norm=0\.5"):
        molf.use_in(trainer, ranks=(3,), optimizer_in_backward=True)
    molf.use_in(trainer, ranks=(3,), optimizer_in_backward=True, max_grad_norm=None)
    assert trainer.create_optimizer().max_grad_norm is None


def test_no_clipping_is_nobodys(tmp_path):
    trainer = Trainer(tiny_llama(), Arguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    molf.use_in(trainer, ranks=(2,), max_grad_norm=None)
    assert trainer.args.max_grad_norm == 0 and trainer.create_optimizer().max_grad_norm is None


def test_an_optim_without_effect_is_said(tmp_path, caplog):
    args = Arguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, optim="adafactor")
    molf.use_in(Trainer(tiny_llama(), args))
    assert "optim='adafactor' of the Trainer has no effect" in caplog.text


def experts_in_sft(folder, checkpoint, resume=None, plain=False):
    model = add_lora_experts(load(checkpoint), ranks=(2, 4))
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = make("SFT", folder, checkpoint, model, **saving)
    if plain:
        trainer.optimizer = MoLF(model, lr=1e-2)
    else:
        molf.use_in(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory, checkpoint):
    torch.manual_seed(0)
    return experts_in_sft(tmp_path_factory.mktemp("whole"), checkpoint)


def test_resumed_experts_all_train(whole, tmp_path, checkpoint):
    torch.manual_seed(1)
    resumed = experts_in_sft(tmp_path, checkpoint, f"{whole.args.output_dir}/checkpoint-2")
    for (name, p), q in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert optimizer_of(resumed).routing.winners() == optimizer_of(whole).routing.winners()


def test_without_use_in_a_resumed_expert_that_would_rest_is_refused(whole, tmp_path, checkpoint):
    with pytest.raises(MolfError, match=r"lora_r4 would never move: .*molf\.use_in\(trainer, \.\.\.\)"):
        experts_in_sft(tmp_path, checkpoint, f"{whole.args.output_dir}/checkpoint-2", plain=True)


@pytest.mark.parametrize("only_model", [False, True])
def test_a_checkpoint_without_the_optimizers_state_is_named(only_model, tmp_path, checkpoint, caplog):
    def trainer(steps):
        saving = {"save_strategy": "steps", "save_steps": 1, "save_only_model": only_model, "max_steps": steps}
        return molf.use_in(make("SFT", tmp_path, checkpoint, **saving), ranks=(2,))

    trainer(1).train()
    trainer(2).train(resume_from_checkpoint=True)
    assert ("step 1 has no state of the optimizer (save_only_model)" in caplog.text) == only_model


@pytest.mark.parametrize("ranks", [(2, 4), (2,)])
def test_base_weights_that_no_checkpoint_has_are_named_and_not_resumed(ranks, tmp_path, checkpoint, caplog):
    def trainer():
        model = add_lora_experts(load(checkpoint), ranks=ranks, freeze_base=False)
        return make("SFT", tmp_path, checkpoint, model, save_strategy="steps", save_steps=1)

    molf.use_in(trainer()).train()
    assert "have the adapters only, but 21 parameters of the base model train, too (base_model." in caplog.text
    with pytest.raises(
        MolfError, match=r"step 1 has the adapters only, but 21 parameters.*Give the trainer the plain model"
    ):
        molf.use_in(trainer()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    best = trainer()
    best.args.load_best_model_at_end = True
    with pytest.raises(MolfError, match="load_best_model_at_end"):
        molf.use_in(best)


def test_what_peft_saves_beside_adapters_is_no_base_weight(checkpoint):
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[1, 2], bias="all"
    )
    model = get_peft_model(load(checkpoint), config)
    assert unsaved_parameters(model, ["default"]) == []
    model.base_model.model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    assert unsaved_parameters(model, ["default"]) == ["base_model.model.model.layers.0.mlp.up_proj.weight"]
