"""Seeded inputs of the log-prob ops and of the top-k divergence, by the rules of `esr_kernels.testing.inputs`."""

from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.output_head import OutputHead
from esr_kernels.testing.cases import Shape
from esr_kernels.testing.inputs import make_linear_inputs


class PrefixInputs(NamedTuple):
    """The tensors of `linear_prefix_logprobs`; `logits` gives those of `prefix_logprobs`."""

    hidden_B_T_D: Tensor
    head: OutputHead
    token_ids_B_T: Tensor
    starts_B: Tensor
    lengths_B: Tensor
    horizon: int

    def logits(self) -> Tensor:
        """(B, T, V) of the dtype of the hidden states, as transformers computes them."""
        return self.head.logits(self.hidden_B_T_D).to(self.hidden_B_T_D.dtype)


class GatherInputs(NamedTuple):
    """The tensors of `gather_logprobs`."""

    hidden_N_D: Tensor
    head: OutputHead
    token_ids_N_K: Tensor


class TopkInputs(NamedTuple):
    """The tensors of `topk_divergence`; the teacher's log-probs are float32, as they are served."""

    student_hidden_N_D: Tensor
    student_head: OutputHead
    teacher_ids_N_K: Tensor
    teacher_logprobs_N_K: Tensor


def make_prefix_inputs(
    batch_size: int,
    num_columns: int,
    vocab_size: int,
    hidden_size: int,
    *,
    horizon: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **head,
) -> PrefixInputs:
    """Rollouts that start anywhere and end anywhere, whose tokens are likely in every second column and random elsewhere.

    `head` are the options of `make_linear_inputs` that concern one.
    """
    shape = Shape(batch_size * num_columns, vocab_size, hidden_size, hidden_size + 1)
    linear = make_linear_inputs(shape, seed=seed, dtype=dtype, device=device, **head)
    hidden_B_T_D = linear.student_hidden_N_D.view(batch_size, num_columns, hidden_size)
    generator = torch.Generator().manual_seed(seed + 2)

    def integers(least: int, most: Tensor) -> Tensor:
        drawn = torch.rand(most.shape, generator=generator, dtype=torch.float64)
        return least + (drawn * (most - least + 1)).long()

    starts_B = integers(1, torch.full((batch_size,), num_columns - 1))
    lengths_B = integers(0, num_columns - starts_B)
    token_ids_B_T = integers(0, torch.full((batch_size, num_columns), vocab_size - 1)).to(device)
    likeliest_B_T = linear.student_head.logits(hidden_B_T_D).argmax(-1)
    token_ids_B_T[:, 1::2] = likeliest_B_T[:, :-1:2][:, : token_ids_B_T[:, 1::2].shape[1]]
    integer_tensors = token_ids_B_T, starts_B.to(device), lengths_B.to(device)
    return PrefixInputs(hidden_B_T_D, linear.student_head, *integer_tensors, horizon)


def make_gather_inputs(
    shape: Shape, num_ids: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu", **head
) -> GatherInputs:
    """The likeliest id of each row, padding, a repeated id, random ids; the second row is padding alone."""
    linear = make_linear_inputs(shape, seed=seed, dtype=dtype, device=device, **head)
    generator = torch.Generator().manual_seed(seed + 2)
    ids_N_K = torch.randint(-1, shape.vocab_size, (shape.rows, num_ids), generator=generator).to(device)
    if shape.rows and num_ids:
        ids_N_K[:, 0] = linear.student_head.logits(linear.student_hidden_N_D).argmax(-1)
        ids_N_K[:, -1] = ids_N_K[:, num_ids // 2]
        ids_N_K[1:2] = -1
    return GatherInputs(linear.student_hidden_N_D, linear.student_head, ids_N_K)


def make_topk_inputs(
    shape: Shape,
    num_ids: int,
    *,
    gap: float = 0.5,
    temperature: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **head,
) -> TopkInputs:
    """The teacher of `make_linear_inputs` as a server gives it: its likeliest ids in a shuffled order, at `temperature`."""
    linear = make_linear_inputs(shape, gap=gap, seed=seed, dtype=dtype, device=device, **head)
    exact = linear.teacher_hidden_N_E.double() @ linear.teacher_head.weight.double().T
    bias, scale, softcap = (getattr(linear.teacher_head, name) for name in ("bias", "logit_scale", "softcap"))
    exact = scale * (exact if bias is None else exact + bias.double())
    exact = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    top = (exact / temperature).log_softmax(-1).topk(num_ids, dim=-1)
    order = torch.randperm(num_ids, generator=torch.Generator().manual_seed(seed + 2)).to(device)
    student = linear.student_hidden_N_D, linear.student_head
    return TopkInputs(*student, top.indices[:, order], top.values[:, order].float())
