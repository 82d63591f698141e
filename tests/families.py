"""Tiny random models of many families of transformers, and the table of what MoLF trains of each.

``python tests/families.py`` writes the table into ``docs/models.md``.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from molf import param_groups
from molf.errors import MolfError
from molf.integrations.lora_targets import find_targets

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
COMMAND = "PYTHONPATH=src python tests/families.py"

WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
ENCODER = {**WIDTHS, **SPECIAL}
DECODER = {**ENCODER, "num_key_value_heads": 2}
HEADS = {**DECODER, "head_dim": 8}
GPT = {**SPECIAL, "vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
MIXTURE = {**DECODER, "num_experts_per_tok": 2, "num_local_experts": 4}
EXPERTS = {**DECODER, "num_experts_per_tok": 2, "num_experts": 4}
IMAGE = {"image_size": 8, "patch_size": 4}
VISION = {**WIDTHS, **IMAGE, "projection_dim": 16}

# fmt: off
DEEPSEEK = {
    **ENCODER, "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8,
}
JAMBA = {
    **EXPERTS, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
}
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0,
}
BART = {
    **SPECIAL, "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}
WHISPER = {
    **BART, "num_mel_bins": 4, "max_source_positions": 4, "max_target_positions": 8, "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
}
# fmt: on


class Family(NamedTuple):
    """A model class of transformers.

    Attributes:
        model: Its name.
        settings: Arguments of its configuration.
        inputs: What a batch has: ``text``, ``pairs`` (for an encoder and a decoder), ``speech``, ``image``, or ``both``.
    """

    model: str
    settings: dict[str, Any]
    inputs: str = "text"

    def build(self, **changes):
        """Return a random model in evaluation mode, always the same."""
        torch.manual_seed(0)
        model = getattr(transformers, self.model)
        return model(model.config_class(**self.settings, **changes)).eval()

    def batch(self):
        """Return the arguments of a forward pass."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 60, (2, 6), generator=generator)
        ids[:, 1:5] = 63  # for Llava the place of the four patches of an image
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        image = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
        pairs = {**text, "decoder_input_ids": ids.flip(1)}
        speech = {"input_features": torch.randn(2, 4, 8, generator=generator), "decoder_input_ids": ids}
        return {"text": text, "pairs": pairs, "speech": speech, "image": image, "both": text | image}[self.inputs]


FAMILIES = {
    "Llama": Family("LlamaForCausalLM", DECODER),
    "Qwen2": Family("Qwen2ForCausalLM", DECODER),
    "Qwen3": Family("Qwen3ForCausalLM", HEADS),
    "Gemma 2": Family("Gemma2ForCausalLM", HEADS),
    "Gemma 3": Family("Gemma3ForCausalLM", HEADS),
    "Phi-3": Family("Phi3ForCausalLM", DECODER),
    "OLMo 2": Family("Olmo2ForCausalLM", DECODER),
    "StableLM": Family("StableLmForCausalLM", DECODER),
    "Cohere": Family("CohereForCausalLM", DECODER),
    "GPT-2": Family("GPT2LMHeadModel", GPT),
    "GPT-2 classifier": Family("GPT2ForSequenceClassification", GPT),
    "GPT-NeoX": Family("GPTNeoXForCausalLM", ENCODER),
    "OPT": Family("OPTForCausalLM", {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Falcon": Family("FalconForCausalLM", {**ENCODER, "ffn_hidden_size": 48}),
    "BLOOM": Family("BloomForCausalLM", {**GPT, "hidden_size": 32}),
    "Mixtral": Family("MixtralForCausalLM", MIXTURE),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 8, "moe_intermediate_size": 16}),
    "gpt-oss": Family("GptOssForCausalLM", {**MIXTURE, "head_dim": 8, "rope_parameters": {"rope_type": "default"}}),
    "OLMoE": Family("OlmoeForCausalLM", EXPERTS),
    "DeepSeek-V3": Family("DeepseekV3ForCausalLM", DEEPSEEK),
    "Llama 4": Family("Llama4ForCausalLM", {**MIXTURE, "head_dim": 8, "intermediate_size_mlp": 48}),
    "GraniteMoE": Family("GraniteMoeForCausalLM", MIXTURE),
    "Jamba": Family("JambaForCausalLM", JAMBA),
    "Mamba": Family(
        "MambaForCausalLM", {**SPECIAL, "vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
    ),
    "BERT": Family("BertModel", ENCODER),
    "BERT classifier": Family("BertForSequenceClassification", ENCODER),
    "BERT masked": Family("BertForMaskedLM", ENCODER),
    "BERT tokens": Family("BertForTokenClassification", ENCODER),
    "RoBERTa classifier": Family("RobertaForSequenceClassification", ENCODER),
    "DeBERTa-v2 classifier": Family("DebertaV2ForSequenceClassification", {**ENCODER, "relative_attention": True}),
    "ModernBERT masked": Family("ModernBertForMaskedLM", {**ENCODER, "cls_token_id": 1, "sep_token_id": 2}),
    "T5": Family("T5ForConditionalGeneration", T5, "pairs"),
    "BART": Family("BartForConditionalGeneration", BART, "pairs"),
    "Whisper": Family("WhisperForConditionalGeneration", WHISPER, "speech"),
    "ViT classifier": Family("ViTForImageClassification", VISION, "image"),
    "CLIP": Family("CLIPModel", {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 16}, "both"),
    "Llava": Family(
        "LlavaForConditionalGeneration",
        {
            "text_config": {**DECODER, "model_type": "llama"},
            "vision_config": {**VISION, "num_hidden_layers": 2, "model_type": "clip_vision_model"},
            "image_token_index": 63,
        },
        "both",
    ),
}


def output(model, batch):
    """Return what a loss is made of: logits, similarities or hidden states."""
    found = model(**batch)
    return next(found[key] for key in ("logits", "logits_per_image", "last_hidden_state") if key in found)


def merged_share(model):
    """Return the part of the parameters that the merged form routes, or None if it refuses the model."""
    try:
        groups = param_groups(model, ranks=(2,))
    except MolfError:
        return None
    routed = {id(p): p.numel() for group in groups if "module" in group for p in group["params"]}
    return sum(routed.values()) / sum(p.numel() for p in model.parameters())


def row(name):
    """Return a family's line of the table."""
    family = FAMILIES[name]
    model = family.build()
    targets, share = find_targets(model), merged_share(model)
    left = [f"`{re.sub(r'^.*[*][.]', '', weight)}`" for weight in targets.left_out]
    merged = "not with Conv1D" if share is None else f"{100 * share:.0f} %"
    return f"| {name} | `{family.model}` | {merged} | {100 * targets.share:.0f} % | {', '.join(left)} |"


def table():
    """Return the table of all families."""
    head = "| family | class | merged: routed | MoLF-Efficient: adapted | without LoRA experts |\n| --- | --- | --- | --- | --- |"
    return "\n".join([head, *map(row, FAMILIES)])


def split_page():
    """Return the page before its table, the table, and the rest."""
    before, rest = PAGE.read_text().split("<!-- table -->\n")
    found, _, after = rest.partition("\n\n")
    return before + "<!-- table -->\n", found, "\n\n" + after


if __name__ == "__main__":
    start, _, end = split_page()
    PAGE.write_text(start + table() + end)
