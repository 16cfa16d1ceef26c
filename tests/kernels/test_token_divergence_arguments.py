"""Does token_divergence refuse wrong arguments with an error that names argument, need and value?

python -m pytest tests/kernels/test_token_divergence_arguments.py
"""

import pytest
import torch

from esr_kernels.divergence import ReverseKL
from esr_kernels.impl import Impl
from esr_kernels.token_divergence import token_divergence

GOOD = {"student_logits_N_V": torch.zeros(4, 10), "teacher_logits_N_V": torch.zeros(4, 10), "impl": Impl.REFERENCE}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"student_logits_N_V": [[0.0]]}, TypeError, r"student_logits_N_V must be a tensor \(N V\), got list"),
        (
            {"student_logits_N_V": torch.zeros(4, 10, dtype=torch.int64)},
            TypeError,
            r"student_logits_N_V must have dtype bfloat16, float16, float32, float64, got int64",
        ),
        (
            {"student_logits_N_V": torch.zeros(2, 2, 10)},
            ValueError,
            r"student_logits_N_V must have shape \(N, V\) = \(N, V\), got \(2, 2, 10\)",
        ),
        (
            {"teacher_logits_N_V": torch.zeros(5, 10)},
            ValueError,
            r"teacher_logits_N_V must have shape \(N, V\) = \(4, V\), got \(5, 10\)",
        ),
        (
            {"teacher_logits_N_V": torch.zeros(4, 12)},
            ValueError,
            r"student and teacher must have equal vocabularies, got 10 and 12; pass vocab_size= .* \(at most 10\)",
        ),
        (
            {"teacher_logits_N_V": torch.zeros(4, 12), "vocab_size": 11},
            ValueError,
            r"vocab_size must be in \[1, 10\] \(student has 10 ids, teacher 12\), got 11",
        ),
        ({"vocab_size": 0}, ValueError, r"vocab_size must be in \[1, 10\] .*, got 0"),
        ({"vocab_size": 8.0}, TypeError, r"vocab_size must be an int or None, got float"),
        ({"vocab_size": True}, TypeError, r"vocab_size must be an int or None, got bool"),
        (
            {"teacher_logits_N_V": torch.zeros(4, 10, requires_grad=True)},
            ValueError,
            r"teacher_logits_N_V must not require grad \(the teacher is frozen\)",
        ),
        (
            {"teacher_logits_N_V": torch.zeros(4, 10, device="meta")},
            ValueError,
            r"all tensors must be on one device, got student_logits_N_V: cpu, teacher_logits_N_V: meta",
        ),
        ({"token_ids_N": torch.zeros(3, dtype=torch.int64)}, ValueError, r"token_ids_N must have shape \(N\) = \(4\)"),
        ({"token_ids_N": torch.zeros(4)}, TypeError, r"token_ids_N must have dtype int32, int64, got float32"),
        (
            {"divergence": "reverse_kl"},
            TypeError,
            r"divergence must be a value such as ReverseKL\(\), got 'reverse_kl'",
        ),
        ({"loss_temperature": 0.0}, ValueError, r"loss_temperature must be finite and > 0, got 0\.0"),
        ({"loss_temperature": float("inf")}, ValueError, r"loss_temperature must be finite and > 0, got inf"),
        ({"loss_temperature": "1"}, TypeError, r"loss_temperature must be a number > 0, got str"),
        ({"stop_ids": [10]}, ValueError, r"stop_ids must be in \[0, 10\), got 10"),
        ({"stop_ids": [3, 9], "vocab_size": 9}, ValueError, r"stop_ids must be in \[0, 9\), got 9"),
        ({"stop_ids": 3}, TypeError, r"stop_ids must be an iterable of ints, got int"),
        ({"stop_ids": [1.0]}, TypeError, r"stop_ids must hold ints, got float"),
        ({"impl": "triton"}, ValueError, r"impl must be one of \['fused', 'reference'\], got 'triton'"),
    ],
)
def test_wrong_arguments_raise(changed, error, message):
    with pytest.raises(error, match="token_divergence: " + message):
        token_divergence(**{**GOOD, **changed})


def test_fused_is_the_default_and_says_how_to_get_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        NotImplementedError, match=r"token_divergence: .* needs tensors on a CUDA device, got cpu.*impl=Impl\.REFERENCE"
    ):
        token_divergence(GOOD["student_logits_N_V"], GOOD["teacher_logits_N_V"], ReverseKL())


def test_fused_refuses_float64():
    doubles = {name: GOOD[name].double() for name in ("student_logits_N_V", "teacher_logits_N_V")}
    with pytest.raises(
        TypeError, match=r"token_divergence: student_logits_N_V must have dtype .* got float64; .*REFERENCE"
    ):
        token_divergence(**doubles)


def test_arguments_are_checked_before_the_implementation():
    with pytest.raises(ValueError, match="loss_temperature"):
        token_divergence(**{**GOOD, "impl": Impl.FUSED, "loss_temperature": -1.0})


def test_g7_a_frozen_teacher_computed_by_a_graph_is_refused_even_without_grad_mode():
    weight = torch.ones(10, requires_grad=True)
    teacher = torch.zeros(4, 10) + weight
    with torch.no_grad(), pytest.raises(ValueError, match="teacher_logits_N_V must not require grad .* detach it"):
        token_divergence(**{**GOOD, "teacher_logits_N_V": teacher})
    output = token_divergence(**{**GOOD, "teacher_logits_N_V": teacher.detach()})
    assert not output.divergence_N.requires_grad


def test_an_unknown_option_raises():
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        token_divergence(**GOOD, temperature=2.0)
