"""How much probability a cut vocabulary (`loss.vocab_size`) leaves out."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esr_distill.config import TrainConfig
from esr_distill.devices.sharding import whole_head
from esr_distill.hidden_states import output_head
from esr_distill.models.teacher import Teacher
from esr_distill.prompts import PromptSet, PromptStream, pad_prompts
from esr_distill.rollout.eval_mode import eval_mode
from esr_distill.rollout.rollout_batch import prompt_inputs
from esr_kernels import OutputHead

LOGITS_AT_A_TIME = 2**25  # 128 MiB in float32
PROMPTS_ASKED = 16


@dataclass(frozen=True)
class DiscardedMass:
    """Probability of the ids from `vocab_size` on, over the rows that were asked about."""

    mean: float
    largest: float


@torch.no_grad()
def discarded_mass(hidden_N_D: Tensor, head: OutputHead, vocab_size: int, *, temperature: float = 1.0) -> DiscardedMass:
    """Mean and largest mass that the softmax of each row has beyond `vocab_size`; 0 for a head that is no wider.

    exp(logsumexp(cut ids) - logsumexp(all ids)), in float32 (float64 for float64 hidden states), a few rows at a time: a mass of
    1e-20 is told as such, and not as the rest of 1. NaN in a row gives NaN.

    Args:
        hidden_N_D: (N, D), N >= 1, on any device.
        temperature: of the softmax; `loss.loss_temperature` for what the loss leaves out.
    """
    rows_at_a_time = max(1, LOGITS_AT_A_TIME // head.vocab_size)
    masses = []
    for rows_M_D in hidden_N_D.split(rows_at_a_time):
        logits_M_V = head.logits(rows_M_D) / temperature
        beyond_M = logits_M_V[:, vocab_size:].logsumexp(-1) - logits_M_V.logsumexp(-1)
        masses.append(beyond_M.exp())
    mass_N = torch.cat(masses)
    return DiscardedMass(mass_N.mean().item(), mass_N.max().item())


def describe_discarded_mass(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Teacher,
    prompts: PromptSet | PromptStream,
    config: TrainConfig,
    autocast: AbstractContextManager,
) -> str:
    """What both models would give to the ids that are cut, as the first token after the first prompts, in words for the log.

    Before training there is no rollout to ask about, but there are prompts. `autocast` is where the student runs.
    """
    first = prompts.first(PROMPTS_ASKED)
    count = len(first.token_ids)
    batch = pad_prompts(first, range(count), request_ids=range(count))
    asked = {"vocab_size": config.loss.vocab_size, "temperature": config.loss.loss_temperature}
    with torch.no_grad(), eval_mode(student):
        with autocast:
            student_hidden_B_D = student.base_model(**prompt_inputs(batch), use_cache=False).last_hidden_state[:, -1]
        teacher_hidden_B_E = teacher.base_model(**prompt_inputs(batch.for_teacher), use_cache=False).last_hidden_state[
            :, -1
        ]
        of_student = discarded_mass(student_hidden_B_D, output_head(student), **asked)
        of_teacher = discarded_mass(teacher_hidden_B_E, whole_head(output_head(teacher)), **asked)
    parts = [
        f"{name} {mass.mean:.3g} (at most {mass.largest:.3g})"
        for name, mass in (("student", of_student), ("teacher", of_teacher))
    ]
    return (
        f"loss.vocab_size {config.loss.vocab_size}: probability of the ids that are cut, after the first {count} prompts: "
        + ", ".join(parts)
    )
