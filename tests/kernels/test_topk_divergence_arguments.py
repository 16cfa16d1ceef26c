"""Does topk_divergence refuse wrong arguments with an error that names argument, need and value?

python -m pytest tests/kernels/test_topk_divergence_arguments.py
"""

import pytest
import torch

from esr_kernels.divergence import ReverseKL
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
        (
            {"teacher_ids_N_K": torch.zeros(4, 2, dtype=torch.int64, device="meta")},
            ValueError,
            r"all tensors must be on one device, got .*teacher_ids_N_K: meta",
        ),
        ({"divergence": ReverseKL}, TypeError, r"divergence must be a value .*, got the class ReverseKL"),
        ({"loss_temperature": float("nan")}, ValueError, r"loss_temperature must be finite and > 0, got nan"),
        ({"impl": None}, ValueError, r"impl must be one of \['fused', 'reference'\], got None"),
    ],
)
def test_wrong_arguments_raise(changed, error, message):
    with pytest.raises(error, match="topk_divergence: " + message):
        topk_divergence(**{**GOOD, **changed})
