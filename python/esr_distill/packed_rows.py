"""Rollouts one behind the other in one sequence, without padding, and the hidden states of such a sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from esr_distill.rollout.rollout_batch import RolloutBatch


@dataclass(frozen=True)
class PackedRows:
    """Prompt and response of B rollouts in one sequence of S tokens, S the sum of their lengths.

    Attributes:
        token_ids_1_S: (1, S) int64.
        position_ids_1_S: (1, S) int64, from 0 on in every row.
        starts: (B + 1,) int32, where each row starts; the last is S.
        longest: tokens of the longest row.
        place_B_T: (B, T) int64, where the token of each row and column stands; at padding S, which is no place.
    """

    token_ids_1_S: Tensor
    position_ids_1_S: Tensor
    starts: Tensor
    longest: int
    place_B_T: Tensor

    @classmethod
    def of(cls, rollouts: RolloutBatch) -> "PackedRows":
        is_token_B_T = rollouts.attention_mask_B_T.bool()
        lengths_B = is_token_B_T.sum(1)
        kept_S = is_token_B_T.flatten().nonzero().squeeze(1)
        place_B_T = (is_token_B_T.flatten().cumsum(0) - 1).view_as(is_token_B_T)
        return cls(
            token_ids_1_S=rollouts.token_ids_B_T.flatten()[kept_S][None],
            position_ids_1_S=rollouts.position_ids_B_T.flatten()[kept_S][None],
            starts=pad(lengths_B.cumsum(0), (1, 0)).to(torch.int32),
            longest=int(lengths_B.max()),
            place_B_T=place_B_T.masked_fill(~is_token_B_T, kept_S.shape[0]),
        )


@dataclass(frozen=True)
class HiddenRows:
    """Hidden states (S, D) of packed rows, indexed by row and column as padded ones (B, T, D) are.

    `hidden[row_N, column_N]` is (N, D), `hidden[:, column:]` the same states counted from another column. What is padding in its
    row is a place that does not exist: an IndexError on a CPU, a failed assertion of the device on CUDA.
    """

    hidden_S_D: Tensor
    place_B_T: Tensor

    def __getitem__(self, index: tuple[Tensor | slice, Tensor | slice]) -> "Tensor | HiddenRows":
        place = self.place_B_T[index]
        if place.ndim != 1:
            return HiddenRows(self.hidden_S_D, place)
        # Its backward adds rows; that of indexing sorts them first.
        return self.hidden_S_D.index_select(0, place)

    def with_padding_before(self, columns: int) -> "HiddenRows":
        """The same states behind so many columns more."""
        return HiddenRows(self.hidden_S_D, pad(self.place_B_T, (columns, 0), value=self.hidden_S_D.shape[0]))
