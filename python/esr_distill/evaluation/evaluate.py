"""Measure a model: its accuracy on problems, greedy or over samples, and the divergence by response position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esr_distill import preflight
from esr_distill.config import DataConfig, EvaluationConfig
from esr_distill.devices import Devices
from esr_distill.devices.shares import in_order, share_of
from esr_distill.distill_loss import choose_impl
from esr_distill.evaluation.accuracy import Accuracy
from esr_distill.evaluation.grades import Grades, Reply, grade_replies
from esr_distill.evaluation.repetition import end_repeats
from esr_distill.evaluation.scorers import SCORERS, expected_answer
from esr_distill.hidden_states import last_hidden_states, output_head
from esr_distill.input_error import InputError
from esr_distill.models import StopIds
from esr_distill.prefix_positions import gather_rows, select_prefix_positions
from esr_distill.prompts import PromptRecord, PromptSet, pad_prompts, tokenize_prompts
from esr_distill.rollout import InProcessBackend, RolloutBackend, RolloutBatch, generate_rollouts
from esr_distill.rollout.eval_mode import eval_mode
from esr_distill.rollout.hf_generate import HFGenerateBackend
from esr_distill.sampler_settings import SamplerSettings
from esr_kernels import Divergence, ReverseKL, linear_divergence

# Request ids of a problem's samples lie this far apart: sample s of a problem draws from the same random stream whatever the
# number of samples, the limit and the batch size.
SAMPLE_STRIDE = 2**32


@dataclass(frozen=True)
class Evaluation:
    """Held-out problems, ready to be answered. With `vocab_size` only ids below it are drawn, as in training with
    `loss.vocab_size`."""

    problems: PromptSet
    tokenizer: PreTrainedTokenizerBase
    settings: EvaluationConfig
    stop: StopIds
    rollouts: RolloutBackend
    vocab_size: int | None = None

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
        vocab_size: int | None = None,
    ) -> "Evaluation":
        """Tokenise the problems; each must have an answer and fit into the model's context with its reply.

        `rollouts` draws the replies, `InProcessBackend` by default; `group` stands before the names of options in messages.
        """
        option = f"{group}prompts"
        records = records[: settings.limit]
        SCORERS[settings.scorer].check(f"{group}scorer", settings.scorer)
        if settings.sampling_temperature > 0 and isinstance(rollouts, HFGenerateBackend):
            raise InputError(
                f"{group}sampling_temperature must be 0 for the backend hf_generate, whose draws depend on the batch, "
                f"got {settings.sampling_temperature}"
            )
        for number, record in enumerate(records, 1):
            if record.answer is None:
                raise InputError(f'{option} must have an "answer" to every prompt, got none to prompt {number}')
            if expected_answer(record.answer, settings.scorer) is None:
                raise InputError(
                    f"{option} must have answers in which {settings.scorer} finds one to compare with, "
                    f"got {record.answer[:60]!r} to prompt {number}"
                )
        problems = tokenize_prompts(records, tokenizer, data, pad_id=stop.pad_id, device=device, option=option)
        limit, source = preflight.prompt_limit(None, settings.max_tokens, f"{group}max_tokens", model)
        preflight.fit_prompts(problems, limit=limit, limit_source=source, long_prompts="error", option=option)
        return cls(problems, tokenizer, settings, stop, rollouts or InProcessBackend(), vocab_size)

    def accuracy(
        self, model: PreTrainedModel, console: Console | None = None, devices: Devices | None = None
    ) -> Accuracy:
        """Answer every problem and score the replies, the same in all processes; shows progress on `console` if one is given."""
        return self.score(self.replies(model, console, devices))

    def replies(
        self, model: PreTrainedModel, console: Console | None = None, devices: Devices | None = None
    ) -> list[Reply]:
        """The replies to each problem, in order, the `samples_per_problem` of one problem next to each other. With `devices` each
        process draws its share of them, and all call it.

        Each is drawn from a random stream of its own, named by (seed, problem, sample), as training rollouts are, so neither
        batch size nor number of processes changes a random number. They may change the last bits of logits, where matrix
        products depend on their shape.
        """
        settings, count = self.settings, len(self.problems.token_ids)
        devices = devices or Devices(self.problems.device)
        batches = self.batches(
            model,
            settings.sampler,
            settings.seed,
            console,
            samples_per_problem=settings.samples_per_problem,
            problems=share_of(count, devices),
        )
        replies = [reply for rollouts in batches for reply in decode_replies(rollouts, self.tokenizer)]
        return in_order(replies, count * settings.samples_per_problem, devices)

    def grade(self, replies: list[Reply]) -> Grades:
        """What is right about each reply; `replies` are as the method of this name gives them."""
        scorer = self.settings.scorer
        expected = [expected_answer(answer, scorer) for answer in self.problems.answers]
        return grade_replies(replies, expected, scorer, self.settings.samples_per_problem)

    def score(self, replies: list[Reply]) -> Accuracy:
        """Accuracy of the replies."""
        return Accuracy.of(self.grade(replies))

    def own_divergence(
        self, student: PreTrainedModel, teacher: PreTrainedModel, console: Console | None = None
    ) -> tuple[Tensor, Tensor]:
        """`divergence_by_position` summed over the student's own rollouts to all problems, sampled at temperature 1.

        Returns:
            sum_K, count_K: (K,) float64, up to the last position that a rollout reached.
        """
        sum_K, count_K = torch.zeros(2, self.settings.max_tokens, dtype=torch.float64)
        for rollouts in self.batches(student, SamplerSettings(), 1, console):
            sums, counts = divergence_by_position(
                student, teacher, rollouts, stop_ids=self.stop.eos_ids, vocab_size=self.vocab_size
            )
            sum_K[: len(sums)] += sums
            count_K[: len(counts)] += counts
        reached = int((count_K > 0).sum())
        return sum_K[:reached], count_K[:reached]

    def batches(
        self,
        model: PreTrainedModel,
        sampler: SamplerSettings,
        seed: int,
        console: Console | None = None,
        *,
        samples_per_problem: int = 1,
        problems: Sequence[int] | None = None,
    ) -> Iterator[RolloutBatch]:
        """Rollouts of these problems, or of all, in order, at most `settings.batch_size` at a time; then the backend's memory is
        free."""
        problems = range(len(self.problems.token_ids)) if problems is None else problems
        pieces = split_replies(len(problems), samples_per_problem, self.settings.batch_size)
        if console is not None:
            pieces = track(pieces, "evaluating", console=console, transient=True)
        for places, samples in pieces:
            asked = [problems[place] for place in places]
            prompts = pad_prompts(
                self.problems,
                [problem for problem in asked for _ in samples],
                request_ids=[problem + sample * SAMPLE_STRIDE for problem in asked for sample in samples],
                samples_per_prompt=len(samples),
            )
            yield generate_rollouts(
                model,
                prompts,
                horizon=self.settings.max_tokens,
                sampler=sampler,
                eos_ids=self.stop.eos_ids,
                pad_id=self.stop.pad_id,
                seed=seed,
                vocab_size=self.vocab_size,
                backend=self.rollouts,
            )
        self.rollouts.release()


def split_replies(num_problems: int, num_samples: int, batch_size: int) -> list[tuple[range, range]]:
    """(problems, samples) of each batch, at most `batch_size` replies: whole problems where one fits, else a part of one's
    samples. A batch reads each of its prompts once."""
    if num_samples > batch_size:
        pieces = [range(start, min(start + batch_size, num_samples)) for start in range(0, num_samples, batch_size)]
        return [(range(problem, problem + 1), samples) for problem in range(num_problems) for samples in pieces]
    step = batch_size // num_samples
    starts = range(0, num_problems, step)
    return [(range(start, min(start + step, num_problems)), range(num_samples)) for start in starts]


def decode_replies(rollouts: RolloutBatch, tokenizer: PreTrainedTokenizerBase) -> list[Reply]:
    """The responses as text without special tokens."""
    lengths, stopped = rollouts.response_lengths_B.tolist(), rollouts.stopped_by_eos_B.tolist()
    rows = [ids[:length] for ids, length in zip(rollouts.response_ids_B_K.tolist(), lengths, strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    repeats = [end_repeats(ids[:-1] if has_eos else ids) for ids, has_eos in zip(rows, stopped, strict=True)]
    return [Reply(*fields) for fields in zip(texts, lengths, stopped, repeats, strict=True)]


@torch.no_grad()
def divergence_by_position(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rollouts: RolloutBatch,
    *,
    stop_ids: tuple[int, ...],
    divergence: Divergence | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the divergence and number of rollouts at each response position of `rollouts`.

    The positions after a rollout's end count for nothing, so late positions average over the longer rollouts only:
    read the mean (sum / count) together with the count.

    Returns:
        sum_K, count_K: (K,) float64, K the longest response.
    """
    positions = select_prefix_positions(rollouts, rollouts.response_ids_B_K.shape[1])
    with eval_mode(student):
        student_hidden_N_D = gather_rows(last_hidden_states(student, rollouts), positions)
    output = linear_divergence(
        student_hidden_N_D,
        output_head(student),
        gather_rows(last_hidden_states(teacher, rollouts), positions),
        output_head(teacher),
        divergence or ReverseKL(),
        stop_ids=stop_ids,
        vocab_size=vocab_size,
        impl=choose_impl(positions.slot_N.device),
    )
    width = rollouts.response_ids_B_K.shape[1]
    sums_K = torch.zeros(width, dtype=torch.float64, device=positions.slot_N.device)
    sums_K.index_add_(0, positions.slot_N, output.divergence_N.double())
    counts_K = torch.bincount(positions.slot_N, minlength=width).double()
    return sums_K.cpu(), counts_K.cpu()
