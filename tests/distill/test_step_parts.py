"""Are a step's rollouts taken apart and put together without loss, and gradients packed as they should be?"""

from dataclasses import replace

import pytest
import torch
from tiny_models import EOS, make_prompt_batch, make_rollouts

from esr_distill.devices.gradients import buckets
from esr_distill.devices.sharding import layers_of, whole
from esr_distill.distill_loss import normalize_divergence
from esr_distill.prefix_positions import select_prefix_positions
from esr_distill.step_parts import ScoredPart, joined, rows_of
from esr_kernels import DivergenceOutput

PROMPTS = [[3], [4, 5], [6, 7, 8, 9, 10], [11]]
RESPONSES = [[12, EOS], [13, 14, 15], [16], [17, 18, 3, 4, EOS]]


def scored(rollouts, first: float) -> ScoredPart:
    """As values of the positions consecutive numbers from `first` on."""
    positions = select_prefix_positions(rollouts, 4)
    value_N = first + torch.arange(len(positions.row_N), dtype=torch.float32)
    return ScoredPart(value_N.sum(), rollouts, positions, DivergenceOutput(*[value_N] * 6), value_N + 0.5)


def test_rows_of_a_batch_lose_only_columns_that_none_of_them_uses():
    prompts, rollouts = make_prompt_batch(PROMPTS), make_rollouts(PROMPTS, RESPONSES)
    read, drawn = rows_of(prompts, rollouts, slice(0, 2))
    expected = make_rollouts(PROMPTS[:2], RESPONSES[:2])
    for name, value in vars(expected).items():
        ours = getattr(drawn, name)
        assert torch.equal(ours, value) if isinstance(value, torch.Tensor) else ours == value, name
    assert read.prompt_ids_B_P.tolist() == [[0, 3], [4, 5]]
    assert read.prompt_mask_B_P.tolist() == [[False, True], [True, True]]
    assert read.request_ids_B.tolist() == [0, 1]


def test_the_teachers_prompts_are_cut_by_their_own_width():
    theirs = make_prompt_batch([[1, 2, 3], [1], [1, 2, 3, 4, 5, 6], [2]])
    prompts = replace(make_prompt_batch(PROMPTS), teacher_prompts=theirs, columns_B=[{"n": n} for n in range(4)])
    read, _ = rows_of(prompts, make_rollouts(PROMPTS, RESPONSES), slice(2, 4))
    assert read.teacher_prompts.prompt_ids_B_P.tolist() == [[1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 2]]
    read, _ = rows_of(prompts, make_rollouts(PROMPTS, RESPONSES), slice(0, 2))
    assert read.teacher_prompts.prompt_ids_B_P.tolist() == [[1, 2, 3], [0, 0, 1]]
    assert read.columns_B == [{"n": 0}, {"n": 1}]


def test_parts_become_the_batch_that_they_were_made_of():
    whole_rollouts = make_rollouts(PROMPTS, RESPONSES)
    expected = select_prefix_positions(whole_rollouts, 4)
    parts = [make_rollouts(PROMPTS[:2], RESPONSES[:2]), make_rollouts(PROMPTS[2:], RESPONSES[2:])]
    result = joined([scored(parts[0], 0.0), scored(parts[1], 5.0)])
    for name, value in vars(whole_rollouts).items():
        ours = getattr(result.rollouts, name)
        assert torch.equal(ours, value) if isinstance(value, torch.Tensor) else ours == value, name
    for name, value in vars(expected).items():
        assert torch.equal(getattr(result.positions, name), value), name
    # 2 + 3 tokens in the first part, 1 + 4 (of 5) in the second
    assert result.divergence.divergence_N.tolist() == list(range(10))
    assert result.weights_N.tolist() == [n + 0.5 for n in range(10)]
    assert result.loss.item() == 45


@pytest.mark.parametrize(
    ("normalizer", "denominator", "expected"),
    [
        ("sum", None, (1 + 2 + 4 + 8) / 3),
        ("sequence_mean", None, ((1 + 2 + 4) / 3 + 8) / 3),
        ("token_mean", None, (1 + 2 + 4 + 8) / 4),
        ("fixed", 5.0, (1 + 2 + 4 + 8) / 5),
    ],
)
def test_losses_of_parts_add_up_to_that_of_the_step(normalizer, denominator, expected):
    """Three rollouts with 3, 1 and 0 positions, in two parts."""
    first = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3), torch.tensor([0, 0, 0])
    second = torch.tensor([8.0]), torch.ones(1), torch.tensor([0])
    parts = [normalize_divergence(*part, 3, normalizer, denominator, 4) for part in (first, second)]
    assert sum(parts).item() == pytest.approx(expected)


def test_a_part_without_positions_has_a_loss_with_a_gradient_of_0():
    divergence_N = torch.empty(0, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    for normalizer in ("sum", "sequence_mean", "token_mean"):
        loss = normalize_divergence(divergence_N * 2, torch.empty(0), none, 3, normalizer, None, 0)
        loss.backward()
        assert loss.item() == 0


def test_buckets_hold_neighbours_of_one_dtype(monkeypatch):
    monkeypatch.setattr("esr_distill.devices.gradients.BUCKET_BYTES", 40)
    sizes = [(4, torch.float32), (6, torch.float32), (1, torch.float32), (30, torch.float32), (2, torch.float64)]
    found = list(buckets([torch.zeros(size, dtype=dtype) for size, dtype in sizes]))
    assert [[gradient.numel() for gradient in bucket] for bucket in found] == [[4, 6], [1], [30], [2]]
    assert list(buckets([])) == []


def test_layers_are_those_of_the_longest_list():
    body = torch.nn.Module()
    body.experts = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    body.layers = torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(3)])
    assert layers_of(body) == list(body.layers)
    assert layers_of(torch.nn.Linear(1, 1)) == []


def test_a_plain_tensor_is_whole():
    tensor = torch.ones(2)
    assert whole(tensor) is tensor and whole(None) is None
