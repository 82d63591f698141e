"""TF32 products on a CPU: factors of float32 products are cut to 11 significant bits, which is the most that a core may lose."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""Where the first of two factors stands among the arguments."""


def cut(x):
    """Cut float32 numbers to TF32; others stay."""
    return (x.view(torch.int32) & -0x2000).view(torch.float32) if x.dtype == torch.float32 else x


class EmulatedTF32(TorchDispatchMode):
    """Inside, products of float32 matrices have TF32's error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Call an operation, with cut factors if it is a product."""
        first = _FACTORS.get(func.overloadpacket.__name__)
        if first is not None:
            args = (*args[:first], *map(cut, args[first : first + 2]), *args[first + 2 :])
        return func(*args, **(kwargs or {}))
