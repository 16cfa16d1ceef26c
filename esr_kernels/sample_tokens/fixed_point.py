"""Probability masses as 64-bit integers: their sums are exact, so a draw depends neither on the order in which a row is read
nor on how many threads read it. The same arithmetic as csrc/sampler/fixed_point.h, bit for bit.

    distance_v = (z_v - max z) * scale,  scale = log2(e) / temperature          float32, <= 0
    weight_v   = round(2^(fraction_bits + distance_v))                          so the likeliest id has 2^fraction_bits

With 44 fraction bits an id of 30.5 nats below the likeliest still has a weight. A sum over V ids stays within 2^62.
"""

import math

import torch
from torch import Tensor

UNIFORM_BITS = 53

_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453
_MOST_FRACTION_BITS = 44
# 2^x for x in [-1/2, 1/2], highest power first: minimax in relative error (1.1e-7), exact at 0
_EXP2_COEFFICIENTS = tuple(
    float.fromhex(c)
    for c in ("0x1.5bba14p-10", "0x1.3cea88p-7", "0x1.c6b752p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1", "0x1p0")
)


def fraction_bits_for(vocab_size: int) -> int:
    """44, or fewer for more than 2^18 ids."""
    return min(_MOST_FRACTION_BITS, 62 - (vocab_size - 1).bit_length())


def scale_of_temperature(temperature: Tensor) -> Tensor:
    """log2(e) / temperature in float32, kept among the normal numbers; `temperature` is float64 and > 0."""
    return (_LOG2_E / temperature).clamp(2.0**-126, 2.0**126).float()


def weights_of(logits_R_V: Tensor, top_logit_R: Tensor, scale_R: Tensor, fraction_bits: int) -> Tensor:
    """int64 (R, V) from float32 logits without NaN and their finite maximum."""
    distance_R_V = ((logits_R_V - top_logit_R[:, None]) * scale_R[:, None]).clamp(min=-120.0)
    exponent_R_V = distance_R_V.round()  # half to even
    fraction_R_V = distance_R_V - exponent_R_V
    y_R_V = torch.full_like(fraction_R_V, _EXP2_COEFFICIENTS[0])
    for coefficient in _EXP2_COEFFICIENTS[1:]:
        y_R_V = fused_multiply_add(y_R_V, fraction_R_V, coefficient)
    power_of_two_R_V = ((exponent_R_V.to(torch.int64) + (fraction_bits + 1023)) << 52).view(torch.float64)
    return (y_R_V.double() * power_of_two_R_V).round().to(torch.int64)


def fused_multiply_add(a: Tensor, b: Tensor, c: float) -> Tensor:
    """a * b + c of float32 numbers, rounded once, which PyTorch does not offer.

    The product is exact in float64. The sum is rounded to float64 first; making its last bit odd where it was inexact keeps
    what the second rounding, to float32, must know (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums:
    proved algorithms using rounding to odd", 2008).
    """
    product = a.double() * b.double()
    total = product + c
    product_part = total - c
    error = (product - product_part) + (c - (total - product_part))  # exact (Knuth's two-sum)
    bits = total.view(torch.int64)
    is_even = (bits & 1) == 0
    step = torch.where((error > 0) == (total > 0), 1, -1)  # away from 0 or toward it
    return torch.where((error != 0) & is_even, bits + step, bits).view(torch.float64).float()


def part_of(mass: Tensor, fraction_of_2_53: Tensor) -> Tensor:
    """floor(fraction * mass) for int64 masses up to 2^62 and fractions given as integers of up to 53 bits (1 is 2^53).

    The 115 bits of the product in parts that int64 holds: mass = m1 2^31 + m0, fraction = f1 2^27 + f0.
    """
    m1, m0 = mass >> 31, mass & (2**31 - 1)
    f1, f0 = fraction_of_2_53 >> 27, fraction_of_2_53 & (2**27 - 1)
    over_2_27 = ((f0 * m0) >> 27) + f1 * m0 + ((f0 * m1) << 4)
    return (over_2_27 >> 26) + ((f1 * m1) << 5)


def fraction_of(probability: Tensor) -> Tensor:
    """A float64 in [0, 1] as an integer of 53 bits, rounded down."""
    return (probability * 2.0**UNIFORM_BITS).to(torch.int64)


def least_weight_of(min_p: Tensor, fraction_bits: int) -> Tensor:
    """The least weight that min-p keeps: w >= min_p * 2^fraction_bits."""
    return (min_p * 2.0**fraction_bits).ceil().to(torch.int64)


def log_of_mass(mass: Tensor) -> Tensor:
    """ln(mass) in float64, mass > 0; 2 artanh(s) with s = (m - 1) / (m + 1) of the mantissa m, |s| < 0.172.

    Every operation is one that IEEE 754 defines, so that all implementations agree to the bit.
    """
    bits = mass.double().view(torch.int64)
    exponent = ((bits >> 52) - 1023).double()
    mantissa = ((bits & (2**52 - 1)) | (1023 << 52)).view(torch.float64)
    is_large = mantissa > math.sqrt(2)
    mantissa = torch.where(is_large, mantissa * 0.5, mantissa)
    exponent = torch.where(is_large, exponent + 1, exponent)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = torch.full_like(s, 1.0 / 19)
    for odd in range(17, 0, -2):
        series = series * square + 1.0 / odd
    return exponent * _LN_2 + 2.0 * s * series


def logprobs_of(logits: Tensor, top_logit: Tensor, temperature: Tensor, mass: Tensor, fraction_bits: int) -> Tensor:
    """ln(weight / mass) of ids in float32, from their logits, so that rounding the weights does not show."""
    distance = (logits.double() - top_logit.double()) / temperature
    return (distance - (log_of_mass(mass) - fraction_bits * _LN_2)).float()
