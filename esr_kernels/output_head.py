"""The output head (LM head) of a model as a value: everything between the last hidden state and the logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from esr_kernels.checks import FLOAT_DTYPES, check_positive, check_tensor


@dataclass(frozen=True, eq=False)
class OutputHead:
    """`logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`; no tanh when `softcap` is None.

    Args:
        weight: (V, hidden), any float dtype.
        bias: (V,) or None.
        logit_scale: multiplies the logits before the soft cap (Cohere; Granite divides, so pass the reciprocal).
        softcap: bound of the tanh soft cap (Gemma 2), > 0, or None.

    Raises:
        TypeError, ValueError: wrong shape, dtype or number.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        check_tensor("OutputHead", "weight", self.weight, "V D", sizes, FLOAT_DTYPES)
        if self.bias is not None:
            check_tensor("OutputHead", "bias", self.bias, "V", sizes, FLOAT_DTYPES)
        check_positive("OutputHead", "logit_scale", self.logit_scale)
        if self.softcap is not None:
            check_positive("OutputHead", "softcap", self.softcap)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden_N_D: Tensor) -> Tensor:
        """Reference projection (..., D) -> (..., V), in float32 (float64 for float64 hidden states), differentiable.

        An enclosing autocast region does not apply: it would project, and so store the logits, in 16 bits.
        """
        dtype = torch.promote_types(hidden_N_D.dtype, torch.float32)
        with torch.autocast(hidden_N_D.device.type, enabled=False):
            logits = hidden_N_D.to(dtype) @ self.weight.to(dtype).T
        if self.bias is not None:
            logits = logits + self.bias.to(dtype)
        logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def as_output_head(op: str, name: str, head: "OutputHead | Tensor") -> OutputHead:
    """Accept a bare weight (V, hidden) where an `OutputHead` is expected."""
    if isinstance(head, OutputHead):
        return head
    if isinstance(head, Tensor):
        return OutputHead(head)
    raise TypeError(f"{op}: {name} must be an OutputHead or a weight tensor (V, hidden), got {type(head).__name__}")
