"""Are infinite, masked, extreme and confident rows defined in the kernel of token_divergence, and confined to themselves?

python -m pytest tests/kernels/test_fused_edge_cases.py
"""

import math

import pytest
import torch

from esr_kernels import AlphaDivergence, ForwardKL, GeneralizedJSD, Impl, ReverseKL
from esr_kernels.testing.cases import DIVERGENCES, ONE_OF_EACH_CLASS
from esr_kernels.testing.error_budget import check_token_divergence
from esr_kernels.testing.inputs import LogitPair, make_logit_pair
from esr_kernels.testing.oracle import Results, converted, evaluate_token_divergence, token_divergence_oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
every_class = pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)


def logit_pair(rows, vocab_size, **options) -> LogitPair:
    return converted(make_logit_pair(rows, vocab_size, **options), DEVICE)


def upstream_of(pair: LogitPair) -> torch.Tensor:
    return torch.tensor([2.0, -0.5, 3.5, -1.5, 0.75], device=DEVICE)[: len(pair.student_N_V)]


def fused(pair: LogitPair, divergence, **options) -> Results:
    return evaluate_token_divergence(pair, divergence, upstream_of(pair), impl=Impl.FUSED, **options)


def assert_other_rows_are(results: Results, expected: Results, row: int) -> None:
    """All results but those of one row, bit by bit; student and teacher log-probs only where both have them."""
    others = [r for r in range(len(results["divergence"])) if r != row]
    for name in expected:
        if not name.endswith("_logprob"):
            assert torch.equal(results[name][others], expected[name][others]), name


@every_class
def test_n2_columns_masked_on_both_sides(name):
    pair = logit_pair(3, 200, gap=1.0, seed=1)
    masked = [0, 7, 8, 127, 128, 199]
    for logits in pair:
        logits[:, masked] = -INF
    results = check_token_divergence(pair, DIVERGENCES[name], upstream_of(pair))
    assert results["divergence"].isfinite().all()
    assert (results["grad_student_logits"][:, masked] == 0).all()


@pytest.mark.parametrize("side", ["student", "teacher"])
@every_divergence
def test_n2_columns_masked_on_one_side(name, side):
    """Infinite exactly where mathematics says so, and then with gradient exactly 0; with a stop event of several ids, of
    which one is masked in one row and all but one in another.
    """
    pair = logit_pair(3, 200, gap=1.0, seed=2)
    masked = pair.student_N_V if side == "student" else pair.teacher_N_V
    masked[1, [3, 9]] = masked[2, :140] = -INF
    results = check_token_divergence(pair, DIVERGENCES[name], upstream_of(pair), stop_ids=(3, 5, 150))
    infinite = results["divergence"].isinf()
    assert (results["grad_student_logits"][infinite] == 0).all()
    assert not infinite[0] and infinite[2] == (name in INFINITE_WITHOUT[side])


# Which of the cases are infinite when one side alone gives an event probability 0, from their definitions.
INFINITE_WITHOUT = {
    "student": {"forward_kl", "jsd_0", "skew_forward_0", "alpha_1", "alpha_2"},
    "teacher": {"reverse_kl", "jsd_1", "skew_reverse_0", "alpha_0", "alpha_-1.5"},
}


@every_class
def test_n2_a_mask_by_the_lowest_number_is_a_mask(name):
    """Masks are often torch.finfo(dtype).min: here over the first two of three tiles of 4096 columns, on both sides."""
    pair, lowest = logit_pair(2, 8300, gap=1.0, seed=13), torch.finfo(FLOAT32).min
    results = {}
    for mask in (lowest, -INF):
        for logits in pair:
            logits[:, :8200] = mask
        results[mask] = fused(pair, DIVERGENCES[name])
    for field in results[-INF]:
        torch.testing.assert_close(results[lowest][field], results[-INF][field], rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@every_class
def test_s3_a_fully_masked_row_is_zero(name, side):
    pair = logit_pair(3, 140, seed=3, dtype=BFLOAT16)
    expected = fused(pair, DIVERGENCES[name], stop_ids=(2, 4))
    if side != "teacher":
        pair.student_N_V[1] = -INF
    if side != "student":
        pair.teacher_N_V[1] = -INF
    ids = torch.tensor([2, 2, 2], device=DEVICE)
    results = fused(pair, DIVERGENCES[name], token_ids_N=ids, stop_ids=(2, 4))
    row = {field: value[1].tolist() for field, value in results.items()}
    assert row.pop("grad_student_logits") == [0.0] * 140
    assert row == {
        "divergence": 0.0,
        "student_entropy": 0.0,
        "teacher_entropy": 0.0,
        "student_logprob": -INF,
        "teacher_logprob": -INF,
        "top1_agreement": 0.0,
    }
    assert_other_rows_are(results, expected, row=1)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "alpha_0.5"])
def test_s3_all_rows_masked(name):
    """Nothing is divided by a count: losses are 0 and gradients exactly 0."""
    pair = LogitPair(*torch.full((2, 4, 130), -INF, device=DEVICE))
    results = fused(pair, DIVERGENCES[name])
    assert (results["divergence"] == 0).all() and (results["grad_student_logits"] == 0).all()
    assert (results["student_entropy"] == 0).all() and (results["top1_agreement"] == 0).all()


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
@every_class
def test_n8_nan_and_infinity_poison_only_their_row(name, side, poison):
    pair = logit_pair(3, 140, seed=4)
    expected = fused(pair, DIVERGENCES[name])
    (pair.student_N_V if side == "student" else pair.teacher_N_V)[1, 60] = poison
    ids = torch.tensor([1, 1, 1], device=DEVICE)
    results = fused(pair, DIVERGENCES[name], token_ids_N=ids)
    assert results["divergence"][1].isnan() and results["top1_agreement"][1].isnan()
    for other in ("entropy", "logprob"):
        assert results[f"student_{other}"][1].isnan() == (side == "student")
        assert results[f"teacher_{other}"][1].isnan() == (side == "teacher")
    assert_other_rows_are(results, expected, row=1)
    gradient = results["grad_student_logits"][1]
    assert (gradient.isnan() | (gradient == 0)).all()


@every_class
def test_n8_a_nan_row_with_upstream_zero_has_gradient_zero(name):
    """What a caller masks out by weight 0 stays out; any other weight shows the NaN."""
    pair = logit_pair(3, 140, seed=5)
    pair.student_N_V[:2, 60] = NAN
    upstream = torch.tensor([0.0, 1e-3, 2.0], device=DEVICE)
    results = evaluate_token_divergence(pair, DIVERGENCES[name], upstream, impl=Impl.FUSED)
    gradient = results["grad_student_logits"]
    assert (gradient[0] == 0).all()
    assert gradient[1].isnan().any()
    assert (gradient[2] != 0).any() and gradient[2].isfinite().all()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@every_class
def test_n3_probabilities_that_underflow_on_both_sides(name, temperature):
    """Log-probabilities below -104 are probability 0 in float32; nothing divides by them."""
    pair = logit_pair(3, 150, gap=0.5, seed=6)
    for logits in pair:
        logits[:, 70:] -= 130.0 * temperature
    check_token_divergence(pair, DIVERGENCES[name], upstream_of(pair), loss_temperature=temperature)


@pytest.mark.parametrize(
    "name", ["jsd_0.1", "jsd_0.9", "skew_forward_0.7", "skew_reverse_0.1", "alpha_0.3", "alpha_0.8"]
)
def test_n3_one_side_underflows_where_the_other_does_not(name):
    pair = logit_pair(4, 150, gap=0.5, seed=7)
    pair.student_N_V[:2, ::3] -= 150.0
    pair.teacher_N_V[2:, ::3] -= 150.0
    check_token_divergence(pair, DIVERGENCES[name], upstream_of(pair))


@pytest.mark.parametrize(("student_offset", "teacher_offset"), [(2.0**24, 2.0**24), (1e4, -1e4), (-3e38, 3e38)])
@every_class
def test_n4_a_common_offset_changes_nothing(name, student_offset, teacher_offset):
    """Even integers stay exact after adding 2^24 in float32; logits of which all are far below -104 are ordinary ones."""
    generator = torch.Generator().manual_seed(8)
    student, teacher = (2.0 * torch.randint(-4, 5, (2, 3, 150), generator=generator)).to(DEVICE)
    if abs(student_offset) > 1e38:  # beyond which nothing is left of the logits but their offset
        student, teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    expected = fused(LogitPair(student, teacher), DIVERGENCES[name])
    shifted = fused(LogitPair(student + student_offset, teacher + teacher_offset), DIVERGENCES[name])
    for field in ("divergence", "student_entropy", "teacher_entropy", "top1_agreement", "grad_student_logits"):
        torch.testing.assert_close(shifted[field], expected[field], rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("remainder", [0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), GeneralizedJSD(0.5)], ids=repr)
def test_n5_confident_rows_keep_the_true_class_gradient(divergence, remainder):
    """p = 1 - remainder at one id, q = 1 - 3 remainder: the gradient there is within 1 % of the oracle, in float32.

    As a difference of two numbers near 1 it would have no correct digit from remainder = 1e-6 on.
    """
    vocab_size, true_class = 300, 130
    pair = LogitPair(*0.5 * torch.randn(2, 2, vocab_size, generator=torch.Generator().manual_seed(9)).to(DEVICE))
    for logits, rest in zip(pair, (remainder, 3 * remainder), strict=True):
        logits[:, true_class] = -INF
        logits[:, true_class] = logits.logsumexp(-1) + math.log((1 - rest) / rest)
    upstream = upstream_of(pair)
    gradient = evaluate_token_divergence(pair, divergence, upstream, impl=Impl.FUSED)["grad_student_logits"]
    oracle = token_divergence_oracle(pair, divergence, upstream).values["grad_student_logits"]
    relative = (gradient[:, true_class].double() / oracle[:, true_class] - 1).abs()
    assert (relative < 0.01).all(), relative.tolist()


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=str)
@every_class
def test_n8_large_finite_logits(name, dtype):
    """+-6e4: two rows that agree about the winner and one that does not."""
    student, teacher = torch.full((2, 3, 140), -6e4, dtype=dtype, device=DEVICE)
    student[0, 3] = student[1, 139] = student[2, 3] = 6e4
    teacher[0, 3] = teacher[1, 139] = teacher[2, 70] = 6e4
    student[:, 5], teacher[:, 5] = 0.0, -1e4
    results = fused(LogitPair(student, teacher), DIVERGENCES[name])
    assert (results["divergence"][:2].abs() < 1e-6).all()
    assert (results["grad_student_logits"][:2].abs() < 1e-6).all()
    oracle = token_divergence_oracle(
        LogitPair(student, teacher), DIVERGENCES[name], upstream_of(LogitPair(student, teacher))
    )
    torch.testing.assert_close(results["divergence"].double(), oracle.values["divergence"], rtol=1e-6, atol=1e-6)
    assert results["grad_student_logits"].isfinite().all()


def assert_rows_sum_to_zero(pair: LogitPair, gradient: torch.Tensor) -> None:
    """To rounding of the sum in float32; a 16-bit entry is off by half its own last place besides."""
    precision = torch.finfo(gradient.dtype)
    gradient = gradient.double()
    size = gradient.abs().sum(-1)
    own_rounding = 0.5 * precision.eps * (size + gradient.shape[-1] * precision.smallest_normal)
    assert (size > 0).all()
    assert (gradient.sum(-1).abs() <= own_rounding + 1e-6 * upstream_of(pair).abs()).all()


@every_divergence
def test_n9_gradient_rows_sum_to_zero(name):
    pair = logit_pair(3, 515, gap=0.5, seed=10)
    assert_rows_sum_to_zero(pair, fused(pair, DIVERGENCES[name])["grad_student_logits"])


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@every_class
def test_n9_gradient_rows_with_a_stop_event_sum_to_zero(name, dtype):
    pair = logit_pair(3, 515, gap=0.5, seed=10, dtype=dtype)
    assert_rows_sum_to_zero(pair, fused(pair, DIVERGENCES[name], stop_ids=(3, 400))["grad_student_logits"])


def test_a_finite_value_too_large_for_float32_is_infinite_with_gradient_zero():
    student, teacher = torch.tensor([[[0.0, 300.0], [0.0, 1.0]], [[300.0, 0.0], [1.0, 0.0]]], device=DEVICE)
    results = fused(LogitPair(student, teacher), AlphaDivergence(3.0))
    assert results["divergence"][0] == INF and (results["grad_student_logits"][0] == 0).all()
    assert results["divergence"][1].isfinite() and (results["grad_student_logits"][1] != 0).all()


@every_class
def test_equal_sides_have_value_and_gradient_zero(name):
    student, _ = logit_pair(4, 300, seed=11)
    results = fused(LogitPair(student, student), DIVERGENCES[name])
    assert (results["divergence"].abs() < 1e-6).all() and (results["grad_student_logits"].abs() < 1e-6).all()
    assert (results["top1_agreement"] == 1).all()


def test_top1_ties_go_to_the_lowest_id_across_tiles():
    """Ties within a tile of 128 columns, between two of them, and between two tiles of a program (4096 columns)."""
    student, teacher = torch.zeros(2, 4, 4200, device=DEVICE)
    student[0, [5, 90]] = teacher[0, 5] = 3.0
    student[1, [90, 300]] = teacher[1, 90] = 3.0
    student[2, [90, 4150]] = teacher[2, 4150] = 3.0
    student[3, [4100, 4150]] = teacher[3, [4100, 4199]] = 3.0
    results = fused(LogitPair(student, teacher), ReverseKL())
    assert results["top1_agreement"].tolist() == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("stop_ids", [(), (1, 3)], ids=["plain", "stop"])
@every_class
def test_no_mix_of_extreme_logits_makes_nan(name, stop_ids):
    """N2, N3, N8 at once: rows of five logits drawn from the extremes of float32; values as PyTorch gives them."""
    extremes = torch.tensor([0.0, 1.0, -1.0, 1e-30, 50.0, -50.0, 200.0, -200.0, 6e4, -6e4, 3e38, -3e38, -INF, -INF])
    generator = torch.Generator().manual_seed(12)
    student, teacher = extremes[torch.randint(0, len(extremes), (2, 12, 5), generator=generator)].to(DEVICE)
    pair, upstream = LogitPair(student, teacher), torch.ones(12, device=DEVICE)
    results = evaluate_token_divergence(pair, DIVERGENCES[name], upstream, impl=Impl.FUSED, stop_ids=stop_ids)
    assert (results["divergence"] >= -1e-6).all()  # False for NaN
    assert results["grad_student_logits"].isfinite().all()
    assert (results["grad_student_logits"][results["divergence"].isposinf()] == 0).all()
    reference = evaluate_token_divergence(pair, DIVERGENCES[name], upstream, impl=Impl.REFERENCE, stop_ids=stop_ids)
    for field in ("divergence", "student_entropy", "teacher_entropy"):
        # Near the largest number one way of summing may be infinite where another is not.
        actual, expected = (values[field].clamp(max=1e37) for values in (results, reference))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
