"""Rollouts to measure, from hidden states and as logits, and the float64 oracle on some of their slots.

Every rollout starts in the same column, so that what others are given can be cut out by slices; starts and lengths are on the
device, as a trainer has them. The gate compares 256 slots, spread over all rollouts: each is a rollout of two columns for the
oracle. Its upstream gradient is 0 at the other slots.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases.comparison import Gate, gate_rows
from bench.cases.settings import Settings
from esr_kernels import Impl, LogitStorage, OutputHead, select_topk_ids
from esr_kernels.testing.error_budget import relative_error_in_norm
from esr_kernels.testing.inputs import make_hidden_pair
from esr_kernels.testing.logprob_inputs import PrefixInputs
from esr_kernels.testing.logprob_oracle import (
    evaluate_linear_prefix_logprobs,
    evaluate_prefix_logprobs,
    linear_prefix_logprobs_oracle,
    prefix_logprobs_oracle,
)
from esr_kernels.testing.oracle import FLOAT32_BOUND, Oracle, Results


class LogitRollouts(NamedTuple):
    """The tensors of `prefix_logprobs`."""

    logits_B_T_V: Tensor
    rollouts: PrefixInputs


class GateSlots(NamedTuple):
    """Slots that the gate compares, and where their rollouts start."""

    batch_S: Tensor
    slot_S: Tensor
    start: int

    @classmethod
    def of(cls, inputs: PrefixInputs, start: int, horizon: int) -> "GateSlots":
        """Slots of the first `horizon` tokens."""
        slots = gate_rows(inputs.starts_B.shape[0] * horizon, inputs.starts_B.device)
        return cls(slots // horizon, slots % horizon, start)

    def columns(self) -> tuple[Tensor, Tensor]:
        """Index (S, 2) into (B, T): the column that predicts the token, and the token's own."""
        column_S = self.start - 1 + self.slot_S
        return self.batch_S[:, None], torch.stack([column_S, column_S + 1], dim=1)

    def inputs(self, inputs: PrefixInputs) -> PrefixInputs:
        """Each slot as a rollout of two columns."""
        ones_S = torch.ones_like(self.slot_S)
        tensors = inputs.hidden_B_T_D[self.columns()], inputs.head, inputs.token_ids_B_T[self.columns()]
        return PrefixInputs(*tensors, ones_S, ones_S, horizon=1)

    def upstream(self, upstream_B_K: Tensor) -> Tensor:
        """The upstream gradient, 0 at the other slots."""
        here = self.batch_S, self.slot_S
        return torch.zeros_like(upstream_B_K).index_put(here, upstream_B_K[here])

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """What the oracle says about a result: a slot is a row. Gradients of a head, and losses, are sums, compared whole."""
        if name in ("grad_weight", "loss"):
            return tensor
        if name in ("grad_hidden", "grad_logits"):
            return tensor[self.batch_S, self.start - 1 + self.slot_S]
        return tensor[self.batch_S, self.slot_S]


def of_one_slot(results: Results) -> Results:
    """What the oracle says about rollouts of two columns and one slot, in the form of `GateSlots.part`."""
    return {name: tensor if name == "grad_weight" else tensor[:, 0] for name, tensor in results.items()}


def prefix_gate(
    inputs: PrefixInputs, slots: GateSlots, trained: tuple[str, ...], upstream_B_K: Tensor
) -> Callable[[LogitStorage], Gate]:
    """The oracle on some of the slots, with the bounds of a storage."""
    upstream_S_1 = upstream_B_K[slots.batch_S, slots.slot_S][:, None]
    arguments = slots.inputs(inputs), upstream_S_1

    @cache
    def gate(storage: LogitStorage) -> Gate:
        oracle = linear_prefix_logprobs_oracle(*arguments, trained=trained, logits=storage)
        same_dtype = evaluate_linear_prefix_logprobs(*arguments, impl=Impl.REFERENCE, trained=trained)
        return Gate(slots.part, Oracle(*map(of_one_slot, oracle)), of_one_slot(same_dtype))

    return gate


class MeanGate(Gate):
    """With the error of "loss", which every implementation of a mean gives."""

    def errors(self, actual: Results) -> dict[str, float]:
        return {"loss": relative_error_in_norm(actual["loss"], self.oracle.values["loss"]), **super().errors(actual)}


def mean_gate(
    inputs: PrefixInputs, slots: GateSlots, trained: tuple[str, ...], upstream_B_K: Tensor
) -> Callable[[LogitStorage], Gate]:
    """`prefix_gate` with the loss: the sum of log-probs times upstream gradients, which are -1 / S in the slots and else 0."""
    gate_of = prefix_gate(inputs, slots, trained, upstream_B_K)
    upstream_S = upstream_B_K[slots.batch_S, slots.slot_S].double()

    @cache
    def gate(storage: LogitStorage) -> Gate:
        part, (values, bounds), same_dtype = gate_of(storage)
        terms_S = values["logprobs"] * upstream_S
        bound = (bounds["logprobs"] * upstream_S.abs()).sum() + FLOAT32_BOUND * terms_S.abs().sum()
        loss = {"loss": (same_dtype["logprobs"] * upstream_S.float()).sum()}
        return MeanGate(part, Oracle(values | {"loss": terms_S.sum()}, bounds | {"loss": bound}), same_dtype | loss)

    return gate


def logits_gate(inputs: LogitRollouts, slots: GateSlots) -> Callable[[LogitStorage], Gate]:
    """The oracle on some of the slots; `storage` plays no part."""

    @cache
    def gate() -> Gate:
        upstream_S_1 = torch.ones(len(slots.slot_S), 1, device=slots.slot_S.device)
        arguments = inputs.logits_B_T_V[slots.columns()], slots.inputs(inputs.rollouts), upstream_S_1
        oracle = prefix_logprobs_oracle(*arguments)
        same_dtype = evaluate_prefix_logprobs(*arguments, impl=Impl.REFERENCE)
        return Gate(slots.part, Oracle(*map(of_one_slot, oracle)), of_one_slot(same_dtype))

    return lambda storage: gate()


def make_rollouts(
    settings: Settings, hidden_size: int, *, start: int, tokens: int, dtype: torch.dtype = torch.bfloat16
) -> PrefixInputs:
    """Rollouts of `tokens` response tokens from column `start` on, likeliest ones in every second column and random others."""
    batch_size, num_columns, vocab_size, device = (
        settings.rollouts,
        start + tokens,
        settings.vocab_size,
        settings.device,
    )
    drawn = make_hidden_pair(
        batch_size * num_columns, vocab_size, hidden_size, hidden_size + 1, dtype=dtype, device=device
    )
    weight_V_D = drawn.student_weight_V_D
    generator = torch.Generator().manual_seed(2)
    token_ids_B_T = torch.randint(vocab_size, (batch_size, num_columns), generator=generator).to(device)
    likeliest_B_T = select_topk_ids(drawn.student_hidden_N_D, weight_V_D, 1).view(batch_size, num_columns)
    token_ids_B_T[:, 1::2] = likeliest_B_T[:, : num_columns - 1 : 2]
    starts_B, lengths_B = (torch.full((batch_size,), number, device=device) for number in (start, tokens))
    hidden_B_T_D = drawn.student_hidden_N_D.view(batch_size, num_columns, hidden_size)
    return PrefixInputs(hidden_B_T_D, OutputHead(weight_V_D), token_ids_B_T, starts_B, lengths_B, tokens)


def logits_of(rollouts: PrefixInputs) -> Tensor:
    """`PrefixInputs.logits` rollout by rollout: their float32 logits are twice as large."""
    batch_size, num_columns, _ = rollouts.hidden_B_T_D.shape
    logits_B_T_V = rollouts.hidden_B_T_D.new_empty((batch_size, num_columns, rollouts.head.vocab_size))
    for logits_T_V, hidden_T_D in zip(logits_B_T_V, rollouts.hidden_B_T_D, strict=True):
        logits_T_V.copy_(rollouts.head.logits(hidden_T_D))
    return logits_B_T_V
