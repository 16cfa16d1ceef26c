"""Where the teacher reads another prompt, are its hidden states those of the student's responses, row by row?

pytest tests/distill/test_teacher_prompts.py
"""

import pytest
import torch
from tiny_models import BOS, EOS, PAD, make_model, make_prompt_batch, make_rollouts
from transformers import LlamaConfig, Qwen3Config

from esr_distill.hidden_states import last_hidden_states
from esr_distill.prefix_positions import gather_rows, select_prefix_positions
from esr_distill.prompt_prefill import PromptPrefill
from esr_distill.prompts import PromptBatch, pad_prompts
from esr_distill.prompts.prompt_set import PromptSet
from esr_distill.teacher_prompts import in_student_columns, teacher_hidden_states, teacher_rollouts

CPU = torch.device("cpu")
PROMPTS = [[BOS, 5, 13, 7], [BOS, 4], [BOS]]
RESPONSES = [[6, 7, 8, EOS], [5, 5, 9, 12], [EOS]]
TEACHER_PROMPTS = {
    "longer": [[BOS, 9, 9, 14, 5, 13, 7], [BOS, 8, 4], [BOS, 8, 8, 8, 8, 8, 8, 8, 3]],
    "shorter": [[BOS], [BOS, 4, 4], [3]],
    "of one width": [[BOS, 9, 9, 14], [8], [BOS, 11, 11]],
}


def make_batch(teacher_prompts: list[list[int]] | None, samples: int = 1) -> PromptBatch:
    prompts = PromptSet(PROMPTS, [None] * 3, PAD, CPU, teacher_prompts)
    return pad_prompts(prompts, [i // samples for i in range(3 * samples)], range(3 * samples), samples)


def repeated(rows: list[list[int]], samples: int) -> list[list[int]]:
    return [row for row in rows for _ in range(samples)]


@torch.no_grad()
def alone(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """(K, hidden): the states that predict the response's tokens, of this row by itself, without padding, mask or positions."""
    hidden = model.base_model(input_ids=torch.tensor([prompt + response]), use_cache=False).last_hidden_state[0]
    return hidden[len(prompt) - 1 : -1]


def test_a_teacher_that_reads_the_same_prompts():
    rollouts, batch = make_rollouts(PROMPTS, RESPONSES), make_batch(None)
    assert batch.for_teacher is batch
    read = teacher_rollouts(rollouts, batch)
    assert read is rollouts
    hidden = torch.rand(3, 8, 5)
    assert torch.equal(in_student_columns(hidden, read, rollouts), hidden)


def test_equal_prompts_of_its_own_change_nothing():
    rollouts, batch = make_rollouts(PROMPTS, RESPONSES), make_batch([list(ids) for ids in PROMPTS])
    read = teacher_rollouts(rollouts, batch)
    assert read is not rollouts and read.prompt_width == rollouts.prompt_width
    for name in ("token_ids_B_T", "attention_mask_B_T", "position_ids_B_T", "response_lengths_B"):
        assert torch.equal(getattr(read, name), getattr(rollouts, name))
    model = make_model(3)
    hidden = last_hidden_states(model, read)
    assert torch.equal(in_student_columns(hidden, read, rollouts), last_hidden_states(model, rollouts))


@pytest.mark.parametrize("kind", TEACHER_PROMPTS)
def test_the_teacher_reads_its_prompts_and_the_same_responses(kind):
    rollouts, prompts = make_rollouts(PROMPTS, RESPONSES), TEACHER_PROMPTS[kind]
    read, width = teacher_rollouts(rollouts, make_batch(prompts)), max(map(len, prompts))
    assert read.prompt_width == width and torch.equal(read.response_ids_B_K, rollouts.response_ids_B_K)
    for row, (prompt, response) in enumerate(zip(prompts, RESPONSES, strict=True)):
        before, after = width - len(prompt), 4 - len(response)
        assert read.token_ids_B_T[row].tolist() == [PAD] * before + prompt + response + [PAD] * after
        assert read.attention_mask_B_T[row].tolist() == [0] * before + [1] * (len(prompt) + len(response)) + [0] * after
    # The positions that train: the same rows, slots and ids, with the shift by one at the teacher's own width.
    own, theirs = select_prefix_positions(rollouts, 3), select_prefix_positions(read, 3)
    for name in ("row_N", "slot_N", "token_ids_N"):
        assert torch.equal(getattr(own, name), getattr(theirs, name))
    assert torch.equal(theirs.column_N - own.column_N, torch.full_like(own.column_N, width - 4))


@pytest.mark.parametrize("kind", TEACHER_PROMPTS)
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("is_early", [False, True])
def test_gathered_hidden_states_are_those_of_each_row_by_itself(kind, config_class, samples, is_early):
    teacher = make_model(4, config_class)
    prompts, responses = repeated(TEACHER_PROMPTS[kind], samples), repeated(RESPONSES, samples)
    rollouts, batch = make_rollouts(repeated(PROMPTS, samples), responses), make_batch(TEACHER_PROMPTS[kind], samples)
    prefill = PromptPrefill.start(teacher, batch.for_teacher, None) if is_early else None
    with torch.no_grad():
        hidden_B_T_E = teacher_hidden_states(teacher, rollouts, batch, prefill)
    assert hidden_B_T_E.shape == (3 * samples, rollouts.token_ids_B_T.shape[1], 32)
    positions = select_prefix_positions(rollouts, 4)
    gathered_N_E = gather_rows(hidden_B_T_E, positions)
    expected_N_E = torch.cat([alone(teacher, *row) for row in zip(prompts, responses, strict=True)])
    torch.testing.assert_close(gathered_N_E, expected_N_E, rtol=1e-5, atol=1e-5)
    assert positions.token_ids_N.tolist() == sum(responses, [])
    # The same rows in the teacher's own columns.
    read = teacher_rollouts(rollouts, batch)
    with torch.no_grad():
        own_N_E = gather_rows(last_hidden_states(teacher, read), select_prefix_positions(read, 4))
    torch.testing.assert_close(own_N_E, expected_N_E, rtol=1e-5, atol=1e-5)
    # Other prompts give other states: nothing above would notice a teacher that reads the student's.
    student_prompts = torch.cat([alone(teacher, *row) for row in zip(PROMPTS, RESPONSES, strict=True)])
    assert samples > 1 or (expected_N_E - student_prompts).abs().max() > 0.1


def test_a_view_where_the_teachers_prompts_are_wider():
    rollouts, batch = make_rollouts(PROMPTS, RESPONSES), make_batch(TEACHER_PROMPTS["longer"])
    hidden = torch.rand(3, 13, 5)
    found = in_student_columns(hidden, teacher_rollouts(rollouts, batch), rollouts)
    assert found.shape == (3, 8, 5) and found._is_view() and found.data_ptr() == hidden[:, 5:].data_ptr()


def test_rollouts_of_other_prompts_are_refused():
    message = r"teacher_rollouts: rollouts must be those of the prompts, \(3, 4\), got \(2, 4\)"
    with pytest.raises(ValueError, match=message):
        teacher_rollouts(make_rollouts(PROMPTS[:2], RESPONSES[:2]), make_batch(None))
    with pytest.raises(ValueError, match="teacher_rollouts: rollouts must be those of the prompts"):
        teacher_rollouts(make_rollouts([[BOS]] * 3, RESPONSES), make_batch(TEACHER_PROMPTS["longer"]))


def test_the_teachers_prompts_are_padded_to_the_longest_of_theirs():
    batch = make_batch(TEACHER_PROMPTS["shorter"], samples=2)
    teacher, expected = batch.for_teacher, make_prompt_batch(repeated(TEACHER_PROMPTS["shorter"], 2))
    assert torch.equal(teacher.prompt_ids_B_P, expected.prompt_ids_B_P)
    assert torch.equal(teacher.prompt_mask_B_P, expected.prompt_mask_B_P)
    assert torch.equal(teacher.request_ids_B, batch.request_ids_B) and teacher.samples_per_prompt == 2
    assert batch.prompt_ids_B_P.shape == (6, 4) and teacher.prompt_ids_B_P.shape == (6, 3)
