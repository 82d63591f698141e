import json

import pytest

from molf.study.config import RunConfig
from molf.study.methods.made_with import FILE_NAME, MadeWith


def settings_of_lora(**changes):
    return RunConfig.from_dict({"method": "lora", "lora_rank": 4, "learning_rate": 1e-3, **changes})


def settings(**changes):
    return MadeWith(settings_of_lora(**changes))


def test_the_same_and_what_may_change(tmp_path):
    settings().save(None, tmp_path)
    settings().check(tmp_path)
    settings(num_train_epochs=7, output_root="elsewhere").check(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": 8}, r"was made with lora_rank=4 \(here 8\): go on"),
        (
            {"method": "rslora", "dtype": "bfloat16"},
            r"dtype=float32 \(here bfloat16\), method=lora \(here rslora\), use_rslora",
        ),
    ],
)
def test_what_differs_is_named(changes, words, tmp_path):
    settings().save(None, tmp_path)
    with pytest.raises(ValueError, match=words):
        settings(**changes).check(tmp_path)


def test_a_plain_trainers_checkpoint_is_not_asked(tmp_path):
    settings().check(tmp_path)
    assert not (tmp_path / FILE_NAME).exists()


def test_shards_are_no_whole_checkpoint(tmp_path):
    """And a checkpoint from before anything could be sharded is a whole one."""
    settings().save(None, tmp_path)
    sharded = MadeWith(settings_of_lora(), sharded=True)
    with pytest.raises(ValueError, match=r"sharded=False \(here True\)"):
        sharded.check(tmp_path)
    sharded.save(None, tmp_path)
    sharded.check(tmp_path)
    with pytest.raises(ValueError, match=r"sharded=True \(here False\)"):
        settings().check(tmp_path)
    earlier = {name: value for name, value in settings().settings.items() if name != "sharded"}
    (tmp_path / FILE_NAME).write_text(json.dumps(earlier), encoding="utf-8")
    settings().check(tmp_path)
