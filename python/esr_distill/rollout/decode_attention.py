"""Which attention decodes, beside the one that reads prompts."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


def decode_attention(model: PreTrainedModel) -> str:
    """Flash attention over a static cache would read its unwritten columns; SDPA takes a mask."""
    name = model.config._attn_implementation
    return "sdpa" if "flash" in name else name


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
