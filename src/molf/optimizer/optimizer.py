"""``MoLF``, the optimizer: options, state and the order of a step. The mathematics is in the modules it calls."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from molf.errors import MolfError
from molf.kernels.checks import check_options as check_fused
from molf.layers.base import Matrix
from molf.layers.build import init_state_, matrix_of, modules_of
from molf.layers.fit import check_not_flat
from molf.numerics.context import StepContext
from molf.numerics.distributed import Ranks, broadcast_seeds, check_no_orphaned_state, find_ranks
from molf.numerics.param_names import ParamNames
from molf.optimizer.backward_step import BackwardStep, detach_others
from molf.optimizer.expert_views import Experts
from molf.optimizer.kernel_choice import KernelSelector
from molf.optimizer.state_dict import SkippedSteps, check_compatible, restore_state, with_tuples
from molf.optimizer.step import only_creates_state, step_all
from molf.routing import Routing
from molf.scores import Score, get_score, try_score
from molf.setup.checks import (
    NO_GRADIENTS_KEPT,
    check_added_group,
    check_alike,
    check_backward_step,
    check_given_groups,
    check_optim_bits,
    check_options,
    check_top_k,
)
from molf.setup.param_groups import param_groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["MoLF"]

logger = logging.getLogger(__name__)

# What a copy of an optimizer takes over, beside groups and state.
_OPTIONS = ("top_k", "score", "max_grad_norm", "optim_bits", "bf16_update", "fused", "optimizer_in_backward")
_COPIED = (*_OPTIONS, "routing", "grad_norm")


class MoLF(torch.optim.Optimizer):
    """Route every linear layer's update to full fine-tuning or to a LoRA expert, at every step.

    Each targeted layer holds an ``fft`` expert (its weight and bias) and one LoRA expert per rank. At each step the Adam moments
    of all experts are updated. The ``top_k`` experts with the best score take the AdamW step; the others keep their weights bit
    for bit (Tang et al. 2026). The model stays made of plain layers whose weights are the merged ones at all times, so every
    checkpoint is an ordinary checkpoint. Everything else that trains takes plain AdamW.

    Args:
        model: The model, or the groups that ``molf.param_groups`` made of it. Parameters that are frozen now, and layers put
            into the model later, are not trained. A warning names them at the first step at which they have a gradient, and
            parameters that have left the model. With groups, and in a copy of an optimizer, nothing is noticed: the model is
            unknown. Groups without ``lr`` or ``weight_decay`` take those given here.
        ranks: Rank of each LoRA expert; None means ``(128,)``. With ``()`` this is AdamW.
        lr: Learning rate of ``fft`` experts and ordinary parameters.
        lora_lr: ``"matched"``: ``lr`` for LoRA, too, whatever ``lora_alpha`` and the rank (``molf.param_groups``). Or a learning
            rate of its own, which follows the schedule of ``lr``; None for ``lr`` at LoRA's scale, as published.
        weight_decay: Decoupled decay of ``fft`` weights and ordinary matrices (never of norms and biases).
        lora_weight_decay: Decoupled decay of A and B.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        lora_alpha: One number, or one for each rank.
        use_rslora: Scale by ``alpha / sqrt(r)`` instead of ``alpha / r``.
        top_k: Number of experts of a layer that move at each step.
        score: ``"epd"``, ``"pfn"``, ``"descent"``, ``"coherence"``, ``"random"``, ``"shuffled"``, or a ``molf.Score``.
        target_modules: As in PEFT: ``"all-linear"``, a regular expression, or names or their last parts, which must match.
        exclude_modules: Modules never routed, in the same notation.
        target_parameters: More matrices to route that are in no ``nn.Linear`` layer, by name (``molf.param_groups``).
        max_grad_norm: Clip the norm of all experts' gradients together to this, inside the step.
        optim_bits: 32, or 8 for 8-bit block-wise moments of every large matrix that trains with full rank, at a quarter of the
            memory. Vectors, matrices below 4096 elements and LoRA pairs keep float32 moments.
        bf16_update: How bf16 weights keep small updates: ``"split"`` (a 16-bit low part in the state, exact) or
            ``"stochastic"`` (stochastic rounding, no memory).
        fused: None: use the Triton kernels if they are supported here and a self-test matches PyTorch. True: insist on them,
            with an error that says why they cannot be used. False: never. They need CUDA, float32 or bf16 weights and a
            score of ours, launch a few kernels for the whole model and never sync.
        optimizer_in_backward: Route and move every layer inside backward, as soon as its gradients are complete, and free them:
            all gradients never exist at once. ``step`` then only completes the step. Not with ``max_grad_norm``, accumulation,
            a loss scale, a closure or several ranks; a layer whose gradient is not finite is skipped alone.
        process_group: Ranks that train the same unsharded model (DDP) and take rank 0's decisions; None for all. Sharded
            parameters (FSDP2) know their ranks.

    Attributes:
        routing: The last step's decision, a ``molf.Routing``; None before the first step. A fused step leaves it on the device.
        grad_norm: Norm of all gradients at the last step before clipping, 0-dim; includes LoRA gradients if ``max_grad_norm``.
        experts: Live views, ``optimizer.experts[module][expert]``.

    Raises:
        MolfError, TypeError: For an option that cannot work, at construction.
    """

    # GradScaler then hands scale and overflow flag to ``step`` instead of skipping it unseen.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module | Iterable[dict[str, Any]],
        *,
        ranks: Sequence[int] | None = None,
        lr: float | Tensor = 5e-5,
        lora_lr: float | str | None = "matched",
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
        target_parameters: Sequence[str] = (),
        max_grad_norm: float | None = None,
        optim_bits: int = 32,
        bf16_update: str = "split",
        fused: bool | None = None,
        optimizer_in_backward: bool = False,
        process_group: ProcessGroup | None = None,
    ):
        check_options(betas, eps, max_grad_norm, bf16_update, fused, optimizer_in_backward)
        grouping: dict[str, Any] = {
            "ranks": ranks,
            "lora_lr": lora_lr,
            "lora_weight_decay": lora_weight_decay,
            "lora_alpha": lora_alpha,
            "use_rslora": use_rslora,
            "target_modules": target_modules,
            "exclude_modules": exclude_modules,
            "target_parameters": target_parameters,
        }
        if isinstance(model, nn.Module):
            groups = param_groups(model, lr=lr, weight_decay=weight_decay, **grouping)
        else:
            groups = check_given_groups(model, grouping, {"lr": lr, "weight_decay": weight_decay})
        self.optim_bits = check_optim_bits(optim_bits, groups)
        self.top_k = check_top_k(top_k, groups)
        self.score = get_score(score)
        self.max_grad_norm = None if max_grad_norm is None else float(max_grad_norm)
        self.bf16_update = bf16_update
        self.fused = fused
        if fused:
            check_fused(groups, self.score)
        self.optimizer_in_backward = optimizer_in_backward
        self.routing: Routing | None = None
        self.grad_norm: Tensor | None = None
        self._backward_step: BackwardStep | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "skipped_steps": 0}
        super().__init__(groups, defaults)
        self._start(model if isinstance(model, nn.Module) else None, process_group)

    def _start(self, model: nn.Module | None = None, process_group: ProcessGroup | None = None) -> None:
        """Create what a copy of an optimizer does not take over from its original."""
        self._fused_steps: dict[int, Any] = {}
        self._kernels = KernelSelector()
        self._skipped_steps = SkippedSteps()
        self._process_group = process_group
        self._names = None if model is None else ParamNames(model, self.param_groups)
        self._seeds_are_shared = False
        self._checked: tuple[Any, ...] = ()
        if self.optimizer_in_backward:
            check_backward_step(
                self.max_grad_norm, self.score.compares_modules, find_ranks(self.param_groups, process_group), model
            )
            self._backward_step = BackwardStep(self.param_groups, self._begin)
        else:
            self._backward_step = None
        detach_others(self.param_groups, self._backward_step)

    @property
    def experts(self) -> Experts:
        """Live views of all experts by module and expert name."""
        return Experts(self._modules, self._matrix)

    @property
    def fused_in_use(self) -> bool | None:
        """Whether the Triton kernels take the steps, by ``fused`` or by choice; None before the first step."""
        return self._kernels.enabled

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped because of a non-finite gradient; with ``optimizer_in_backward`` also those skipped in part.

        Syncs after fused steps.
        """
        return self._skipped_steps.flush(self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @_disable_dynamo  # host-side bookkeeping; a compiled step would break on its guards
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Decide, then move the winners.

        A step with a non-finite gradient is skipped whole (moments too), counted in ``skipped_steps`` and logged. So is one whose
        gradient has a square that overflows, unless it is clipped. A fused step is skipped if the norm that it looks at overflows
        (1.8e19 in float32): that of all gradients, or without clipping, loss scale and shards that of all B's and of what is no
        routed weight. With ``optimizer_in_backward`` the layers have moved in backward, and this completes the step.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Raises:
            MolfError, RuntimeError: If an option of this step cannot work, parameters were replaced, or one has another shape,
                dtype or device than its state or its gradient. Nothing has moved then, but for what backward has moved with
                ``optimizer_in_backward``.
        """
        loss = None
        if closure is not None and self._backward_step is not None:
            raise MolfError(f"{NO_GRADIENTS_KEPT}step() takes no closure: call backward, then step()")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fresh = not any(self.state.values())
        context = (
            None if self._backward_step is None else self._backward_step.context
        )  # backward may have begun the step
        if context is None:
            context = self._begin()
        if fresh and only_creates_state(context):
            return loss
        if self._names is not None and context.ranks.is_leader:
            self._names.warn_of_changes(self.param_groups)
        if self._backward_step is None:
            outcome = step_all(context)
        else:
            outcome = self._backward_step.finish(context, getattr(self, "grad_scale", None))
        self.grad_norm = outcome.norm
        if outcome.routing is not None:
            self.routing = outcome.routing
        self._skipped_steps.record(outcome.taken, self.param_groups)
        return loss

    def _begin(self) -> StepContext:
        """Return the context of a new step, with all missing state created."""
        check_not_flat(self.param_groups)
        self._follow_model()
        self._check_settings()
        ranks = find_ranks(self.param_groups, self._process_group)
        if self.optimizer_in_backward:
            check_backward_step(self.max_grad_norm, self.score.compares_modules, ranks)
        if not self._seeds_are_shared:
            broadcast_seeds(self.param_groups, self.state, ranks)
            self._seeds_are_shared = True
        check_no_orphaned_state(self.param_groups, self.state)
        context = replace(
            self._context(ranks),
            top_k=self.top_k,
            max_grad_norm=self.max_grad_norm,
            fused_required=self.fused is True,
            fused_steps=self._fused_steps,
            # A GradScaler sets these two before it calls step().
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )
        init_state_(self.param_groups, context)
        return replace(context, fused=self._kernels.select(context, self.fused))

    def _check_settings(self) -> None:
        """Check what the user may have set since the last step."""
        if self._checked == (self.score, self.top_k, self.max_grad_norm):
            return
        self.score = get_score(self.score)
        routed = next(group for group in self.param_groups if "module" in group)
        check_top_k(self.top_k, self.param_groups)
        check_options(routed["betas"], routed["eps"], self.max_grad_norm)
        try_score(self.score, self._modules(), len(routed["experts"]), routed["eps"])
        self._checked = self.score, self.top_k, self.max_grad_norm

    def _follow_model(self) -> None:
        """Take over parameters that were replaced in the model."""
        if self._names is not None and self._names.refresh(self.param_groups) and self._backward_step is not None:
            self._backward_step.follow(self.param_groups)
            logger.warning(
                "Parameters were replaced in the model (to_empty, load_state_dict(assign=True)): their gradients are freed from "
                "the next backward on. Replace them before MoLF is made, to have the first ones freed, too"
            )

    def _context(self, ranks: Ranks) -> StepContext:
        """Return what holds between steps, too."""
        return StepContext(
            groups=self.param_groups,
            state=self.state,
            ranks=ranks,
            score=self.score,
            stochastic=self.bf16_update == "stochastic",
            optim_bits=self.optim_bits,
            names=self._names,
        )

    def _modules(self) -> list[str]:
        return [module for group in self.param_groups if "module" in group for module in modules_of(group)]

    def _matrix(self, module: str) -> Matrix:
        """Return the experts of a module with their state created.

        Raises:
            KeyError: If no such module is routed.
        """
        self._follow_model()
        for group in self.param_groups:
            if "module" in group and module in modules_of(group):
                context = self._context(find_ranks(self.param_groups, self._process_group))
                init_state_([group], context)
                return matrix_of(group, module, self.state, context.with_noise().noise)
        names = self._modules()
        raise KeyError(f"{module!r} is not routed; the {len(names)} routed modules are {names[0]}, ..., {names[-1]}")

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the count of skipped steps up to date.

        Raises:
            RuntimeError: Inside a step: after a backward that has moved layers, before ``step``.
        """
        self._check_between_steps()
        self._skipped_steps.flush(self.param_groups)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state exactly, in the dtypes it was saved in. Low parts of bf16 weights follow ``bf16_update``.

        Raises:
            MolfError: If it is not whole, or belongs to other modules, ranks or shapes; the message names the difference.
        """
        saved: dict[str, Any] = {}

        def set_aside(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            saved.update(with_tuples(given))
            check_compatible(self.param_groups, saved, self.optim_bits, self._names)
            if self._backward_step is not None:
                self._backward_step.reset()
            self._skipped_steps.flush(self.param_groups)  # counts on the device belong to the old state
            return {**saved, "state": {}}

        # Between other users' pre-hooks and their post-hooks.
        before = self.register_load_state_dict_pre_hook(set_aside)
        keep_low = self.bf16_update != "stochastic"
        after = self.register_load_state_dict_post_hook(lambda _: restore_state(self, saved, keep_low), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of ordinary parameters, or a routed one of ``molf.param_groups``.

        Raises:
            MolfError: If a parameter has a dtype or a layout that cannot be trained, or an option a value that is not allowed, or
                a routed group has other experts, or the name of another.
        """
        super().add_param_group(param_group)
        try:
            check_added_group(self.param_groups[-1], self.optim_bits)
            if "module" in param_group and hasattr(self, "_kernels"):  # those of the start were checked together
                check_alike([group for group in self.param_groups if "module" in group])
        except MolfError:
            self.param_groups.pop()
            raise
        self._seeds_are_shared = False
        if self._backward_step is not None:
            self._backward_step.register_hooks(len(self.param_groups) - 1, self.param_groups[-1])

    def _check_between_steps(self) -> None:
        if self._backward_step is not None:
            self._backward_step.check_finished()

    def _copied(self) -> dict[str, Any]:
        """Return what a copy takes over, but for the process group, which is not copied."""
        self._check_between_steps()
        self._skipped_steps.flush(self.param_groups)
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _COPIED}}

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            logger.warning(
                "A pickled MoLF leaves its process_group behind, and would follow rank 0 of all ranks: make a new one with "
                "process_group=..., and load optimizer.state_dict() into it"
            )
        return self._copied()

    def __deepcopy__(self, memo: dict[int, Any]) -> MoLF:
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__({**copy.deepcopy(self._copied(), memo), "_process_group": self._process_group})
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "optimizer_in_backward" in state:  # a copy of an optimizer, not a state that is loaded
            self._start(process_group=state.get("_process_group"))
