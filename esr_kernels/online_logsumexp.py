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
    """old_max - new_max <= 0, by which the terms already summed move; 0 while there are none.

    Bounded, so that sum * shift * exp(shift) of terms that vanish is 0 and not inf * 0.
    """
    shift = tl.maximum(old_max - finite_max(new_max), -1e30)
    return tl.where(old_max == float("-inf"), 0.0, shift)


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
    return tl.where(exponent == float("-inf"), 0.0, exp_value * exponent)


@triton.jit
def log_ratio_of(student_shifted, teacher_shifted, log_sum_ratio):
    """log p - log q from logits relative to their maxima; 0 where both are -inf."""
    is_empty = (student_shifted == float("-inf")) & (teacher_shifted == float("-inf"))
    return tl.where(is_empty, 0.0, (student_shifted - teacher_shifted) - log_sum_ratio)
