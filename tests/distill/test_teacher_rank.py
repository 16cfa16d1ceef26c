"""Are the teacher's ranks those that sorting gives?  pytest tests/distill/test_teacher_rank.py"""

import pytest
import torch

from esr_distill.monitoring import teacher_rank
from esr_distill.monitoring.teacher_rank import rank_summary, teacher_ranks
from esr_kernels import OutputHead

COUNT = 23


def inputs(student_width: int = 37, teacher_width: int = 37):
    """Random hidden states of 7 and 5 numbers, and the heads."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    heads = OutputHead(normal(student_width, 7)), OutputHead(normal(teacher_width, 5), bias=normal(teacher_width))
    tokens_N = torch.randint(33, (COUNT,), generator=generator)
    return normal(COUNT, 7), heads[0], normal(COUNT, 5), heads[1], tokens_N


def probabilities(hidden_N_D, head) -> list[list[float]]:
    logits = hidden_N_D.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    return torch.softmax(logits, -1).tolist()


def by_sorting(p: list[list[float]], q: list[list[float]], tokens: list[int]) -> tuple[list[int], list[int]]:
    """Places in the teacher's order of events: of the drawn one, and of the student's likeliest."""
    orders = [sorted(range(len(row)), key=row.__getitem__, reverse=True) for row in q]
    tops = [max(range(len(row)), key=row.__getitem__) for row in p]
    return tuple([order.index(i) + 1 for order, i in zip(orders, ids, strict=True)] for ids in (tokens, tops))


@pytest.mark.parametrize("rows_at_a_time", [1, 4, 1000])
def test_ranks_are_places_in_the_teachers_order(monkeypatch, rows_at_a_time):
    monkeypatch.setattr(teacher_rank, "LOGITS_AT_A_TIME", rows_at_a_time * 37)
    given = inputs()
    expected = by_sorting(probabilities(*given[:2]), probabilities(*given[2:4]), given[4].tolist())
    ranks = teacher_ranks(*given)
    assert (ranks.drawn_N.tolist(), ranks.student_top_N.tolist()) == expected
    assert len(set(expected[0])) > 5 and len(set(expected[1])) > 5


@pytest.mark.parametrize("widths", [(37, 41), (41, 37), (40, 40)])
def test_a_cut_vocabulary_has_no_ids_beyond(widths):
    given = inputs(*widths)
    p, q = ([row[:33] for row in probabilities(*given[i : i + 2])] for i in (0, 2))
    ranks = teacher_ranks(*given, vocab_size=33)
    assert (ranks.drawn_N.tolist(), ranks.student_top_N.tolist()) == by_sorting(p, q, given[4].tolist())


def test_stop_ids_are_one_token():
    student_hidden, student_head, teacher_hidden, teacher_head, tokens_N = inputs()
    stops = (3, 8, 21)
    tokens_N[::3] = torch.tensor([21, 3, 8]).repeat(3)[: len(tokens_N[::3])]

    def with_event(rows: list[list[float]]) -> list[list[float]]:
        """The stop event first, then the others in their order."""
        return [[sum(row[i] for i in stops), *(x for i, x in enumerate(row) if i not in stops)] for row in rows]

    places = {i: place for place, i in enumerate([i for i in range(37) if i not in stops], 1)}
    tokens = [places.get(i, 0) for i in tokens_N.tolist()]
    p, q = probabilities(student_hidden, student_head), probabilities(teacher_hidden, teacher_head)
    expected = by_sorting(with_event(p), with_event(q), tokens)
    ranks = teacher_ranks(student_hidden, student_head, teacher_hidden, teacher_head, tokens_N, stop_ids=stops)
    assert (ranks.drawn_N.tolist(), ranks.student_top_N.tolist()) == expected != by_sorting(p, q, tokens_N.tolist())


def test_equally_likely_tokens_share_the_best_rank():
    same = OutputHead(torch.tensor([[2.0], [1.0], [1.0], [0.0]]))
    ones = torch.ones(4, 1)
    ranks = teacher_ranks(ones, same, ones, same, torch.tensor([0, 1, 2, 3]))
    assert ranks.drawn_N.tolist() == [1, 2, 2, 4] and ranks.student_top_N.tolist() == [1, 1, 1, 1]


def test_summary_by_hand():
    summary = rank_summary(torch.tensor([1, 1, 5, 6, 37]))
    assert summary == {"mean": 10.0, "first": 0.4, "in_first_5": pytest.approx(0.6)}
