import pytest

from forked import on_two_ranks
from molf.study.config.trainer_config import build_train_config
from molf.study.engine.examples import tokenize_examples
from molf.study.run import training_data
from molf.study.run.training_data import CutTargets, cut_targets, tokenize_training_data

EXAMPLES = [
    {"prompt": "The capital of Italy is", "completion": " Rome"},
    {"prompt": "king " * 40, "completion": " Rome"},
    {"prompt": "The king is", "completion": " French" * 30},
]


@pytest.mark.parametrize(
    "settings, dropped, truncated",
    [
        ({"max_length": 30}, 1, 1),
        ({"max_length": 1000}, 0, 0),
        ({"max_length": None}, 0, 0),
        pytest.param(
            {"max_length": 30, "truncation_mode": "keep_end"},
            0,
            1,
            marks=pytest.mark.filterwarnings("ignore:The `'keep_end'`:FutureWarning"),  # by TRL 1.16
        ),
        ({"max_length": 30, "packing": True, "packing_strategy": "bfd"}, 1, 1),
        ({"max_length": 30, "packing": True, "packing_strategy": "wrapped"}, 0, 0),
    ],
)
def test_targets_that_max_length_cuts_are_counted(tiny_tokenizer, tmp_path, settings, dropped, truncated):
    args = build_train_config({"output_dir": str(tmp_path), **settings})
    tokens = tokenize_examples(tiny_tokenizer, EXAMPLES)
    assert cut_targets(tokens, args) == CutTargets(settings["max_length"], dropped, truncated)


@pytest.mark.parametrize(("completion_only", "first"), [(None, -100), (True, -100), (False, "itself")])
def test_the_loss_is_on_what_the_settings_say(tiny_tokenizer, tmp_path, completion_only, first):
    args = build_train_config({"output_dir": str(tmp_path), "completion_only_loss": completion_only})
    rows, _ = tokenize_training_data(tiny_tokenizer, EXAMPLES, args)
    for row in rows:
        assert row["labels"][0] == (row["input_ids"][0] if first == "itself" else first)
        assert row["labels"][-1] == row["input_ids"][-1] == tiny_tokenizer.eos_token_id


def test_only_the_first_rank_tokenises(tiny_tokenizer, tmp_path, monkeypatch):
    args = build_train_config({"output_dir": str(tmp_path)})

    def rank_of_two(rank):
        monkeypatch.setattr(training_data, "tokenize_examples", tokenize_examples if rank == 0 else None)
        rows, cut = tokenize_training_data(tiny_tokenizer, EXAMPLES, args)
        return rows.to_list(), cut

    first, second = on_two_ranks(rank_of_two, tmp_path)
    assert first == second and len(first[0]) == len(EXAMPLES)


def test_only_losses_are_warned_of():
    assert CutTargets(30, 0, 0).warnings() == []
    dropped, truncated = CutTargets(30, 2, 3).warnings()
    assert dropped == "2 examples have no completion within max_length=30 and are left out"
    assert truncated.startswith("3 examples lose the end of their target to max_length=30")
