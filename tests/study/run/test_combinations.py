"""Accumulation, checkpointing, compilation and autocast change how a step is computed, not what it is."""

import pytest
import torch
from torch._dynamo.utils import counters

from conftest import TOLERANCE
from molf.cli import main
from molf.study.run.job import make_trainer
from small_runs import small_run
from tiny_checkpoints import save_tiny_checkpoint

# torch.compile imports torch.utils.mkldnn, which still scripts its methods. To trace an autograd Function, such as TRL's loss
# is, it makes an object of it, and looks for gradients of what it is given.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
]

OPTIONS = {
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},  # which needs no compiler of C++
    "autocast": {"bf16": True, "use_cpu": True},
}
METHODS = {
    "molf": {},
    "molf_e": {"method": "molf_e", "target_modules": ["down_proj"]},  # adapters take long to compile
}
CASES = [
    *(("molf", (name,)) for name in OPTIONS if name != "compile"),  # which takes long, and is among all of them
    ("molf", tuple(OPTIONS)),
    ("molf_e", ("accumulation", "checkpointing", "autocast")),
    ("molf_e", ("compile",)),
]
PLAIN = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "learning_rate": 3e-3,
    "max_steps": 3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "eval_limit": 1,
    "pad_to_multiple_of": 64,  # one shape, which is compiled once
    "overwrite": True,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Carries out `molf train` and returns its trainer and the loss of every step; batches of four examples in every case."""
    folder = tmp_path_factory.mktemp("combinations")
    save_tiny_checkpoint(folder / "model", num_hidden_layers=1)
    trainers = []

    def make(*given, **more):
        trainers.append(make_trainer(*given, **more))
        return trainers[-1]

    def run(changes):
        torch._dynamo.reset()
        counters.clear()
        settings = small_run(str(folder / "model"), folder / "run") | PLAIN | changes
        del settings["lora_rank"]  # a baseline's
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("LOG_FILE", raising=False)
            patch.setattr("molf.study.run.train.make_trainer", make)
            assert (
                main(["train", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]) == 0
            )
        losses = [entry["loss"] for entry in trainers[-1].state.log_history if "loss" in entry]
        return trainers[-1], torch.tensor(losses, dtype=torch.float64)

    return run


@pytest.fixture(scope="module")
def plain(trained):
    """The losses of the plain run, and of the plain run under autocast, by method."""
    return {
        name: [trained(changes | more)[1] for more in ({}, OPTIONS["autocast"])] for name, changes in METHODS.items()
    }


@pytest.mark.parametrize(
    ("method", "names"), CASES, ids=lambda part: part if isinstance(part, str) else " + ".join(part)
)
def test_the_loss_is_that_of_the_plain_run(method, names, trained, plain):
    changes = {key: value for name in names for key, value in OPTIONS[name].items()}
    trainer, loss = trained(METHODS[method] | changes)
    assert any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules()) is (
        "checkpointing" in names
    )
    assert (counters["stats"]["unique_graphs"] > 0) is ("compile" in names)
    exact, rounded = plain[method]
    assert len(loss) == 3 and loss[-1] < loss[0] - 0.02
    if "autocast" not in names:
        torch.testing.assert_close(loss, exact, rtol=0, atol=TOLERANCE[torch.float32])
        return
    assert not torch.equal(loss, exact)
    torch.testing.assert_close(loss, exact, rtol=0, atol=TOLERANCE[torch.bfloat16])
    # Rounded in the same places, but for sums over parts of a batch.
    torch.testing.assert_close(loss, rounded, rtol=0, atol=TOLERANCE[torch.bfloat16] / 10)
