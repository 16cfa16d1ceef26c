"""From divergences per position to one loss: the only place where positions are weighed against each other."""

import torch
from torch import Tensor

from esr_distill.config import LossConfig
from esr_distill.input_error import InputError
from esr_kernels import (
    AlphaDivergence,
    ForwardKL,
    GeneralizedJSD,
    Impl,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)

PLAIN_DIVERGENCES = {"reverse_kl": ReverseKL, "forward_kl": ForwardKL, "total_variation": TotalVariation}
PARAMETER_DIVERGENCES = {
    "jsd": GeneralizedJSD,
    "skew_forward_kl": SkewForwardKL,
    "skew_reverse_kl": SkewReverseKL,
    "alpha_divergence": AlphaDivergence,
}


def choose_impl(device: torch.device) -> Impl:
    """The kernels on a CUDA device, else plain PyTorch: the ops themselves never choose."""
    return Impl.FUSED if device.type == "cuda" else Impl.REFERENCE


def make_divergence(loss: LossConfig):
    """The divergence value that `loss.divergence` and `loss.divergence_parameter` name.

    Raises:
        InputError: an unknown name; a parameter that is missing, superfluous or out of its range.
    """
    parameter = loss.divergence_parameter
    names = sorted(PLAIN_DIVERGENCES | PARAMETER_DIVERGENCES)
    if loss.divergence not in names:
        raise InputError(f"loss.divergence must be one of {', '.join(names)}, got {loss.divergence!r}")
    if loss.divergence in PLAIN_DIVERGENCES:
        if parameter is not None:
            raise InputError(f"loss.divergence_parameter must be unset for {loss.divergence}, got {parameter}")
        return PLAIN_DIVERGENCES[loss.divergence]()
    if parameter is None:
        raise InputError(f"loss.divergence_parameter must be set for {loss.divergence}, got none")
    try:
        return PARAMETER_DIVERGENCES[loss.divergence](parameter)
    except ValueError as error:
        raise InputError(f"loss.divergence_parameter: {error}") from None


def normalize_divergence(divergence_N: Tensor, row_N: Tensor, batch_size: int, normalizer: str) -> Tensor:
    """Reduce the divergence of N positions in `batch_size` rollouts to a scalar.

    With d(b, t) the divergence at position t of rollout b and n(b) its number of trained positions:

    - "sum":            1/B sum_b sum_t d(b, t)           (arXiv 2605.27028, Eq. 2, the expectation over B rollouts)
    - "sequence_mean":  1/B sum_b 1/n(b) sum_t d(b, t)    (the authors' code)
    - "token_mean":     sum_b sum_t d(b, t) / sum_b n(b)

    A rollout holds at least one token, so n(b) >= 1.
    """
    if normalizer == "token_mean":
        return divergence_N.mean()
    if normalizer == "sum":
        return divergence_N.sum() / batch_size
    if normalizer == "sequence_mean":
        count_B = torch.bincount(row_N, minlength=batch_size).to(divergence_N.dtype)
        return (divergence_N / count_B[row_N]).sum() / batch_size
    raise ValueError(f"normalizer must be sum, sequence_mean or token_mean, got {normalizer!r}")
