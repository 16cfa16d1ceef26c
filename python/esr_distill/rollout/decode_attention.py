"""Which attention decodes, beside the one that reads prompts.

Flash attention over a static cache would read its unwritten columns; SDPA takes a mask. transformers' SDPA, given a mask, may
first copy keys and values so that every query head has its own (5.17 does): most of the traffic of a step with a large cache.
Here the query heads that share a key head are rows of one product instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "esr_decode_sdpa"


def decode_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """(B, heads, 1, size) queries on (B, key heads, columns, size) keys -> (B, 1, heads, size of values).

    Whatever is not the plain attention of one token goes to transformers' own SDPA.
    """
    is_plain = query.shape[2] == 1 and all(others.get(name) is None for name in ("softcap", "position_bias", "cache"))
    if not is_plain:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **others)
    batch_size, num_heads, _, size = query.shape
    grouped = query.reshape(batch_size, key.shape[1], num_heads // key.shape[1], size)
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch_size, 1, num_heads, value.shape[-1]), None


AttentionInterface.register(NAME, decode_sdpa)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


def decode_attention(model: PreTrainedModel) -> str:
    """`decode_sdpa` where the model has SDPA or flash attention, else what it has."""
    name = model.config._attn_implementation
    return NAME if name == "sdpa" or "flash" in name else name


@contextmanager
def decode_attention_of(model: PreTrainedModel) -> Iterator[None]:
    before, inside = model.config._attn_implementation, decode_attention(model)
    if inside == before:
        yield
        return
    model.set_attn_implementation(inside)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
