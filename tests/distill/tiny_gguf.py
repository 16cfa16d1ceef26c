"""A random Llama of two layers as a GGUF file, written with the package gguf as llama.cpp lays weights out."""

from pathlib import Path

import numpy as np
from tiny_models import BOS, EOS, PAD, make_model, make_tokenizer
from transformers import PreTrainedModel

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_tokens() -> list[str]:
    """Those of the 19 symbols, one that only a merge gives, and one that transformers would add."""
    vocabulary = make_tokenizer().get_vocab()
    return [*sorted(vocabulary, key=vocabulary.get), "12", "<|endoftext|>"]


def save_gguf(path: Path, seed: int = 0) -> PreTrainedModel:
    """Write the model of this seed, in float32; returns it."""
    from gguf import GGUFWriter

    tokens = gguf_tokens()
    model = make_model(seed, vocab_size=len(tokens))
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])  # control or normal
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        layer, weight = name.removesuffix(".weight"), parameter.detach().numpy()
        if layer in NAMES:
            target = NAMES[layer]
        else:
            _, _, number, part = layer.split(".", 3)
            target = f"blk.{number}.{NAMES[part]}"
            if part in heads:  # llama.cpp rotates neighbours, transformers the two halves of a head
                halves = weight.reshape(heads[part], 2, -1, weight.shape[1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{target}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
