"""Which positions train, and where their hidden states are. The only file that knows the shift by one."""

from dataclasses import dataclass

from torch import Tensor

from esr_distill.packed_rows import HiddenRows
from esr_distill.rollout.rollout_batch import RolloutBatch, response_mask


@dataclass(frozen=True)
class PrefixPositions:
    """N kept positions, ordered by rollout and then by response position.

    Attributes:
        row_N: (N,) rollout of each position.
        column_N: (N,) column of the hidden state that predicts the token.
        slot_N: (N,) response position t, 0-based.
        token_ids_N: (N,) the response token predicted there.
    """

    row_N: Tensor
    column_N: Tensor
    slot_N: Tensor
    token_ids_N: Tensor


def select_prefix_positions(
    rollouts: RolloutBatch, prefix_tokens: int, candidates_B_K: Tensor | None = None
) -> PrefixPositions:
    """The first `prefix_tokens` response tokens of each rollout, as far as it goes; its first EOS included. Of these, where
    `candidates_B_K` is given (bool), those that it names.

    Response token t stands at column P + t (P: prompt width), and the hidden state that predicts it one column earlier.
    """
    response_ids_B_K = rollouts.response_ids_B_K
    width = response_ids_B_K.shape[1]
    kept_B_K = response_mask(rollouts.response_lengths_B.clamp_max(prefix_tokens), width)
    if candidates_B_K is not None:
        kept_B_K = kept_B_K & candidates_B_K
    row_N, slot_N = kept_B_K.nonzero(as_tuple=True)
    return PrefixPositions(
        row_N=row_N,
        column_N=rollouts.prompt_width + slot_N - 1,
        slot_N=slot_N,
        token_ids_N=response_ids_B_K[row_N, slot_N],
    )


def gather_rows(hidden_B_T_D: Tensor | HiddenRows, positions: PrefixPositions) -> Tensor:
    """(B, T, D), or the same of packed rows, -> (N, D), the hidden states that predict the kept tokens."""
    return hidden_B_T_D[positions.row_N, positions.column_N]
