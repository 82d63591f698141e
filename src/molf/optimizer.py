"""``MoLF``, the optimizer: it carries state and order; the mathematics is in the modules around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from molf.checkpoint import check_compatible, restore_dtypes
from molf.distributed import Ranks, agree_on_seeds, find_ranks, is_sharded
from molf.experts import Experts
from molf.forms import FORMS
from molf.gradients import all_zero
from molf.groups import param_groups
from molf.kernels import refusal
from molf.layers import RoutedLayer
from molf.options import check_given_groups, check_optim_bits, check_options, check_top_k
from molf.plain import PlainStep
from molf.precision import Noise
from molf.resharding import Names
from molf.routing import Outcome, Routing
from molf.scores import Score, get_score
from molf.states import init_group, init_states

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
        self._fetch_left_out()
        return int(self.param_groups[0]["skipped_steps"])

    def _fetch_left_out(self) -> None:
        """Add the steps that kernels left out, which they count on the device, to the count in the groups."""
        if self._left_out is not None:
            self._count_left_out(int(self._left_out))
            self._left_out.zero_()

    def _count_left_out(self, steps: int) -> None:
        for group in self.param_groups:
            group["skipped_steps"] += steps

    def routed_layer(self, module: str) -> RoutedLayer:
        """Return the routed layer of that name as it is now, its state in place.

        Raises:
            KeyError: If no such module is routed.
        """
        for group in self.param_groups:
            if group.get("module") == module:
                init_group(group, self.state, self.bf16_update == "split", self.optim_bits)
                return FORMS[group["form"]](group, self.state, self._noise(self._ranks()))
        names = [group["module"] for group in self.param_groups if "module" in group]
        raise KeyError(f"{module!r} is not routed; the {len(names)} routed modules are {names[0]}, ..., {names[-1]}")

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
        fresh = not any(self.state.values())
        ranks = self._begin()
        if not (fresh and self._is_dry(ranks)):
            self._settle(self._take(self.param_groups, ranks, self._noise(ranks)), ranks)
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
        init_states(self.param_groups, self.state, self.bf16_update == "split", self.optim_bits)
        return ranks

    def _is_dry(self, ranks: Ranks) -> bool:
        """Tell a dry step, with which distributed checkpointing creates optimizer state: rates and gradients all zero."""
        if any(float(group["lr"]) for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return all_zero(grads, ranks)

    def _noise(self, ranks: Ranks) -> Noise | None:
        """Return the noise of this step's stochastic rounding, None where low parts are kept or kernels make their own."""
        if self.bf16_update == "split" or self.fused:
            return None
        routed = [group for group in self.param_groups if "module" in group]
        steps = max(int(self.state.get(group["params"][0], {}).get("step", 0)) for group in routed)
        params = [p for group in self.param_groups for p in group["params"]]
        # What is whole on every rank is rounded alike on all; a shard has a number of its own.
        apart = (ranks.index + 1) * len(params)
        streams = {p: i + apart * is_sharded(p) for i, p in enumerate(params)}
        return Noise((routed[0]["lora_seed"] * 1_000_003 + steps) % 2**63, streams)

    def _take(self, groups: Sequence[dict[str, Any]], ranks: Ranks, noise: Noise | None) -> Outcome:
        """Take the step of these groups' layers and parameters that have gradients."""
        layers = [FORMS[group["form"]](group, self.state, noise) for group in groups if "module" in group]
        active = [layer for layer in layers if layer.active]
        ordinary = [group for group in groups if "module" not in group]
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not self.fused:
            plain = PlainStep(self.score, self.top_k, self.max_grad_norm)
            return plain.take(active, ordinary, self.state, scale, overflow, ranks, noise)
        seed = next(group["lora_seed"] for group in self.param_groups if "module" in group)
        return self._fused_step().take(active, ordinary, self.state, scale, overflow, ranks, seed)

    def _fused_step(self) -> FusedStep:
        if self._kernels is None:
            if reason := refusal(self.param_groups, self.score):
                raise ValueError(f"fused=True: {reason}; use fused=False")
            from molf.kernels.step import FusedStep

            device = self.param_groups[0]["params"][0].device
            self._kernels = FusedStep(device, self.score, self.top_k, self.max_grad_norm)
        return self._kernels

    def _settle(self, outcome: Outcome, ranks: Ranks) -> None:
        """Keep what a step tells about itself; whether a fused one was left out is asked for later, by ``skipped_steps``."""
        self.grad_norm = outcome.norm
        if outcome.routing is not None:
            self.routing = outcome.routing
        if isinstance(outcome.taken, Tensor):
            # In place: a CUDA graph that holds this step goes on counting.
            if self._left_out is None:
                self._left_out = torch.zeros((), dtype=torch.int64, device=outcome.taken.device)
            self._left_out += outcome.taken.logical_not()
        elif not outcome.taken:
            self._count_left_out(1)
            if ranks.first:
                logger.warning(
                    "step left out: a gradient is not finite (%d left out so far). Weights and moments are unchanged.",
                    self.skipped_steps,
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the count of steps left out up to date."""
        self._fetch_left_out()
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
