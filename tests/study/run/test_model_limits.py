"""Rows that a model cannot read are refused before the training, and so by a dry run."""

import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    RobertaConfig,
)

from molf.errors import MolfError
from molf.study.run.dry_run import make_plan
from molf.study.run.model_limits import check_causal
from small_runs import carry_out, small_config

MARKED = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}\
{{ messages[0].content }}{% generation %}{{ messages[1].content }}{% endgeneration %}"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(*prompts):
    return [{"prompt": prompt, "completion": " king"} for prompt in prompts]


@pytest.fixture
def learned(shared_model, tmp_path):
    """A model with 32 learned positions."""
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 320}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(shared_model).save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


@pytest.fixture
def data(tmp_path):
    def data(train, held):
        paths = write(tmp_path / "train.jsonl", train), write(tmp_path / "held.jsonl", held)
        return {"task": "custom", "data_path": paths[0], "eval_path": paths[1], "sample": False}

    return data


def plan(settings, **changes):
    return make_plan(small_config(settings, **changes))


def small(kind, **more):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "vocab_size": 320,
    }
    return AutoModelForCausalLM.from_config(kind(**sizes, max_position_embeddings=64, **more))


GEMMA = {"head_dim": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "kind, more",
    [
        (BertConfig, {}),
        (RobertaConfig, {}),
        (ElectraConfig, {}),
        (Gemma3TextConfig, {"use_bidirectional_attention": True} | GEMMA),
    ],
)
def test_a_model_that_sees_later_tokens_is_refused(kind, more):
    with pytest.raises(MolfError, match="is no causal language model"):
        check_causal(small(kind, **more).train())


@pytest.mark.parametrize(
    "kind, more", [(BertConfig, {"is_decoder": True}), (Gemma3TextConfig, GEMMA), (MambaConfig, {})]
)
def test_other_models_are_as_before(kind, more):
    model = small(kind, **more).train()
    model.config._attn_implementation = "flash_attention_2"  # which needs a GPU
    model.model_dropout = torch.nn.Dropout().eval()
    state = torch.get_rng_state()
    check_causal(model)
    assert (
        model.training and not model.model_dropout.training and model.config._attn_implementation == "flash_attention_2"
    )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("changes", [{}, {"only_eval": True}])
def test_an_encoder_is_refused_before_anything_is_computed(settings, tmp_path, shared_model, changes):
    small(BertConfig).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(shared_model).save_pretrained(tmp_path / "bert")
    with pytest.raises(MolfError, match="BertLMHeadModel of .*bert' is no causal language model"):
        carry_out(settings | changes, model_name_or_path=str(tmp_path / "bert"))


LONG = "The king " * 30


@pytest.mark.parametrize(
    "train, held, message",
    [
        (
            pairs("Who", LONG),
            pairs("Who"),
            r"training row 2 needs \d+ positions, but the model has 32; pass --max_length 32",
        ),
        (pairs("Who"), pairs("Who", LONG), r"evaluation row 2 needs \d+ positions, but the model has 32; shorten or"),
    ],
)
def test_rows_longer_than_learned_positions(settings, learned, data, train, held, message):
    with pytest.raises(MolfError, match=message):
        plan(settings, **data(train, held), model_name_or_path=learned, method="fft")


def test_rows_of_all_learned_positions_are_trained_and_evaluated(settings, learned, data):
    both = data(pairs("Who", LONG), pairs("Who"))
    run = (
        settings
        | both
        | {"model_name_or_path": learned, "method": "fft", "max_length": 32, "completion_only_loss": False}
    )
    assert carry_out(run).training.dropped_examples == 1
    with pytest.raises(MolfError, match="training row 1 needs 64 positions"):
        plan(run, packing=True, packing_strategy="wrapped", max_length=64, output_dir=f"{run['output_dir']}-again")


def test_rows_held_out_for_validation_are_checked_too(settings, learned, data):
    both = data(pairs(*["Who"] * 9, LONG), pairs("The"))
    with pytest.raises(MolfError, match="validation row 1 needs .* positions, but the model has 32"):
        plan(settings, **both, model_name_or_path=learned, method="fft", eval_strategy="epoch", limit=None)


def test_rotary_positions_have_no_limit(settings, data):
    rows = pairs("Who", "The king " * 200)
    assert plan(settings, **data(rows, rows), max_length=None, method="fft").rows == (2, 2)


@pytest.fixture
def larger(shared_model, tmp_path):
    """A model whose tokenizer has one token too many."""
    folder = shutil.copytree(shared_model, tmp_path / "larger")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    while len(tokenizer) < 321:
        tokenizer.add_tokens([f"<extra{len(tokenizer)}>"])
    tokenizer.save_pretrained(folder)
    assert LlamaForCausalLM.from_pretrained(folder).config.vocab_size == 320
    return str(folder)


@pytest.mark.parametrize(
    "train, held, message", [("<extra320> ", "Who", "training row 2"), ("Who", "<extra320> ", "evaluation row 2")]
)
def test_a_token_without_an_embedding(settings, larger, data, train, held, message):
    both = data(pairs("Who", train), pairs("Who", held))
    with pytest.raises(
        MolfError, match=f"{message} has the token '<extra320>' of id 320, but the model has only 320 tokens"
    ):
        plan(settings, **both, model_name_or_path=larger)


def test_a_larger_tokenizer_is_no_matter_unless_it_is_needed(settings, larger, data):
    both = data(pairs("Who", "The"), pairs("Who"))
    assert plan(settings, **both, model_name_or_path=larger).rows == (2, 1)
    tokenizer = AutoTokenizer.from_pretrained(larger)
    tokenizer.pad_token = "<extra320>"
    tokenizer.save_pretrained(larger)
    with pytest.raises(MolfError, match="padding has the token '<extra320>'"):
        plan(settings, **both, model_name_or_path=larger)


@pytest.mark.parametrize(
    "bad, message",
    [("train", "rejects .* of conversation 2: not this"), ("held", "evaluation rows: .* of conversation 2: not")],
)
def test_a_template_that_rejects_a_row(settings, data, tmp_path, bad, message):
    (tmp_path / "t.jinja").write_text(MARKED)

    def chats(*questions):
        return [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "a"}]} for q in questions
        ]

    both = data(chats("yes", "no" if bad == "train" else "yes"), chats("yes", "no" if bad == "held" else "yes"))
    with pytest.raises(MolfError, match=message):
        plan(settings, **both, chat_template_path=str(tmp_path / "t.jinja"))


def test_an_evaluation_alone_is_checked_too(settings, learned, data):
    both = data(pairs("Who"), pairs(LONG))
    with pytest.raises(MolfError, match="evaluation row 1 needs"):
        carry_out(settings | both, model_name_or_path=learned, only_eval=True)
