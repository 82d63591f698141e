"""``MoLF``, the optimizer: it carries state and order; the mathematics is in the modules around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from molf.kernels.checks import check_options as check_fused
from molf.layers.build import init_states
from molf.numerics.distributed import Ranks, agree_on_seeds, find_ranks
from molf.numerics.resharding import Names
from molf.optimizer.backward_step import Release, retire_others
from molf.optimizer.expert_views import Experts
from molf.optimizer.kernel_choice import Choice
from molf.optimizer.left_out import LeftOut
from molf.optimizer.state_dict import check_compatible, restore_state, with_tuples
from molf.optimizer.step import is_dry, take_whole
from molf.routing import Routing
from molf.scores import Score, get_score
from molf.setup.checks import RELEASED, check_given_groups, check_optim_bits, check_options, check_top_k
from molf.setup.param_groups import param_groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from molf.kernels.step import FusedStep

__all__ = ["MoLF"]

# What a copy of an optimizer takes over, beside groups and state.
_OPTIONS = ("top_k", "score", "max_grad_norm", "optim_bits", "bf16_update", "fused", "optimizer_in_backward")
_COPIED = (*_OPTIONS, "routing", "grad_norm")


class MoLF(torch.optim.Optimizer):
    """Route every linear layer's update to full fine-tuning or to a LoRA expert, at every step.

    Each targeted layer holds an ``fft`` expert (its weight and bias) and one LoRA expert per rank. At each step all
    experts' Adam moments move; the ``top_k`` experts with the best score take the AdamW step, the others keep their
    weights bit for bit (Tang et al. 2026). The model stays made of plain layers whose weights are the merged ones at all
    times, so every checkpoint is an ordinary checkpoint. Everything else that trains takes plain AdamW.

    Args:
        model: The model, or the groups that ``molf.param_groups`` made of it. What is frozen in it now is not trained later.
        ranks: Rank of each LoRA expert; None means ``(128,)``. With ``()`` this is AdamW.
        lr: Learning rate of ``fft`` experts and ordinary parameters.
        lora_lr: Learning rate of LoRA experts; None means ``lr``. It follows the schedule of ``lr``.
        weight_decay: Decoupled decay of ``fft`` weights and ordinary matrices (never of norms and biases).
        lora_weight_decay: Decoupled decay of A and B.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        lora_alpha: One number, or one for each rank.
        use_rslora: Scale ``alpha / sqrt(r)`` instead of ``alpha / r``.
        top_k: Number of experts of a layer that move at each step.
        score: ``"epd"`` (default), ``"pfn"``, or a ``molf.Score``.
        target_modules: As in PEFT: ``"all-linear"``, a regular expression, or names or their last parts.
        exclude_modules: Modules never routed, in the same notation.
        max_grad_norm: Clip the norm of all experts' gradients together to this, inside the step.
        optim_bits: 32, or 8 to keep the moments of every large matrix that trains with full rank in 8 bits, block-wise, at a
            quarter of the memory. Vectors, matrices below 4096 elements and LoRA pairs keep theirs in float32.
        bf16_update: How bf16 weights keep small updates: ``"split"`` (a 16-bit low part in the state, exact) or
            ``"stochastic"`` (rounding at random, no memory).
        fused: Take the step by MoLF's own Triton kernels: a few launches for the whole model and no word to the host. They need
            a CUDA device, float32 or bf16 weights and one of the paper's scores. None chooses at the first step: these kernels
            where they can be used and, in a trial on small layers, take the step that PyTorch's take on this device; else
            PyTorch's. True insists, and says what is wrong; False leaves them alone.
        optimizer_in_backward: Route and move every layer inside backward, as soon as its gradients are there, and free them:
            all gradients never exist at once. ``step`` then only closes the step. Not with ``max_grad_norm``, accumulation,
            a loss scale, a closure or several ranks; a layer whose gradient is not finite is left out alone.
        process_group: Ranks that train the same unsharded model (DDP), all of which take the first one's decisions; None for
            all ranks there are. Sharded parameters (FSDP2) know their ranks.

    Attributes:
        routing: The last step's decision, a ``molf.Routing``; None before the first step. A fused step leaves it on the device.
        grad_norm: Norm of all gradients at the last step before clipping, 0-dim; with LoRA gradients if ``max_grad_norm``.
        experts: Live views, ``optimizer.experts[module][expert]``.

    Raises:
        ValueError, TypeError: For anything that can't work, at construction.
    """

    # GradScaler then hands scale and overflow flag to ``step`` instead of skipping it unseen.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module | Iterable[dict[str, Any]],
        *,
        ranks: Sequence[int] | None = None,
        lr: float | Tensor = 5e-5,
        lora_lr: float | None = None,
        weight_decay: float = 0.1,
        lora_weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        lora_alpha: float | Sequence[float] = 32.0,
        use_rslora: bool = True,
        top_k: int = 1,
        score: str | Score = "epd",
        target_modules: str | Sequence[str] = "all-linear",
        exclude_modules: str | Sequence[str] = ("lm_head",),
        max_grad_norm: float | None = None,
        optim_bits: int = 32,
        bf16_update: str = "split",
        fused: bool | None = None,
        optimizer_in_backward: bool = False,
        process_group: ProcessGroup | None = None,
    ):
        check_options(betas, eps, max_grad_norm, bf16_update, fused)
        grouping: dict[str, Any] = {
            "ranks": ranks,
            "lora_lr": lora_lr,
            "lora_weight_decay": lora_weight_decay,
            "lora_alpha": lora_alpha,
            "use_rslora": use_rslora,
            "target_modules": target_modules,
            "exclude_modules": exclude_modules,
        }
        if isinstance(model, nn.Module):
            groups = param_groups(model, lr=lr, weight_decay=weight_decay, **grouping)
        else:
            groups = check_given_groups(model, grouping)
        self.optim_bits = check_optim_bits(optim_bits, groups)
        self.top_k = check_top_k(top_k, groups)
        self.score = get_score(score)
        self.max_grad_norm = max_grad_norm
        self.bf16_update = bf16_update
        self.fused = fused
        if fused:
            check_fused(groups, self.score)
        self.optimizer_in_backward = optimizer_in_backward
        self.routing: Routing | None = None
        self.grad_norm: Tensor | None = None
        self._release: Release | None = None
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "skipped_steps": 0}
        super().__init__(groups, defaults)
        self._start(model if isinstance(model, nn.Module) else None, process_group)

    def _start(self, model: nn.Module | None = None, process_group: ProcessGroup | None = None) -> None:
        """Begin with what a copy of an optimizer does not take over from its original."""
        self.kernels: dict[int, FusedStep] = {}  # by the part of the groups that they take the step of
        self._choice = Choice()
        self._left_out = LeftOut()
        self._process_group = process_group
        self._names = None if model is None else Names(model, self.param_groups)
        self._agreed = False
        self._release = Release(self, model) if self.optimizer_in_backward else None
        retire_others(self.param_groups, self._release)

    @property
    def experts(self) -> Experts:
        """Live views of all experts by module and expert name."""
        return Experts(self)

    @property
    def fused_in_use(self) -> bool | None:
        """Whether MoLF's own kernels take the steps, by ``fused`` or by choice; None before the first step."""
        return self._choice.made

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because of a non-finite gradient, or with ``optimizer_in_backward`` parts of them.

        After fused steps, asking waits for the device.
        """
        return self._left_out.fetch(self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Decide, then move the winners.

        A step with a non-finite gradient is left out whole (moments too), counted in ``skipped_steps`` and logged. With
        ``optimizer_in_backward`` all this has been done layer by layer, and what is left is done now.

        Args:
            closure: Re-evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None and self._release is not None:
            raise ValueError(f"{RELEASED}step() takes no closure: call backward, then step()")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fresh = not any(self.state.values())
        ranks = self.begin()
        if fresh and is_dry(self, ranks):
            return loss
        outcome = take_whole(self, ranks) if self._release is None else self._release.close(ranks)
        self.grad_norm = outcome.norm
        if outcome.routing is not None:
            self.routing = outcome.routing
        self._left_out.note(outcome.taken, self.param_groups)
        return loss

    def ranks(self) -> Ranks:
        """Return the ranks that train together; if the model was sharded since, its new parameters are looked up first."""
        if self._names is not None:
            self._names.follow(self.param_groups)
        return find_ranks(self.param_groups, self._process_group)

    def choose(self, ranks: Ranks) -> bool:
        """Return whether MoLF's own kernels are to take the next step."""
        return self._choice.make(self, ranks)

    def begin(self) -> Ranks:
        """Make everything ready for a step, and return the ranks that take it together."""
        ranks = self.ranks()
        if not self._agreed:
            agree_on_seeds(self.param_groups, self.state, ranks)
            self._agreed = True
        init_states(self.param_groups, self.state, self.bf16_update == "split", self.optim_bits)
        return ranks

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the count of steps left out up to date.

        Raises:
            RuntimeError: Inside a step: after a backward that has moved layers, before ``step``.
        """
        self._check_between_steps()
        self._left_out.fetch(self.param_groups)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state exactly, in the dtypes it was saved in.

        Raises:
            ValueError: If it belongs to other modules, ranks or shapes; the differing names are given.
        """
        saved: dict[str, Any] = {}

        def set_aside(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            saved.update(with_tuples(given))
            check_compatible(self.param_groups, saved, self.optim_bits)
            if self._release is not None:
                self._release.forget()
            self._left_out.fetch(self.param_groups)  # what is still on the device is not of the state that comes
            return {**saved, "state": {}}

        # After the hooks of others that come before loading, and before those that come after it.
        before = self.register_load_state_dict_pre_hook(set_aside)
        after = self.register_load_state_dict_post_hook(lambda _: restore_state(self, saved), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of ordinary parameters."""
        super().add_param_group(param_group)
        if self._release is not None:
            self._release.watch(len(self.param_groups) - 1)

    def _check_between_steps(self) -> None:
        if self._release is not None:
            self._release.refuse_unfinished()

    def __getstate__(self) -> dict[str, Any]:
        self._check_between_steps()
        self._left_out.fetch(self.param_groups)
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _COPIED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "optimizer_in_backward" in state:  # a copy of an optimizer, and not a state that is loaded
            self._start()
