"""Mixtures of experts from training to the saved checkpoint: their stacked matrices are routed one by one."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from molf.study.results.routing_reader import read_routing
from molf.study.results.tables import expert_grids
from molf.study.run.train import run
from small_runs import small_config, small_run
from tiny_checkpoints import SENTENCE, byte_tokenizer

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
MIXTURES = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16)),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, num_local_experts=4, rope_parameters={"rope_type": "default"})
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_trains_and_its_checkpoint_loads_in_plain_transformers(name, tmp_path):
    torch.manual_seed(0)
    source = tmp_path / "model"
    MIXTURES[name]().save_pretrained(source)
    byte_tokenizer([SENTENCE], 300, pad_token="</s>").save_pretrained(source)
    result = run(small_config(small_run(str(source), tmp_path / "run"), score="random", eval_before=True))
    assert 0 < result.routing["fft"] < 1
    before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, tmp_path / "run"))
    assert after.config.output_router_logits == before.config.output_router_logits  # TRL asks for them in training
    ids = torch.randint(2, 256, (2, 7))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        assert torch.equal(after(ids).logits, reloaded(ids).logits)
        assert not torch.allclose(after(ids).logits, before(ids).logits, atol=1e-3)
    here, there = (model.state_dict() for model in (before, after))
    stacks = [key for key in here if "experts" in key and here[key].ndim == 3]
    assert len(stacks) == 4 and all((here[key] - there[key]).abs().amax((1, 2)).min() > 0 for key in stacks)
    routed = json.loads((tmp_path / "run/routing.jsonl").read_text().splitlines()[0])["modules"]
    assert "model.layers.1.mlp.experts.gate_up_proj[3]" in routed and len(routed) == 2 * (4 + 2 * 4)
    grids = expert_grids(read_routing(tmp_path / "run/routing.jsonl").by_module)
    assert {kind: grid.shape for kind, (grid, *_) in grids.items()} == {"gate_up_proj": (2, 4), "down_proj": (2, 4)}
    assert (tmp_path / "run/routing.png").stat().st_size > 50_000
