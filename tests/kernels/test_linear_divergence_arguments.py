"""Does linear_divergence refuse wrong arguments with an error that names argument, need and value?

python -m pytest tests/kernels/test_linear_divergence_arguments.py
"""

import pytest
import torch

from esr_kernels.impl import Impl
from esr_kernels.linear_divergence import linear_divergence
from esr_kernels.output_head import OutputHead

GOOD = {
    "student_hidden_N_D": torch.zeros(4, 3),
    "student_head": torch.zeros(10, 3),
    "teacher_hidden_N_E": torch.zeros(4, 5),
    "teacher_head": torch.zeros(10, 5),
    "impl": Impl.REFERENCE,
}


def trainable(*shape):
    return torch.zeros(*shape, requires_grad=True)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"student_head": torch.nn.Linear(3, 10)},
            TypeError,
            r"student_head must be an OutputHead or a weight tensor \(V, hidden\), got Linear",
        ),
        ({"teacher_head": None}, TypeError, r"teacher_head must be an OutputHead or .* got NoneType"),
        (
            {"student_head": torch.zeros(10, 5)},
            ValueError,
            r"student_head\.weight must have shape \(V, D\) = \(V, 3\), got \(10, 5\)",
        ),
        (
            {"teacher_head": OutputHead(torch.zeros(10, 3))},
            ValueError,
            r"teacher_head\.weight must have shape \(V, E\) = \(V, 5\), got \(10, 3\)",
        ),
        (
            {"teacher_hidden_N_E": torch.zeros(6, 5)},
            ValueError,
            r"teacher_hidden_N_E must have shape \(N, E\) = \(4, E\), got \(6, 5\)",
        ),
        (
            {"student_hidden_N_D": torch.zeros(4, 3, dtype=torch.int32)},
            TypeError,
            r"student_hidden_N_D must have dtype .*, got int32",
        ),
        (
            {"teacher_head": torch.zeros(12, 5)},
            ValueError,
            r"student and teacher must have equal vocabularies, got 10 and 12; pass vocab_size=",
        ),
        ({"vocab_size": 11}, ValueError, r"vocab_size must be in \[1, 10\] .*, got 11"),
        ({"teacher_hidden_N_E": trainable(4, 5)}, ValueError, r"teacher_hidden_N_E must not require grad"),
        ({"teacher_head": trainable(10, 5)}, ValueError, r"teacher_head\.weight must not require grad"),
        (
            {"teacher_head": OutputHead(torch.zeros(10, 5), bias=trainable(10))},
            ValueError,
            r"teacher_head\.bias must not require grad",
        ),
        (
            {"student_head": OutputHead(torch.zeros(10, 3), bias=torch.zeros(10, device="meta"))},
            ValueError,
            r"all tensors must be on one device, got .*student_head\.bias: meta",
        ),
        ({"token_ids_N": torch.zeros(5, dtype=torch.int32)}, ValueError, r"token_ids_N must have shape \(N\) = \(4\)"),
        ({"divergence": 1}, TypeError, r"divergence must be a value such as ReverseKL\(\), got 1"),
        ({"loss_temperature": -1}, ValueError, r"loss_temperature must be finite and > 0, got -1"),
        ({"stop_ids": (1, -1)}, ValueError, r"stop_ids must be in \[0, 10\), got -1"),
        (
            {"logits": "bfloat16"},
            ValueError,
            r"logits must be one of \['auto', 'float32', 'tile_relative_fp16'\], got 'bfloat16'",
        ),
        ({"workspace_bytes": 0}, ValueError, r"workspace_bytes must be > 0 or None, got 0"),
        ({"workspace_bytes": 1e9}, TypeError, r"workspace_bytes must be an int > 0 or None, got float"),
        ({"workspace_bytes": True}, TypeError, r"workspace_bytes must be an int > 0 or None, got bool"),
        ({"impl": "liger"}, ValueError, r"impl must be one of \['fused', 'reference'\], got 'liger'"),
    ],
)
def test_wrong_arguments_raise(changed, error, message):
    with pytest.raises(error, match="linear_divergence: " + message):
        linear_divergence(**{**GOOD, **changed})


@pytest.mark.parametrize("option", [{"logits": "bfloat16"}, {"workspace_bytes": 0}, {"stop_ids": [10]}])
def test_arguments_are_checked_before_the_implementation(option):
    with pytest.raises(ValueError, match="|".join(option)):
        linear_divergence(**{**GOOD, "impl": Impl.FUSED, **option})


def test_fused_is_the_default_and_says_how_to_get_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {name: value for name, value in GOOD.items() if name != "impl"}
    with pytest.raises(
        NotImplementedError,
        match=r"linear_divergence: .* needs tensors on a CUDA device, got cpu.*impl=Impl\.REFERENCE",
    ):
        linear_divergence(**arguments)


def test_a_storage_may_be_named_by_its_value():
    output = linear_divergence(**GOOD, logits="float32")
    assert output.divergence_N.tolist() == [0.0] * 4
