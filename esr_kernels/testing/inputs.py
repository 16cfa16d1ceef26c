"""Seeded inputs that look like a language model's, for tests and benchmarks.

Every function takes its own seed and draws from its own generator: the data never depends on the order of calls.
Tensors are made in float64 and then converted, so that one seed means the same numbers in every dtype; on another device
than the CPU it means other numbers, made there because full-size logits are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.output_head import OutputHead
from esr_kernels.testing.cases import Shape


class LogitPair(NamedTuple):
    student_N_V: Tensor
    teacher_N_V: Tensor


class HiddenPair(NamedTuple):
    student_hidden_N_D: Tensor
    student_weight_V_D: Tensor
    teacher_hidden_N_E: Tensor
    teacher_weight_V_E: Tensor


class LinearInputs(NamedTuple):
    """The tensors of `linear_divergence`, heads with everything that a head can have."""

    student_hidden_N_D: Tensor
    student_head: OutputHead
    teacher_hidden_N_E: Tensor
    teacher_head: OutputHead


def make_logit_pair(
    rows: int,
    vocab_size: int,
    *,
    gap: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> LogitPair:
    """Two sets of logits with a Zipf-like tail; row by row from flat to peaked.

    The logits are -s log(rank) + noise with ranks permuted per row and s between 0.5 and 3. The teacher's are the
    student's plus `gap` times standard normal noise: 0.05 is near convergence, 0.5 ordinary, 3 far apart.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64, device=device)

    ranks = torch.argsort(torch.rand(rows, vocab_size, generator=generator, device=device), dim=-1) + 1
    slope = torch.linspace(0.5, 3.0, max(rows, 1), dtype=torch.float64, device=device)[:rows, None]
    student = -slope * ranks.double().log() + 0.3 * normal()
    teacher = student + gap * normal()
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
    device: str = "cpu",
) -> HiddenPair:
    """Hidden states and head weights of a student and of a wider teacher that differs by about `gap` in its logits.

    Student logits are normal with standard deviation `spread`. The teacher has the student's columns and
    `teacher_size - student_size` more, whose contribution to the logits has standard deviation `gap`.
    """
    extra_size = teacher_size - student_size
    if extra_size < 1:
        raise ValueError(f"make_hidden_pair: teacher_size must be > student_size = {student_size}, got {teacher_size}")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)

    student_hidden = normal(rows, student_size)
    student_weight = spread / student_size**0.5 * normal(vocab_size, student_size)
    teacher_hidden = torch.cat([student_hidden, normal(rows, extra_size)], dim=-1)
    teacher_weight = torch.cat([student_weight, gap / extra_size**0.5 * normal(vocab_size, extra_size)], dim=-1)
    return HiddenPair(*(x.to(dtype) for x in (student_hidden, student_weight, teacher_hidden, teacher_weight)))


def make_linear_inputs(
    shape: Shape,
    *,
    gap: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    has_bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> LinearInputs:
    """`make_hidden_pair` with its weights as output heads; scale and soft cap on both sides, biases of 0.5 sigma."""
    pair = make_hidden_pair(
        shape.rows,
        shape.vocab_size,
        shape.student_size,
        shape.teacher_size,
        gap=gap,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    student_bias = teacher_bias = None
    if has_bias:
        generator = torch.Generator(device).manual_seed(seed + 1)
        common = 0.5 * torch.randn(shape.vocab_size, generator=generator, dtype=torch.float64, device=device)
        noise = gap * torch.randn(shape.vocab_size, generator=generator, dtype=torch.float64, device=device)
        student_bias, teacher_bias = common.to(dtype), (common + noise).to(dtype)
    return LinearInputs(
        pair.student_hidden_N_D,
        OutputHead(pair.student_weight_V_D, student_bias, logit_scale, softcap),
        pair.teacher_hidden_N_E,
        OutputHead(pair.teacher_weight_V_E, teacher_bias, logit_scale, softcap),
    )


def make_upstream(rows: int, *, seed: int = 0, device: str = "cpu") -> Tensor:
    """Upstream gradients of either sign, float32: normal, so that no row has the same one and none has 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, generator=generator).to(device)
