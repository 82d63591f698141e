"""The benchmark scripts run and report what they promise; how fast is not a test."""

import contextlib
import importlib.util
import itertools
import json
import sys

import pytest
import torch

import alignment
import communication
import eval_speed
import evidence
import gpu
import gpu_cost
import gpu_kernels
import gpu_step
import grpo
import many_layers
import maps
import moe_step
import optimizer_step
import plan_vs_measured
import promise
import rounding
import router_bed
import routing_log
import sql_rows
import states
import step_time
from emulated_tf32 import EmulatedTF32
from molf import MoLF, Routing
from molf.integrations.routing_lines import CompactLines
from small import tiny_llama
from tiny_checkpoints import save_tiny_checkpoint


def last_line(script, monkeypatch, capsys, *argv):
    monkeypatch.setattr(
        sys, "argv", [script.__name__, "--shape", "tiny", "--rank", "4", "--rounds", "1", "--json", *argv]
    )
    script.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_step_time(monkeypatch, capsys):
    report = last_line(step_time, monkeypatch, capsys, "--tokens", "256")
    assert set(report["tokens_per_s"]) == {"fft", "lora", "molf", "molf_branched"}
    assert all(speed > 0 for speed in report["tokens_per_s"].values())
    assert report["ratios"]["fft/fft"] == 1.0


@pytest.mark.parametrize("tokens", ["100", "0", "-128"])
def test_step_time_refuses_odd_tokens(monkeypatch, capsys, tokens):
    with pytest.raises(SystemExit):
        last_line(step_time, monkeypatch, capsys, "--tokens", tokens)
    assert "multiple of 128" in capsys.readouterr().err


@pytest.mark.parametrize("bits", ["32", "8"])
def test_optimizer_step(monkeypatch, capsys, bits):
    report = last_line(optimizer_step, monkeypatch, capsys, "--optim_bits", bits)
    assert set(report) == {"fft_wins", "lora_wins"} and min(report.values()) > 0


def test_moe_step(monkeypatch, capsys):
    sizes = ["--experts", "2", "4", "--layers", "1", "--width", "8", "--inner", "4", "--rank", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["moe_step", *sizes, "--json"])
    moe_step.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report) == {f"{case}, {n}" for case in ("same experts", "same size") for n in (2, 4)}
    assert all(value > 0 for values in report.values() for value in values)


def test_many_layers(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["many_layers", "--layers", "4", "--size", "8", "--rank", "2", "--rounds", "1", "--json"]
    )
    many_layers.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report) == {"molf/adamw", "one_by_one/adamw", "molf/one_by_one"} and min(report.values()) > 0


def test_plan_vs_measured(monkeypatch, capsys):
    flags = [
        "--shape",
        "tiny",
        "--rank",
        "4",
        "--batch",
        "2",
        "--length",
        "16",
        "--method",
        "molf_e",
        "--release",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", [plan_vs_measured.__file__, *flags])
    plan_vs_measured.main()  # measures in a process of its own: memory that this one had before would be reused
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["molf_e"] > 0


@pytest.mark.parametrize("few_shot", ["0", "2"])
def test_eval_speed(monkeypatch, capsys, tiny_checkpoint, few_shot):
    flags = ["--model", tiny_checkpoint, "--task", "fact", "--records", "2", "--few_shot", few_shot, "--json"]
    monkeypatch.setattr(sys, "argv", ["eval_speed", *flags])
    eval_speed.main()
    shown = capsys.readouterr().out
    assert "disagree" not in shown
    report = json.loads(shown.splitlines()[-1])["fact"]
    assert report["records"] == 2 and report["engine"] > 0 and report["loop"] > 0


def test_sql_rows(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sql_rows", "--limit", "3", "--json"])
    sql_rows.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["filled"]["results"] == 1 and report["empty"]["results"] == 0
    assert report["filled"]["all"] > 0.9 > report["empty"]["all"]


def test_states(monkeypatch, capsys, tmp_path):
    save_tiny_checkpoint(tmp_path, hidden_size=64, intermediate_size=96)
    flags = ["--model", str(tmp_path), "--rank", "2", "--steps", "4", "--seeds", "2", "--json"]
    monkeypatch.setattr(sys, "argv", ["states", *flags])
    states.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["bytes"]["8"] < 0.5 * report["bytes"]["32"]
    assert all(curve["4"] < curve["0"] for curves in report["losses"].values() for curve in curves)
    assert 0 < report["rounding"]["exp_avg, blocks along rows"] < 0.02


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT still asks for it
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU gets the programme itself, not its smallest form")
def test_the_gpu_programme_is_ready(monkeypatch, capsys, tmp_path):
    """Every part runs in Triton's interpreter; the kernels are right, and what cannot be measured says so."""
    files = ["--json", str(tmp_path / "all.json"), "--table", str(tmp_path / "all.md")]
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", *files])
    assert gpu.main() == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "all.json").read_text())
    assert {row["part"] for row in found["rows"]} == set(gpu.PARTS)
    assert all(row["holds"] for row in found["rows"] if row["part"] == "kernels")
    missing = {row["case"]: row["note"] for row in found["rows"] if row["value"] is None}
    assert all(note == "not installed" or note.startswith("no memory of a GPU") for note in missing.values()), missing
    assert len((tmp_path / "all.md").read_text().splitlines()) == len(found["rows"]) + 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU gets them all from the programme")
@pytest.mark.parametrize(
    "case",
    ["clipped", "8-bit states, aligned, bfloat16, epd", "stochastic rounding", "odd, bfloat16, pfn, K = 2, biases"],
)
def test_cases_of_the_kernels(case, monkeypatch):
    """With float32 products, and with the error of TF32 within a GPU's tolerance."""
    monkeypatch.setattr(gpu_kernels, "STEPS", 2)  # the second one is without a gradient, where there is such a case
    assert gpu_kernels.cases()[case]() < gpu_kernels.TOLERANCE["cpu"]
    with EmulatedTF32():
        assert gpu_kernels.cases()[case]() < gpu_kernels.TOLERANCE["cuda"]


# Widths of blocks as in Qwen2.5-1.5B, Gemma 3 and Llama 3.1, divided by 16, 8 and 64; multiples of 16 as these are.
FAMILIES = {"qwen": (96, 560, 16), "gemma": (80, 256, 32), "llama": (64, 224, 16)}
STORAGES = [
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.float32, {"optim_bits": 8}),
    (torch.bfloat16, {"optim_bits": 8}),
    (torch.bfloat16, {"bf16_update": "stochastic"}),
    (torch.bfloat16, {"bf16_update": "stochastic", "optim_bits": 8}),
]


def block(hidden, inner, key_value):
    sizes = [(hidden, hidden), (hidden, key_value), (hidden, inner), (inner, hidden)]
    layers = [torch.nn.Linear(*size, bias=i < 2) for i, size in enumerate(sizes)]
    return torch.nn.ModuleList([*layers, torch.nn.Embedding(256, hidden), torch.nn.RMSNorm(hidden)])


def test_cases_compile_all_that_real_models_run(monkeypatch):
    """The kernels and constants of the programme's cases are a superset of those of models."""
    step = pytest.importorskip("molf.kernels.step", exc_type=ImportError)
    found: set[str] = set()

    def note(what, *args, **constants):
        found.add(f"{what.kernel.fn.__name__} {sorted({**what.constants, **constants}.items(), key=str)}")

    monkeypatch.setattr(step, "launch", note)
    monkeypatch.setattr(gpu_kernels, "STEPS", 1)
    for case in gpu_kernels.cases().values():
        with contextlib.suppress(RuntimeError):  # nothing was launched, so other experts win
            case()
    compiled, found = found, set()
    for widths, (dtype, options), score in itertools.product(FAMILIES.values(), STORAGES, ("epd", "pfn", "coherence")):
        model = block(*widths).to(dtype)
        optimizer = MoLF(model, ranks=(8, 16), fused=True, score=score, **options)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert found and not sorted(found - compiled)


def test_what_a_step_should_cost(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_cost"])
    gpu_cost.main()
    shown = capsys.readouterr().out
    assert shown.count("against fused AdamW** |") == 2 and shown.count(" | x") > 2 * len(gpu_cost.GPUS) * len(
        gpu_cost.SHAPES
    )
    shape, h200 = gpu_cost.SHAPES["1.5B"], gpu_cost.GPUS["H200"]
    floors = [gpu_cost.ratio(shape, h200, 128, wins, gpu_cost.Cost.floor) for wins in (True, False)]
    assert floors == pytest.approx([1.92, 1.48], abs=0.01)
    speeds = [gpu_cost.speed(shape, h200, 128, True, n) for n in (1024, 4096, 16384)]
    assert speeds == sorted(speeds) and speeds[-1] < 1


def test_bytes_of_a_model_are_those_of_its_shape():
    model, shape = gpu_step.random_model("tiny", "meta"), gpu_cost.Shape(64, 160, 32, 2, 512)
    costs = gpu_cost.step_of(shape, 4, fft_wins=True)
    assert gpu_step.bytes_of(model, 4, 32, fft_wins=True) == sum(cost.bytes for cost in costs)


class CompilerError(Exception):
    """As Triton's errors are: of no kind that torch's are."""


@pytest.mark.parametrize("kind", [RuntimeError, CompilerError, AssertionError])
def test_a_part_of_the_gpu_programme_that_fails_is_a_row(kind, monkeypatch, capsys, tmp_path):
    def fail(*args):
        raise kind("CUDA out of memory.\nTried to allocate much")

    monkeypatch.setattr(gpu.gpu_step, "measure", fail)
    path = tmp_path / "all.json"
    table = tmp_path / "new" / "all.md"
    flags = ["--only", "step", "--shapes", "tiny,smallest", "--json", str(path), "--table", str(table)]
    monkeypatch.setattr(sys, "argv", ["gpu", *flags])
    assert gpu.main() == 1
    rows = json.loads(path.read_text())["rows"]
    assert [row["note"] for row in rows] == [f"failed: {kind.__name__}: CUDA out of memory."] * 2
    assert table.read_text().count("failed") == 2


def test_the_gpu_programme_ends_in_time(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", "kernels", "--quick", "--budget", "0"])
    assert gpu.main() == 0
    assert capsys.readouterr().out.count("not begun: out of time") == 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_bytes_that_ranks_send_are_as_the_formulas_say():
    counted, foreseen = communication.count_on_ranks(2)
    fused = communication.FUSED if importlib.util.find_spec("triton") else ()
    cases = [(sharding, method) for sharding in ("ddp", "fsdp") for method in communication.METHODS]
    assert set(counted) == {f"{s} {m}" for s, m in (*cases, *(("fsdp", method) for method in fused))}
    assert counted == foreseen


def test_alignment(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    found = alignment.alignments(torch.randn(500, 400), ranks=(8, 128))
    assert found == {r: pytest.approx(alignment.alignment(r, 400), rel=0.1) for r in (8, 128)}
    save_tiny_checkpoint(tmp_path)
    monkeypatch.setattr(sys, "argv", ["alignment", "--model", str(tmp_path), "--rows", "2"])
    alignment.main()
    assert "| down_proj |" in capsys.readouterr().out


def test_evidence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "GATHERED", tmp_path)

    def finish(name, score, **config):
        (tmp_path / "runs" / name).mkdir(parents=True)
        config = {"ranks": [8], "learning_rate": 2e-4, "seed": 42, **config}
        metrics = {"score": {"value": score}, "unusable_gold": {"value": 1}}
        result = {"config": config, "metrics": metrics, "routing": None if name.startswith("fft") else {"fft": 0.5}}
        result["retention"] = {"loss_rise": {"value": 1.0}, "origin": "here"} if "_r8" in name else None
        (tmp_path / "runs" / name / "result.json").write_text(json.dumps(result))

    def told(*arguments):
        monkeypatch.setattr(sys, "argv", ["evidence", *map(str, arguments)])
        evidence.main()
        return capsys.readouterr().out

    finish("fft-lr0.0002-s42", 58.0)
    finish("epd_r8_alpha128-lr0.0002-s42", 40.0)
    # Two of three layers kept one expert.
    log = [{"experts": ["fft", "lora_r8"], "modules": ["a", "b", "c"]}]
    log += [{"step": step, "won": [[1, 0, step % 2], [0, 1, 1 - step % 2]], "scores": [[1] * 3] * 2} for step in (1, 2)]
    own = tmp_path / "runs/epd_r8_alpha128-lr0.0002-s42/routing.jsonl"
    own.write_text("".join(json.dumps(line) + "\n" for line in log))
    finish("epd_r8_alpha128-lr0.0004-s43", 58.0, learning_rate=4e-4, seed=43)
    finish("epd_r8_alpha128-lr0.0004-s44", 60.0, learning_rate=4e-4, seed=44)
    finish("static-lr0.0002-s42", 50.0, lora_learning_rate=1e-3)
    for draw, seed in enumerate((42, 43)):
        finish(f"random_{draw}-lr0.0002-s{seed}", 51.0 + draw, seed=seed)
    table = told(tmp_path / "runs", "fact")
    assert "| contender | score | won by FFT | one expert | forgotten |" in table
    assert "| fft, 0.0002, seed 42 | 58.0 |  |  |  |" in table
    assert "| epd r8 alpha128, 0.0002, seed 42 | 40.0 | 50% | 67% | 1.00 |" in table
    assert "| epd r8 alpha128, 0.0004, mean of 2 | 59.0 | 50% |  | 1.00 |" in table
    assert "| static, 0.0002 / 0.001, seed 42 | 50.0 | 50% |  |  |" in table
    assert "| random, 0.0002, mean of 2 | 51.5 | 50% |  |  |" in table and table.count("mean of") == 2
    assert told("fact") == table
    kept = json.loads((tmp_path / "fact.json").read_text())
    assert len(kept) == 7 and kept[0]["retention"] == {"loss_rise": {"value": 1.0}}
    with pytest.raises(SystemExit):
        told(tmp_path, "nothing")
    assert "no finished run" in capsys.readouterr().err and not (tmp_path / "nothing.json").exists()


def test_maps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(maps, "FILE", tmp_path / "maps.json")

    def finish(name, winners, **config):
        """A run of one step, in which these experts of layers 0 and 1 won in ``q_proj`` and in ``k_proj``."""
        modules = tuple(f"{layer}.{kind}_proj" for kind in "qk" for layer in range(2))
        chosen = torch.tensor([[winner == "f", winner != "f"] for winner in winners])
        (tmp_path / name).mkdir()
        line = CompactLines().encode(1, Routing(modules, ("fft", "lora_r2"), chosen.double(), chosen))
        (tmp_path / name / "routing.jsonl").write_text(line)
        config = {"task": "fact", "score": "epd", "ranks": [2], "learning_rate": 1e-4, "seed": 1, **config}
        (tmp_path / name / "result.json").write_text(json.dumps({"config": config}))
        return str(tmp_path / name)

    def told(*runs):
        monkeypatch.setattr(sys, "argv", ["maps", *runs])
        maps.main()
        return capsys.readouterr().out

    table = told(finish("one", "flff"), finish("other", "flff", seed=2))
    assert "| seed, fact | 1 | 1.00 | 1.00 |" in table
    table = told(finish("sql", "lfff", task="sql", seed=3))
    assert (
        "| seed, fact | 1 | 1.00 | 1.00 |" in table and "| task | 2 | -0.33 | -1.00 |" in table and "ranks" not in table
    )
    assert told() == table
    assert "| ranks | 2 | nan | nan |" in told(finish("whole", "ffff", ranks=[4])), "nothing to correlate"
    (tmp_path / "whole" / "routing.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="whole has no routing log"):
        told(str(tmp_path / "whole"))


def test_promise(tmp_path, monkeypatch):
    pictures = tmp_path / "tasks.png", tmp_path / "promise.png"
    monkeypatch.setattr(sys, "argv", ["promise", *map(str, pictures)])
    promise.main()
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    for rank in (8, 32, 128):
        assert len(promise.scores(evidence.read("smollm2-fact-aligned"), f"epd_r{rank}", 2e-4)) == 3
    # Every contender of the picture has its seeds at the rate that is drawn.
    for _, files, metric, rates in promise.TASKS:
        for name, (key, *_) in promise.SHOWN.items():
            found = [promise.scores(evidence.read(file), name, rates[key], metric) for file in files]
            assert any(len(own) == promise.SEEDS for own in found)


def test_grpo(tmp_path, monkeypatch, capsys):
    train, choose, test = grpo.sums()
    prompts = [row["prompt"] for rows in (train, choose, test) for row in rows]
    assert len(set(prompts)) == len(prompts), "no sum is in two of the sets"
    assert grpo.is_right([" 56\n", "x 7", "", "-5"], [56, 8, 1, 5]) == [1.0, 0.0, 0.0, 1.0]
    monkeypatch.setattr(grpo, "GATHERED", tmp_path / "grpo.json")
    ran = {"before": 30.0, "after": 50.0, "rewards": [0.0] * 10 + [1.0] * 10, "fft_share": [0.5, 1.0]}
    monkeypatch.setattr(grpo, "run", lambda *key: dict(zip(grpo.KEY, [*key[:4], "test"], strict=True)) | ran)
    for _ in range(2):  # what is there is not run again
        monkeypatch.setattr(sys, "argv", ["grpo", "molf", "--lr", "1e-5"])
        grpo.main()
    assert len(grpo.gathered()) == 1
    assert "| molf | 1e-05 | 42 | test | 30.0 | 50.0 | 0.00 | 1.00 | 75% |" in capsys.readouterr().out


def test_rounding():
    weight = torch.tensor(
        [1.0, 1.0, 2.0**-14, 2.0**-14]
    ).bfloat16()  # half of the last bit of 1 is above 1e-3 on either side
    assert rounding.moved(weight, 1e-3, torch.Generator().manual_seed(0)) == 2
    assert "| 1e-05" not in rounding.table([weight]) and rounding.table([weight]).endswith("| 50% |")


def test_router_bed():
    texts, settings = router_bed.data()
    for setting in settings.values():
        assert not set(setting.train) & set(setting.held_out)
        assert not any(answer in text and prompt in text for prompt, answer in setting.train for text in texts[-50:])
    tokenizer = router_bed.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[:50], vocab_size=300, show_progress=False)
    model, pairs = tiny_llama(vocab_size=300, max_position_embeddings=512), settings["facts"].train[:4]
    before = router_bed.held_out_loss(model, tokenizer, pairs)
    for molf in router_bed.contenders().values():
        optimizer = router_bed.train(
            model, tokenizer, pairs, 1, 4, lr=1e-3, **{**molf, "ranks": molf["ranks"] and (2,)}
        )
    assert optimizer.routing.experts == ("fft", "lora_r2")
    assert router_bed.held_out_loss(model, tokenizer, pairs) < before
    assert "| fft |  |  | 1.000 |" in router_bed.table({"facts|fft|0.003|1": {"held_out": 1.0}})


def test_the_compact_routing_log_is_a_sixth_of_the_published_one(tmp_path):
    modules = routing_log.DENSE
    sizes = [routing_log.measure(kind(), modules, 2, tmp_path / "log")[0] for kind in routing_log.FORMATS.values()]
    assert sizes[1] * 6 < sizes[0] and len(routing_log.MIXTURE) == 12_480
