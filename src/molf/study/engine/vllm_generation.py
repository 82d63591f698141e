"""Greedy continuations by vLLM, imported only if requested."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from molf.errors import MolfError
from molf.study.engine.generation import prompt_ids
from molf.tasks.base import Generate, Request


def require_vllm() -> None:
    """Make sure that vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        raise MolfError(
            "--generation_backend vllm needs vLLM, which is not installed: pip install 'molf[vllm]', "
            "or use --generation_backend transformers"
        )


@dataclass(frozen=True)
class VllmGenerator:
    """Answers ``Generate`` requests with a saved model."""

    source: str  # the model's folder or Hub id
    tokenizer: PreTrainedTokenizerBase  # with it, vLLM reads the same tokens as training and the other requests
    end_ids: list[int]
    dtype: str
    progress: bool = False

    def __call__(self, requests: Sequence[Generate]) -> dict[Request, str]:
        """Generate the greedy continuation of every request."""
        from vllm import LLM, SamplingParams

        ids = prompt_ids(self.tokenizer, requests)
        # "vllm": ignore the sampling settings that the checkpoint recommends.
        llm = LLM(model=self.source, dtype=self.dtype, generation_config="vllm")
        settings = [
            SamplingParams(
                temperature=0.0,
                max_tokens=request.max_new_tokens,
                stop=list(request.stop),
                stop_token_ids=self.end_ids,
                skip_special_tokens=True,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(ids[request.prompt])} for request in requests]
        outputs = llm.generate(prompts, settings, use_tqdm=self.progress)
        return {request: output.outputs[0].text for request, output in zip(requests, outputs, strict=True)}
