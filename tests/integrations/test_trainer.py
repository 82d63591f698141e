"""MoLF inside the stock trainers of transformers and TRL."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import molf
from molf import MoLF, RoutingLog
from molf.integrations.routing_lines import LOG_FILES
from molf.integrations.trainer import MoLFFactory
from small import tiny_llama

OPTIONS = {"ranks": (2,), "lr": 5e-3, "lora_lr": 1e-2, "max_grad_norm": 1.0}
WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghij"]


def test_what_the_argument_of_a_trainer_takes(tmp_path):
    given = arguments(tmp_path, max_grad_norm=0.5)
    factory, options = molf.trainer_optimizer(given, **OPTIONS)
    assert (factory, options, given.max_grad_norm) == (MoLFFactory, OPTIONS, 0)
    optimizer = factory()(tiny_llama(), **options)
    assert type(optimizer) is MoLF and len(optimizer.experts) == 14


RELEASING = {"ranks": (2,), "lr": 5e-3, "lora_lr": 1e-2, "optimizer_in_backward": True}


def test_gradient_release_needs_settings_that_allow_it(tmp_path):
    for name, value in (("max_grad_norm", 1.0), ("gradient_accumulation_steps", 2)):
        given = arguments(tmp_path, **{"gradient_accumulation_steps": 1, name: value})
        with pytest.raises(ValueError, match=rf"optimizer_in_backward=True with {name}={value}"):
            molf.use_in(Trainer(tiny_llama(), given), **RELEASING)


def arguments(folder, kind=TrainingArguments, **options):
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "logging_steps": 1}
    rates = {"max_grad_norm": 0.0, "warmup_steps": 2, "lr_scheduler_type": "cosine", "seed": 5}
    saving = {"save_strategy": "steps", "save_steps": 3, "output_dir": str(folder)}
    return kind(**{**quiet, **shape, **rates, **saving, **options})


def causal_rows():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 40, (32, 10), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def trained(folder, dtype=torch.float32, resume=None, model=None, optimizer=OPTIONS, **options):
    model = tiny_llama(dtype) if model is None else model
    given = arguments(folder, **options)
    trainer = Trainer(
        model,
        given,
        train_dataset=causal_rows(),
        callbacks=[RoutingLog(folder)],
    )
    molf.use_in(trainer, **optimizer).train(resume_from_checkpoint=resume)
    return trainer


def test_gradients_are_clipped_once(tmp_path, caplog):
    """Even if the Trainer clips too, as it does by default, and whoever makes the optimizer."""
    clipped = {**OPTIONS, "max_grad_norm": 0.5}
    once = trained(tmp_path / "once", optimizer=clipped)
    assert_same_state(trained(tmp_path / "both", optimizer=clipped, max_grad_norm=1e-3), once)
    assert_same_state(trained(tmp_path / "arguments", optimizer={**OPTIONS, "max_grad_norm": 0.5}), once)
    assert not caplog.records
    given, model = arguments(tmp_path / "given", max_grad_norm=1e-3), tiny_llama()
    rates = {"weight_decay": 0.0, "lora_weight_decay": 0.0}
    torch.manual_seed(given.seed)
    own = (MoLF(model, **{**clipped, **rates}), None)
    Trainer(model, given, train_dataset=causal_rows(), optimizers=own, callbacks=[RoutingLog(tmp_path)]).train()
    clips = (
        "MoLF clips the gradients of all experts to max_grad_norm=0.5, so the Trainer's clipping to 0.001 is now off"
    )
    assert caplog.text.count(clips) == 1 and given.max_grad_norm == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of each precision."""
    return {
        dtype: trained(tmp_path_factory.mktemp(str(dtype).removeprefix("torch.")), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }


def lines(trainer):
    return (trainer_folder(trainer) / LOG_FILES["compact"]).read_text().splitlines()[1:]  # after the header


def trainer_folder(trainer):
    return Path(trainer.args.output_dir)


def assert_same_state(one, two):
    for (name, p), q in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    ours, theirs = (trainer.optimizer.state_dict()["state"] for trainer in (one, two))
    assert ours.keys() == theirs.keys()
    for key, own in ours.items():
        assert own.keys() == theirs[key].keys()
        for name, value in own.items():
            assert value.dtype == theirs[key][name].dtype and torch.equal(value, theirs[key][name]), (key, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_run_is_the_uninterrupted_one(whole, tmp_path, dtype):
    """Killed after step 5, resumed from the checkpoint of step 3."""
    killed = trained(tmp_path, dtype)
    log = tmp_path / LOG_FILES["compact"]
    written = log.read_text().splitlines(keepends=True)
    log.write_text("".join(written[:6]) + written[6][:40])  # with the header
    torch.manual_seed(77)
    resumed = trained(tmp_path, dtype, resume=str(tmp_path / "checkpoint-3"), model=tiny_llama(dtype, seed=9))
    assert resumed.state.global_step == 6
    assert_same_state(resumed, whole[dtype])
    assert_same_state(killed, whole[dtype])
    assert lines(resumed) == lines(whole[dtype])
    assert [json.loads(line)["step"] for line in lines(resumed)] == [1, 2, 3, 4, 5, 6]
    logged = [{k: v for k, v in row.items() if k in ("step", "loss", "lr/lora")} for row in resumed.state.log_history]
    expected = [
        {k: v for k, v in row.items() if k in ("step", "loss", "lr/lora")} for row in whole[dtype].state.log_history
    ]
    assert logged == expected


def test_released_gradients_change_nothing_and_resume(tmp_path):
    plain = {name: value for name, value in RELEASING.items() if name != "optimizer_in_backward"}
    usual = trained(tmp_path / "usual", optimizer=plain, gradient_accumulation_steps=1)
    whole = trained(tmp_path / "whole", optimizer=RELEASING, gradient_accumulation_steps=1)
    assert_same_state(whole, usual)
    assert lines(whole) == lines(usual) and len(lines(whole)) == 6
    last = str(tmp_path / "whole" / "checkpoint-3")
    again = {"model": tiny_llama(seed=9), "optimizer": RELEASING, "gradient_accumulation_steps": 1}
    assert_same_state(trained(tmp_path / "again", resume=last, **again), usual)
    norms = [[row["grad_norm"] for row in t.state.log_history if "loss" in row] for t in (whole, usual)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_resumed_run_with_8_bit_states_is_the_uninterrupted_one(tmp_path):
    sizes, optimizer = {"hidden_size": 64, "intermediate_size": 80, "vocab_size": 90}, {**OPTIONS, "optim_bits": 8}
    uninterrupted = trained(tmp_path, model=tiny_llama(**sizes), optimizer=optimizer)
    last = str(tmp_path / "checkpoint-3")
    resumed = trained(tmp_path / "other", resume=last, model=tiny_llama(**sizes, seed=9), optimizer=optimizer)
    dtypes = {key: x.dtype for key, x in resumed.optimizer.state[resumed.model.model.embed_tokens.weight].items()}
    assert dtypes["exp_avg"] == torch.uint8 and dtypes["exp_avg.absmax"] == torch.float32
    assert_same_state(resumed, uninterrupted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_checkpoint_is_an_ordinary_model(whole, dtype):
    trainer = whole[dtype]
    folder = trainer_folder(trainer) / "checkpoint-6"
    assert set(load_file(folder / "model.safetensors")) == set(tiny_llama().state_dict()) - {"lm_head.weight"}
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == dtype
    for p, q in zip(model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), tiny_llama(dtype).parameters(), strict=True))


def test_trainer_takes_the_steps_of_a_plain_loop(tmp_path):
    """A loop by hand with the same batches, learning rates and initial weights."""
    trainer = trained(tmp_path, save_strategy="no")
    model = tiny_llama()
    fresh = Trainer(model, arguments(tmp_path / "plain"), train_dataset=causal_rows())
    torch.manual_seed(5)
    optimizer = MoLF(model, **OPTIONS, weight_decay=0.0, lora_weight_decay=0.0)  # the Trainer's default
    for group, own in zip(optimizer.param_groups, trainer.optimizer.param_groups, strict=True):
        if "module" in group:
            group["lora_seed"] = own["lora_seed"]
    scheduler = fresh.create_scheduler(6, optimizer)
    torch.manual_seed(5)
    batches = list(fresh.get_train_dataloader())
    for step in range(6):
        optimizer.zero_grad()
        pair = batches[2 * step : 2 * step + 2]
        for batch in pair:
            (model(input_ids=batch["input_ids"], labels=batch["labels"]).loss / 2).backward()
        optimizer.step()
        scheduler.step()
    for p, q in zip(model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)
    assert optimizer.routing.winners() == trainer.optimizer.optimizer.routing.winners()


def tokenizer():
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def test_sft(tmp_path):
    rows = [{"prompt": f"{a} {b}", "completion": f" {b} {a}"} for a in "abcde" for b in "fghij"]
    model = tiny_llama()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = SFTTrainer(
        model,
        args=arguments(tmp_path, SFTConfig, max_length=16, bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[RoutingLog(tmp_path)],
    )
    molf.use_in(trainer, **OPTIONS).train()
    assert len(lines(trainer)) == 6
    assert all(not torch.equal(p, start[name]) for name, p in trainer.model.named_parameters() if p.ndim == 2)
    assert {"lr/fft", "lr/lora", "molf/fft_share", "molf/skipped_steps"} <= trainer.state.log_history[0].keys()
    LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
