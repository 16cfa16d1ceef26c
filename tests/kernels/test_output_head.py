"""Does an output head make the logits of its formula, in float32, and refuse wrong parts?

python -m pytest tests/kernels/test_output_head.py
"""

import numpy as np
import pytest
import torch

from esr_kernels.output_head import OutputHead, as_output_head


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


HIDDEN, WEIGHT, BIAS = normal(5, 4, seed=1), normal(7, 4, seed=2), normal(7, seed=3)
PRODUCT = HIDDEN.numpy() @ WEIGHT.numpy().T


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (OutputHead(WEIGHT), PRODUCT),
        (OutputHead(WEIGHT, BIAS), PRODUCT + BIAS.numpy()),
        (OutputHead(WEIGHT, logit_scale=0.5), PRODUCT / 2),
        (OutputHead(WEIGHT, softcap=1.5), 1.5 * np.tanh(PRODUCT / 1.5)),
        (
            OutputHead(WEIGHT, BIAS, logit_scale=3.0, softcap=1.5),
            1.5 * np.tanh(3.0 * (PRODUCT + BIAS.numpy()) / 1.5),
        ),
    ],
    ids=["weight", "bias", "scale", "softcap", "all"],
)
def test_logits_are_the_formula(head, expected):
    np.testing.assert_allclose(head.logits(HIDDEN).numpy(), expected, rtol=1e-13)
    batched = head.logits(HIDDEN.reshape(5, 1, 4))
    np.testing.assert_allclose(batched.numpy(), expected[:, None], rtol=1e-13)


@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_logits_of_low_precision_hidden_states_are_float32(dtype, head_dtype, is_autocast):
    """An autocast region must not turn the projection into bf16: its rounding would be 2^-9, not 2^-24."""
    hidden, weight = normal(6, 64, seed=4, dtype=dtype), normal(9, 64, seed=5, dtype=head_dtype)
    bias = normal(9, seed=6, dtype=head_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        logits = OutputHead(weight, bias).logits(hidden)
    assert logits.dtype == torch.float32
    expected = hidden.double().numpy() @ weight.double().numpy().T + bias.double().numpy()
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=2e-5)


def test_gradients_of_every_part():
    leaves = [HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_(), BIAS.clone().requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: OutputHead(weight, bias, logit_scale=0.7, softcap=2.0).logits(hidden), leaves
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: OutputHead([[1.0]]), TypeError, r"OutputHead: weight must be a tensor \(V D\), got list"),
        (lambda: OutputHead(torch.zeros(7)), ValueError, r"weight must have shape \(V, D\) = \(V, D\), got \(7,\)"),
        (lambda: OutputHead(torch.zeros(7, 4, dtype=torch.int8)), TypeError, r"weight must have dtype .*, got int8"),
        (lambda: OutputHead(WEIGHT, torch.zeros(8)), ValueError, r"bias must have shape \(V\) = \(7\), got \(8,\)"),
        (lambda: OutputHead(WEIGHT, logit_scale=0), ValueError, r"logit_scale must be finite and > 0, got 0"),
        (lambda: OutputHead(WEIGHT, softcap=-30.0), ValueError, r"softcap must be finite and > 0, got -30\.0"),
        (lambda: OutputHead(WEIGHT, softcap="30"), TypeError, r"softcap must be a number > 0, got str"),
    ],
)
def test_wrong_parts_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_bare_weight_is_a_head_and_anything_else_is_not():
    head = OutputHead(WEIGHT)
    assert as_output_head("op", "student_head", head) is head
    made = as_output_head("op", "student_head", WEIGHT)
    assert made.weight is WEIGHT and made.bias is None and made.vocab_size == 7
    with pytest.raises(TypeError, match=r"op: student_head must be an OutputHead or a weight tensor .*, got Linear"):
        as_output_head("op", "student_head", torch.nn.Linear(4, 7))
