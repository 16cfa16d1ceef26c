"""Does topk_divergence refuse wrong arguments with an error that names argument, need and value?

python -m pytest tests/kernels/test_topk_divergence_arguments.py
"""

import pytest
import torch

from esr_kernels.divergence import (
    AlphaDivergence,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from esr_kernels.impl import Impl
from esr_kernels.topk_divergence import topk_divergence

GOOD = {
    "student_hidden_N_D": torch.zeros(4, 3),
    "student_head": torch.zeros(10, 3),
    "teacher_ids_N_K": torch.arange(2).expand(4, -1),
    "teacher_logprobs_N_K": torch.full((4, 2), -1.0),
    "impl": Impl.REFERENCE,
}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"student_head": "lm_head"}, TypeError, r"student_head must be an OutputHead or a weight tensor .*, got str"),
        (
            {"student_head": torch.zeros(10, 4)},
            ValueError,
            r"student_head\.weight must have shape \(V, D\) = \(V, 3\), got \(10, 4\)",
        ),
        (
            {"teacher_ids_N_K": torch.zeros(4, 2)},
            TypeError,
            r"teacher_ids_N_K must have dtype int32, int64, got float32",
        ),
        (
            {"teacher_ids_N_K": torch.zeros(5, 2, dtype=torch.int64)},
            ValueError,
            r"teacher_ids_N_K must have shape \(N, K\) = \(4, K\), got \(5, 2\)",
        ),
        (
            {"teacher_logprobs_N_K": torch.zeros(4, 3)},
            ValueError,
            r"teacher_logprobs_N_K must have shape \(N, K\) = \(4, 2\), got \(4, 3\)",
        ),
        (
            {"teacher_logprobs_N_K": torch.zeros(4, 2, dtype=torch.int64)},
            TypeError,
            r"teacher_logprobs_N_K must have dtype .*, got int64",
        ),
        (
            {"teacher_logprobs_N_K": torch.zeros(4, 2, requires_grad=True)},
            ValueError,
            r"teacher_logprobs_N_K must not require grad \(the teacher is frozen\)",
        ),
        (
            {"teacher_ids_N_K": torch.zeros(4, 0, dtype=torch.int64), "teacher_logprobs_N_K": torch.zeros(4, 0)},
            ValueError,
            r"teacher_ids_N_K must have K >= 1 ids per row, got 0",
        ),
        (
            {
                "teacher_ids_N_K": torch.zeros(4, 1, dtype=torch.int64),
                "teacher_logprobs_N_K": torch.zeros(4, 1),
                "tail_bucket": False,
            },
            ValueError,
            r"tail_bucket must be True for K = 1, got False: .* 0 everywhere",
        ),
        ({"tail_bucket": 1}, TypeError, r"tail_bucket must be a bool, got int"),
        ({"renormalize": None}, TypeError, r"renormalize must be a bool, got NoneType"),
        (
            {"renormalize": False},
            ValueError,
            r"renormalize must be True with tail_bucket=True, got False: .* pass tail_bucket=False for the ids' terms alone",
        ),
        (
            {"teacher_ids_N_K": torch.zeros(4, 2, dtype=torch.int64, device="meta")},
            ValueError,
            r"all tensors must be on one device, got .*teacher_ids_N_K: meta",
        ),
        ({"divergence": ReverseKL}, TypeError, r"divergence must be a value .*, got the class ReverseKL"),
        ({"loss_temperature": float("nan")}, ValueError, r"loss_temperature must be finite and > 0, got nan"),
        ({"impl": None}, ValueError, r"impl must be one of \['fused', 'reference'\], got None"),
        ({"logits": "float16"}, ValueError, r"logits must be one of .*, got 'float16'"),
        ({"workspace_bytes": 0}, ValueError, r"workspace_bytes must be > 0 or None, got 0"),
        ({"workspace_bytes": "1 GB"}, TypeError, r"workspace_bytes must be an int > 0 or None, got str"),
    ],
)
def test_wrong_arguments_raise(changed, error, message):
    with pytest.raises(error, match="topk_divergence: " + message):
        topk_divergence(**{**GOOD, **changed})


TRUNCATED = {"tail_bucket": False, "renormalize": False}


@pytest.mark.parametrize(
    "divergence", [SkewForwardKL(0.1), SkewReverseKL(0.1), TotalVariation(), AlphaDivergence(0.5)], ids=repr
)
def test_a_truncated_sum_is_refused_where_it_is_not_defined(divergence):
    message = r"divergence must be one of ForwardKL, ReverseKL, GeneralizedJSD with renormalize=False, got "
    with pytest.raises(ValueError, match="topk_divergence: " + message + type(divergence).__name__):
        topk_divergence(**GOOD, **TRUNCATED, divergence=divergence)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), GeneralizedJSD(0.2), AlphaDivergence(1)], ids=repr)
def test_a_truncated_sum_of_one_id_is_no_constant_and_legal(divergence):
    """Its student has a uniform distribution over 10 ids, of which one is compared."""
    one_id = {"teacher_ids_N_K": torch.zeros(4, 1).int(), "teacher_logprobs_N_K": torch.full((4, 1), -0.5)}
    output = topk_divergence(**{**GOOD, **one_id}, **TRUNCATED, divergence=divergence)
    assert (output.divergence_N.abs() > 0.01).all()


def test_fused_says_what_it_is_missing(monkeypatch):
    """Neither a CUDA device nor Triton's interpreter; then no Triton. The reference runs all the same."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = r"topk_divergence: impl=Impl\.FUSED needs tensors on a CUDA device, got cpu; .*Impl\.REFERENCE"
    with pytest.raises(NotImplementedError, match=message):
        topk_divergence(**{**GOOD, "impl": Impl.FUSED})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("esr_kernels.impl.find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"topk_divergence: .*needs Triton, .*Impl\.REFERENCE"):
        topk_divergence(**{**GOOD, "impl": Impl.FUSED})
    assert topk_divergence(**GOOD).divergence_N.shape == (4,)
