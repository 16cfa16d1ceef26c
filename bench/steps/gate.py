"""Before a step is timed: our loss and gradient are those of the step written by hand, from one weight and one rollout.

The rollout is given, so that both see the same tokens; they are random ids, because the loss is a function of whatever was
drawn. Ours is `train_step` itself, with an optimizer that keeps the gradient and changes nothing.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.steps.eager import full_logits_loss, given_rollouts
from bench.steps.runs import with_rows
from esr_distill.metrics import StageClock
from esr_distill.prompts import PromptBatch, next_prompt_batch
from esr_distill.rollout import RolloutBatch, RolloutRequest
from esr_distill.train_step import train_step
from esr_distill.training_run import TrainingRun

LOSS_LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}  # relative difference
COSINE_LIMITS = {"float32": 0.999, "bfloat16": 0.99}
# Of float32 logits of one model. Eager PyTorch holds about eight times as much, so long rollouts are compared on fewer rows.
LOGIT_BYTES = 2_500_000_000


@dataclass
class GivenRollouts:
    """A backend that draws what it was given."""

    rollouts: RolloutBatch

    def generate(self, model: torch.nn.Module, prompts: PromptBatch, request: RolloutRequest) -> RolloutBatch:
        return self.rollouts

    def release(self) -> None:
        """Nothing is held."""

    def describe(self, model: torch.nn.Module) -> str:
        return "rollouts: given"


class GradientKeeper:
    """Stands for optimizer and scheduler: keeps the gradients of some weights and leaves the weights alone."""

    def __init__(self, student: torch.nn.Module, names: list[str]) -> None:
        self.student, self.names = student, names
        self.gradients: dict[str, Tensor] = {}

    def step(self) -> None:
        weights = dict(self.student.named_parameters())
        self.gradients = {name: weights[name].grad.clone() for name in self.names}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.student.zero_grad(set_to_none=set_to_none)


class StillScheduler:
    def step(self) -> None:
        """The learning rate stays."""

    def get_last_lr(self) -> list[float]:
        return [0.0]


def compared_weights(student: torch.nn.Module) -> list[str]:
    """The output head, whose gradient the op makes, and the last matrix that the backward pass comes to."""
    head = student.get_output_embeddings().weight
    names = [name for name, weight in student.named_parameters() if weight is head]
    return names + [name for name, weight in student.named_parameters() if weight.ndim == 2 and "layers" in name][:1]


def gate_rows(run: TrainingRun) -> int:
    """Rollouts of the batch that are compared: all, or as many as LOGIT_BYTES hold."""
    vocab_size = run.student.get_output_embeddings().weight.shape[0]
    row_bytes = 4 * vocab_size * (run.prompts.longest + run.rollout_request.horizon)
    return max(1, min(run.config.rollout.batch_size, LOGIT_BYTES // row_bytes))


def random_rollouts(run: TrainingRun) -> RolloutBatch:
    prompts = next_prompt_batch(run.prompts, run.config.rollout.batch_size, 0, run.config.run.seed)
    vocab_size = run.student.get_output_embeddings().weight.shape[0]
    shape = run.config.rollout.batch_size, run.rollout_request.horizon
    response_ids_B_K = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))
    return given_rollouts(prompts, response_ids_B_K.to(run.device))


def step_gate(run: TrainingRun) -> dict:
    """Columns of the comparison; the student is as it was before."""
    run = with_rows(run, gate_rows(run))
    rollouts, names = random_rollouts(run), compared_weights(run.student)
    keeper = GradientKeeper(run.student, names)
    still = replace(run, rollouts=GivenRollouts(rollouts), optimizer=keeper, scheduler=StillScheduler())
    loss = train_step(still, 0)["loss"]
    loss = math.nan if loss is None else loss  # records hold no NaN
    ours = keeper.gradients

    eager_loss = full_logits_loss(run, rollouts, StageClock(run.device))
    eager_loss.backward()
    keeper.step()
    keeper.zero_grad()
    expected = eager_loss.item()
    return {
        "gate_rows": rollouts.batch_size,
        "gate_loss": loss,
        "gate_eager_loss": expected,
        "gate_loss_difference": abs(loss - expected) / max(abs(expected), 1e-30),
        "gate_gradient_cosine": min(cosine(ours[name], keeper.gradients[name]) for name in names),
        "gate_gradients": names,
    }


def check_gate(columns: dict, dtype: str) -> None:
    """Raises AssertionError where loss or gradient differ by more than the dtype explains, or are not finite."""
    difference, cosine_of_gradients = columns["gate_loss_difference"], columns["gate_gradient_cosine"]
    if not difference <= LOSS_LIMITS[dtype]:
        raise AssertionError(
            f"loss {columns['gate_loss']:.6g}, by full logits {columns['gate_eager_loss']:.6g}: relative difference "
            f"{difference:.2g}, at most {LOSS_LIMITS[dtype]:g} in {dtype}"
        )
    if not cosine_of_gradients > COSINE_LIMITS[dtype]:
        raise AssertionError(
            f"gradient of {' or '.join(columns['gate_gradients'])}: cosine {cosine_of_gradients:.6g} to that by full "
            f"logits, more than {COSINE_LIMITS[dtype]:g} wanted in {dtype}"
        )


def cosine(a: Tensor, b: Tensor) -> float:
    """Sums in float64: a head has hundreds of millions of entries."""
    a, b = a.float(), b.float()

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(dtype=torch.float64)

    return (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).item()
