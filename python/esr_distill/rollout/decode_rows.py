"""The rows that are being decoded: what the sampler keeps of them, where they stand, and one step for all of them."""

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from esr_distill.rollout.decode_masks import Masks, mask_of_step
from esr_distill.rollout.static_cache import RolloutCache
from esr_kernels import Impl, SamplerState, sample_tokens

FOR_ALL_ROWS = ("active", "eos_ids_E")


def row_fields(state: SamplerState) -> dict[str, Tensor]:
    """The tensors of a state that have one entry, or K, for each row."""
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: v for name, v in values.items() if isinstance(v, Tensor) and name not in FOR_ALL_ROWS}


def select_rows(state: SamplerState, order: Tensor) -> SamplerState:
    """A state of these rows, in memory of its own."""
    rows = {name: value.index_select(0, order) for name, value in row_fields(state).items()}
    active = (~rows["finished_B"]).sum()
    return replace(state, **rows, active=active, eos_ids_E=state.eos_ids_E.clone())


def write_rows(whole: SamplerState, order: Tensor, rows: SamplerState) -> None:
    """Row order[i] of `whole` becomes row i of `rows`."""
    for name, value in row_fields(rows).items():
        getattr(whole, name).index_copy_(0, order, value)


def copy_state(to: SamplerState, other: SamplerState) -> None:
    """All tensors of another state of the same shapes, into the same memory."""
    for name, value in row_fields(other).items():
        getattr(to, name).copy_(value)
    to.active.copy_(other.active)
    to.eos_ids_E.copy_(other.eos_ids_E)


class DecodeRows:
    """State and positions of some rows, in memory that stays where it is."""

    def __init__(self, state: SamplerState, position_B_1: Tensor, cache: RolloutCache) -> None:
        self.state, self.position_B_1, self.cache = state, position_B_1, cache

    def copy_from(self, state: SamplerState, position_B_1: Tensor) -> None:
        copy_state(self.state, state)
        self.position_B_1.copy_(position_B_1)


class DecodeStep:
    """One token for each row: the model on the last tokens, then the sampler. Reads and writes device memory alone.

    Calls differ by numbers on the device: the column that is written, the position, the mask that is picked. So a call can be
    captured in a CUDA graph and replayed.
    """

    def __init__(
        self,
        forward: Callable,
        rows: DecodeRows,
        masks: Masks,
        visible: int,
        *,
        vocab_size: int | None,
        impl: Impl,
    ) -> None:
        self.forward, self.rows, self.masks = forward, rows, masks
        self.visible, self.vocab_size, self.impl = visible, vocab_size, impl
        self.step_1 = torch.zeros(1, dtype=torch.int64, device=rows.position_B_1.device)

    def start(self, masks: Masks, first_column: int) -> None:
        """Begin a segment: its masks, and the column of its first token."""
        for name, mask in masks.items():
            if self.masks[name] is not mask:
                self.masks[name].copy_(mask)
        self.step_1.zero_()
        self.rows.cache.column_1.fill_(first_column)

    def __call__(self) -> None:
        rows = self.rows
        output = self.forward(
            input_ids=rows.state.next_ids_B[:, None],
            attention_mask=mask_of_step(self.masks, self.step_1, self.visible),
            position_ids=rows.position_B_1,
            past_key_values=rows.cache,
            use_cache=True,
        )
        sample_tokens(output.logits[:, -1, : self.vocab_size], rows.state, impl=self.impl)
        for counter in (rows.position_B_1, rows.cache.column_1, self.step_1):
            counter.add_(1)
