"""Is the random stream Philox4x32-10, addressed as documented, and uniform along every part of the address?

python -m pytest tests/kernels/test_random_stream.py
"""

import pytest
import torch

from esr_kernels.sample_tokens.random_stream import bits_from_words, philox4x32, uniform_bits

# Published known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds): counter, key, output.
KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}
CHI_SQUARED_63 = 131.4  # critical value for 63 degrees of freedom at p = 1e-6


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_known_answers(name):
    counter, key, expected = KNOWN_ANSWERS[name]
    got = philox4x32(words(counter), words(key))
    assert " ".join(f"{int(word):08x}" for word in got) == expected


def test_philox_rows_are_independent_of_each_other():
    """The three vectors in one batch give the same words as one by one."""
    counters = [torch.cat(c) for c in zip(*(words(v[0]) for v in KNOWN_ANSWERS.values()), strict=True)]
    keys = [torch.cat(k) for k in zip(*(words(v[1]) for v in KNOWN_ANSWERS.values()), strict=True)]
    got = torch.stack(philox4x32(tuple(counters), tuple(keys)), dim=1)
    expected = torch.stack([torch.cat(words(v[2])) for v in KNOWN_ANSWERS.values()])
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("high", "low", "expected"),
    [
        (0, 0, 0),
        (0, 0x7FF, 0),  # the 11 low bits are dropped
        (0, 0x800, 1),
        (0x80000000, 0, 2**52),
        (0x40000000, 0, 2**51),
        (0xFFFFFFFF, 0xFFFFFFFF, 2**53 - 1),
    ],
)
def test_bits_from_words_by_hand(high, low, expected):
    assert bits_from_words(torch.tensor(high), torch.tensor(low)).item() == expected


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_uniform_addressing(name):
    """Counter = (request id low, high, position, stream), key = (seed low, high), read off the published vectors."""

    def signed(low: str, high: str) -> torch.Tensor:
        value = int(high + low, 16)
        return torch.tensor([value - 2**64 if value >= 2**63 else value])

    counter, key, output = (text.split() for text in KNOWN_ANSWERS[name])
    got = uniform_bits(
        signed(*key), signed(*counter[:2]), torch.tensor([int(counter[2], 16)]), stream=int(counter[3], 16)
    )
    assert got.dtype == torch.int64
    assert got.item() == int(output[0] + output[1], 16) >> 11


def uniform(*address: torch.Tensor, stream: int = 0) -> torch.Tensor:
    return uniform_bits(*address, stream=stream).double() / 2**53


def draw_along(axis: str, num: int) -> torch.Tensor:
    varied, fixed = torch.arange(num), torch.full((num,), 12345)
    seed, request, position = (varied if axis == name else fixed for name in ("seed", "request", "position"))
    return uniform(seed, request, position)


@pytest.mark.parametrize("axis", ["seed", "request", "position"])
def test_uniform_is_flat_along(axis):
    num = 64_000
    u = draw_along(axis, num)
    counts = torch.histc(u, bins=64, min=0, max=1)
    assert ((counts - num / 64) ** 2 / (num / 64)).sum() < CHI_SQUARED_63
    assert abs(u.mean() - 0.5) < 4.5 / (12 * num) ** 0.5
    neighbours = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(neighbours) < 4.5 / num**0.5


def test_every_bit_is_balanced():
    num = 64_000
    bits = (draw_along("request", num) * 2.0**53).to(torch.int64)
    ones = torch.stack([(bits >> i & 1).sum() for i in range(53)])
    assert ((ones - num / 2).abs() < 5 * (num / 4) ** 0.5).all(), ones
    assert len(bits.unique()) == num


def test_axes_are_uncorrelated_with_each_other():
    """One step of seed, of request and of position leads to four unrelated streams (R5)."""
    num = 20_000
    request, zero = torch.arange(num), torch.zeros(num, dtype=torch.int64)
    streams = [
        uniform(zero, request, zero),
        uniform(zero + 1, request, zero),
        uniform(zero, request, zero + 1),
        uniform(zero + 2**32, request, zero),  # the high word of the seed counts
        uniform(zero, request + 2**32, zero),  # and that of the request id
        uniform(zero, request, zero, stream=1),
    ]
    off_diagonal = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert off_diagonal.abs().max() < 4.5 / num**0.5
