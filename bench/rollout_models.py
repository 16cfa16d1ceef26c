"""Models to draw rollouts from: a saved one, or the shape of a published one with random weights; and what a step must read."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from esr_distill.prompts import PromptBatch

# The fields of the published config.json that decide size and speed.
SHAPES = {
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072},
    "qwen3-1.7b": {"hidden_size": 2048, "intermediate_size": 6144},
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "tiny-teacher": {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 300,
        "head_dim": 8,
    },
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 8},
}
QWEN3 = {
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}


def make_model(name: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A shape by its name, with weights of standard deviation 0.02; else a saved model's folder."""
    if name in SHAPES:
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(Qwen3Config(**(QWEN3 | SHAPES[name])), dtype=dtype).eval()
    if not Path(name).is_dir():
        raise ValueError(f"model must be among {', '.join(SHAPES)} or a folder, got {name!r}")
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True).to(device).eval()


def make_prompts(model: PreTrainedModel, batch_size: int, width: int, *, is_ragged: bool) -> PromptBatch:
    """Random ids; ragged prompts have every length from half the width on."""
    device, vocab_size = model.device, model.get_output_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(batch_size)
    ids_B_P = torch.randint(vocab_size, (batch_size, width), generator=generator)
    lengths_B = torch.full((batch_size,), width)
    if is_ragged:
        lengths_B = torch.randint(width // 2, width + 1, (batch_size,), generator=generator)
    mask_B_P = torch.arange(width) >= width - lengths_B[:, None]
    return PromptBatch(ids_B_P.to(device), mask_B_P.to(device), torch.arange(batch_size, device=device))


def weight_bytes(model: PreTrainedModel) -> int:
    """Weights that one decode step reads: all but the embedding, of which it takes a row, unless the head is the same tensor."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    total = sum(parameter.nbytes for parameter in parameters.values())
    return total if embedding.data_ptr() == head.data_ptr() else total - embedding.nbytes


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Keys and values of one token in all layers, in the dtype of the weights."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize


def step_bytes(model: PreTrainedModel, prompts: PromptBatch, horizon: int) -> float:
    """Bytes that a step must read on average over the horizon: weights once, and every row's cache."""
    prompt_tokens = int(prompts.prompt_mask_B_P.sum())
    cached_tokens = prompt_tokens + prompts.prompt_ids_B_P.shape[0] * horizon / 2
    return weight_bytes(model) + cache_bytes_per_token(model) * cached_tokens
