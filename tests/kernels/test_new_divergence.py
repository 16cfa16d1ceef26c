"""Is a new divergence one line of reference and one small device function, as CONTRIBUTING.md says?

`pytest tests/kernels/test_new_divergence.py`
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401 (the interpreter looks for it beside every jit function)

from esr_kernels import Divergence, ForwardKL, ReverseKL, token_divergence
from esr_kernels.divergence_kernel import DIVERGENCE_KERNELS, DivergenceKernel, _kl_term, _probabilities
from esr_kernels.testing.error_budget import check_token_divergence
from esr_kernels.testing.inputs import LogitPair, make_logit_pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """sum (p - q) log(p / q)."""

    def terms(self, student_logprobs, teacher_logprobs):
        return ReverseKL().terms(student_logprobs, teacher_logprobs) + ForwardKL().terms(
            student_logprobs, teacher_logprobs
        )


@triton.jit
def jeffreys(student_logprob, teacher_logprob, log_ratio, parameter, complement):
    p, q, q_minus_p = _probabilities(student_logprob, teacher_logprob, log_ratio)
    reverse = _kl_term(student_logprob, teacher_logprob, log_ratio)
    forward = _kl_term(teacher_logprob, student_logprob, -log_ratio)
    return reverse + forward, reverse - q_minus_p  # the term, and p * dD/dp


def test_the_example_of_contributing_is_this_one():
    code = (Path(__file__).read_text(encoding="utf-8"), (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    here, there = (re.search(r"@triton\.jit\ndef jeffreys.*?# the term, and p \* dD/dp", text, re.S) for text in code)
    assert here.group() == there.group()


@pytest.mark.parametrize("stop_ids", [(), (3, 40)], ids=["plain", "stop"])
def test_it_meets_the_budget_of_the_built_in_ones(monkeypatch, stop_ids):
    monkeypatch.setitem(DIVERGENCE_KERNELS, "Jeffreys", DivergenceKernel(jeffreys))
    pair = LogitPair(*(logits.to(DEVICE) for logits in make_logit_pair(5, 300, seed=1)))
    upstream = torch.tensor([1.0, -0.3, 2.0, 0.5, 7.0], device=DEVICE)
    results = check_token_divergence(pair, Jeffreys(), upstream, stop_ids=stop_ids)
    assert (results["divergence"] > 0).all()


def test_a_divergence_without_a_device_function_says_so():
    student, teacher = (logits.to(DEVICE) for logits in make_logit_pair(2, 130))
    with pytest.raises(NotImplementedError, match=r"token_divergence: Jeffreys has no kernel .*impl=Impl\.REFERENCE"):
        token_divergence(student, teacher, Jeffreys())


def test_a_divergence_of_two_numbers_says_that_kernels_take_one():
    @dataclass(frozen=True)
    class Two(Divergence):
        a: float = 1.0
        b: float = 2.0

    with pytest.raises(NotImplementedError, match="Two: the kernels take one parameter, got 2 fields"):
        Two().kernel()
