"""Are infinite, masked, foreign, repeated, confident and extreme rows of the top-k kernel defined, and confined to themselves?

python -m pytest tests/kernels/test_fused_topk_edge_cases.py
"""

import math

import numpy as np
import pytest
import torch
from numpy_divergences import CASES, softmax
from test_fused_edge_cases import INFINITE_WITHOUT
from test_fused_topk_divergence import CLASSES_AND_EVENTS, EVENTS, check, every_storage, fused

from esr_kernels import ForwardKL, GeneralizedJSD, Impl, LogitStorage, OutputHead, ReverseKL
from esr_kernels.testing.cases import DIVERGENCES, ONE_OF_EACH_CLASS
from esr_kernels.testing.inputs import make_logit_pair
from esr_kernels.testing.logprob_inputs import TopkInputs
from esr_kernels.testing.logprob_oracle import evaluate_topk_divergence, topk_divergence_oracle
from esr_kernels.testing.oracle import Results, converted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf
FLOAT32, TILE_RELATIVE = LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16
three_divergences = pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), GeneralizedJSD(0.5)], ids=repr)
every_events = pytest.mark.parametrize("events", EVENTS)
# Every class and kind of events, and every kind in the other storage.
every_case = pytest.mark.parametrize(
    ("name", "events", "storage"),
    [
        (name, events, FLOAT32)
        for name, events in CLASSES_AND_EVENTS
        if events != "renormalized" or name in ("forward_kl", "skew_reverse_0.1", "alpha_0.5")
    ]
    + [
        ("forward_kl", "tail", TILE_RELATIVE),
        ("alpha_0.5", "tail", TILE_RELATIVE),
        ("reverse_kl", "renormalized", TILE_RELATIVE),
        ("jsd_0.5", "truncated", TILE_RELATIVE),
    ],
)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def on_logits(student_N_V, ids_N_K, logprobs_N_K, bias=None, softcap=None) -> TopkInputs:
    """An identity head turns hidden states into logits, so that a row can hold any."""
    student, ids, logprobs = (torch.as_tensor(t).to(DEVICE) for t in (student_N_V, ids_N_K, logprobs_N_K))
    weight = torch.eye(student.shape[1], device=DEVICE)
    head = OutputHead(weight, None if bias is None else bias.to(DEVICE), softcap=softcap)
    return TopkInputs(student, head, ids, logprobs)


def served(rows: int, vocab_size: int, num_ids: int, seed: int, gap: float = 1.0, **head) -> TopkInputs:
    """Logits of a student, and the teacher's likeliest ids in a mixed order."""
    student, teacher = make_logit_pair(rows, vocab_size, gap=gap, seed=seed)
    top = teacher.double().log_softmax(-1).topk(num_ids, dim=-1)
    order = torch.randperm(num_ids, generator=torch.Generator().manual_seed(seed))
    return on_logits(student, top.indices[:, order], top.values[:, order].float(), **head)


def assert_other_rows_are(results: Results, expected: Results, row: int) -> None:
    """Every result that has rows, but for one of them, bit by bit."""
    others = [r for r in range(len(results["divergence"])) if r != row]
    for name in expected.keys() - {"grad_weight", "grad_bias"}:
        assert torch.equal(results[name][others], expected[name][others]), name


def masked_somewhere(num_ids: int = 4) -> TopkInputs:
    """Row 0: nothing. 1: the student excludes a given id (by its bias). 2: all given ids. 3: the teacher excludes an id (by a
    log-prob of -inf). 4: all of them. 5: both exclude one and the same id. Ids 0 to 7 and a whole tile are masked in the bias.
    """
    bias = torch.zeros(400)
    bias[:8] = bias[128:256] = -INF
    inputs = served(6, 400, num_ids, seed=1, bias=bias)
    ids, logprobs = inputs.teacher_ids_N_K, inputs.teacher_logprobs_N_K
    ids[:] = torch.tensor([300, 9, 27, 399])
    logprobs[:] = torch.tensor([0.2, 0.3, 0.1, 0.05]).log()
    ids[1, 1], ids[5, 2] = 3, 130
    ids[2] = torch.tensor([0, 7, 200, 255])
    logprobs[3, 0] = logprobs[5, 2] = -INF
    logprobs[4] = -INF
    return inputs


STUDENT_EXCLUDES, TEACHER_EXCLUDES = {1, 2}, {3, 4}


@every_case
def test_n2_minus_infinity_wherever_it_is_legal(name, events, storage):
    """Infinite exactly where mathematics says so, and then with gradient exactly 0; 0 where nothing is left to compare."""
    inputs = masked_somewhere()
    if storage == TILE_RELATIVE:
        inputs = converted(
            inputs, torch.bfloat16
        )  # for 16 bits of the tail's logits there are bars of 16-bit gradients
    results = check(inputs, DIVERGENCES[name], logits=storage, **EVENTS[events])
    infinite = set()
    if name in INFINITE_WITHOUT["student"]:
        infinite |= STUDENT_EXCLUDES
    if name in INFINITE_WITHOUT["teacher"]:
        infinite |= TEACHER_EXCLUDES
    if events == "renormalized":
        infinite -= {2, 4}
        assert (results["divergence"][[2, 4]] == 0).all() and (results["student_entropy"][[2, 4]] == 0).all()
    assert results["divergence"].isposinf().nonzero().flatten().tolist() == sorted(infinite)
    assert (results["grad_hidden"][sorted(infinite)] == 0).all()
    assert (results["grad_hidden"][[0, 5]] != 0).any(-1).all()
    masked = inputs.student_head.bias == -INF
    assert all((results[f"grad_{leaf}"][masked] == 0).all() for leaf in ("weight", "bias"))


@every_storage
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5", "alpha_0.5"])
def test_n2_a_student_without_a_tail(name, storage):
    """All its mass is on the ids, exactly: forward KL is infinite because the teacher has some elsewhere.

    In the second row an empty slot leaves one id to the tail.
    """
    bias = torch.full((300,), -INF)
    bias[[3, 130, 299]] = 0.0
    ids = torch.tensor([[130, 299, 3], [3, -1, 130]])
    inputs = on_logits(
        make_logit_pair(2, 300, seed=2).student_N_V, ids, torch.tensor([[0.3, 0.2, 0.4]] * 2).log(), bias
    )
    results = check(inputs, DIVERGENCES[name], logits=storage)  # the tail's logit is its tile's maximum, and exact
    assert results["divergence"].isposinf().tolist() == [name == "forward_kl", False]


@every_storage
@every_events
def test_s3_fully_masked_students_and_rows_without_ids_are_zero(events, storage):
    """Also with a NaN hidden state in the row without ids; K + 1 empty slots hold NaN log-probs."""
    inputs = served(3, 140, 5, seed=3)
    expected = fused(inputs, ReverseKL(), logits=storage, trained=("hidden",), **EVENTS[events])
    inputs.teacher_ids_N_K[1] = -1
    inputs.teacher_logprobs_N_K[1] = NAN
    results = fused(inputs, ReverseKL(), logits=storage, trained=("hidden",), **EVENTS[events])
    assert all((results[name][1] == 0).all() for name in results)
    assert_other_rows_are(results, expected, row=1)
    inputs.student_hidden_N_D[1, 3] = NAN
    results = fused(inputs, ReverseKL(), logits=storage, trained=(), **EVENTS[events])
    assert results["divergence"][1] == 0

    masked = on_logits(*inputs[:1], *inputs[2:], bias=torch.full((140,), -INF))
    masked.student_hidden_N_D[1, 3] = 0.0
    results = fused(masked, ForwardKL(), logits=storage, **EVENTS[events])
    assert all((value == 0).all() for value in results.values())


@every_case
def test_empty_slots_and_repeats_are_no_events(name, events, storage):
    """-1 anywhere, and an id again in a later slot, whatever their log-probs: the results are those without the slots."""
    inputs = served(2, 300, 5, seed=4, softcap=6.0)
    expected = fused(inputs, DIVERGENCES[name], logits=storage, **EVENTS[events])
    ids, logprobs = inputs.teacher_ids_N_K, inputs.teacher_logprobs_N_K
    empty, ignored = torch.full_like(ids[:, :1], -1), torch.full_like(logprobs[:, :1], NAN)
    padded = inputs._replace(
        teacher_ids_N_K=torch.cat([empty, ids[:, :2], ids[:, :1], ids[:, 2:], ids[:, 1:3], empty], dim=1),
        teacher_logprobs_N_K=torch.cat(
            [ignored, logprobs[:, :2], ignored + 1, logprobs[:, 2:], 0 * logprobs[:, 1:3], ignored], dim=1
        ),
    )
    results = fused(padded, DIVERGENCES[name], logits=storage, **EVENTS[events])
    assert expected["divergence"].abs().min() > 1e-4
    for field in expected:  # sums of the same numbers in another order, a few eps of sizes near 1
        torch.testing.assert_close(results[field], expected[field], rtol=5e-6, atol=1e-6)


@every_storage
def test_a_repeated_id_counts_once_by_its_first_slot(storage):
    """Not by the larger log-prob, nor the last; against the formula in numpy. One row has an id in all slots but two."""
    student, _ = make_logit_pair(3, 9, seed=5)
    ids = torch.tensor([[4, 1, 4, 6], [1, 1, 2, 1], [8, 0, 3, 8]])
    logprobs = torch.tensor([[0.1, 0.2, 0.6, 0.1], [0.2, 0.5, 0.1, 0.6], [0.5, 0.1, 0.1, 0.3]]).log()
    first = ([0, 1, 3], [0, 2], [0, 1, 2])
    inputs = on_logits(student, ids, logprobs)
    values = fused(inputs, ForwardKL(), logits=storage)["divergence"].cpu()
    for row, slots in enumerate(first):
        p = softmax(student.double().numpy())[row, ids[row, slots].numpy()]
        q = logprobs[row, slots].double().exp().numpy()
        p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
        tolerance = 5e-6 if storage == FLOAT32 else 5e-4  # a few eps of sums near 1, or 11 bits of the tail's logits
        assert values[row].item() == pytest.approx((q * np.log(q / p)).sum(), rel=tolerance)


@every_storage
@every_events
def test_ids_outside_the_vocabulary_make_only_their_row_nan(events, storage):
    """300 is the first column of the padding of a stored row, 384 is past it. With upstream 0 the head is not poisoned."""
    foreign = torch.tensor([300, 384, 151936, 2**31 - 1, -2, -100, -(2**31)])
    inputs, upstream = served(8, 300, 4, seed=6), torch.zeros(8, device=DEVICE)
    upstream[0] = -1.5
    options = {"impl": Impl.FUSED, "logits": storage, **EVENTS[events]}
    alone = TopkInputs(inputs[0][:1], inputs[1], inputs[2][:1], inputs[3][:1])
    expected = evaluate_topk_divergence(alone, ForwardKL(), upstream[:1], **options)
    inputs.teacher_ids_N_K[1:, 2] = foreign.to(DEVICE)
    for dtype in (torch.int64, torch.int32) if events == "tail" else (torch.int64,):
        results = evaluate_topk_divergence(
            inputs._replace(teacher_ids_N_K=inputs.teacher_ids_N_K.to(dtype)), ForwardKL(), upstream, **options
        )
        for field in ("divergence", "top1_agreement"):
            assert results[field].isnan().tolist() == [False] + [True] * 7
        for field in expected:
            rows = slice(None) if field == "grad_weight" else slice(1)
            assert torch.equal(results[field][rows], expected[field]), field
        assert (results["grad_hidden"][1:] == 0).all()


@every_events
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()], ids=repr)
def test_a_row_of_nothing_but_foreign_ids_is_nan(divergence, events):
    inputs = on_logits(torch.zeros(2, 9), [[9, -2, -1], [0, 1, 2]], torch.full((2, 3), -2.0))
    upstream = torch.tensor([0.0, 1.0], device=DEVICE)
    results = evaluate_topk_divergence(inputs, divergence, upstream, impl=Impl.FUSED, **EVENTS[events])
    assert results["divergence"].isnan().tolist() == results["top1_agreement"].isnan().tolist() == [True, False]


@every_case
def test_n8_nan_in_hidden_states_and_log_probs_poison_only_their_row(name, events, storage):
    """Rows 1 and 2; with upstream 0 their gradient is 0, and the head's is that of row 0 alone."""
    inputs, upstream = served(3, 140, 4, seed=7), torch.tensor([1.5, 0.0, 0.0], device=DEVICE)
    options = {"impl": Impl.FUSED, "logits": storage, **EVENTS[events]}
    alone = TopkInputs(inputs[0][:1], inputs[1], inputs[2][:1], inputs[3][:1])
    expected = evaluate_topk_divergence(alone, DIVERGENCES[name], upstream[:1], **options)
    inputs.student_hidden_N_D[1, 60] = NAN
    inputs.teacher_logprobs_N_K[2, 2] = NAN
    results = evaluate_topk_divergence(inputs, DIVERGENCES[name], upstream, **options)
    assert results["divergence"].isnan().tolist() == [False, True, True]
    assert results["student_entropy"].isnan().tolist() == [False, True, False]
    assert results["teacher_entropy"].isnan().tolist() == [False, False, True]
    for field in expected:
        rows = slice(None) if field == "grad_weight" else slice(1)
        assert torch.equal(results[field][rows], expected[field]), field
    assert (results["grad_hidden"][1:] == 0).all()


@every_storage
def test_n8_a_nan_row_with_another_upstream_shows_in_its_gradient_and_the_heads(storage):
    inputs, upstream = served(3, 140, 4, seed=7), torch.tensor([1.0, 1e-3, -2.0], device=DEVICE)
    inputs.teacher_logprobs_N_K[1, 2] = NAN
    results = evaluate_topk_divergence(inputs, ForwardKL(), upstream, impl=Impl.FUSED, logits=storage)
    assert results["grad_hidden"].isnan().any(-1).tolist() == [False, True, False]
    assert results["grad_weight"].isnan().any()


@every_storage
def test_n8_a_nan_row_with_upstream_zero_adds_nothing_whatever_the_teacher_gives(storage):
    """Truncated forward KL is 0 where the teacher gives no id any mass, also for a student that is NaN."""
    inputs = served(3, 300, 4, seed=8)
    upstream = torch.tensor([1.0, 0.0, -2.0], device=DEVICE)
    options = {"impl": Impl.FUSED, "logits": storage, **EVENTS["truncated"]}
    inputs.teacher_logprobs_N_K[1] = -INF
    expected = evaluate_topk_divergence(inputs, ForwardKL(), upstream, **options)
    inputs.student_hidden_N_D[1, 60] = NAN
    results = evaluate_topk_divergence(inputs, ForwardKL(), upstream, **options)
    assert (results["grad_hidden"][1] == 0).all()
    assert torch.equal(results["grad_weight"], expected["grad_weight"])


@pytest.mark.parametrize(
    ("name", "storage"),
    [*((name, FLOAT32) for name in ONE_OF_EACH_CLASS), ("reverse_kl", TILE_RELATIVE), ("jsd_0.5", TILE_RELATIVE)],
)
def test_n4_a_common_offset_changes_nothing(name, storage):
    """Even integers stay exact after adding 2^24 in float32; logits that are all far below -104 are ordinary ones. Beyond 1e38
    nothing is left of the logits but their offset: they are those of a flat row.
    """
    logits = 2.0 * torch.randint(-4, 5, (1, 150), generator=torch.Generator().manual_seed(9))
    offsets = torch.tensor([0.0, 2.0**24, 1e4, -1e4])[:, None]
    rows = torch.cat([logits + offsets, 0 * logits, 0 * logits - 3e38])
    inputs = on_logits(rows, torch.tensor([[3, 149, 80]] * 6), torch.tensor([[0.3, 0.2, 0.1]] * 6).log())
    upstream = torch.full((6,), 1.5, device=DEVICE)
    results = evaluate_topk_divergence(inputs, DIVERGENCES[name], upstream, impl=Impl.FUSED, logits=storage)
    for field in results.keys() - {"grad_weight"}:
        for shifted, plain in ((1, 0), (2, 0), (3, 0), (5, 4)):
            actual, expected = results[field][shifted], results[field][plain]
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("remainder", [0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize(("num_ids", "storage"), [(1, TILE_RELATIVE), (8, FLOAT32)])
@three_divergences
def test_n5_confident_rows_keep_the_true_class_gradient(divergence, num_ids, storage, remainder):
    """p = 1 - remainder at one given id, q = 1 - 3 remainder in row 0 and 0.3 in row 1: the gradient there is within 1 % of
    float64.

    As a difference of two numbers near 1, or of two costs, it would have no correct digit from remainder = 1e-6 on, nor would
    a teacher's tail that is 1 minus a sum.
    """
    vocab_size, true_class = 300, 130
    generator = torch.Generator().manual_seed(10)
    student, teacher = 0.5 * torch.randn(2, 2, vocab_size, generator=generator, dtype=torch.float64)
    for logits, rests in ((student, [remainder, remainder]), (teacher, [3 * remainder, 0.7])):
        rest = torch.tensor(rests, dtype=torch.float64)
        logits[:, true_class] = -INF
        logits[:, true_class] = logits.logsumexp(-1) + ((1 - rest) / rest).log()
    top = teacher.log_softmax(-1).topk(num_ids, dim=-1)
    inputs = on_logits(student.float(), top.indices, top.values.float())
    upstream = torch.tensor([1.7, -0.6], device=DEVICE)
    options = {"trained": ("hidden",), "logits": storage}
    gradient = evaluate_topk_divergence(inputs, divergence, upstream, impl=Impl.FUSED, **options)["grad_hidden"]
    oracle = topk_divergence_oracle(inputs, divergence, upstream, **options).values["grad_hidden"]
    relative = (gradient[:, true_class].double() / oracle[:, true_class] - 1).abs()
    assert (relative < 0.01).all(), relative.tolist()


@pytest.mark.parametrize("events", ["tail", "truncated"])
@three_divergences
def test_n5_the_students_tail_keeps_its_digits(divergence, events):
    """P_tail = 2e-12: 1 - sum(p) would be 0 in float32, and the gradient outside the ids with it."""
    inputs = on_logits(
        [[30.0, 29.0, 2.0, 2.0, 1.0], [1.0, 0.0, 27.5, 2.0, 29.0]],
        [[0, 1], [4, 2]],
        torch.tensor([[0.5, 0.4], [0.7, 0.2]]).log(),
    )
    results = check(inputs, divergence, trained=("hidden",), **EVENTS[events])
    oracle = topk_divergence_oracle(inputs, divergence, torch.ones(2, device=DEVICE), **EVENTS[events]).values
    actual = evaluate_topk_divergence(
        inputs, divergence, torch.ones(2, device=DEVICE), impl=Impl.FUSED, **EVENTS[events]
    )
    # 27 nats below the maximum, one exponential has a relative error of 27 eps.
    torch.testing.assert_close(actual["grad_hidden"].double(), oracle["grad_hidden"], rtol=5e-6, atol=1e-30)
    assert results["divergence"].isfinite().all()


@three_divergences
def test_n5_a_tail_of_nearly_everything_keeps_its_digits(divergence):
    """P_tail = 1 - 4e-9 and Q_tail = 1 - 2e-6: the tail's own gradient is minus that of the ids, not 1 - 1."""
    student = torch.zeros(2, 300)
    student[:, [3, 200]] = -14.0
    logprobs = torch.tensor([[-14.0, -14.5], [-13.0, -15.0]])
    inputs, upstream = on_logits(student, [[3, 200], [200, 3]], logprobs), torch.ones(2, device=DEVICE)
    actual = evaluate_topk_divergence(inputs, divergence, upstream, impl=Impl.FUSED)["grad_hidden"]
    oracle = topk_divergence_oracle(inputs, divergence, upstream).values["grad_hidden"]
    torch.testing.assert_close(actual.double(), oracle, rtol=1e-4, atol=1e-16)


@pytest.mark.parametrize("total", [1.0, 1.01])
@pytest.mark.parametrize("name", CASES)
def test_log_probs_that_sum_to_one_or_more_still_give_a_proper_divergence(name, total):
    """The teacher's tail is then 2^-23, and its events are renormalised. Expected values from numpy."""
    given = np.array([0.6, 0.3, 0.1])
    student, _ = make_logit_pair(1, 8, seed=11)
    logprobs = torch.tensor(np.log(total * given), dtype=torch.float32)[None]
    results = fused(on_logits(student, [[4, 1, 6]], logprobs), CASES[name].divergence)
    p = softmax(student.double().numpy())[:, [4, 1, 6]]
    p, q = np.append(p, 1 - p.sum(-1, keepdims=True), axis=-1), np.append(total * given, 2.0**-23)[None]
    # The tail's share of a reverse KL is 16 nats times P_tail, exact to a few eps; log-probs of -0.5 are to half of one.
    np.testing.assert_allclose(results["divergence"].cpu().numpy(), CASES[name].value(p, q / q.sum()), rtol=2e-5)
    assert results["grad_hidden"].isfinite().all()


@every_case
def test_n9_gradient_rows_sum_to_zero(name, events, storage):
    """To rounding of the sum in float32; renormalised, nothing outside the ids has a gradient."""
    inputs = served(3, 515, 6, seed=12, gap=0.5)
    results = fused(inputs, DIVERGENCES[name], logits=storage, trained=("hidden",), **EVENTS[events])
    gradient = results["grad_hidden"].double()
    # Tile-relative, an entry is its probability within 2^-11, of a tail whose sum was taken of the same numbers.
    assert (gradient.abs().sum(-1) > 1e-4).all()
    assert (gradient.sum(-1).abs() <= 3e-6).all()
    if events == "renormalized":
        outside = torch.ones_like(gradient, dtype=torch.bool).scatter(-1, inputs.teacher_ids_N_K, False)
        assert (gradient[outside] == 0).all() and (gradient[~outside] != 0).all()


@every_storage
def test_top1_agreement_is_of_the_full_student_against_the_best_given_id(storage):
    """Ties go to the lowest id on both sides: among the ids, between an id and the rest of its tile, of another tile, of another
    program step (2048 columns), and between slots of the teacher. NaN where the row is.
    """
    rows = [  # the student's largest logits, given ids and their log-probs, agreement
        ({5: 3.0}, [5, 9], [-1.0, -2.0], 1.0),
        ({5: 3.0}, [9, 5], [-1.0, -2.0], 0.0),
        ({7: 3.0}, [5, 9], [-1.0, -2.0], 0.0),
        ({5: 3.0, 7: 3.0}, [5, 9], [-1.0, -2.0], 1.0),
        ({5: 3.0, 3: 3.0}, [5, 9], [-1.0, -2.0], 0.0),
        ({5: 3.0, 9: 3.0}, [9, 5], [-1.0, -2.0], 0.0),
        ({5: 3.0, 9: 3.0}, [9, 5], [-1.0, -1.0], 1.0),
        ({2200: 3.0, 200: 3.0}, [2200, 9], [-1.0, -2.0], 0.0),
        ({2200: 3.0, 2199: 2.9999}, [2200, 2199], [-1.0, -2.0], 1.0),
        ({130: 3.0, 2200: 3.0}, [130, -1], [-1.0, NAN], 1.0),
        ({0: 3.0}, [0, 2048], [-INF, -INF], 1.0),
        ({5: NAN}, [5, 9], [-1.0, -2.0], NAN),
    ]
    student = torch.zeros(len(rows), 2300)
    for row, (largest, *_) in enumerate(rows):
        for column, logit in largest.items():
            student[row, column] = logit
    inputs = on_logits(student, [ids for _, ids, _, _ in rows], torch.tensor([lp for _, _, lp, _ in rows]))
    for events in ("tail", "renormalized"):
        results = fused(inputs, GeneralizedJSD(0.5), logits=storage, trained=(), **EVENTS[events])
        expected = torch.tensor([agrees for *_, agrees in rows])
        if events == "renormalized":
            expected[10] = 0.0  # no probability on the given ids: nothing to compare
        torch.testing.assert_close(results["top1_agreement"].cpu(), expected, rtol=0, atol=0, equal_nan=True)
