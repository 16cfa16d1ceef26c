"""What every divergence op returns."""

from typing import NamedTuple

from torch import Tensor


class DivergenceOutput(NamedTuple):
    """One value per row, never reduced. float32, or float64 where an input is float64.

    Only `divergence_N` is differentiable; the rest are detached by-products of the same pass, of the tempered
    distributions, after the vocabulary cut and after merging stop events.
    """

    divergence_N: Tensor  # D(student, teacher)
    student_entropy_N: Tensor  # -sum p log p, nats
    teacher_entropy_N: Tensor  # -sum q log q, nats
    student_logprob_N: Tensor  # log p[token_ids_N], NaN without token_ids_N
    teacher_logprob_N: Tensor  # log q[token_ids_N], NaN without token_ids_N
    top1_agreement_N: Tensor  # 1.0 where argmax p = argmax q (ties by the lowest id), else 0.0
