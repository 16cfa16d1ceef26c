"""Is the kernel of token_divergence within the error budget, for every divergence, dtype, vocabulary and layout?

python -m pytest tests/kernels/test_fused_token_divergence.py
"""

import math

import pytest
import torch

from esr_kernels import ForwardKL, GeneralizedJSD, Impl, ReverseKL, token_divergence
from esr_kernels.testing.cases import DIVERGENCES, ONE_OF_EACH_CLASS, SMALL_SHAPES
from esr_kernels.testing.error_budget import check_token_divergence
from esr_kernels.testing.inputs import LogitPair, make_logit_pair, make_upstream
from esr_kernels.testing.oracle import converted, evaluate_token_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def logit_pair(rows, vocab_size, **options) -> LogitPair:
    return converted(make_logit_pair(rows, vocab_size, **options), DEVICE)


def upstream_of(pair: LogitPair, seed: int = 0) -> torch.Tensor:
    return make_upstream(len(pair.student_N_V), seed=seed, device=DEVICE)


def fused(pair: LogitPair, divergence=ReverseKL(), **options):  # noqa: B008 (a frozen value)
    return evaluate_token_divergence(pair, divergence, upstream_of(pair), impl=Impl.FUSED, **options)


def assert_same(first, second) -> None:
    """Bit by bit, NaN included."""
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} differs")


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence(name, dtype):
    """With a temperature, token ids and a stop event of three ids, one of them the first."""
    pair = logit_pair(4, 643, gap=1.0, seed=1, dtype=dtype)
    ids = torch.tensor([5, 642, -100, 7], device=DEVICE)
    options = {"token_ids_N": ids, "stop_ids": (0, 5, 300), "loss_temperature": 0.7}
    check_token_divergence(pair, DIVERGENCES[name], upstream_of(pair), **options)


@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_every_class_in_float16(name):
    pair = logit_pair(4, 643, gap=1.0, seed=2, dtype=FLOAT16)
    check_token_divergence(pair, DIVERGENCES[name], upstream_of(pair))


@pytest.mark.parametrize("gap", [0.05, 0.5])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_n1_near_equal_models(name, dtype, gap):
    """Divergences of 5e-4 and 0.05 nats: float32 arithmetic loses nothing that PyTorch in float32 keeps."""
    pair = logit_pair(6, 1000, gap=gap, seed=3, dtype=dtype)
    results = check_token_divergence(pair, DIVERGENCES[name], upstream_of(pair))
    assert results["divergence"].mean() < (0.002 if gap == 0.05 else 0.2)


@pytest.mark.parametrize("vocab_size", [1, 2, 67, 127, 128, 129, 1024, 1025, 1664, 4096, 4097, 5003])
@pytest.mark.parametrize("divergence", [ReverseKL(), GeneralizedJSD(0.5)], ids=repr)
def test_s1_vocabulary_sizes(divergence, vocab_size):
    """Around a tile of 128 columns, around a program's tile of 4096, multiples of 128 and of nothing."""
    pair = logit_pair(3, vocab_size, gap=1.0, seed=4)
    ids = torch.tensor([0, vocab_size - 1, vocab_size // 2], device=DEVICE)
    check_token_divergence(pair, divergence, upstream_of(pair), token_ids_N=ids)


@pytest.mark.parametrize("shape", ["odd-vocab", "qwen3-scaled"])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_s1_several_tiles_with_a_stop_event_over_them(shape, dtype):
    rows, vocab_size = SMALL_SHAPES[shape].rows, SMALL_SHAPES[shape].vocab_size
    pair = logit_pair(rows, vocab_size, gap=0.5, seed=5, dtype=dtype)
    options = {"stop_ids": (1, 4000, vocab_size - 1), "loss_temperature": 2.0}
    for divergence in (ForwardKL(), DIVERGENCES["skew_reverse_0.1"]):
        check_token_divergence(pair, divergence, upstream_of(pair), **options)


@pytest.mark.parametrize("student_dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("teacher_dtype", [FLOAT32, BFLOAT16], ids=str)
def test_the_two_sides_may_differ_in_dtype(student_dtype, teacher_dtype):
    student, teacher = logit_pair(3, 200, gap=0.5, seed=6)
    results = check_token_divergence(
        LogitPair(student.to(student_dtype), teacher.to(teacher_dtype)), ReverseKL(), make_upstream(3, device=DEVICE)
    )
    assert results["grad_student_logits"].dtype == student_dtype
    assert results["divergence"].dtype == FLOAT32


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5", "alpha_0.3"])
def test_n6_exactly_representable_logits_give_one_loss_in_every_dtype(name):
    """Multiples of 1/4 below 16 are exact in all three; the gradients agree too, but for their own rounding."""
    generator = torch.Generator().manual_seed(7)
    student, teacher = torch.randint(-60, 61, (2, 4, 333), generator=generator).to(DEVICE) / 4
    exact = fused(LogitPair(student, teacher), DIVERGENCES[name], stop_ids=(3, 8))
    for dtype in (FLOAT16, BFLOAT16):
        rounded = fused(LogitPair(student.to(dtype), teacher.to(dtype)), DIVERGENCES[name], stop_ids=(3, 8))
        expected = exact | {"grad_student_logits": exact["grad_student_logits"].to(dtype)}
        assert_same(rounded, expected)


@pytest.mark.parametrize("rows", [0, 1, 9, 37])
def test_s3_any_number_of_rows(rows):
    pair = logit_pair(rows, 130, seed=8)
    results = check_token_divergence(pair, ReverseKL(), upstream_of(pair))
    assert results["divergence"].shape == (rows,) and results["grad_student_logits"].shape == (rows, 130)


def test_a_row_does_not_depend_on_its_neighbours():
    pair = logit_pair(7, 300, seed=9)
    whole = fused(pair, GeneralizedJSD(0.5))
    for row in (0, 3, 6):
        rows = slice(row, row + 1)
        alone = evaluate_token_divergence(
            LogitPair(pair.student_N_V[rows], pair.teacher_N_V[rows]),
            GeneralizedJSD(0.5),
            upstream_of(pair)[rows],
            impl=Impl.FUSED,
        )
        assert_same(alone, {name: value[rows] for name, value in whole.items()})


@pytest.mark.parametrize("teacher_vocab_size", [260, 300])
@pytest.mark.parametrize("name", ["reverse_kl", "jsd_0.5"])
def test_s4_unequal_vocabularies_meet_at_their_intersection(name, teacher_vocab_size):
    """Nothing is padded and nothing beyond the cut is read: NaN there changes no result, and its gradient is 0."""
    student, teacher = logit_pair(4, 300, gap=1.0, seed=10)
    student[:, 260:], teacher[:, 260:] = NAN, NAN
    pair = LogitPair(student, teacher[:, :teacher_vocab_size])
    cut = fused(LogitPair(student[:, :260].contiguous(), teacher[:, :260].contiguous()), DIVERGENCES[name])
    whole = fused(pair, DIVERGENCES[name], vocab_size=260)
    gradient = whole.pop("grad_student_logits")
    assert torch.equal(gradient[:, :260], cut.pop("grad_student_logits"))
    assert (gradient[:, 260:] == 0).all()
    assert_same(whole, cut)
    assert_same(fused(pair, DIVERGENCES[name], vocab_size=260), whole | {"grad_student_logits": gradient})


def test_s4_ids_beyond_the_cut_are_outside_the_vocabulary():
    pair = logit_pair(3, 300, seed=11)
    ids = torch.tensor([259, 260, 299], device=DEVICE)
    results = fused(pair, token_ids_N=ids, vocab_size=260)
    assert results["student_logprob"].isnan().tolist() == [False, True, True]
    assert results["teacher_logprob"].isnan().tolist() == [False, True, True]


LAYOUTS = {
    "rows of a wider tensor": lambda x: wider(x)[:, 3 : 3 + x.shape[1]],
    "every second row": lambda x: wider(x.repeat_interleave(2, dim=0))[::2, 3 : 3 + x.shape[1]],
    "every second column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "transposed": lambda x: x.T.contiguous().T,
    "one row for all": lambda x: x[:1].expand(x.shape),
}


def wider(x: torch.Tensor) -> torch.Tensor:
    """x in the middle of a tensor of NaN."""
    surrounded = x.new_full((x.shape[0], x.shape[1] + 8), NAN)
    surrounded[:, 3 : 3 + x.shape[1]] = x
    return surrounded


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_s2_strided_inputs_give_the_same_result(layout, dtype):
    """S2 in small: non-contiguous and row-strided inputs, read where they are, with NaN around them."""
    pair = LogitPair(*map(LAYOUTS[layout], logit_pair(4, 301, seed=12, dtype=dtype)))
    assert not pair.student_N_V.is_contiguous()
    contiguous = LogitPair(*(logits.contiguous() for logits in pair))
    assert_same(fused(pair, stop_ids=(2, 77)), fused(contiguous, stop_ids=(2, 77)))


def test_s2_a_broadcast_upstream_gradient():
    """sum().backward() passes one number expanded to N rows, with stride 0."""
    pair = logit_pair(5, 150, seed=13)
    student = pair.student_N_V.requires_grad_()
    divergence_N = token_divergence(student, pair.teacher_N_V).divergence_N
    (of_sum,) = torch.autograd.grad(divergence_N.sum(), student, retain_graph=True)
    (of_ones,) = torch.autograd.grad(divergence_N, student, torch.ones(5, device=DEVICE))
    assert torch.equal(of_sum, of_ones) and (of_sum != 0).any()


def test_x7_inputs_are_not_written_to():
    pair = logit_pair(4, 5003, seed=14)
    ids = torch.tensor([1, 2, 3, 4], device=DEVICE)
    before = [tensor.clone() for tensor in (*pair, ids)]
    fused(pair, GeneralizedJSD(0.5), token_ids_N=ids, stop_ids=(3, 9))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((*pair, ids), before, strict=True))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.9", "total_variation"])
def test_g6_temperature_divides_the_logits_and_nothing_else(name, temperature):
    """The gradient carries 1 / T, no T squared: the oracle is checked against the formula elsewhere, and once here."""
    pair = logit_pair(3, 130, gap=1.0, seed=15)
    results = check_token_divergence(pair, DIVERGENCES[name], upstream_of(pair), loss_temperature=temperature)
    scaled = fused(LogitPair(*(logits / temperature for logits in pair)), DIVERGENCES[name])
    torch.testing.assert_close(results["divergence"], scaled["divergence"], rtol=1e-5, atol=1e-6)
    expected = scaled["grad_student_logits"] / temperature
    torch.testing.assert_close(results["grad_student_logits"], expected, rtol=1e-4, atol=3e-6 / temperature)
