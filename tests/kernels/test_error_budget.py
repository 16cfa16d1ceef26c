"""Does the error budget find a kernel that is worse than PyTorch, and do the named cases cover the family?

python -m pytest tests/kernels/test_error_budget.py
"""

import math

import pytest
import torch

import esr_kernels
from esr_kernels import Divergence, ForwardKL, Impl, ReverseKL
from esr_kernels.testing.cases import DIVERGENCES, MODEL_SHAPES, ONE_OF_EACH_CLASS, SMALL_SHAPES
from esr_kernels.testing.error_budget import check_error, check_results, relative_error_in_norm
from esr_kernels.testing.inputs import make_linear_inputs, make_logit_pair, make_upstream
from esr_kernels.testing.oracle import (
    converted,
    evaluate_linear_divergence,
    evaluate_token_divergence,
    linear_divergence_oracle,
    token_divergence_oracle,
)

NAN, INF = math.nan, math.inf
ORACLE = torch.tensor([[1.0, -2.0, 4.0], [0.0, 8.0, -1.0]], dtype=torch.float64)


def check_planted(actual, *, oracle=ORACLE, same_dtype=None, bound=0.0):
    same_dtype = oracle.float() if same_dtype is None else same_dtype
    check_error("grad", actual.float(), oracle=oracle, same_dtype=same_dtype, bound=bound)


def shifted(index: tuple[int, int], by: float) -> torch.Tensor:
    changed = ORACLE.clone()
    changed[index] += by
    return changed


def test_equal_results_pass_with_no_bound():
    check_planted(ORACLE)


def test_one_wrong_element_is_found_by_the_maximum():
    """0.25 at one of six: the mean, 0.042, is within a bound of 0.1; the maximum is not."""
    message = (
        r"grad: largest error 0\.25 exceeds the budget 0\.1 = 0 \(PyTorch at the same dtype\) \+ 0\.1 \(bound\); "
        r"at \(1, 1\): actual 8\.25, oracle 8, PyTorch 8"
    )
    with pytest.raises(AssertionError, match=message):
        check_planted(shifted((1, 1), 0.25), bound=0.1)
    check_planted(shifted((1, 1), 0.25), bound=0.25)


def test_a_bias_of_all_elements_is_found_by_the_mean():
    """PyTorch errs by 0.5 at one element; 0.25 everywhere passes the maximum but not the mean."""
    with pytest.raises(AssertionError, match=r"grad: mean error 0\.25 exceeds the budget 0\.0833 = 0\.0833"):
        check_planted(ORACLE + 0.25, same_dtype=shifted((0, 0), 0.5).float())


def test_what_pytorch_errs_by_is_allowed():
    check_planted(shifted((1, 2), -0.5), same_dtype=shifted((0, 0), 0.5).float())


def test_a_bound_per_element_allows_its_maximum_and_its_mean():
    bound = torch.zeros(2, 3)
    bound[0, 0] = 0.6
    check_planted(shifted((1, 2), 0.5), bound=bound)
    with pytest.raises(AssertionError, match=r"mean error 0\.5 exceeds the budget 0\.1 "):
        check_planted(ORACLE + 0.5, bound=bound)


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_a_value_that_is_not_finite_is_found(wrong):
    with pytest.raises(AssertionError, match=r"largest error inf .* at \(0, 2\)"):
        check_planted(shifted((0, 2), wrong), bound=1e30)


@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_a_value_of_the_oracle_that_is_not_finite_must_be_met_exactly(special):
    oracle = shifted((0, 2), special)
    check_planted(oracle, oracle=oracle)
    for wrong in {NAN, INF, -INF, 7.0} - {special}:
        with pytest.raises(AssertionError, match=r"at \(0, 2\)"):
            check_planted(shifted((0, 2), wrong), oracle=oracle, bound=1e30)


def test_pytorch_failing_does_not_excuse_the_kernel():
    with pytest.raises(AssertionError, match=r"at \(0, 1\): actual -1\.5, oracle -2, PyTorch inf"):
        check_planted(shifted((0, 1), 0.5), same_dtype=shifted((0, 1), INF).float())


def test_shape_and_dtype_must_agree():
    with pytest.raises(AssertionError, match=r"grad: shape \(3,\), oracle \(2, 3\)"):
        check_planted(ORACLE[0])
    with pytest.raises(AssertionError, match=r"grad: dtype torch\.float32, PyTorch gives torch\.bfloat16"):
        check_planted(ORACLE, same_dtype=ORACLE.bfloat16())


def test_an_empty_result_has_no_error():
    check_planted(ORACLE[:0], oracle=ORACLE[:0])


def test_relative_error_in_norm():
    assert relative_error_in_norm(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error_in_norm(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error_in_norm(torch.ones(2), torch.zeros(2)) == INF
    assert math.isnan(relative_error_in_norm(torch.tensor([NAN, 1.0]), torch.ones(2)))


def token_results(dtype, *, gap=0.5, changed=lambda pair: pair):
    """A call in `dtype` on inputs that `changed` may have spoilt, its oracle, and PyTorch on the true inputs."""
    pair, upstream = make_logit_pair(9, 257, gap=gap, seed=1, dtype=dtype), make_upstream(9, seed=2)
    ids = torch.arange(9) * 11
    options = {"token_ids_N": ids, "loss_temperature": 1.5, "stop_ids": (3, 99)}
    oracle = token_divergence_oracle(pair, ReverseKL(), upstream, **options)
    same = evaluate_token_divergence(pair, ReverseKL(), upstream, impl=Impl.REFERENCE, **options)
    actual = evaluate_token_divergence(changed(pair), ReverseKL(), upstream, impl=Impl.REFERENCE, **options)
    return actual, oracle, same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_of_another_float32_arithmetic_pass(dtype):
    """Both sides' columns in another order: every sum of the softmaxes rounds differently."""
    order = torch.randperm(257, generator=torch.Generator().manual_seed(0))
    pair, upstream = make_logit_pair(9, 257, gap=0.05, seed=1, dtype=dtype), make_upstream(9, seed=2)
    oracle = token_divergence_oracle(pair, ReverseKL(), upstream)
    same = evaluate_token_divergence(pair, ReverseKL(), upstream, impl=Impl.REFERENCE)
    permuted = type(pair)(*(logits[:, order] for logits in pair))
    actual = evaluate_token_divergence(permuted, ReverseKL(), upstream, impl=Impl.REFERENCE)
    actual["grad_student_logits"] = actual["grad_student_logits"][:, order.argsort()]
    assert not torch.equal(actual["divergence"], same["divergence"])
    check_results(actual, oracle=oracle, same_dtype=same)


def test_logits_rounded_to_bfloat16_are_found():
    """The peers' storage of logits, with float32 inputs and an ordinary gap."""
    spoilt = token_results(
        torch.float32, changed=lambda pair: converted(converted(pair, torch.bfloat16), torch.float32)
    )
    actual, oracle, same = spoilt
    with pytest.raises(AssertionError, match="divergence: largest error"):
        check_results(actual, oracle=oracle, same_dtype=same)


@pytest.mark.parametrize("name", ["student_entropy", "teacher_logprob", "grad_student_logits"])
def test_a_relative_error_of_1e_5_of_one_result_is_found(name):
    actual, oracle, same = token_results(torch.float32)
    check_results(actual, oracle=oracle, same_dtype=same)
    actual[name] = actual[name] * (1 + 1e-5)
    with pytest.raises(AssertionError, match=f"^{name}: "):
        check_results(actual, oracle=oracle, same_dtype=same)


def test_one_flipped_agreement_and_a_missing_result_are_found():
    actual, oracle, same = token_results(torch.float32)
    actual["top1_agreement"][4] = 1 - actual["top1_agreement"][4]
    with pytest.raises(AssertionError, match=r"top1_agreement: largest error 1 exceeds the budget 0 .* at \(4,\)"):
        check_results(actual, oracle=oracle, same_dtype=same)
    del actual["top1_agreement"]
    with pytest.raises(AssertionError, match="results differ in name"):
        check_results(actual, oracle=oracle, same_dtype=same)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_gradient_has_a_bar_in_norm(dtype):
    """Rows that lose 0.4 % of their length at random keep the largest element: PyTorch's own rounding hides it."""
    shape, upstream = SMALL_SHAPES["odd-vocab"], make_upstream(5, seed=3)
    inputs = make_linear_inputs(shape, seed=4, dtype=dtype, has_bias=True)
    oracle = linear_divergence_oracle(inputs, ForwardKL(), upstream)
    same = evaluate_linear_divergence(inputs, ForwardKL(), upstream, impl=Impl.REFERENCE)
    check_results(same, oracle=oracle, same_dtype=same)
    spoilt = same["grad_student_weight"].double()
    spoilt = spoilt * (1 + 4e-3 * torch.randn(spoilt.shape, generator=torch.Generator().manual_seed(5)))
    actual = same | {"grad_student_weight": spoilt.to(dtype)}
    with pytest.raises(AssertionError, match=r"grad_student_weight: "):
        check_results(actual, oracle=oracle, same_dtype=same)


def test_oracle_is_float64_on_the_rounded_inputs():
    inputs = make_linear_inputs(SMALL_SHAPES["one-row"], dtype=torch.bfloat16, has_bias=True, softcap=9.0)
    oracle = linear_divergence_oracle(inputs, ReverseKL(), make_upstream(1))
    assert {value.dtype for value in oracle.values.values()} == {torch.float64}
    exact = converted(inputs, torch.float64)
    assert torch.equal(exact.student_head.weight.bfloat16(), inputs.student_head.weight)
    assert exact.student_head.softcap == 9.0 and exact.student_head.bias.dtype == torch.float64


@pytest.mark.parametrize("trained", [(), ("student_hidden",), ("student_weight", "student_bias")])
def test_frozen_tensors_have_no_result(trained):
    inputs = make_linear_inputs(SMALL_SHAPES["below-a-tile"], has_bias=True)
    results = evaluate_linear_divergence(inputs, ReverseKL(), make_upstream(4), impl=Impl.REFERENCE, trained=trained)
    assert [name for name in results if name.startswith("grad_")] == [f"grad_{name}" for name in trained]


def test_every_divergence_has_a_case():
    family = {
        value for value in vars(esr_kernels).values() if isinstance(value, type) and issubclass(value, Divergence)
    }
    family.remove(Divergence)
    assert {type(divergence) for divergence in DIVERGENCES.values()} == family
    assert sorted(type(divergence).__name__ for divergence in ONE_OF_EACH_CLASS.values()) == sorted(
        divergence.__name__ for divergence in family
    )


def test_every_shape_suits_the_inputs():
    for name, shape in {**SMALL_SHAPES, **MODEL_SHAPES}.items():
        assert shape.teacher_size > shape.student_size, name
    assert SMALL_SHAPES["empty"].rows == 0 and SMALL_SHAPES["qwen3-scaled"].vocab_size % 128 == 0
    for name in ("ragged", "odd-vocab", "below-a-tile", "one-row"):
        assert SMALL_SHAPES[name].vocab_size % 128, name


def test_upstream_gradients_are_seeded_and_never_one():
    upstream = make_upstream(64, seed=1)
    assert torch.equal(upstream, make_upstream(64, seed=1)) and not torch.equal(upstream, make_upstream(64, seed=2))
    assert (upstream != 1).all() and (upstream < 0).any() and (upstream > 0).any()
