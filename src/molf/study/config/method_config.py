"""The method of a run and its settings. Nothing here imports torch."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from molf.errors import MolfError
from molf.study.config.fields import ADAPTED, ADDING_LORA, ROUTED, STATIC, setting

Method = Literal["molf", "molf_e", "fft", "lora", "rslora", "dora", "adalora", "pissa", "eva", "lora_plus", "static"]
"""The names of all methods."""


@dataclass
class MethodConfig:
    """How the weights are updated: MoLF, MoLF-Efficient, full fine-tuning or a PEFT adapter.

    Defaults that depend on the method are filled in: ``ranks``, ``match_lora_rate``, ``use_rslora``, ``fft_expert``,
    ``freeze_non_linear``. What the method does not read is refused when a run starts (``molf.study.config.unread``).

    Raises:
        MolfError: A setting is out of range or contradicts the method.
    """

    _argument_group_name: ClassVar[str] = "method"

    method: Method = setting(
        "molf",
        "molf routes the update of each layer; molf_e does so on a frozen base; static trains what a recipe says; the others are "
        "baselines.",
        shapes="checkpoint",
    )
    recipe: str = setting(
        "default",
        "published: the paper's settings of molf and molf_e wherever none is given. Flags by their published names (--mode, "
        "--molf_topk, ...) choose it, too. A file that `molf recipe` wrote: method static by this file.",
        shapes="nothing",  # by itself: the settings that it fills in do
        read_by=ROUTED,
    )
    allocation: str | None = setting(
        None,
        "static: the file that says which layers train whole and which by LoRA; --recipe FILE chooses both.",
        read_by=(STATIC,),
    )
    ranks: list[int] | None = setting(
        None,
        "molf, molf_e: ranks of the LoRA experts, e.g. 128 or [32,128]; by default [128] and [32,128].",
        shapes="checkpoint",
        read_by=ROUTED,
    )
    lora_rank: int = setting(
        128,
        "Baselines: rank of the adapter; for adalora and eva the mean rank.",
        shapes="checkpoint",
        read_by=ADAPTED,
    )
    lora_learning_rate: float | None = setting(
        None,
        "Learning rate of LoRA weights; learning_rate if unset.",
        shapes="checkpoint",
        read_by=(*ADDING_LORA, STATIC),
    )
    lora_weight_decay: float = setting(
        0.01, "Weight decay of LoRA weights.", shapes="checkpoint", read_by=(*ADDING_LORA, STATIC)
    )
    lora_alpha: float | None = setting(
        None,
        "LoRA alpha; by default 32 for molf and molf_e; for the others such that the scale is 2 (1 for pissa): "
        "2*sqrt(rank) with rsLoRA, 2*rank without.",
        shapes="checkpoint",
        read_by=ADDING_LORA,
    )
    lora_dropout: float | None = setting(
        None,
        "LoRA dropout; by default 0 for molf, molf_e and pissa, 0.05 for the others. MoLF with dropout runs its "
        "experts as PEFT adapters.",
        shapes="checkpoint",
        read_by=(*ADDING_LORA, STATIC),
    )
    use_rslora: bool | None = setting(
        None,
        "Scale LoRA by alpha/sqrt(rank) instead of alpha/rank; by default for molf, molf_e and rslora only.",
        shapes="checkpoint",
        read_by=ADDING_LORA,
    )
    loraplus_lr_ratio: float = setting(
        16.0,
        "lora_plus: ratio of the learning rates of B and A.",
        shapes="checkpoint",
        read_by=("lora_plus",),
    )
    top_k: int = setting(
        1, "molf: how many experts of a layer are updated per step.", shapes="checkpoint", read_by=ROUTED
    )
    score: Literal["epd", "pfn", "descent", "random", "coherence", "shuffled"] = setting(
        "epd",
        "molf, molf_e: expected preconditioned descent, the preconditioned Frobenius norm, total descent, coherence, or a "
        "control: random routing, or EPD's decisions dealt to other layers.",
        shapes="checkpoint",
        read_by=ROUTED,
    )
    match_lora_rate: bool | None = setting(
        None,
        "molf, molf_e: let the length of a LoRA step follow from learning_rate, whatever lora_alpha, as far as it is aligned "
        "with the gradient; by default unless lora_learning_rate is given or the recipe is the published one.",
        shapes="checkpoint",
        read_by=ROUTED,
    )
    target_modules: list[str] = setting(
        ["all-linear"], "Layers to route or adapt: all-linear, or endings of their names.", shapes="checkpoint"
    )
    exclude_modules: list[str] = setting(["lm_head"], "Layers to leave out of target_modules.", shapes="checkpoint")
    target_parameters: list[str] = setting(
        [],
        "molf: matrices to route that are in no linear layer, by their names or endings of these (stacks of a mixture's "
        "experts are routed without being named).",
        shapes="checkpoint",
        read_by=("molf",),
    )
    freeze_non_linear: bool | None = setting(
        None,
        "molf, molf_e, fft: train only the weights and experts of target_modules (no norms, embeddings, biases); "
        "by default for molf_e only.",
        shapes="checkpoint",
        read_by=(*ROUTED, "fft"),
    )
    fft_expert: bool | None = setting(
        None, "Whether full fine-tuning is an expert of molf; molf without it is molf_e.", read_by=ROUTED
    )
    optim_bits: Literal[32, 8] = setting(
        32,
        "molf: bits of the moments of large matrices that train with full rank; 8 takes a quarter.",
        shapes="checkpoint",
        read_by=ROUTED,
    )
    bf16_update: Literal["split", "stochastic"] = setting(
        "split",
        "molf, bfloat16 weights: keep their low bits beside them, or round stochastically.",
        shapes="checkpoint",
        read_by=ROUTED,
    )
    optimizer_in_backward: bool = setting(
        False,
        "molf, molf_e: move every layer inside backward and free its gradients; with max_grad_norm 0 and "
        "gradient_accumulation_steps 1 only.",
        read_by=ROUTED,
    )
    fused: bool | None = setting(
        None,
        "molf, molf_e, on a CUDA device: use the Triton kernels or not; by default use them if they are supported and a "
        "self-test matches PyTorch.",
        read_by=ROUTED,
    )
    routing_log: Literal["compact", "published"] = setting(
        "compact",
        "molf, molf_e: format of the log of all decisions: arrays in routing.jsonl, or the published "
        "molf_expert_selection.jsonl, which the published flags choose.",
        shapes="nothing",
        read_by=ROUTED,
    )
    routing_log_every: int = setting(
        1, "molf, molf_e: log the decision of every so many steps.", shapes="nothing", read_by=ROUTED
    )

    def __post_init__(self) -> None:
        if self.recipe not in ("default", "published"):
            self._take_recipe()
        if self.method == "molf_e" and self.fft_expert:
            raise MolfError("fft_expert=True with method molf_e, whose base is frozen: leave it out or use method molf")
        if self.method == "rslora" and self.use_rslora is False:
            raise MolfError("use_rslora=False with method rslora: leave it out or use method lora")
        if self.method == "adalora" and self.use_rslora:
            raise MolfError("use_rslora=True with method adalora, which scales by alpha/rank: leave it out")
        if self.method == "molf" and self.fft_expert is False:
            self.method = "molf_e"
        efficient = self.method == "molf_e"
        if self.match_lora_rate is None:
            self.match_lora_rate = self.routes and self.recipe == "default" and self.lora_learning_rate is None
        if self.match_lora_rate and self.lora_learning_rate is not None:
            raise MolfError(
                f"match_lora_rate=True with lora_learning_rate={self.lora_learning_rate}: leave one of them out"
            )
        if self.routes:
            self.fft_expert = not efficient
        if self.use_rslora is None:
            self.use_rslora = self.routes or self.method == "rslora"
        if self.ranks is None:
            self.ranks = [32, 128] if efficient else [128]
        if self.freeze_non_linear is None:
            self.freeze_non_linear = efficient
        self._check_numbers()

    def _take_recipe(self) -> None:
        """Read ``recipe``, the name of a file, as the method static with that file."""
        if self.method not in ("molf", STATIC):  # molf is the default
            raise MolfError(
                f"recipe={self.recipe} with method {self.method}: a recipe file is a method of its own, static; leave one out"
            )
        if self.allocation not in (None, self.recipe):
            raise MolfError(f"recipe={self.recipe} with allocation={self.allocation}: leave one of them out")
        self.method, self.allocation, self.recipe = "static", self.recipe, "default"

    def _check_numbers(self) -> None:
        if not 1 <= self.loraplus_lr_ratio < math.inf:
            raise MolfError(
                f"loraplus_lr_ratio={self.loraplus_lr_ratio} must be a finite number of at least 1, so that B learns at least as "
                "fast as A"
            )
        for name in ("lora_learning_rate", "lora_weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise MolfError(f"{name}={value} must be a finite number, 0 or more")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise MolfError(f"lora_dropout={self.lora_dropout} must be at least 0 and below 1")
        if self.routing_log_every < 1:
            raise MolfError(f"routing_log_every={self.routing_log_every} must be at least 1")
        if self.lora_rank < 1:
            raise MolfError(f"lora_rank={self.lora_rank} must be at least 1")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise MolfError(f"lora_alpha={self.lora_alpha} must be a finite number above 0")
        ranks = self.ranks or []
        if any(rank < 1 for rank in ranks) or len(set(ranks)) < len(ranks):
            raise MolfError(f"ranks={ranks}: give ranks of at least 1, each once")
        experts = len(ranks) + bool(self.fft_expert)
        if self.routes and not 1 <= self.top_k <= experts:
            raise MolfError(f"top_k={self.top_k}: choose between 1 and {experts}, the number of experts")

    @property
    def routes(self) -> bool:
        """Whether the optimizer is MoLF."""
        return self.method in ROUTED
