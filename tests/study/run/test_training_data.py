import pytest

from molf.study.config.trainer_config import build_train_config
from molf.study.run.training_data import CutTargets, cut_targets

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
    assert cut_targets(tiny_tokenizer, EXAMPLES, args) == CutTargets(settings["max_length"], dropped, truncated)


def test_only_losses_are_warned_of():
    assert CutTargets(30, 0, 0).warnings() == []
    dropped, truncated = CutTargets(30, 2, 3).warnings()
    assert dropped == "2 examples have no completion within max_length=30 and are left out"
    assert truncated.startswith("3 examples lose the end of their target to max_length=30")
