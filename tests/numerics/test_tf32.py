"""The optimizer's products may use TF32; the user's settings read the same before and after. No GPU is needed to ask that."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from molf import MoLF
from molf.numerics import tf32
from molf.numerics.tf32 import tf32_products
from small import mlp
from stacks import Stacks

CUDA = torch.device("cuda")
MATMUL = torch.backends.cuda.matmul
pytestmark = pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="PyTorch 2.8 has the older switch only")


def readings():
    """All that a user can read of the settings; asking the older functions is an error after some of the newer."""
    found = [MATMUL.fp32_precision, torch.backends.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    for ask in (torch.get_float32_matmul_precision, lambda: MATMUL.allow_tf32):
        try:
            found.append(ask())
        except RuntimeError as error:
            found.append(str(error))
    return found


SETTINGS = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(MATMUL, "allow_tf32", True),
    "tf32": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "ieee": lambda: setattr(MATMUL, "fp32_precision", "ieee"),
    "all tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "all ieee": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
}


@pytest.fixture(autouse=True)
def reset():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_read_the_same_afterwards(setting):
    SETTINGS[setting]()
    before = readings()
    with tf32_products(CUDA), tf32_products(CUDA):
        assert MATMUL.fp32_precision == "tf32"
    assert readings() == before
    with pytest.raises(ZeroDivisionError), tf32_products(CUDA):
        raise ZeroDivisionError
    assert readings() == before


def test_an_inherited_setting_goes_on_following():
    torch.backends.fp32_precision = "ieee"
    with tf32_products(CUDA):
        pass
    torch.backends.fp32_precision = "tf32"
    assert MATMUL.fp32_precision == "tf32"


def test_on_a_cpu_nothing_is_set():
    with tf32_products(torch.device("cpu")):
        assert MATMUL.fp32_precision == "none"


def test_the_last_of_two_threads_restores():
    first, second = threading.Event(), threading.Event()

    def other():
        with tf32_products(CUDA):
            first.set()
            second.wait(10)

    thread = threading.Thread(target=other)
    with tf32_products(CUDA):
        thread.start()
        assert first.wait(10)
    assert MATMUL.fp32_precision == "tf32"
    second.set()
    thread.join()
    assert MATMUL.fp32_precision == "none"


def test_an_older_switch_is_restored(monkeypatch):
    class Matmul:
        allow_tf32 = False

    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul())
    with tf32_products(CUDA):
        assert torch.backends.cuda.matmul.allow_tf32 is True
    assert torch.backends.cuda.matmul.allow_tf32 is False


class Products(TorchDispatchMode):
    """Counts products of matrices, inside ``tf32_products`` and elsewhere."""

    def __init__(self):
        super().__init__()
        self.inside = self.outside = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"):
            self.inside += tf32._inside > 0
            self.outside += tf32._inside == 0
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("where", ["merged", "stacked", "fused"])
def test_all_products_of_a_step_may_use_tf32_and_no_others(where, monkeypatch):
    module = f"molf.layers.{where}"
    if where == "fused":
        pytest.importorskip("triton")
        module = "molf.kernels.step"
    monkeypatch.setattr(f"{module}.tf32_products", lambda device: tf32_products(CUDA))
    model = Stacks() if where == "stacked" else mlp(torch.float32)
    optimizer = MoLF(
        model, ranks=(2,), target_parameters=["up_proj", "down_proj"] * (where == "stacked"), fused=where == "fused"
    )
    x = torch.randn(20, 6) if where == "stacked" else torch.zeros(2, 3, dtype=torch.long)
    before = readings()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sum().backward()
        with Products() as products:
            optimizer.step()
        assert products.inside and not products.outside
    with Products() as products:
        model(x)
        _ = next(iter(optimizer.experts.values()))["fft"].weight
    assert not products.inside and readings() == before
