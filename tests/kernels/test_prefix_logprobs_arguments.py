"""Do the prefix log-prob ops refuse wrong arguments with an error that says what is wrong?

python -m pytest tests/kernels/test_prefix_logprobs_arguments.py
"""

import pytest
import torch

from esr_kernels import Impl, linear_prefix_logprobs, prefix_logprobs

INT = torch.int64


def arguments() -> dict:
    return {
        "token_ids_B_T": torch.zeros(2, 5, dtype=INT),
        "starts_B": torch.tensor([1, 3]),
        "horizon": 3,
        "lengths_B": torch.tensor([4, 2]),
        "temperature": 1.0,
        "impl": Impl.REFERENCE,
    }


def call(op: str, **changed) -> object:
    if op == "prefix_logprobs":
        return prefix_logprobs(**{"logits_B_T_V": torch.zeros(2, 5, 7), **arguments(), **changed})
    inputs = {"hidden_B_T_D": torch.zeros(2, 5, 4), "head": torch.zeros(7, 4)}
    return linear_prefix_logprobs(**{**inputs, **arguments(), **changed})


@pytest.mark.parametrize("op", ["prefix_logprobs", "linear_prefix_logprobs"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"token_ids_B_T": torch.zeros(2, 4, dtype=INT)},
            ValueError,
            r"token_ids_B_T must have shape \(B, T\) = \(2, 5\)",
        ),
        ({"token_ids_B_T": torch.zeros(2, 5)}, TypeError, r"token_ids_B_T must have dtype int32, int64, got float32"),
        ({"starts_B": [1, 3]}, TypeError, r"starts_B must be a tensor \(B\), got list"),
        ({"starts_B": torch.tensor([1, 2, 3])}, ValueError, r"starts_B must have shape \(B\) = \(2\), got \(3,\)"),
        ({"starts_B": torch.tensor([1, 0])}, ValueError, r"starts_B must be in \[1, 5\], got 0 in row 1"),
        ({"starts_B": torch.tensor([6, 1])}, ValueError, r"starts_B must be in \[1, 5\], got 6 in row 0"),
        (
            {"lengths_B": torch.tensor([4, -1])},
            ValueError,
            r"lengths_B must be in \[0, T - start = 2\], got -1 in row 1",
        ),
        ({"lengths_B": torch.tensor([5, 2])}, ValueError, r"lengths_B must be in \[0, T - start = 4\], got 5 in row 0"),
        (
            {"lengths_B": torch.ones(2, dtype=INT, device="meta")},
            ValueError,
            r"on one device, got starts_B: cpu, lengths_B: meta",
        ),
        ({"lengths_B": torch.ones(2)}, TypeError, r"lengths_B must have dtype int32, int64, got float32"),
        ({"horizon": -1}, ValueError, r"horizon must be >= 0, got -1"),
        ({"horizon": 2.0}, TypeError, r"horizon must be an int >= 0, got float"),
        ({"horizon": True}, TypeError, r"horizon must be an int >= 0, got bool"),
        ({"temperature": 0.0}, ValueError, r"temperature must be finite and > 0, got 0.0"),
        ({"temperature": "1"}, TypeError, r"temperature must be a number > 0, got str"),
        (
            {"token_ids_B_T": torch.full((2, 5), 7)},
            ValueError,
            r"\[0, V\) = \[0, 7\) at the slots .* got 7 in row 0, slot 0",
        ),
        ({"starts_B": torch.ones(2, dtype=INT, device="meta")}, ValueError, r"on one device, got .* starts_B: meta"),
        ({"impl": "quick"}, ValueError, r"impl must be one of \['fused', 'reference'\], got 'quick'"),
    ],
)
def test_refuses(op, changed, error, message):
    with pytest.raises(error, match=rf"^{op}: .*{message}"):
        call(op, **changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden_B_T_D": torch.zeros(2, 5)}, ValueError, r"hidden_B_T_D must have shape \(B, T, D\)"),
        ({"hidden_B_T_D": torch.zeros(2, 5, 4, dtype=INT)}, TypeError, r"hidden_B_T_D must have dtype .*, got int64"),
        ({"head": torch.zeros(7, 3)}, ValueError, r"head.weight must have shape \(V, D\) = \(V, 4\), got \(7, 3\)"),
        ({"head": [1.0]}, TypeError, r"head must be an OutputHead or a weight tensor \(V, hidden\), got list"),
        ({"head": torch.zeros(7, 4, device="meta")}, ValueError, r"on one device, got .*head.weight: meta"),
    ],
)
def test_linear_refuses(changed, error, message):
    with pytest.raises(error, match=rf"^linear_prefix_logprobs: .*{message}"):
        call("linear_prefix_logprobs", **changed)


def test_logits_are_checked():
    with pytest.raises(
        ValueError, match=r"^prefix_logprobs: logits_B_T_V must have shape \(B, T, V\) = .*got \(2, 5\)"
    ):
        call("prefix_logprobs", logits_B_T_V=torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"^prefix_logprobs: logits_B_T_V must have dtype .*, got int64"):
        call("prefix_logprobs", logits_B_T_V=torch.zeros(2, 5, 7, dtype=INT))


def test_arguments_are_checked_before_the_implementation():
    with pytest.raises(ValueError, match=r"horizon must be >= 0, got -2"):
        prefix_logprobs(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=INT), torch.tensor([1]), -2)


def test_the_unchanged_arguments_are_accepted():
    for op in ("prefix_logprobs", "linear_prefix_logprobs"):
        assert call(op).mask_B_K.tolist() == [[True, True, True], [True, True, False]]
