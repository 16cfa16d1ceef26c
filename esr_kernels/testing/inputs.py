"""Seeded inputs that look like a language model's, for tests and benchmarks.

Every function takes its own seed and draws from its own generator: the data never depends on the order of calls.
Tensors are made on the CPU in float64 and then converted, so that one seed means the same numbers in every dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LogitPair(NamedTuple):
    student_N_V: Tensor
    teacher_N_V: Tensor


class HiddenPair(NamedTuple):
    student_hidden_N_D: Tensor
    student_weight_V_D: Tensor
    teacher_hidden_N_E: Tensor
    teacher_weight_V_E: Tensor


def make_logit_pair(
    rows: int, vocab_size: int, *, gap: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LogitPair:
    """Two sets of logits with a Zipf-like tail; row by row from flat to peaked.

    The logits are -s log(rank) + noise with ranks permuted per row and s between 0.5 and 3. The teacher's are the
    student's plus `gap` times standard normal noise: 0.05 is near convergence, 0.5 ordinary, 3 far apart.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.argsort(torch.rand(rows, vocab_size, generator=generator), dim=-1) + 1
    slope = torch.linspace(0.5, 3.0, max(rows, 1), dtype=torch.float64)[:rows, None]
    noise = torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64)
    student = -slope * ranks.double().log() + 0.3 * noise
    teacher = student + gap * torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64)
    return LogitPair(student.to(dtype), teacher.to(dtype))


def make_hidden_pair(
    rows: int,
    vocab_size: int,
    student_size: int,
    teacher_size: int,
    *,
    gap: float = 0.5,
    spread: float = 3.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> HiddenPair:
    """Hidden states and head weights of a student and of a wider teacher that differs by about `gap` in its logits.

    Student logits are normal with standard deviation `spread`. The teacher has the student's columns and
    `teacher_size - student_size` more, whose contribution to the logits has standard deviation `gap`.
    """
    extra_size = teacher_size - student_size
    if extra_size < 1:
        raise ValueError(f"make_hidden_pair: teacher_size must be > student_size = {student_size}, got {teacher_size}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student_hidden = normal(rows, student_size)
    student_weight = spread / student_size**0.5 * normal(vocab_size, student_size)
    teacher_hidden = torch.cat([student_hidden, normal(rows, extra_size)], dim=-1)
    teacher_weight = torch.cat([student_weight, gap / extra_size**0.5 * normal(vocab_size, extra_size)], dim=-1)
    return HiddenPair(*(x.to(dtype) for x in (student_hidden, student_weight, teacher_hidden, teacher_weight)))
