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


def normalize_divergence(
    divergence_N: Tensor,
    weights_N: Tensor,
    row_N: Tensor,
    batch_size: int,
    normalizer: str,
    denominator: float | None = None,
    num_positions: int | None = None,
) -> Tensor:
    """Reduce the divergence of N positions in `batch_size` rollouts to a scalar.

    With d(b, t) the divergence at position t of rollout b, w(b, t) its weight and n(b) its number of positions with w > 0:

    - "sum":            1/B sum_b sum_t w d               (arXiv 2605.27028, Eq. 2, the expectation over B rollouts)
    - "sequence_mean":  1/B sum_b 1/n(b) sum_t w d        (the authors' code)
    - "token_mean":     sum_b sum_t w d / sum_b n(b)
    - "fixed":          sum_b sum_t w d / denominator

    Where these are a part of a step, `batch_size` and `num_positions`, which stands for sum_b n(b), are those of the whole
    step, so that the parts' losses add up to the step's.

    A rollout without positions adds 0 and counts in B; where there is no position at all the loss is 0 and so is its gradient.
    A divergence of a position with weight 0 is not read, whatever it is.
    """
    is_kept_N = weights_N != 0  # a NaN weight is kept, so that the loss says so
    weighted_N = torch.where(is_kept_N, weights_N * divergence_N, 0.0)
    if normalizer == "token_mean":
        return weighted_N.sum() / (is_kept_N.sum().clamp_min(1) if num_positions is None else max(1, num_positions))
    if normalizer == "sum":
        return weighted_N.sum() / batch_size
    if normalizer == "sequence_mean":
        count_B = torch.bincount(row_N[is_kept_N], minlength=batch_size).clamp_min(1).to(divergence_N.dtype)
        return (weighted_N / count_B[row_N]).sum() / batch_size
    if normalizer == "fixed":
        return weighted_N.sum() / denominator
    raise ValueError(f"normalizer must be sum, sequence_mean, token_mean or fixed, got {normalizer!r}")
