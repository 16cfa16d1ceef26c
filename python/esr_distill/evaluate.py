"""Measure a model: greedy accuracy with its standard error, and the divergence by response position."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esr_distill import preflight
from esr_distill.config import DataConfig, EvaluationConfig
from esr_distill.distill_loss import choose_impl
from esr_distill.hidden_states import last_hidden_states, output_head
from esr_distill.input_error import InputError
from esr_distill.models import StopIds
from esr_distill.prefix_positions import gather_rows, select_prefix_positions
from esr_distill.prompts import PromptRecord, PromptSet, pad_prompts, tokenize_prompts
from esr_distill.rollout import InProcessBackend, RolloutBackend, RolloutBatch, generate_rollouts
from esr_distill.sampler_settings import GREEDY, SamplerSettings
from esr_distill.scorers import expected_answer, is_correct
from esr_kernels import Divergence, ReverseKL, linear_divergence


@dataclass(frozen=True)
class Accuracy:
    """Greedy accuracy on `count` problems.

    Attributes:
        accuracy: Share of replies with the right final answer.
        standard_error: sqrt(a (1 - a) / n), of the problems drawn; decoding is greedy, so it has no variance of its own.
        count: n.
        mean_length: Mean reply length in tokens.
        finished: Share of replies that ended by EOS within the limit.
    """

    accuracy: float
    standard_error: float
    count: int
    mean_length: float
    finished: float


@dataclass(frozen=True)
class Reply:
    """A response as text, its length in tokens, and whether it ended by EOS within the limit."""

    text: str
    length: int
    finished: bool


@dataclass(frozen=True)
class Evaluation:
    """Held-out problems, ready to be answered."""

    problems: PromptSet
    tokenizer: PreTrainedTokenizerBase
    settings: EvaluationConfig
    stop: StopIds
    rollouts: RolloutBackend

    @classmethod
    def prepare(
        cls,
        records: list[PromptRecord],
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        settings: EvaluationConfig,
        *,
        stop: StopIds,
        model: PreTrainedModel,
        device: torch.device,
        rollouts: RolloutBackend | None = None,
        group: str = "evaluation.",
    ) -> "Evaluation":
        """Tokenise the problems; each must have an answer and fit into the model's context with its reply.

        `rollouts` draws the replies, `InProcessBackend` by default; `group` stands before the names of options in messages.
        """
        option = f"{group}prompts"
        records = records[: settings.limit]
        for number, record in enumerate(records, 1):
            if record.answer is None:
                raise InputError(f'{option} must have an "answer" to every prompt, got none to prompt {number}')
            if expected_answer(record.answer, settings.scorer) is None:
                raise InputError(
                    f"{option} must have answers in which {settings.scorer} finds a number, "
                    f"got {record.answer[:60]!r} to prompt {number}"
                )
        problems = tokenize_prompts(records, tokenizer, data, pad_id=stop.pad_id, device=device, option=option)
        limit, source = preflight.prompt_limit(None, settings.max_tokens, f"{group}max_tokens", model)
        preflight.fit_prompts(problems, limit=limit, limit_source=source, long_prompts="error", option=option)
        return cls(problems, tokenizer, settings, stop, rollouts or InProcessBackend())

    def accuracy(self, model: PreTrainedModel, console: Console | None = None) -> Accuracy:
        """Answer every problem greedily and score the replies; shows progress on `console` if one is given."""
        return self.score(self.replies(model, console))

    def replies(self, model: PreTrainedModel, console: Console | None = None) -> list[Reply]:
        """The greedy reply to each problem, in order."""
        batches = self.batches(model, GREEDY, 0, console)
        return [reply for rollouts in batches for reply in decode_replies(rollouts, self.tokenizer)]

    def score(self, replies: list[Reply]) -> Accuracy:
        """Accuracy of one reply to each problem."""
        pairs = zip(replies, self.problems.answers, strict=True)
        correct = [is_correct(reply.text, answer, self.settings.scorer) for reply, answer in pairs]
        count, share = len(correct), sum(correct) / len(correct)
        return Accuracy(
            accuracy=share,
            standard_error=math.sqrt(share * (1 - share) / count),
            count=count,
            mean_length=sum(reply.length for reply in replies) / count,
            finished=sum(reply.finished for reply in replies) / count,
        )

    def own_divergence(
        self, student: PreTrainedModel, teacher: PreTrainedModel, console: Console | None = None
    ) -> tuple[Tensor, Tensor]:
        """`divergence_by_position` summed over the student's own rollouts to all problems, sampled at temperature 1.

        Returns:
            sum_K, count_K: (K,) float64, up to the last position that a rollout reached.
        """
        sum_K, count_K = torch.zeros(2, self.settings.max_tokens, dtype=torch.float64)
        for rollouts in self.batches(student, SamplerSettings(), 1, console):
            sums, counts = divergence_by_position(student, teacher, rollouts, stop_ids=self.stop.eos_ids)
            sum_K[: len(sums)] += sums
            count_K[: len(counts)] += counts
        reached = int((count_K > 0).sum())
        return sum_K[:reached], count_K[:reached]

    def batches(
        self, model: PreTrainedModel, sampler: SamplerSettings, seed: int, console: Console | None = None
    ) -> Iterator[RolloutBatch]:
        """Rollouts of all problems in order, at most `settings.batch_size` at a time; then the backend's memory is free."""
        starts = range(0, len(self.problems.token_ids), self.settings.batch_size)
        if console is not None:
            starts = track(starts, "evaluating", console=console, transient=True)
        for start in starts:
            indices = list(range(start, min(start + self.settings.batch_size, len(self.problems.token_ids))))
            yield generate_rollouts(
                model,
                pad_prompts(self.problems, indices, request_ids=indices),
                horizon=self.settings.max_tokens,
                sampler=sampler,
                eos_ids=self.stop.eos_ids,
                pad_id=self.stop.pad_id,
                seed=seed,
                backend=self.rollouts,
            )
        self.rollouts.release()


def decode_replies(rollouts: RolloutBatch, tokenizer: PreTrainedTokenizerBase) -> list[Reply]:
    """The responses as text without special tokens."""
    lengths = rollouts.response_lengths_B.tolist()
    rows = zip(rollouts.response_ids_B_K.tolist(), lengths, strict=True)
    texts = tokenizer.batch_decode([ids[:length] for ids, length in rows], skip_special_tokens=True)
    return [Reply(*fields) for fields in zip(texts, lengths, rollouts.stopped_by_eos_B.tolist(), strict=True)]


@torch.no_grad()
def divergence_by_position(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rollouts: RolloutBatch,
    *,
    stop_ids: tuple[int, ...],
    divergence: Divergence | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the divergence and number of rollouts at each response position of `rollouts`.

    The positions after a rollout's end count for nothing, so late positions average over the longer rollouts only:
    read the mean (sum / count) together with the count.

    Returns:
        sum_K, count_K: (K,) float64, K the longest response.
    """
    positions = select_prefix_positions(rollouts, rollouts.response_ids_B_K.shape[1])
    output = linear_divergence(
        gather_rows(last_hidden_states(student, rollouts), positions),
        output_head(student),
        gather_rows(last_hidden_states(teacher, rollouts), positions),
        output_head(teacher),
        divergence or ReverseKL(),
        stop_ids=stop_ids,
        impl=choose_impl(positions.slot_N.device),
    )
    width = rollouts.response_ids_B_K.shape[1]
    sums_K = torch.zeros(width, dtype=torch.float64, device=positions.slot_N.device)
    sums_K.index_add_(0, positions.slot_N, output.divergence_N.double())
    counts_K = torch.bincount(positions.slot_N, minlength=width).double()
    return sums_K.cpu(), counts_K.cpu()
