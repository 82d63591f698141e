"""A merged checkpoint as a GGUF file: what is read back computes the same, up to the quantisation."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import molf
from molf.integrations.export import export_merged
from small import tiny_llama
from tiny_checkpoints import SIZES, TOKENS

LAYERS = 2
# The largest difference of a weight, relative to the largest of its block of 32, is 1/127 / 2 with 8 bits.
TOLERANCE = {"F32": 1e-5, "Q8_0": 2e-2}


def llama():
    return tiny_llama(vocab_size=300, **SIZES, **TOKENS, num_hidden_layers=LAYERS)


def write_gguf(folder, file, kind):
    """Write a Llama as llama.cpp's converter lays it out: rows of q and k in another order, matrices quantised."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("merged")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    for name, x in model.state_dict().items():
        values = x.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            halves = values.reshape(heads, 2, -1, values.shape[1])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        own = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        data = values if own == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(values, own)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The folder of a merged checkpoint, and the logits of the experts that it was made of."""
    model = molf.add_lora_experts(llama(), ranks=(2, 4))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    expected = logits(model)
    assert (expected - logits(llama())).abs().max() > 0.02
    folder = tmp_path_factory.mktemp("gguf") / "merged"
    export_merged(model, folder)
    return folder, expected


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None]).logits


@pytest.mark.parametrize("kind", TOLERANCE)
def test_what_is_read_back_computes_the_same(kind, merged, tmp_path):
    folder, expected = merged
    write_gguf(folder, tmp_path / "model.gguf", kind)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    apart = (logits(read) - expected).abs().max() / expected.abs().max()
    assert apart < TOLERANCE[kind]
    assert kind == "F32" or apart > 1e-5, "it was quantised"
