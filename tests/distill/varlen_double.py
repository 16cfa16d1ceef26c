"""Attention within rows in plain PyTorch, in place of the two kernels that need a GPU: their arguments, and what these mean.

Both count a window as keys to the left of a token, itself not among them, and take a right side of 0 for causal. Row by row over
whole score matrices, in float64; nothing of it is in the library.
"""

import inspect
import sys
from types import ModuleType

import pytest
import torch
import transformers.modeling_flash_attention_utils as transformers_flash
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from esr_distill import packed_attention


def attend_in_rows(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *, scale: float | None, left: int, softcap: float = 0.0
) -> Tensor:
    """(S, heads, size) on (S, key heads, size) -> (S, heads, size); `left` below 0 is no limit."""
    heads_per_key = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(heads_per_key, dim=1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for first, last in zip(starts.tolist()[:-1], starts.tolist()[1:], strict=True):
        rows = slice(first, last)
        scores = torch.einsum("qhd,khd->hqk", query[rows].double(), key[rows].double()) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(last - first, device=query.device)[:, None] - torch.arange(
            last - first, device=query.device
        )
        seen = (distance >= 0) & ((distance <= left) if left >= 0 else (distance >= 0))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value[rows].double()))
    return torch.cat(outputs).to(query.dtype)


class VarlenDouble:
    """`torch.nn.attention.varlen.varlen_attn`, for causal attention; `calls` keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "VarlenDouble":
        monkeypatch.setattr(packed_attention, "varlen_attn", self)
        return self

    def __call__(self, *arguments, **options):
        given = inspect.signature(varlen_attn).bind(
            *arguments, **options
        )  # what the real one would not take is a TypeError
        given.apply_defaults()
        query, key, value, starts, key_starts, longest, longest_key = given.args[:7]
        check_rows(query, starts, key_starts, longest, longest_key)
        # PyTorch 2.11 has no such option, and takes fewer key heads without being asked
        assert given.arguments.get("enable_gqa", True) or query.shape[1] == key.shape[1]
        window = given.arguments["window_size"]
        assert isinstance(window, tuple) and window[1] == 0  # a list is not taken for causal
        assert len({tensor.dtype for tensor in (query, key, value)}) == 1
        assert query.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
        self.calls.append({"dtype": query.dtype, "tokens": query.shape[0], "window": window, "longest": longest})
        return attend_in_rows(query, key, value, starts, scale=given.arguments["scale"], left=window[0])


class FlashDouble:
    """`flash_attn.flash_attn_varlen_func` of flash-attn 2, for causal attention; `calls` keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "FlashDouble":
        """As the package flash_attn that transformers' flash_attention_2 imports."""
        package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
        package.flash_attn_func = package.flash_attn_with_kvcache = package.flash_attn_varlen_func = self
        padding.pad_input, padding.unpad_input = pad_input, None
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
        monkeypatch.setattr(transformers_flash, "is_flash_attn_2_available", lambda: True)
        monkeypatch.setattr(transformers_flash, "_loaded_implementation", None)
        return self

    def __call__(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        deterministic=False,
    ):
        check_rows(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert causal
        self.calls.append({"tokens": q.shape[0], "window": window_size, "softcap": softcap})
        return attend_in_rows(q, k, v, cu_seqlens_q, scale=softmax_scale, left=window_size[0], softcap=softcap)


def check_rows(query: Tensor, starts: Tensor, key_starts: Tensor, longest: int, longest_key: int) -> None:
    """What the kernels check or rely on without checking."""
    assert query.ndim == 3 and query.stride(-1) == 1
    assert starts.dtype == torch.int32 and starts.is_contiguous() and torch.equal(starts, key_starts)
    assert isinstance(longest, int) and longest == longest_key == int(starts.diff().max())
    assert starts[0] == 0 and starts[-1] == query.shape[0]


def pad_input(tokens: Tensor, places: Tensor, batch_size: int, width: int) -> Tensor:
    """(S, ...) to (batch, width, ...), zeros elsewhere."""
    padded = tokens.new_zeros(batch_size * width, *tokens.shape[1:]).index_copy(0, places, tokens)
    return padded.view(batch_size, width, *tokens.shape[1:])
