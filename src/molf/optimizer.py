"""``MoLF``, the optimizer: it carries state and order; the mathematics is in the modules around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from molf.adamw import Rates, Slot, adamw_
from molf.checkpoint import check_compatible, restore_dtypes
from molf.distributed import Ranks, agree_on_seeds, find_ranks
from molf.experts import Experts
from molf.forms import FORMS
from molf.gradients import all_zero, prepare_gradients
from molf.groups import param_groups
from molf.kernels import refusal
from molf.layers import RoutedLayer, in_8_bits, init_moments, init_step
from molf.options import check_given_groups, check_optim_bits, check_options, check_top_k
from molf.precision import Noise
from molf.resharding import Names, refuse_orphans
from molf.router import route
from molf.routing import Routing
from molf.scores import Score, get_score

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from molf.kernels.step import FusedStep

__all__ = ["MoLF"]

logger = logging.getLogger(__name__)


class MoLF(torch.optim.Optimizer):
    """Route every linear layer's update to full fine-tuning or to a LoRA expert, at every step.

    Each targeted layer holds an ``fft`` expert (its weight and bias) and one LoRA expert per rank. At each step all
    experts' Adam moments move; the ``top_k`` experts with the best score take the AdamW step, the others keep their
    weights bit for bit (Tang et al. 2026). The model stays made of plain layers whose weights are the merged ones at all
    times, so every checkpoint is an ordinary checkpoint. Everything else that trains takes plain AdamW.

    Args:
        model: The model, or the groups that ``molf.param_groups`` made of it.
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
        fused: Take the step by MoLF's own Triton kernels: a few launches for the whole model and no word to the host. True
            needs an accelerator, float32 or bf16 weights and one of the paper's scores. None leaves it off: no GPU has timed
            these kernels yet.
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
        process_group: ProcessGroup | None = None,
    ):
        check_options(betas, eps, max_grad_norm, bf16_update)
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
        self.optim_bits = check_optim_bits(optim_bits, groups, fused)
        self.top_k = check_top_k(top_k, groups)
        self.score = get_score(score)
        self.max_grad_norm = max_grad_norm
        self.bf16_update = bf16_update
        self.fused = bool(fused)
        self._kernels: FusedStep | None = None
        self._left_out: Tensor | None = None  # steps that kernels left out since the count was last asked for
        self._process_group = process_group
        self._names = Names(model, groups) if isinstance(model, nn.Module) else None
        self._agreed = False
        self.routing: Routing | None = None
        self.grad_norm: Tensor | None = None
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "skipped_steps": 0}
        super().__init__(groups, defaults)

    @property
    def experts(self) -> Experts:
        """Live views of all experts by module and expert name."""
        return Experts(self)

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because of a non-finite gradient. After fused steps, asking waits for the device."""
        self._count_left_out()
        return int(self.param_groups[0]["skipped_steps"])

    def _count_left_out(self) -> None:
        """Add the steps that kernels left out, which they count on the device, to the count in the groups."""
        if self._left_out is not None:
            left_out, self._left_out = int(self._left_out), None
            for group in self.param_groups:
                group["skipped_steps"] += left_out

    def routed_layer(self, module: str) -> RoutedLayer:
        """Return the routed layer of that name as it is now, its state in place.

        Raises:
            KeyError: If no such module is routed.
        """
        for group in self.param_groups:
            if group.get("module") == module:
                form = FORMS[group["form"]]
                form.init_state(group, self.state, self.bf16_update == "split", self.optim_bits)
                return form(group, self.state, self.noise(self._ranks()))
        names = [group["module"] for group in self.param_groups if "module" in group]
        raise KeyError(f"{module!r} is not routed; the {len(names)} routed modules are {names[0]}, ..., {names[-1]}")

    def noise(self, ranks: Ranks) -> Noise | None:
        """Return the noise of this step's stochastic rounding on one of these ranks, None where low parts are kept."""
        if self.bf16_update == "split":
            return None
        routed = [group for group in self.param_groups if "module" in group]
        steps = max(int(self.state[group["params"][0]].get("step", 0)) for group in routed)
        return Noise((routed[0]["lora_seed"] * 1_000_003 + steps) % 2**63, ranks.index)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Decide, then move the winners.

        A step with a non-finite gradient is left out whole (moments too), counted in ``skipped_steps`` and logged.

        Args:
            closure: Re-evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ranks = self._begin()
        ordinary = [g for g in self.param_groups if "module" not in g]
        if self._is_dry(ranks):
            return loss
        noise = None if self.fused else self.noise(ranks)
        routed = [FORMS[g["form"]](g, self.state, noise) for g in self.param_groups if "module" in g]
        layers = [layer for layer in routed if layer.active]
        if self.fused and layers:
            self._take_fused(layers, ordinary, ranks)
            return loss
        if not self._prepare(layers, ordinary, ranks):
            return loss
        if layers:
            self.routing = route(layers, self.score, self.top_k, noise, ranks)
        for group in ordinary:
            self._adamw(group, noise)
        return loss

    def _ranks(self) -> Ranks:
        """Return the ranks that train together; if the model was sharded since, its new parameters are looked up first."""
        if self._names is not None:
            self._names.follow(self.param_groups)
        return find_ranks(self.param_groups, self._process_group)

    def _begin(self) -> Ranks:
        """Make everything ready for a step."""
        ranks = self._ranks()
        if not self._agreed:
            agree_on_seeds(self.param_groups, self.state, ranks)
            self._agreed = True
        self._init_states()
        return ranks

    def _init_states(self) -> None:
        refuse_orphans(self.param_groups, self.state)
        keep_low = self.bf16_update == "split"
        for group in self.param_groups:
            if "module" in group:
                FORMS[group["form"]].init_state(group, self.state, keep_low, self.optim_bits)
                continue
            for p, packed in zip(group["params"], in_8_bits(group, self.optim_bits), strict=True):
                if p.grad is not None:
                    init_step(self.state[p])
                    init_moments(p, self.state[p], keep_low, packed)

    def _is_dry(self, ranks: Ranks) -> bool:
        """Tell a dry step, with which distributed checkpointing creates optimizer state: rates and gradients all zero."""
        if any(float(group["lr"]) for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return all_zero(grads, ranks)

    def _prepare(self, layers: list[RoutedLayer], ordinary: list[dict[str, Any]], ranks: Ranks) -> bool:
        """Unscale, measure and clip the gradients; return whether the step can be taken."""
        dense = [p.grad for group in ordinary for p in group["params"] if p.grad is not None]
        dense += [grad for layer in layers for grad in layer.gradients()]
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self.grad_norm = prepare_gradients(dense, layers, self.max_grad_norm, scale, overflow, ranks)
        if self.grad_norm.isfinite() and not overflow:
            return True
        for group in self.param_groups:
            group["skipped_steps"] += 1
        if ranks.first:
            logger.warning(
                "step left out: a gradient is not finite (%d left out so far). Weights and moments are unchanged.",
                self.skipped_steps,
            )
        return False

    def _take_fused(self, layers: list[RoutedLayer], ordinary: list[dict[str, Any]], ranks: Ranks) -> None:
        """Take the step by kernels; whether it was left out is asked for later, by ``skipped_steps``."""
        if self._kernels is None:
            if reason := refusal(layers, ordinary, self.score):
                raise ValueError(f"fused=True: {reason}; use fused=False")
            from molf.kernels.step import FusedStep

            self._kernels = FusedStep(layers[0].group["params"][0].device, self.score, self.top_k, self.max_grad_norm)
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        outcome = self._kernels.take(layers, ordinary, self.state, scale, overflow, ranks)
        self.grad_norm = outcome.norm
        self._left_out = outcome.taken.logical_not() + (0 if self._left_out is None else self._left_out)
        names = tuple(layer.name for layer in layers)
        self.routing = Routing(names, layers[0].experts, outcome.scores, outcome.chosen, outcome.taken)

    def _adamw(self, group: dict[str, Any], noise: Noise | None) -> None:
        by_step: dict[float, list[Slot]] = {}
        for p in group["params"]:
            if p.grad is not None:
                own = self.state[p]
                own["step"] += 1
                by_step.setdefault(float(own["step"]), []).append(Slot.of(p, own))
        for step, slots in by_step.items():
            adamw_(slots, Rates(float(group["lr"]), group["weight_decay"], group["betas"], group["eps"], step), noise)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the count of steps left out up to date."""
        self._count_left_out()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state exactly, in the dtypes it was saved in.

        Raises:
            ValueError: If it belongs to other modules, ranks or shapes; the differing names are given.
        """
        check_compatible(self.param_groups, state_dict, self.optim_bits)
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        options = (
            "top_k",
            "score",
            "max_grad_norm",
            "optim_bits",
            "bf16_update",
            "routing",
            "grad_norm",
            "fused",
            "_left_out",
        )
        bound = {"_kernels": None, "_names": None, "_process_group": None, "_agreed": False}
        return {**super().__getstate__(), **{key: getattr(self, key) for key in options}, **bound}
