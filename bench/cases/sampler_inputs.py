"""What the sampler cases draw from: logits of three kinds, a sampler's parameters row by row, a state that can be rewound.

LM-like   about -1.1 log(rank) at ids in random order, as of a language model; few different rows, which repeat
flat      all equal: no id can be left out early, and every rank is a tie
one-hot   one id 45 nats above all others
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels import SamplerState

LM_LIKE, FLAT, ONE_HOT = "LM-like", "flat", "one-hot"
DIFFERENT_ROWS = 8
# Slots of a state: more than the calls of a sample, and than those of the gate.
SLOTS = 128


@dataclass(frozen=True)
class SamplerSetting:
    """Parameters as `SamplerState.create` takes them; the defaults filter nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def has_filter(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def __str__(self) -> str:
        parts = [f"T {self.temperature:g}"]
        parts += [f"k {self.top_k}"] if self.top_k else []
        parts += [f"p {self.top_p:g}"] if self.top_p < 1 else []
        parts += [f"min_p {self.min_p:g}"] if self.min_p else []
        return ", ".join(parts)


# One for all rows, or several that rows take in turn.
SettingOfRows = tuple[SamplerSetting, ...]


def name_of(settings: SettingOfRows) -> str:
    return str(settings[0]) if len(settings) == 1 else "mixed rows"


class RowParameters(NamedTuple):
    """Parameters on the device in the types of vLLM and FlashInfer; a top-k that is off is the vocabulary."""

    temperature_B: Tensor  # float32
    top_k_B: Tensor  # int32
    top_p_B: Tensor  # float32
    min_p_B: Tensor  # float32

    @classmethod
    def of(cls, settings: SettingOfRows, batch_size: int, vocab_size: int, device: torch.device) -> "RowParameters":
        rows = [settings[i % len(settings)] for i in range(batch_size)]

        def per_row(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            per_row([row.temperature for row in rows]),
            per_row([row.top_k or vocab_size for row in rows], torch.int32),
            per_row([row.top_p for row in rows]),
            per_row([row.min_p for row in rows]),
        )


class SamplerInputs(NamedTuple):
    logits_B_V: Tensor
    state: SamplerState  # of ours
    settings: SettingOfRows
    parameters: RowParameters  # of others
    rows_B: Tensor  # int32
    # int64, for others that take their place in the random stream from the caller. Timed calls do not advance it.
    seeds_B: Tensor
    positions_B: Tensor


def make_inputs(
    settings: SettingOfRows, kind: str, shape: tuple[int, int], dtype: torch.dtype, device: str, *, copies: int
) -> list[SamplerInputs]:
    """`copies` batches of different logits, of shape (B, V), with one state."""
    batch_size, vocab_size = shape
    rows_B = torch.arange(batch_size, device=device)
    state = make_state(settings, rows_B)
    parameters = RowParameters.of(settings, batch_size, vocab_size, rows_B.device)
    shared = state, settings, parameters, rows_B.int(), rows_B, torch.zeros_like(rows_B)
    return [SamplerInputs(make_logits(kind, shape, dtype, device, seed=seed), *shared) for seed in range(copies)]


def make_state(settings: SettingOfRows, request_ids_R: Tensor) -> SamplerState:
    """A state without EOS; a row's parameters follow from its request id, as its random numbers do."""
    rows = [settings[i % len(settings)] for i in request_ids_R.tolist()]

    def per_row(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    return SamplerState.create(
        len(rows),
        SLOTS,
        eos_ids=(),
        sampling_temperature=per_row([row.temperature for row in rows]),
        top_k=per_row([row.top_k for row in rows], torch.int64),
        top_p=per_row([row.top_p for row in rows]),
        min_p=per_row([row.min_p for row in rows]),
        request_ids=request_ids_R,
        device=request_ids_R.device,
    )


def make_logits(kind: str, shape: tuple[int, int], dtype: torch.dtype, device: str, *, seed: int) -> Tensor:
    batch_size, vocab_size = shape
    generator = torch.Generator(device).manual_seed(seed)
    num_rows = min(batch_size, DIFFERENT_ROWS)
    if kind == FLAT:
        logits_R_V = torch.full((num_rows, vocab_size), -3.25, device=device)
    elif kind == ONE_HOT:
        logits_R_V = torch.full((num_rows, vocab_size), -40.0, device=device)
        ids_R = torch.randint(vocab_size, (num_rows,), generator=generator, device=device)
        logits_R_V[torch.arange(num_rows, device=device), ids_R] = 5.0
    else:
        by_rank_V = -1.1 * torch.arange(1, vocab_size + 1, device=device).log()
        order_R_V = torch.rand(num_rows, vocab_size, generator=generator, device=device).argsort(-1)
        noise_R_V = 0.05 * torch.randn(num_rows, vocab_size, generator=generator, device=device)
        logits_R_V = torch.empty_like(noise_R_V).scatter_(1, order_R_V, by_rank_V + noise_R_V)
    repeats = -(-batch_size // num_rows)
    return logits_R_V.to(dtype).repeat(repeats, 1)[:batch_size].contiguous()


class RewoundState:
    """The state of timed calls. A call on finished rows does nothing, so rows start anew and are counted afterwards."""

    def __init__(self, state: SamplerState) -> None:
        self.state = state

    def rewind(self) -> None:
        self.state.lengths_B.zero_()
        self.state.finished_B.zero_()
        self.state.active.fill_(self.state.batch_size)

    def check(self, num_calls: int) -> None:
        """
        Raises:
            AssertionError: some row did not draw one token per call, or has finished.
        """
        lengths_B, active = self.state.lengths_B, int(self.state.active)
        drawn = sorted(set(lengths_B.tolist()))
        assert drawn == [num_calls], f"{num_calls} calls drew {drawn} tokens in a row"
        assert active == self.state.batch_size and not self.state.finished_B.any(), f"{active} rows are still running"
