import shlex

import pytest

from molf.cli.parsing import parse_run, print_help, read_flags, read_yaml
from molf.errors import MolfError, UsageError
from molf.study.config.run_config import RunConfig
from molf.study.config.trainer_config import build_train_config

PUBLISHED = (
    "--model_name_or_path M --dataset_type fact --mode molf --molf_score_fn true_projected --molf_topk 1 "
    '--molf_lora_ranks "[128]" --learning_rate 5e-5 --lora_learning_rate 5e-5 --weight_decay 0.1 '
    "--lora_weight_decay 0.01 --use_rslora True --per_device_batch_size 8 --gradient_accumulation_steps 4 "
    "--num_train_epochs 2 --lr_scheduler_type cosine --warm_up_ratio 0.1 --ckpt_dir_root D --report_to none"
)


def parse(line, **kwargs):
    return parse_run(shlex.split(line), **kwargs)


def test_the_published_command(tmp_path):
    config = parse(PUBLISHED)
    assert config.model.model_name_or_path == "M"
    assert (config.task.task, config.method.method, config.method.score) == ("fact", "molf", "epd")
    assert (config.method.top_k, config.method.ranks, config.method.use_rslora) == (1, [128], True)
    assert (config.method.lora_learning_rate, config.method.lora_weight_decay) == (5e-5, 0.01)
    assert config.output_dir.parent.name == "D"
    train = build_train_config(config.train | {"output_dir": str(tmp_path)})
    assert (train.learning_rate, train.weight_decay, train.num_train_epochs) == (5e-5, 0.1, 2.0)
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (8, 4)
    assert (train.lr_scheduler_type, train.warmup_steps, train.report_to) == ("cosine", 0.1, [])


@pytest.mark.parametrize("recipe", ["--recipe published", "--mode molf"])
def test_it_is_a_recipe(recipe):
    config, plain = parse(PUBLISHED), parse(f"--model_name_or_path M --output_root D --routing_log published {recipe}")
    assert parse(f"{PUBLISHED} --recipe default").method.match_lora_rate is False  # LoRA has a rate of its own
    assert plain.resolved().to_dict() | {"lora_learning_rate": 5e-5} == config.resolved().to_dict()


def test_the_other_published_flags():
    line = (
        "--mode molf --molf_score_fn projected --molf_fft False --molf_freeze_non_linear True --only_eval --clean_ckpt_at_end "
        "--seed 3"
    )
    config = parse(line)
    assert (config.method.method, config.method.score) == ("molf_e", "pfn")
    assert (config.method.fft_expert, config.method.freeze_non_linear) == (False, True)
    assert (config.output.only_eval, config.output.clean_ckpt_at_end, config.train["seed"]) == (True, True, 3)


@pytest.mark.parametrize("mode", ["fft", "lora", "rslora", "molf"])
def test_the_published_command_gives_all_settings_to_all_modes(mode, caplog):
    line = (
        PUBLISHED.replace("--mode molf", f"--mode {mode}").replace("[128]", "[64]") + " --molf_fft True --lora_rank 32"
    )
    config = parse(line).method
    assert (config.method, config.lora_rank) == (mode, 128 if mode in ("fft", "molf") else 32)
    assert ("lora_rank is left out" in caplog.text) is (mode in ("fft", "molf"))
    assert ("molf_lora_ranks is left out" in caplog.text) is (mode != "molf")
    with pytest.raises(UsageError, match=r"method fft does not read .*ranks"):
        parse("--method fft --molf_lora_ranks [64]")


@pytest.mark.parametrize("written", ["[32,128]", "[32, 128]", "'[32, 128]'", "32,128", "32 128"])
def test_lists_as_people_write_them(written):
    assert parse(f"--molf_lora_ranks {written}").method.ranks == [32, 128]
    assert parse("--target_modules [q_proj,v_proj]").method.target_modules == ["q_proj", "v_proj"]
    assert parse("--ranks []").method.ranks == [] and parse("") == RunConfig()


def test_molf_efficient_by_its_published_flags():
    published = parse("--mode molf --molf_fft False --molf_lora_ranks [32,128] --molf_freeze_non_linear True").method
    assert published == parse("--method molf_e --recipe published --routing_log published").method
    assert parse("--method molf_e --molf_freeze_non_linear False").method.freeze_non_linear is False
    with pytest.raises(UsageError, match="fft_expert=True with method molf_e"):
        parse("--method molf_e --molf_fft True")


def test_the_published_baseline_is_rank_stabilised():
    assert parse("--mode lora --use_rslora True").method.use_rslora is True
    assert parse("--mode lora").method.use_rslora is False
    assert parse("--mode rslora").method.use_rslora is True


@pytest.mark.parametrize("flags", ["--no_use_rslora", "--no-use-rslora", "--use_rslora False", "--use_rslora=0"])
def test_switching_off(flags):
    assert parse(flags).method.use_rslora is False


def test_files_give_the_same_as_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "dataset_type: sql\nlearning_rate: 5e-4\nmolf_lora_ranks: [4, 8]\nuse_rslora: false\nmax_length: null\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nreport_to: [wandb, tensorboard]\nlora_dropout: 0\n"
    )
    config = parse(f"--config {path}")
    assert (config.task.task, config.method.ranks, config.method.use_rslora) == ("sql", [4, 8], False)
    assert config.train["learning_rate"] == 5e-4, "YAML reads 5e-4 as a string"
    assert config.train["max_length"] is None
    assert config.train["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert config.train["report_to"] == ["wandb", "tensorboard"]


def test_flags_win_over_files_and_files_over_a_preset(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("learning_rate: 1.0\nweight_decay: 1.0\nseed: 1\n")
    second.write_text("weight_decay: 2.0\nseed: 2\n")
    preset = {"learning_rate": 0.0, "weight_decay": 0.0, "seed": 0, "limit": 5}
    config = parse(f"--config {first} --seed 3 --config {second}", preset=preset)
    assert [config.train[name] for name in ("learning_rate", "weight_decay", "seed")] == [1.0, 2.0, 3]
    assert config.task.limit == 5


def test_a_written_configuration_is_read_back(tmp_path):
    import yaml

    config = parse(PUBLISHED + " --limit 3 --bf16 False").resolved()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert parse(f"--config {tmp_path / 'config.yaml'}") == config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning_rte 1e-4", r"'learning_rte' in the command line; did you mean 'learning_rate'"),
        ("--mode foo", r"--method: invalid choice: 'foo' \(choose from"),
        ("--learning_rate fast", "--learning_rate.*invalid float value: 'fast'"),
        ("--learning_rate", "learning_rate needs a value"),
        ("--learning_rate 1 2", "learning_rate takes one value, got 2: 1, 2"),
        ("--use_rslora maybe", "Truthy value expected"),
        ("--ranks [4", r"is not a list such as \[32,128\]"),
        ("--ranks four", "invalid int value: 'four'"),
        ("--limit 0", "limit=0"),
        ("--warmup_steps 10 --warm_up_ratio 0.1", "two names of one setting"),
        ("train.yaml --seed 1", "unexpected 'train.yaml'"),
        ("--config", "needs one file, got none"),
        ("--data_path=", "data_path is empty, or has an empty item: give it a value, or leave it out"),
        ("--target_modules q_proj,", "target_modules is empty, or has an empty item"),
    ],
)
def test_mistakes_are_explained(line, message):
    with pytest.raises(UsageError, match=message):
        parse(line)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rte: 1", r"unknown setting 'learning_rte' in .*run\.yaml; did you mean 'learning_rate'"),
        ("task: fact\ndataset_type: sql", "two names of one setting"),
        ("learning_rate: null", "learning_rate cannot be None"),
        ("task: {a: 1}", "task cannot be"),
        ("save_strategy: yes", "save_strategy needs a value other than true or false"),
        ("learning_rate: no", "learning_rate needs a value other than true or false"),
        ("output_dir: ''", "output_dir is empty"),
        ("- a", "one mapping of setting to value"),
        ("1: a", "one mapping of setting to value"),
        ("", "one mapping of setting to value"),
        ("a: [", "is not valid YAML"),
        ("seed: " + "9" * 5000, "is not valid YAML: .*digits"),
        ("a: " + "[" * 2000, "is not valid YAML"),
    ],
)
def test_mistakes_in_files_are_explained(content, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        parse(f"--config {path}")


def test_a_bare_no_in_a_file_is_a_word_where_the_setting_takes_words(tmp_path):
    (tmp_path / "run.yaml").write_text("save_strategy: no\neval_strategy: no\neval_before: no\n")
    config = parse(f"--config {tmp_path / 'run.yaml'}")
    assert (config.train["save_strategy"], config.train["eval_strategy"]) == ("no", "no")
    assert config.task.eval_before is False


def test_paths_of_flags_and_files_may_begin_with_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("chat_template_path: ~/chat.jinja")
    config = parse("--config=~/run.yaml --output_root=~/runs")
    assert (config.output.output_root, config.train["chat_template_path"]) == (
        str(tmp_path / "runs"),
        str(tmp_path / "chat.jinja"),
    )


def test_a_missing_file():
    with pytest.raises(MolfError, match="there is no configuration file no/such"):
        read_yaml("no/such/file.yaml")


def test_read_flags():
    assert read_flags(["--a", "1", "--b-c", "--d=x=y", "--e", "-1", "2"]) == [
        ("a", "1"),
        ("b_c", True),
        ("d", "x=y"),
        ("e", ["-1", "2"]),
    ]


def test_help_shows_every_kind_of_setting(capsys):
    print_help("train")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: molf train")
    for name in ("--model_name_or_path", "--task", "--ranks", "--dry_run", "--learning_rate", "--packing", "--mode"):
        assert name in shown


@pytest.mark.parametrize(
    ("argv", "value"), [(["--retention", "off"], False), (["--retention", "ON"], True), (["--no_retention"], False)]
)
def test_a_switch_is_on_or_off(argv, value):
    assert parse_run(argv).task.retention is value
