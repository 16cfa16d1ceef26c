"""Which positions train, against tables written by hand?  pytest tests/distill/test_prefix_positions.py"""

import pytest
import torch
from tiny_models import EOS, PAD, make_prompt_batch, make_rollouts

from esr_distill.prefix_positions import gather_rows, select_prefix_positions
from esr_distill.rollout.inprocess import collect_rollouts
from esr_kernels import Impl, SamplerState, sample_tokens

# Prompts, responses, prefix_tokens, pad id, and the expected (row, column, slot, token): the hidden state at column
# P + t - 1 predicts response token t, P being the width of the padded prompts.
TABLES = {
    "one row, the whole response": ([[1, 8, 9]], [[5, 6, 7]], 3, PAD, [(0, 2, 0, 5), (0, 3, 1, 6), (0, 4, 2, 7)]),
    "prompt of one token": ([[1]], [[5, 6]], 2, PAD, [(0, 0, 0, 5), (0, 1, 1, 6)]),
    "horizon longer than every response": (
        [[1, 8], [1, 9]],
        [[5, EOS], [6, 7, EOS]],
        50,
        PAD,
        [(0, 1, 0, 5), (0, 2, 1, EOS), (1, 1, 0, 6), (1, 2, 1, 7), (1, 3, 2, EOS)],
    ),
    "prefix cuts the responses": (
        [[1, 8], [1, 9]],
        [[5, 6, 7, EOS], [6, EOS]],
        2,
        PAD,
        [(0, 1, 0, 5), (0, 2, 1, 6), (1, 1, 0, 6), (1, 2, 1, EOS)],
    ),
    "prefix of one token": ([[1, 8], [1, 9]], [[5, 6, EOS], [7, EOS]], 1, PAD, [(0, 1, 0, 5), (1, 1, 0, 7)]),
    "EOS is the first token": ([[1, 8], [1, 9]], [[EOS], [5, 6]], 2, PAD, [(0, 1, 0, EOS), (1, 1, 0, 5), (1, 2, 1, 6)]),
    "EOS is the first token everywhere": ([[1, 8], [1]], [[EOS], [EOS]], 4, PAD, [(0, 1, 0, EOS), (1, 1, 0, EOS)]),
    "EOS is the pad id": (
        [[1, 8], [9]],
        [[5, EOS], [5, 6, 7]],
        3,
        EOS,
        [(0, 1, 0, 5), (0, 2, 1, EOS), (1, 1, 0, 5), (1, 2, 1, 6), (1, 3, 2, 7)],
    ),
    "pad id inside a response is a token": (
        [[1, 8]],
        [[5, PAD, 6]],
        3,
        PAD,
        [(0, 1, 0, 5), (0, 2, 1, PAD), (0, 3, 2, 6)],
    ),
    "ragged prompts, left-padded": (
        [[1, 8, 9, 10], [1], [1, 8]],
        [[5, 6], [6, EOS], [7, 8]],
        2,
        PAD,
        [(0, 3, 0, 5), (0, 4, 1, 6), (1, 3, 0, 6), (1, 4, 1, EOS), (2, 3, 0, 7), (2, 4, 1, 8)],
    ),
}


@pytest.mark.parametrize("table", TABLES)
def test_positions(table):
    prompts, responses, prefix_tokens, pad_id, expected = TABLES[table]
    rollouts = make_rollouts(prompts, responses, pad_id=pad_id)
    positions = select_prefix_positions(rollouts, prefix_tokens)
    columns = (positions.row_N, positions.column_N, positions.slot_N, positions.token_ids_N)
    assert [tuple(row) for row in torch.stack(columns, dim=1).tolist()] == expected


def test_gathered_rows_are_those_of_the_table():
    """hidden[b, c] = (b, c): the gathered rows are the (row, column) pairs themselves."""
    prompts, responses, prefix_tokens, pad_id, expected = TABLES["ragged prompts, left-padded"]
    rollouts = make_rollouts(prompts, responses, pad_id=pad_id)
    B, T = rollouts.token_ids_B_T.shape
    hidden_B_T_2 = torch.stack(torch.meshgrid(torch.arange(B), torch.arange(T), indexing="ij"), dim=-1)
    gathered = gather_rows(hidden_B_T_2, select_prefix_positions(rollouts, prefix_tokens))
    assert [tuple(row) for row in gathered.tolist()] == [(row, column) for row, column, _, _ in expected]


def test_a_drawn_token_that_no_rollout_kept_is_never_selected():
    """The sampler's buffer holds the horizon; its slots behind the end of a row, EOS or horizon, must not train."""
    horizon, eos_id = 6, 5
    state = SamplerState.create(3, horizon, eos_ids=[eos_id], sampling_temperature=0.0, pad_id=eos_id)
    written = [[eos_id] + [7] * 5, [8, 9, eos_id, 7, 7, 7], [6, 6, 6, 6, 6, 6]]
    for slot in range(horizon):
        logits = torch.zeros(3, 12)
        for row, ids in enumerate(written):
            logits[row, ids[slot]] = 9.0
        sample_tokens(logits, state, impl=Impl.REFERENCE)
    rollouts = collect_rollouts(make_prompt_batch([[1, 2], [1], [1, 3]], pad_id=eos_id), state)

    for prefix_tokens, counts in ((6, [1, 3, 6]), (4, [1, 3, 4]), (1, [1, 1, 1])):
        positions = select_prefix_positions(rollouts, prefix_tokens)
        assert positions.row_N.bincount().tolist() == counts
        assert positions.slot_N.max() < prefix_tokens
        assert 7 not in positions.token_ids_N.tolist()
    selected = select_prefix_positions(rollouts, 6)
    assert selected.token_ids_N[selected.row_N == 1].tolist() == [8, 9, eos_id]
