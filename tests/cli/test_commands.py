import json
import pydoc
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import molf
from fake_runs import RESULT
from faults import fail_on_rank_1
from molf.cli import COMMANDS, main
from molf.cli.commands import _parse_demo
from molf.study.config.run_config import DEMO
from molf.study.faults.preemption import Preempted
from served import free_port, start

SMALL = "--sample --limit 4 --per_device_batch_size 2 --gradient_accumulation_steps 1 --ranks 4 --disable_tqdm True"


def call(line):
    return main(shlex.split(line))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["nonsense"]])
def test_answers_without_importing_torch(arguments):
    code = (
        "import sys\nfrom molf.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'rich', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "molf", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"molf {molf.__version__}\n"


def test_every_command_is_listed_and_exists(capsys):
    assert call("") == 0
    listing = capsys.readouterr().out
    assert all(f"  {command} " in listing for command in COMMANDS)
    for home, _ in COMMANDS.values():
        assert callable(pydoc.locate(f"molf.cli.{home}"))


def test_an_unknown_command(capsys):
    assert call("trian --seed 1") == 2
    assert "unknown command 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_the_published_command_trains(model_folder, capsys):
    line = (
        f"train --model_name_or_path {model_folder} --dataset_type fact --mode molf --molf_score_fn true_projected "
        '--molf_topk 1 --molf_lora_ranks "[8]" --learning_rate 5e-5 --lora_learning_rate 5e-5 --weight_decay 0.1 '
        "--lora_weight_decay 0.01 --use_rslora True --per_device_batch_size 8 --gradient_accumulation_steps 4 "
        "--num_train_epochs 2 --lr_scheduler_type cosine --warm_up_ratio 0.1 --ckpt_dir_root D --report_to none "
        "--sample --limit 4"
    )
    assert call(line) == 0
    (folder,) = (path for path in Path("D").iterdir() if path.is_dir())
    assert folder.name == "molf-tiny-fact-n4-r8-epd-lr5e-05-lora5e-05-cosine-s42"
    assert (folder / "model.safetensors").is_file()
    shown = capsys.readouterr().out
    assert "efficacy_score" in shown
    assert "updates won: " in shown
    assert f"written to {folder}: README.md, config.json" in shown


def test_eval_and_report(model_folder, capsys):
    assert call(f"train --model_name_or_path {model_folder} {SMALL} --output_dir run") == 0
    assert call("eval --model_name_or_path run --task fact --sample --limit 2 --output_dir scores") == 0
    assert json.loads(Path("scores/result.json").read_text())["training"] is None
    capsys.readouterr()
    Path("run/routing.png").unlink()
    assert call("report run scores --check --html page.html") == 0
    shown = capsys.readouterr().out
    assert "routing: run/routing.png" in shown
    assert shown.count("computed again from the predictions: the same metrics") == 2
    assert Path("run/routing.png").is_file()
    assert "page: page.html" in shown and Path("page.html").stat().st_size < 10e6
    rows = [line.split()[:3] for line in shown.split("runs")[-1].splitlines()]
    assert ["run", "molf", "fact"] in rows
    assert ["scores", "eval", "fact"] in rows


def test_a_dry_run_shows_and_writes_nothing(model_folder, capsys):
    assert call(f"train --model_name_or_path {model_folder} {SMALL} --output_dir run --dry-run") == 0
    shown = capsys.readouterr().out
    for expected in (
        "learning_rate: 5.0e-05",
        "first example",
        "</s>",
        "LoRA pairs",
        "nothing was trained; 4 training rows",
    ):
        assert expected in shown
    assert not Path("run").exists()


def test_a_dry_run_of_an_evaluation_needs_no_training_rows(model_folder, capsys):
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    assert call(f"eval --model_name_or_path {model_folder} --task custom --eval_path rows.jsonl --dry_run") == 0
    assert "nothing was evaluated; 1 evaluation rows" in capsys.readouterr().out


def test_a_missing_package_is_named_before_the_data_is_read(model_folder, capsys, monkeypatch):
    monkeypatch.setattr("molf.study.config.trainer_config.is_liger_kernel_available", lambda: False)
    assert call(f"train --model_name_or_path {model_folder} --sample --use_liger_kernel True --dry_run") == 1
    assert "pip install liger-kernel" in capsys.readouterr().err


def test_the_demo_runs_twice(model_folder, capsys):
    small = f"--model_name_or_path {model_folder} --limit 4 --num_train_epochs 1 --ranks 4 --disable_tqdm True"
    assert call(f"demo {small}") == 0
    assert call(f"demo {small} --seed 1") == 0
    shown = capsys.readouterr().out
    assert "before" in shown
    assert Path(DEMO["output_dir"], "routing.png").is_file()
    page = Path(DEMO["output_dir"], "report.html")
    assert f"page: {page}" in shown and page.read_text().endswith("</html>\n")
    assert json.loads(Path(DEMO["output_dir"], "result.json").read_text())["config"]["seed"] == 1


@pytest.mark.parametrize(
    ("flags", "folder"),
    [("--output_dir mine", "mine"), ("--output_root other", None), ("--run_name mine", "runs/mine")],
)
def test_a_demo_replaces_no_run_in_a_folder_of_the_user(flags, folder):
    config = _parse_demo(shlex.split(f"{flags} --seed 3"))
    assert not config.output.overwrite and config.train["seed"] == 3 and config.task.limit == DEMO["limit"]
    assert config.output_dir == Path(folder or f"other/{config.run_name}")
    assert _parse_demo([*shlex.split(flags), "--overwrite"]).output.overwrite


def test_a_demo_replaces_an_earlier_demo():
    config = _parse_demo(["--seed", "3"])
    assert config.output.overwrite and config.output_dir == Path(DEMO["output_dir"])
    assert not _parse_demo(["--overwrite", "False"]).output.overwrite


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("train --learning_rte 1", 2, "did you mean 'learning_rate'"),
        ("train --sample", 1, "model_name_or_path is required"),
        ("train --model_name_or_path /no/folder --sample", 1, "does not exist"),
        ("eval --config no.yaml", 1, "no.yaml"),
        ("report nothing", 1, "no finished run"),
        ("train --config binary.yaml", 2, "binary.yaml is not valid YAML"),
        ("train --config broken.yaml", 2, "broken.yaml, line 3, column 2 is not valid YAML"),
        ("train --config", 2, "--config needs one file, got none"),
        ("plan --model_name_or_path nobody/none", 1, "cannot load the configuration of 'nobody/none'"),
        ("train MODEL --bf16 True --fp16 True", 1, "the trainer does not take these settings"),
        ("train MODEL --lr_scheduler_type wavy", 1, "wavy"),
        ("train MODEL --per_device_train_batch_size 0", 1, "per_device_train_batch_size=0 must be at least 1"),
        ("train MODEL --gradient_accumulation_steps 0", 1, "gradient_accumulation_steps=0 must be at least 1"),
        ("train MODEL --learning_rate nan", 1, "learning_rate=nan must be a finite number"),
        ("train MODEL --max_steps -5", 1, "max_steps=-5 must be at least 1"),
        ("train MODEL --num_train_epochs 0", 1, "num_train_epochs=0.0 must be above 0"),
        ("train MODEL --load_best_model_at_end True", 1, "load_best_model_at_end needs evaluations during training"),
        ("train MODEL --limit 4 --max_length 1", 1, "leaves no target of the 4 training rows"),
        ("train MODEL --limit 4 --ranks 4096 --dry_run", 1, "ranks=(4096,) exceeds"),
        ("train MODEL --chat_template_path broken.jinja", 1, "Unexpected end of template"),
        ("train MODEL --method fft --match_lora_rate True", 2, "method fft does not read match_lora_rate=True"),
        ("train MODEL --seed -1", 1, "seed=-1 must be between 0 and 4294967295"),
        ("train MODEL --seed 99999999999999 --dry_run", 1, "seed=99999999999999 must be between 0 and"),
        ("train MODEL --lr_scheduler_type cosine_with_min_lr --dry_run", 1, "One of min_lr or min_lr_rate"),
        ("train MODEL --lr_scheduler_type polynomial --lr_scheduler_kwargs '{\"zz\":1}' --dry_run", 1, "argument 'zz'"),
        ("train MODEL --dataloader_num_workers -1 --dry_run", 1, "num_workers option should be non-negative"),
        ("train MODEL --dataloader_prefetch_factor 2 --dry_run", 1, "dataloader_prefetch_factor can only"),
        ("train MODEL --neftune_noise_alpha nan --dry_run", 1, "neftune_noise_alpha=nan must be a finite number"),
        ("train MODEL --label_smoothing_factor nan --dry_run", 1, "label_smoothing_factor=nan must be a finite number"),
        ("train MODEL --eos_token nope --limit 4", 1, "eos_token='nope' is no token of the tokenizer"),
        ("train MODEL --assistant_only_loss True --limit 4", 1, "assistant_only_loss=True"),
        ("train MODEL --padding_free True --limit 4 --dry_run", 1, "padding_free=True"),
        ("train MODEL --activation_offloading True --use_cpu True", 1, "activation_offloading=True moves"),
        ("train MODEL --push_to_hub True --dry_run", 1, "push_to_hub=True, but HF_HUB_OFFLINE forbids it"),
        ("train MODEL --generation_backend vllm --dry_run", 1, "needs vLLM, which is not installed"),
        ("train MODEL --dry_run --output_dir file", 1, "output_dir=file is not writable"),
        ("results . --csv file/x.csv", 1, "cannot write file/x.csv"),
    ],
)
def test_mistakes_are_one_message(line, status, message, model_folder, capsys):
    Path("binary.yaml").write_bytes(b"\xff\xfe")
    Path("broken.yaml").write_text("a: [1,\n2\nb: 3\n")
    Path("broken.jinja").write_text("{% if x %}")
    Path("file").write_text("")
    Path("result.json").write_text(json.dumps(RESULT))
    assert call(line.replace("MODEL", f"--model_name_or_path {model_folder} --task fact --sample")) == status
    error = capsys.readouterr().err
    assert message in error
    assert re.split("[\r\n]", error.strip())[-1].startswith("molf ")
    assert "Traceback" not in error


@pytest.mark.parametrize("line", ["report nothing --traceback", "--traceback report nothing"])
def test_the_traceback_of_a_mistake_is_shown_on_request(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(line) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "in read_result" in error and "no finished run" in error
    monkeypatch.setenv("MOLF_TRACEBACK", "1")
    assert call("report nothing") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_mistake_with_a_cause_says_how_to_see_it(tmp_path, capsys):
    (tmp_path / "result.json").write_text("{")
    assert call(f"report {tmp_path}") == 1
    assert capsys.readouterr().err.endswith("(--traceback shows the cause)\n")
    assert call(f"--traceback report {tmp_path}") == 1
    assert "JSONDecodeError" in capsys.readouterr().err


def test_names_of_users_are_no_markup(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("[bold]mine :smile:").mkdir()
    Path("[bold]mine :smile:", "result.json").write_text(json.dumps(RESULT | {"config": {"run_name": "[red]my run"}}))
    assert call("results '[bold]mine :smile:'") == 0
    assert "[bold]mine :smile:" in capsys.readouterr().out
    assert call("report '[bold]mine :smile:'") == 0
    assert "[red]my run" in capsys.readouterr().out
    assert call("report '[/nowhere]'") == 1
    assert "[/nowhere] holds no finished run" in capsys.readouterr().err


def test_a_failure_of_other_code_keeps_its_traceback(monkeypatch):
    def fail(argv):
        raise ValueError("out of cheese")

    monkeypatch.setattr("molf.cli.commands.train", fail)
    with pytest.raises(ValueError, match="out of cheese"):
        call("train")


def test_a_missing_library_gives_the_command(monkeypatch, capsys):
    for module in ("molf.cli.commands", "molf.cli.show"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert call("train") == 1
    assert "pip install 'molf[train]'" in capsys.readouterr().err


def test_other_processes_of_a_distributed_run_print_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    monkeypatch.setenv("RANK", "1")
    assert call(f"results {tmp_path}") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", ["train", "eval", "demo", "compare", "sweep"])
def test_help_of_a_command(command, capsys):
    assert call(f"{command} --help") == 0
    assert capsys.readouterr().out.startswith(f"usage: molf {command} ")


def test_a_stopped_run_has_a_status_of_its_own(monkeypatch, capsys):
    """Whatever starts it again goes by that."""

    def stopped(config):
        raise Preempted("stopped by SIGTERM after step 3 of 9")

    monkeypatch.setattr("molf.study.run.train.run", stopped)
    assert main(["train", "--model_name_or_path", "somewhere"]) == 75
    assert "molf train: stopped by SIGTERM after step 3 of 9" in capsys.readouterr().err


def test_a_rank_that_fails_ends_with_its_error(model_folder):
    """It does not wait for the others, which wait for it; whatever started them stops these then."""
    line = f"train --model_name_or_path {model_folder} {SMALL} --limit 8 --output_dir two"
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        start(fail_on_rank_1, f"rank{rank}.log", shlex.split(line), **where, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    ranks[1].join(timeout=120)
    said = Path("rank1.log").read_text()
    for rank in ranks:
        rank.kill()
        rank.join()
    assert ranks[1].exitcode == 1 and "RuntimeError: this rank fails" in said, said


def test_after_an_error_the_process_group_is_not_waited_for(monkeypatch):
    def failing(config):
        raise RuntimeError("no")

    monkeypatch.setattr("molf.study.run.train.run", failing)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: pytest.fail("it may wait for ever"))
    with pytest.raises(RuntimeError, match="no"):
        main(["train", "--model_name_or_path", "somewhere"])


def test_an_error_moves_no_cursor(capsys):
    assert main(["report", "\x1b[2Jrun\r"]) == 1
    assert capsys.readouterr().err.startswith(
        "molf report: \N{REPLACEMENT CHARACTER}[2Jrun\N{REPLACEMENT CHARACTER} holds"
    )
