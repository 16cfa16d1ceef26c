"""A step's rollouts in parts that are scored one after the other, and what came of them as one batch again.

The rollouts of a step are divided over processes, and those of a process over `optimizer.accumulation_steps` parts. They are
drawn together, before any is scored, so the step's number of candidate positions is known before the first backward. Everything
that a part is divided by is that of the whole step, so gradients add up to those of one batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from esr_distill.distill_loss import normalize_divergence
from esr_distill.hidden_states import last_hidden_states
from esr_distill.prefix_positions import PrefixPositions, select_prefix_positions
from esr_distill.prompts import PromptBatch
from esr_distill.rollout.eval_mode import eval_mode
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_distill.score_positions import score_positions
from esr_distill.teacher_prompts import teacher_hidden_states
from esr_distill.token_selection import TokenSelection
from esr_distill.token_selection.whole_batch import weights_of_batch
from esr_distill.training_run import TrainingRun
from esr_kernels import DivergenceOutput


@dataclass(frozen=True)
class StepPart:
    """Rollouts that are scored together, and which of their tokens may train."""

    prompts: PromptBatch
    rollouts: RolloutBatch
    selection: TokenSelection
    positions: PrefixPositions


@dataclass(frozen=True)
class ScoredPart:
    """What a part came to; after `join`, what the whole step did. All of it is detached."""

    loss: Tensor
    rollouts: RolloutBatch
    positions: PrefixPositions
    divergence: DivergenceOutput
    weights_N: Tensor


class StepParts:
    """The parts of one process, and the divisors of the whole step:

    parts = StepParts.of(run, prompts, rollouts)
    for part in parts.parts:
        parts.loss(part, divergence, parts.weights_N(part, divergence)).backward()
    whole, factor = parts.join()

    Under token_mean a part is divided by the candidates of the step, which are known before backward; how many of them a rule
    on scores keeps is known only after the last one. `factor` is candidates over kept, by which gradients must still be
    multiplied. It is 1 for the other normalisers, and where all candidates are kept.
    """

    def __init__(self, run: TrainingRun, parts: list[StepPart]) -> None:
        self.run, self.parts = run, parts
        self.candidates = round(run.devices.sum(sum(part.positions.row_N.numel() for part in parts)))
        self.scored: list[ScoredPart] = []
        self.weights: list[Tensor] = []

    @classmethod
    def of(cls, run: TrainingRun, prompts: PromptBatch, rollouts: RolloutBatch) -> "StepParts":
        config, count = run.config, run.config.optimizer.accumulation_steps
        share = rollouts.batch_size // count
        parts = []
        for first in range(0, rollouts.batch_size, share):
            rows = slice(first, first + share)
            read, drawn = (prompts, rollouts) if count == 1 else rows_of(prompts, rollouts, rows)
            selection = TokenSelection.of(drawn, config.selection, read.request_ids_B, config.run.seed)
            positions = select_prefix_positions(drawn, config.trained_tokens, selection.candidates_B_K)
            parts.append(StepPart(read, drawn, selection, positions))
        return cls(run, parts)

    def weights_N(self, part: StepPart, divergence: DivergenceOutput) -> Tensor:
        """Weight of each candidate of the part, float32 and detached. All processes call it, part by part.

        Rules that compare the rollouts of a batch need the scores of all parts before the first backward: with more parts than
        one, both models read all of them once more, without gradient and dropout.
        """
        devices, parts = self.run.devices, self.parts
        if part.selection.config.compares_rollouts is None or len(parts) * devices.world_size == 1:
            return part.selection.weights_N(part.positions, divergence)
        if not self.weights:
            scores = [divergence] if len(parts) == 1 else [self.score(part) for part in parts]
            scored = [(p.selection, p.positions, score) for p, score in zip(parts, scores, strict=True)]
            self.weights = weights_of_batch(scored, part.rollouts.batch_size, devices)
        return self.weights[len(self.scored)]

    @torch.no_grad()
    def score(self, part: StepPart) -> DivergenceOutput:
        run = self.run
        with eval_mode(run.student), run.autocast():
            student_hidden_B_T_D = last_hidden_states(run.student, part.rollouts)
        teacher_hidden_B_T_E = teacher_hidden_states(run.teacher, part.rollouts, part.prompts)
        return score_positions(run, student_hidden_B_T_D, teacher_hidden_B_T_E, part.positions)

    def loss(self, part: StepPart, divergence: DivergenceOutput, weights_N: Tensor) -> Tensor:
        """The part's share of the step's loss, to call backward on; and the part is remembered for `join`."""
        config = self.run.config
        loss = normalize_divergence(
            divergence.divergence_N,
            weights_N,
            part.positions.row_N,
            config.rollout.batch_size,
            config.loss.normalizer,
            config.loss.denominator,
            self.candidates,
        )
        output = DivergenceOutput(*(value_N.detach() for value_N in divergence))
        self.scored.append(ScoredPart(loss.detach(), part.rollouts, part.positions, output, weights_N))
        return loss

    def join(self) -> tuple[ScoredPart, float]:
        """What all processes scored, in the order of one batch, and the factor of the gradients. All processes call it."""
        whole = joined(self.scored)
        if self.run.devices.world_size > 1:
            whole = joined(self.run.devices.gathered(on_cpu(whole)))
        if self.run.config.loss.normalizer != "token_mean":
            return whole, 1.0
        factor = self.candidates / max(1, int((whole.weights_N > 0).sum()))
        return (
            (whole, 1.0)
            if factor == 1.0 or self.candidates == 0
            else (replace(whole, loss=whole.loss * factor), factor)
        )


def rows_of(prompts: PromptBatch, rollouts: RolloutBatch, rows: slice) -> tuple[PromptBatch, RolloutBatch]:
    """Some rows of a batch, without the columns that none of them uses."""

    def prompt_rows(batch: PromptBatch) -> PromptBatch:
        first = first_used(batch.prompt_mask_B_P[rows])
        return replace(
            batch,
            prompt_ids_B_P=batch.prompt_ids_B_P[rows, first:],
            prompt_mask_B_P=batch.prompt_mask_B_P[rows, first:],
            request_ids_B=batch.request_ids_B[rows],
            teacher_prompts=None if batch.teacher_prompts is None else prompt_rows(batch.teacher_prompts),
            columns_B=None if batch.columns_B is None else batch.columns_B[rows],
        )

    first = first_used(prompts.prompt_mask_B_P[rows])
    lengths_B = rollouts.response_lengths_B[rows]
    longest = int(lengths_B.max())
    columns = slice(first, rollouts.prompt_width + longest)
    drawn = replace(
        rollouts,
        token_ids_B_T=rollouts.token_ids_B_T[rows, columns],
        attention_mask_B_T=rollouts.attention_mask_B_T[rows, columns],
        prompt_width=rollouts.prompt_width - first,
        response_lengths_B=lengths_B,
        stopped_by_eos_B=rollouts.stopped_by_eos_B[rows],
        logprobs_B_K=rollouts.logprobs_B_K[rows, :longest],
        sampling_logprobs_B_K=rollouts.sampling_logprobs_B_K[rows, :longest],
    )
    return prompt_rows(prompts), drawn


def first_used(mask_B_P: Tensor) -> int:
    """The first column with a token; prompts end at the last one."""
    return int(mask_B_P.any(0).int().argmax())


def joined(scored: Sequence[ScoredPart]) -> ScoredPart:
    """Parts as one batch, in their order; the same object where there is one."""
    if len(scored) == 1:
        return scored[0]
    rollouts = join_rollouts([part.rollouts for part in scored])
    first_rows = torch.tensor([0, *(part.rollouts.batch_size for part in scored[:-1])]).cumsum(0).tolist()
    all_positions = [part.positions for part in scored]
    slot_N = torch.cat([positions.slot_N for positions in all_positions])
    positions = PrefixPositions(
        row_N=torch.cat([p.row_N + first for p, first in zip(all_positions, first_rows, strict=True)]),
        column_N=rollouts.prompt_width + slot_N - 1,
        slot_N=slot_N,
        token_ids_N=torch.cat([p.token_ids_N for p in all_positions]),
    )
    divergences = zip(*(part.divergence for part in scored), strict=True)
    return ScoredPart(
        loss=torch.stack([part.loss for part in scored]).sum(),
        rollouts=rollouts,
        positions=positions,
        divergence=DivergenceOutput(*(torch.cat(values) for values in divergences)),
        weights_N=torch.cat([part.weights_N for part in scored]),
    )


def join_rollouts(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """Prompts padded on the left and responses on the right to the widest."""
    prompt_width = max(batch.prompt_width for batch in batches)
    width = max(batch.response_ids_B_K.shape[1] for batch in batches)

    def padded(tensor_B_C: Tensor, batch: RolloutBatch, before: int) -> Tensor:
        return pad(tensor_B_C, (before, width - batch.response_ids_B_K.shape[1]))

    def join(name: str, has_prompt: bool) -> Tensor:
        return torch.cat([padded(getattr(b, name), b, (prompt_width - b.prompt_width) * has_prompt) for b in batches])

    return RolloutBatch(
        token_ids_B_T=join("token_ids_B_T", True),
        attention_mask_B_T=join("attention_mask_B_T", True),
        prompt_width=prompt_width,
        response_lengths_B=torch.cat([batch.response_lengths_B for batch in batches]),
        stopped_by_eos_B=torch.cat([batch.stopped_by_eos_B for batch in batches]),
        logprobs_B_K=join("logprobs_B_K", False),
        sampling_logprobs_B_K=join("sampling_logprobs_B_K", False),
    )


def on_cpu(part: ScoredPart) -> ScoredPart:
    rollouts, positions = part.rollouts, part.positions

    def moved(value: object) -> object:
        return value.cpu() if isinstance(value, Tensor) else value

    return ScoredPart(
        loss=part.loss.cpu(),
        rollouts=RolloutBatch(**{name: moved(value) for name, value in vars(rollouts).items()}),
        positions=PrefixPositions(**{name: moved(value) for name, value in vars(positions).items()}),
        divergence=DivergenceOutput(*(value_N.cpu() for value_N in part.divergence)),
        weights_N=part.weights_N.cpu(),
    )
