"""Rows, parameters and states that try a sampler, and the comparison of two states to the bit."""

from dataclasses import fields

import torch

from esr_kernels import SamplerState


def mixed_rows(num_rows: int, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """float32 rows of ten kinds in turn: spread, peaked, flat, few values, huge, tiny, one-hot, mostly -inf, holding a NaN or
    an infinity, nothing but NaN or -inf."""
    logits = 2.2 * torch.randn(num_rows, vocab_size, generator=generator)
    kind = torch.arange(num_rows) % 10
    logits[kind == 1, : vocab_size // 20 + 1] += 12
    logits[kind == 2] = -3.25
    logits[kind == 3] = logits[kind == 3].round()
    logits[kind == 4] *= 3000
    logits[kind == 5] *= 1e-6
    one_hot = kind == 6
    logits[one_hot] = -40.0
    logits[one_hot, torch.randint(0, vocab_size, (int(one_hot.sum()),), generator=generator)] = 5.0
    is_masked = torch.rand(num_rows, vocab_size, generator=generator) < 0.9
    is_masked[:, 0] = False
    logits[(kind == 7)[:, None] & is_masked] = -torch.inf
    broken = (kind == 8).nonzero().squeeze(1)[::4]
    logits[broken, vocab_size // 2] = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(len(broken)) % 3]
    empty = (kind == 9).nonzero().squeeze(1)[::4]
    logits[empty] = torch.tensor([torch.nan, -torch.inf])[torch.arange(len(empty)) % 2, None]
    return logits


def mixed_state(num_rows: int, vocab_size: int, horizon: int, generator: torch.Generator) -> SamplerState:
    """Every parameter per row, each off in a part of the rows."""

    def rand() -> torch.Tensor:
        return torch.rand(num_rows, generator=generator, dtype=torch.float64)

    def some(value: torch.Tensor, otherwise: float) -> torch.Tensor:
        return torch.where(rand() < 0.6, value, torch.full_like(value, otherwise))

    return SamplerState.create(
        num_rows,
        horizon,
        eos_ids=[1, vocab_size - 1],
        sampling_temperature=torch.where(rand() < 0.1, 0.0, some(10 ** (4 * rand() - 2), 1.0)),
        top_k=some((rand() * vocab_size * 1.1).long(), 0),
        top_p=some(rand(), 1.0),
        min_p=some(0.3 * rand(), 0.0),
        seed=torch.randint(-(2**62), 2**62, (num_rows,), generator=generator),
        request_ids=torch.randint(0, 2**62, (num_rows,), generator=generator),
        pad_id=0,
    )


def assert_same_states(actual: SamplerState, expected: SamplerState) -> None:
    for field in fields(expected):
        one, other = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(other, torch.Tensor):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), field.name
            assert torch.equal(one.isnan(), other.isnan()), field.name
