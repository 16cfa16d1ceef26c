"""What the sampler keeps on the device between two tokens: parameters per row, and the rollouts written so far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esr_kernels.checks import INTEGER_DTYPES, check_tensor

_OP = "SamplerState.create"


@dataclass(eq=False)
class SamplerState:
    """Parameters and rollouts of B rows with K = horizon slots each; changed in place by `sample_tokens`.

    Rollouts:
        token_ids_B_K: int64, the tokens drawn; the first EOS is kept; `pad_id` after it.
        logprobs_B_K: float32, log-prob of each token under softmax(logits): full vocabulary, temperature 1. 0 where
            no token was drawn.
        sampling_logprobs_B_K: float32, log-prob of each token under the tempered and filtered distribution that it was
            drawn from. 0 where no token was drawn.
        lengths_B: int64, tokens drawn so far, EOS included.
        finished_B: bool, no further token will be drawn: EOS was drawn or the horizon is reached.
        stopped_by_eos_B: bool, the last token is an EOS (also when it is the horizon-th token). False for a finished
            row: it was cut by the horizon.
        next_ids_B: int64, the token to feed to the model next; `pad_id` for finished rows (and before the first call).
        active: int64 0-d, number of rows with `finished_B` False.
        invalid_B: bool, some row of logits that a token was drawn from held NaN, +inf or nothing finite.

    Parameters, per row:
        sampling_temperature_B, top_p_B, min_p_B: float64.
        top_k_B, seed_B, request_ids_B: int64; the seed is a 64-bit pattern.

    For all rows:
        eos_ids_E: int64 on the device, and `eos_ids` as Python ints (checked against V without waiting for the device).
        pad_id: Python int.
    """

    token_ids_B_K: Tensor
    logprobs_B_K: Tensor
    sampling_logprobs_B_K: Tensor
    lengths_B: Tensor
    finished_B: Tensor
    stopped_by_eos_B: Tensor
    next_ids_B: Tensor
    active: Tensor
    invalid_B: Tensor
    sampling_temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    seed_B: Tensor
    request_ids_B: Tensor
    eos_ids_E: Tensor
    eos_ids: tuple[int, ...]
    pad_id: int

    @property
    def batch_size(self) -> int:
        return self.token_ids_B_K.shape[0]

    @property
    def horizon(self) -> int:
        return self.token_ids_B_K.shape[1]

    @property
    def device(self) -> torch.device:
        return self.token_ids_B_K.device

    @classmethod
    def create(
        cls,
        batch_size: int,
        horizon: int,
        *,
        eos_ids: Sequence[int],
        sampling_temperature: float | Tensor = 1.0,
        top_k: int | Tensor = 0,
        top_p: float | Tensor = 1.0,
        min_p: float | Tensor = 0.0,
        seed: int | Tensor = 0,
        request_ids: Tensor | Sequence[int] | None = None,
        pad_id: int | None = None,
        device: torch.device | str = "cpu",
    ) -> "SamplerState":
        """An empty state: no token drawn, every row running.

        Args:
            batch_size: number of rows B, >= 0.
            horizon: largest number of tokens per row K, >= 1.
            eos_ids: ids that end a row; may be empty. Checked against the vocabulary in `sample_tokens`.
            sampling_temperature: >= 0; 0 is greedy (argmax, lowest id among equals).
            top_k: >= 0; 0 is off.
            top_p: in [0, 1]; 1 is off.
            min_p: in [0, 1], relative to the largest probability; 0 is off.
            seed: Python int in [0, 2^64), or int64 per row (64-bit pattern).
            request_ids: (B,) int >= 0, the name of each row in the random stream; default 0 .. B-1. Rows with equal
                seed and equal request id get the same random numbers.
            pad_id: written after the end of a row; default the first EOS id, or 0 without EOS ids.
            device: where the tensors live. Parameters given as tensors (B,) are copied to it.

        This reads parameter tensors on the host (it is called once per rollout, not once per token).

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape or range.
        """
        B = _check_int("batch_size", batch_size, 0)
        K = _check_int("horizon", horizon, 1)
        eos_ids = _check_eos_ids(eos_ids)
        pad_id = (eos_ids[0] if eos_ids else 0) if pad_id is None else _check_int("pad_id", pad_id, 0)

        def filled(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        return cls(
            token_ids_B_K=filled((B, K), pad_id, torch.int64),
            logprobs_B_K=filled((B, K), 0.0, torch.float32),
            sampling_logprobs_B_K=filled((B, K), 0.0, torch.float32),
            lengths_B=filled((B,), 0, torch.int64),
            finished_B=filled((B,), False, torch.bool),
            stopped_by_eos_B=filled((B,), False, torch.bool),
            next_ids_B=filled((B,), pad_id, torch.int64),
            active=filled((), B, torch.int64),
            invalid_B=filled((B,), False, torch.bool),
            sampling_temperature_B=_float_per_row("sampling_temperature", sampling_temperature, math.inf, B, device),
            top_k_B=_top_k_per_row(top_k, B, device),
            top_p_B=_float_per_row("top_p", top_p, 1.0, B, device),
            min_p_B=_float_per_row("min_p", min_p, 1.0, B, device),
            seed_B=_seed_per_row(seed, B, device),
            request_ids_B=_request_ids(request_ids, B, device),
            eos_ids_E=torch.tensor(eos_ids, dtype=torch.int64, device=device),
            eos_ids=eos_ids,
            pad_id=pad_id,
        )


def _check_int(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{_OP}: {name} must be an int >= {least}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{_OP}: {name} must be >= {least}, got {value}")
    return value


def _check_eos_ids(eos_ids: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(eos_ids, Sequence) or isinstance(eos_ids, str):
        raise TypeError(f"{_OP}: eos_ids must be a sequence of ints, got {type(eos_ids).__name__}")
    return tuple(_check_int("eos_ids", i, 0) for i in eos_ids)


def _float_per_row(name: str, value: float | Tensor, most: float, B: int, device: torch.device | str) -> Tensor:
    need = "finite and >= 0" if most == math.inf else f"in [0, {most:g}]"
    if isinstance(value, Tensor):
        check_tensor(_OP, name, value, "B", {"B": B}, (torch.float32, torch.float64))
        _check_rows(name, value, value.isfinite() & (value >= 0) & (value <= most), need)
        return value.detach().to(device, torch.float64, copy=True)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{_OP}: {name} must be a number or a tensor (B,), got {type(value).__name__}")
    if not (math.isfinite(value) and 0 <= value <= most):
        raise ValueError(f"{_OP}: {name} must be {need}, got {value}")
    return torch.full((B,), float(value), dtype=torch.float64, device=device)


def _top_k_per_row(top_k: int | Tensor, B: int, device: torch.device | str) -> Tensor:
    if isinstance(top_k, Tensor):
        check_tensor(_OP, "top_k", top_k, "B", {"B": B}, INTEGER_DTYPES)
        _check_rows("top_k", top_k, top_k >= 0, ">= 0")
        return top_k.to(device, torch.int64, copy=True)
    return torch.full((B,), _check_int("top_k", top_k, 0), dtype=torch.int64, device=device)


def _seed_per_row(seed: int | Tensor, B: int, device: torch.device | str) -> Tensor:
    if isinstance(seed, Tensor):
        check_tensor(_OP, "seed", seed, "B", {"B": B}, (torch.int64,))
        return seed.to(device, copy=True)
    seed = _check_int("seed", seed, 0)
    if seed >= 2**64:
        raise ValueError(f"{_OP}: seed must be < 2^64, got {seed}")
    signed = seed - 2**64 if seed >= 2**63 else seed  # same 64 bits
    return torch.full((B,), signed, dtype=torch.int64, device=device)


def _request_ids(request_ids: Tensor | Sequence[int] | None, B: int, device: torch.device | str) -> Tensor:
    if request_ids is None:
        return torch.arange(B, dtype=torch.int64, device=device)
    if not isinstance(request_ids, Tensor):
        request_ids = torch.tensor([_check_int("request_ids", i, 0) for i in request_ids], dtype=torch.int64)
    check_tensor(_OP, "request_ids", request_ids, "B", {"B": B}, INTEGER_DTYPES)
    _check_rows("request_ids", request_ids, request_ids >= 0, ">= 0")
    return request_ids.to(device, torch.int64, copy=True)


def _check_rows(name: str, value: Tensor, valid: Tensor, need: str) -> None:
    if not valid.all():
        row = int((~valid).nonzero()[0])
        raise ValueError(f"{_OP}: {name} must be {need}, got {value[row].item()} in row {row}")
