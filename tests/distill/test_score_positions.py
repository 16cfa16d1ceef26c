"""Is the divergence of a position the formula of the run's options: temperature, stop event, gate?

pytest tests/distill/test_score_positions.py
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from tiny_models import BOS, EOS, make_model, make_rollouts
from torch import Tensor
from transformers import PreTrainedModel

from esr_distill.config import LossConfig
from esr_distill.distill_loss import make_divergence
from esr_distill.hidden_states import last_hidden_states
from esr_distill.models import StopIds
from esr_distill.prefix_positions import select_prefix_positions
from esr_distill.score_positions import score_positions
from esr_kernels import DivergenceOutput, Impl

PROMPTS = [[BOS, 5, 13, 7, 15], [BOS], [BOS, 8, 9]]
RESPONSES = [[4, 6, 9, 5, EOS], [10, 11, 12, 8, 3, 14, 5], [EOS]]
COUNT, TOKENS = 11, 5  # positions: 5 + 5 of 7 + 1
STOP_IDS = (EOS, 5, 9)


def scored(loss: LossConfig, student: PreTrainedModel, teacher: PreTrainedModel) -> DivergenceOutput:
    """What a run of these options and models gives for the first five tokens of each rollout."""
    run = SimpleNamespace(
        config=SimpleNamespace(loss=loss),
        student=student,
        teacher=teacher,
        stop=StopIds(STOP_IDS, 0),
        divergence=make_divergence(loss),
        divergence_impl=Impl.REFERENCE,
    )
    rollouts = make_rollouts(PROMPTS, RESPONSES)
    positions = select_prefix_positions(rollouts, TOKENS)
    with torch.no_grad():
        teacher_hidden_B_T_E = last_hidden_states(teacher, rollouts)
    return score_positions(run, last_hidden_states(student, rollouts), teacher_hidden_B_T_E, positions)


@pytest.fixture
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    return make_model(1), make_model(2, hidden_size=24).requires_grad_(False)


def event_logprobs(model: PreTrainedModel, temperature: float, stop_ids: tuple[int, ...]) -> list[Tensor]:
    """Float64, one vector a position in the order of the rollouts, each sequence by itself: softmax of logits / temperature,
    the stop ids' probabilities added up as the last event."""
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits_T_V = model(torch.tensor([prompt + response])).logits[0].double() / temperature
        for place in range(min(TOKENS, len(response))):
            p_V = torch.softmax(logits_T_V[len(prompt) - 1 + place], 0)
            others = [p_V[i] for i in range(len(p_V)) if i not in stop_ids]
            stop = [sum(p_V[i] for i in stop_ids)] if stop_ids else []
            found.append(torch.stack(others + stop).log())
    return found


def kl(first: Tensor, second: Tensor) -> Tensor:
    return sum(math.e**a * (a - b) for a, b in zip(first, second, strict=True))


def formula(
    pair: tuple[PreTrainedModel, PreTrainedModel],
    of_position: Callable[[Tensor, Tensor], Tensor],
    temperature: float = 1.0,
    stop_ids: tuple[int, ...] = STOP_IDS,
) -> Tensor:
    rows = zip(*(event_logprobs(model, temperature, stop_ids) for model in pair), strict=True)
    return torch.stack([of_position(p, q) for p, q in rows])


def gradient(value_N: Tensor, model: PreTrainedModel) -> Tensor:
    """Of a weighted sum, so that no position's mistake is another's gain."""
    weights_N = torch.linspace(0.5, 2.0, len(value_N), dtype=value_N.dtype)
    return torch.autograd.grad((weights_N * value_N).sum(), model.lm_head.weight, retain_graph=True)[0]


def assert_same(output: DivergenceOutput, expected_N: Tensor, student: PreTrainedModel) -> None:
    assert len(expected_N) == COUNT and expected_N.dtype == torch.float64
    assert output.divergence_N.tolist() == pytest.approx(expected_N.tolist(), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(
        gradient(output.divergence_N, student), gradient(expected_N, student), rtol=1e-3, atol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_the_loss_temperature_shapes_both_distributions(pair, temperature):
    output = scored(LossConfig(loss_temperature=temperature), *pair)
    assert_same(output, formula(pair, kl, temperature), pair[0])  # no factor temperature^2


@pytest.mark.parametrize("is_merged", [True, False])
def test_stop_ids_are_one_event_where_they_are_merged(pair, is_merged):
    output = scored(LossConfig(divergence="forward_kl", merge_stop_ids=is_merged), *pair)
    merged, apart = (formula(pair, lambda p, q: kl(q, p), stop_ids=ids) for ids in (STOP_IDS, ()))
    assert (merged - apart).abs().min() > 1e-4  # at every position they are told apart
    assert_same(output, merged if is_merged else apart, pair[0])
    stop_places = [2, 3, 4, 10]  # of the tokens 9, 5, 2 and 2
    for place in stop_places if is_merged else []:
        stop_logprob = event_logprobs(pair[1], 1.0, STOP_IDS)[place][-1].item()
        assert output.teacher_logprob_N[place].item() == pytest.approx(stop_logprob, rel=1e-4)


@pytest.mark.parametrize("coefficient", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_gate_adds_its_divergence_where_the_teacher_is_unsure(pair, coefficient, temperature):
    entropies = formula(pair, lambda p, q: -sum(math.e**b * b for b in q), temperature)
    unsure = sorted(entropies.tolist())
    gate = (unsure[6] + unsure[7]) / 2  # four positions above, seven below
    loss = LossConfig(
        gated_divergence="forward_kl", gate_coefficient=coefficient, gate_entropy=gate, loss_temperature=temperature
    )
    added_N = coefficient * formula(pair, lambda p, q: kl(q, p), temperature)
    assert (entropies > gate).sum() == 4 and added_N.min() > 1e-3
    expected_N = formula(pair, kl, temperature) + torch.where(entropies > gate, added_N, 0.0)
    assert_same(scored(loss, *pair), expected_N, pair[0])


def test_a_gate_that_no_position_passes_adds_nothing(pair):
    loss = LossConfig(gated_divergence="total_variation", gate_coefficient=2.0, gate_entropy=math.log(19))
    assert_same(scored(loss, *pair), formula(pair, kl), pair[0])
