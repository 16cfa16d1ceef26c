"""Do the fused ops refuse what they cannot run, and say what is needed and how to get the reference?

python -m pytest tests/kernels/test_fused_errors.py
"""

import os
import subprocess
import sys

import pytest
import torch

from esr_kernels import Divergence, Impl, OutputHead, ReverseKL, linear_divergence, token_divergence

LOGITS = {"student_logits_N_V": torch.zeros(4, 10), "teacher_logits_N_V": torch.zeros(4, 10)}
HIDDEN = {
    "student_hidden_N_D": torch.zeros(4, 3),
    "student_head": torch.zeros(10, 3),
    "teacher_hidden_N_E": torch.zeros(4, 5),
    "teacher_head": torch.zeros(10, 5),
}
FLOAT64 = torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"student_logits_N_V": torch.zeros(4, 10, dtype=FLOAT64)},
            TypeError,
            r"student_logits_N_V must have dtype bfloat16, float16 or float32 .*, got float64; .*impl=Impl\.REFERENCE",
        ),
        (
            {"teacher_logits_N_V": torch.zeros(4, 10, dtype=FLOAT64)},
            TypeError,
            r"teacher_logits_N_V must have dtype .*, got float64; .*impl=Impl\.REFERENCE",
        ),
        (
            {"teacher_logits_N_V": torch.zeros(4, 10, dtype=torch.int64)},
            TypeError,
            r"teacher_logits_N_V must have dtype bfloat16, float16, float32, float64, got int64",
        ),
        (
            {"teacher_logits_N_V": torch.zeros(4, 12)},
            ValueError,
            r"student and teacher must have equal vocabularies, got 10 and 12; pass vocab_size=",
        ),
        (
            {"teacher_logits_N_V": torch.zeros(5, 10)},
            ValueError,
            r"teacher_logits_N_V must have shape \(N, V\) = \(4, V\), got \(5, 10\)",
        ),
        (
            {"teacher_logits_N_V": torch.zeros(4, 10, requires_grad=True)},
            ValueError,
            r"teacher_logits_N_V must not require grad \(the teacher is frozen\).*; detach it",
        ),
        (
            {"teacher_logits_N_V": torch.zeros(4, 10, device="meta")},
            ValueError,
            r"all tensors must be on one device, got student_logits_N_V: cpu, teacher_logits_N_V: meta",
        ),
        ({"stop_ids": [10]}, ValueError, r"stop_ids must be in \[0, 10\), got 10"),
        ({"loss_temperature": 0.0}, ValueError, r"loss_temperature must be finite and > 0, got 0\.0"),
        ({"impl": "triton"}, ValueError, r"impl must be one of \['fused', 'reference'\], got 'triton'"),
    ],
)
def test_token_divergence_refuses(changed, error, message):
    with pytest.raises(error, match="token_divergence: " + message):
        token_divergence(**{**LOGITS, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"student_hidden_N_D": torch.zeros(4, 3, dtype=FLOAT64)},
            TypeError,
            r"student_hidden_N_D must have dtype .*, got float64; .*impl=Impl\.REFERENCE",
        ),
        (
            {"student_head": OutputHead(torch.zeros(10, 3), torch.zeros(10, dtype=FLOAT64))},
            TypeError,
            r"student_head\.bias must have dtype .*, got float64",
        ),
        (
            {"teacher_head": torch.zeros(10, 5, dtype=FLOAT64)},
            TypeError,
            r"teacher_head\.weight must have dtype .*, got float64",
        ),
        (
            {"teacher_head": torch.zeros(12, 5)},
            ValueError,
            r"student and teacher must have equal vocabularies, got 10 and 12",
        ),
        ({"teacher_hidden_N_E": torch.zeros(5, 5)}, ValueError, r"teacher_hidden_N_E must have shape .* got \(5, 5\)"),
        ({"student_head": torch.zeros(10, 4)}, ValueError, r"student_head\.weight must have shape .* got \(10, 4\)"),
        (
            {"teacher_head": torch.zeros(10, 5, requires_grad=True)},
            ValueError,
            r"teacher_head\.weight must not require grad \(the teacher is frozen\)",
        ),
        ({"student_head": [1.0]}, TypeError, r"student_head must be an OutputHead or a weight tensor .*, got list"),
        ({"logits": "bfloat16"}, ValueError, r"logits must be one of .*, got 'bfloat16'"),
        ({"workspace_bytes": 0}, ValueError, r"workspace_bytes must be > 0 or None, got 0"),
        (
            {"workspace_bytes": 100},
            ValueError,
            r"workspace_bytes must be at least \d+, the logits of one row of 10 ids, got 100",
        ),
        ({"workspace_bytes": 1e9}, TypeError, r"workspace_bytes must be an int > 0 or None, got float"),
    ],
)
def test_linear_divergence_refuses(changed, error, message):
    with pytest.raises(error, match="linear_divergence: " + message):
        linear_divergence(**{**HIDDEN, **changed})


def test_cpu_tensors_without_the_interpreter_are_refused():
    """A fresh process without TRITON_INTERPRET: the error comes from the call, and says what to do instead."""
    program = (
        "import torch, esr_kernels as k\n"
        "x, w = torch.zeros(2, 3), torch.zeros(5, 3)\n"
        "for op, arguments in ((k.token_divergence, (x, x)), (k.linear_divergence, (x, w, x, w))):\n"
        "    op(*arguments, impl=k.Impl.REFERENCE)\n"
        "    try:\n"
        "        op(*arguments)\n"
        "    except NotImplementedError as error:\n"
        "        print(error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    messages = result.stdout.splitlines()
    assert len(messages) == 2
    for op, message in zip(("token_divergence", "linear_divergence"), messages, strict=True):
        assert message.startswith(f"{op}: impl=Impl.FUSED needs tensors on a CUDA device, got cpu")
        assert "impl=Impl.REFERENCE" in message and "TRITON_INTERPRET=1" in message


def test_a_machine_without_triton_is_told_so(monkeypatch):
    monkeypatch.setattr("esr_kernels.impl.find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"token_divergence: .*needs Triton.* impl=Impl\.REFERENCE"):
        token_divergence(**LOGITS)
    assert token_divergence(**LOGITS, impl=Impl.REFERENCE).divergence_N.shape == (4,)


def test_other_devices_are_refused():
    logits = torch.zeros(4, 10, device="meta")
    with pytest.raises(NotImplementedError, match=r"token_divergence: .*needs tensors on a CUDA device, got meta"):
        token_divergence(logits, logits)


@pytest.mark.parametrize("base", [Divergence, ReverseKL])
def test_a_divergence_without_a_kernel_is_refused_by_name(base):
    """A caller's own divergence runs under REFERENCE; FUSED has no kernel for it, nor takes that of a parent class."""

    class Halved(base):
        def terms(self, student_logprobs, teacher_logprobs):
            return 0.5 * ReverseKL().terms(student_logprobs, teacher_logprobs)

    logits = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    plain = token_divergence(*logits, impl=Impl.REFERENCE).divergence_N
    halved = token_divergence(*logits, Halved(), impl=Impl.REFERENCE).divergence_N
    assert torch.equal(halved, 0.5 * plain) and plain > 0
    with pytest.raises(NotImplementedError, match=r"Halved.* impl=Impl\.REFERENCE"):
        token_divergence(*(x.to(DEVICE) for x in logits), Halved())
