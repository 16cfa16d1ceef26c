"""Steps of an online log-sum-exp over tiles of a row, shared by the row kernels. Derivations: docs/numerics.md.

A row is held as its running maximum (a scalar) and vectors of running sums of exp(logit - maximum), one lane per column
of a tile; the lanes are added once, at the end of the row. -inf logits are legal everywhere, as is a row of nothing else.
"""

import triton
import triton.language as tl


@triton.jit
def finite_max(running_max):
    """The maximum to subtract: 0 while only -inf has been seen, so that -inf - maximum stays -inf."""
    return tl.where(running_max == float("-inf"), 0.0, running_max)


@triton.jit
def max_shift(old_max, new_max):
    """old_max - new_max <= 0, by which the terms already summed move, finite; 0 while there are none."""
    shift = tl.maximum(old_max - finite_max(new_max), -3e38)
    return tl.where(old_max == float("-inf"), 0.0, shift)


@triton.jit
def move_entropy_sum(weighted_sum, plain_sum, shift, rescale):
    """sum(e * x) after each x has moved by `shift` and each e by the factor `rescale` = exp(shift)."""
    return (weighted_sum + plain_sum * tl.where(rescale == 0, 0.0, shift)) * rescale


@triton.jit
def move_cross_sum(cross_sum, plain_sum, shift, rescale):
    """The same where `shift` is a difference of two: huge, it leaves nothing of the sum if nothing is left of the e.

    +inf stays: an event that one side excludes makes the sum infinite however small its e.
    """
    left_over = tl.where(cross_sum == float("inf"), cross_sum, 0.0)
    return tl.where(rescale > 0, (cross_sum + plain_sum * shift) * rescale, left_over)


@triton.jit
def cross_term(exp_value, exponent, other_exponent):
    """exp_value * (exponent - other_exponent): 0 where the event has no probability, +inf where only the other side has none."""
    term = tl.where(other_exponent == float("-inf"), float("inf"), exp_value * (exponent - other_exponent))
    return tl.where(exponent == float("-inf"), 0.0, term)


@triton.jit
def update_top1(top1, running_max, tile_max, logits, columns):
    """Index of the largest logit so far, the lowest index among equals."""
    if tile_max >= running_max:
        candidate = tl.min(tl.where(logits == tile_max, columns, 2147483647))
        is_better = (tile_max > running_max) | (candidate < top1)
        top1 = tl.where(is_better, candidate, top1)
    return top1


@triton.jit
def times_exp(exp_value, exponent):
    """exp_value * exponent with 0 * -inf = 0: one term of sum(p log p)."""
    return exp_value * tl.maximum(exponent, -1e30)


@triton.jit
def log_ratio_of(student_shifted, teacher_shifted, log_sum_ratio):
    """log p - log q from logits relative to their maxima; 0 where both are -inf."""
    is_empty = (student_shifted == float("-inf")) & (teacher_shifted == float("-inf"))
    return tl.where(is_empty, 0.0, (student_shifted - teacher_shifted) - log_sum_ratio)
