"""The random stream of the sampler: Philox4x32-10 in int64 arithmetic, the same numbers on every device.

Philox is counter based (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): the n-th number is a
function of (key, counter) alone. A draw is addressed by (seed, request id, position), so it does not depend on the
batch slot, the batch size, the neighbours or on how often a CUDA graph was replayed.
"""

import torch
from torch import Tensor

SAMPLING_STREAM = 0

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words4 = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words4, key: tuple[Tensor, Tensor]) -> Words4:
    """Philox4x32 with 10 rounds. Words are int64 tensors of one shape holding values in [0, 2^32).

    One round: (c0, c1, c2, c3) -> (hi(m1 c2) ^ c1 ^ k0, lo(m1 c2), hi(m0 c0) ^ c3 ^ k1, lo(m0 c0)).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 multiplication wraps modulo 2^64, so its bits are those of the unsigned product
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            _high_word(product1) ^ c1 ^ k0,
            product1 & _WORD,
            _high_word(product0) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def bits_from_words(high: Tensor, low: Tensor) -> Tensor:
    """`(high << 32 | low) >> 11`: 53 random bits as int64 from two 32-bit words."""
    return ((high << 32 | low) >> 11) & ((1 << 53) - 1)  # the mask turns the arithmetic shift into a logical one


def uniform_bits(seed_B: Tensor, request_ids_B: Tensor, positions_B: Tensor, stream: int = SAMPLING_STREAM) -> Tensor:
    """One uniform number u in [0, 1) per row, as the int64 u * 2^53 (B,).

    The key is (seed low word, seed high word) and the counter (request id low word, request id high word, position,
    stream); the number is made of the first two output words, the first being the high one.

    Args:
        seed_B, request_ids_B: int64 (B,), read as 64-bit patterns.
        positions_B: int64 (B,) in [0, 2^32).
        stream: separates uses of one (seed, request, position); 0 is sampling.
    """
    counter = (request_ids_B & _WORD, _high_word(request_ids_B), positions_B, torch.full_like(positions_B, stream))
    first, second, _, _ = philox4x32(counter, (seed_B & _WORD, _high_word(seed_B)))
    return bits_from_words(first, second)


def _high_word(value: Tensor) -> Tensor:
    return (value >> 32) & _WORD
