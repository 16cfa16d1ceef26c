"""Do rows stop at the first EOS or at the horizon, and stay as they are afterwards?

python -m pytest tests/kernels/test_sample_tokens_stopping.py
"""

from dataclasses import fields

import torch

from esr_kernels import Impl, SamplerState, sample_tokens

VOCAB_SIZE = 9


def scripted_logits(token_of_row: list[int]) -> torch.Tensor:
    """Logits that leave one possible token per row."""
    logits = torch.full((len(token_of_row), VOCAB_SIZE), -torch.inf)
    logits[torch.arange(len(token_of_row)), token_of_row] = 0.0
    return logits


def snapshot(state: SamplerState) -> dict[str, torch.Tensor]:
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    return {name: value.clone() for name, value in values.items() if isinstance(value, torch.Tensor)}


def run(sampler_impl: Impl, state: SamplerState, script: list[list[int]]) -> None:
    for token_of_row in script:
        sample_tokens(scripted_logits(token_of_row), state, impl=sampler_impl)


def test_table_of_stops(sampler_impl):
    """R11: EOS set {5, 7}, horizon 3, pad 8. Rows: EOS at once, EOS second, EOS as third token, cut, EOS second."""
    state = SamplerState.create(5, 3, eos_ids=[7, 5], pad_id=8)
    assert state.active.item() == 5
    run(sampler_impl, state, [[5, 1, 1, 1, 2]])
    assert state.next_ids_B.tolist() == [8, 1, 1, 1, 2]
    assert state.finished_B.tolist() == [True, False, False, False, False]
    assert state.active.item() == 4
    run(sampler_impl, state, [[1, 7, 2, 2, 7]])
    assert state.next_ids_B.tolist() == [8, 8, 2, 2, 8]
    assert state.active.item() == 2
    run(sampler_impl, state, [[1, 1, 5, 3, 1]])
    assert state.token_ids_B_K.tolist() == [[5, 8, 8], [1, 7, 8], [1, 2, 5], [1, 2, 3], [2, 7, 8]]
    assert state.lengths_B.tolist() == [1, 2, 3, 3, 2]
    assert state.finished_B.tolist() == [True] * 5
    assert state.stopped_by_eos_B.tolist() == [True, True, True, False, True]
    assert state.next_ids_B.tolist() == [8] * 5
    assert state.active.item() == 0
    assert state.active.shape == ()


def test_no_call_changes_a_finished_row(sampler_impl):
    """Also not by NaN logits: the row is not read."""
    state = SamplerState.create(3, 2, eos_ids=[5])
    run(sampler_impl, state, [[5, 1, 1]])
    before = snapshot(state)
    logits = scripted_logits([2, 3, 4])
    logits[0] = torch.nan
    sample_tokens(logits, state, impl=sampler_impl)
    for name, after in snapshot(state).items():
        if after.ndim > 0 and name != "eos_ids_E":
            assert torch.equal(after[0], before[name][0]), name
    assert state.active.item() == 0

    before = snapshot(state)
    sample_tokens(torch.full((3, VOCAB_SIZE), torch.nan), state, impl=sampler_impl)
    for name, after in snapshot(state).items():
        assert torch.equal(after, before[name]), name


def test_unused_slots_hold_pad_and_zero(sampler_impl):
    state = SamplerState.create(2, 4, eos_ids=[5, 7])
    sample_tokens(torch.tensor([[0.0, -torch.inf] * 4 + [0.0]]).expand(2, -1).clone(), state, impl=sampler_impl)
    run(sampler_impl, state, [[5, 7]])
    assert (state.token_ids_B_K[:, 2:] == 5).all()  # pad: the first EOS id given
    assert (state.logprobs_B_K[:, 2:] == 0).all()
    assert (state.sampling_logprobs_B_K[:, 2:] == 0).all()
    assert (state.logprobs_B_K[:, 0] < -1).all()


def test_horizon_of_one_without_eos_ids(sampler_impl):
    state = SamplerState.create(2, 1, eos_ids=())
    assert state.pad_id == 0
    run(sampler_impl, state, [[3, 4]])
    assert state.token_ids_B_K.tolist() == [[3], [4]]
    assert state.finished_B.tolist() == [True, True]
    assert state.stopped_by_eos_B.tolist() == [False, False]


def test_pad_equal_to_eos_does_not_count_as_a_token(sampler_impl):
    state = SamplerState.create(1, 4, eos_ids=[5], pad_id=5)
    run(sampler_impl, state, [[1], [5], [2], [3]])
    assert state.token_ids_B_K.tolist() == [[1, 5, 5, 5]]
    assert state.lengths_B.tolist() == [2]
