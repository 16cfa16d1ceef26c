"""What training on prefixes never sees: some prompts answered at full length, all of it scored by the teacher.

A probe changes nothing of the run. It draws from random streams of its own with a backend of its own, in eval mode and without
gradients, and puts torch's generators back as it found them. Several processes each answer and score their share of the prompts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esr_distill import preflight
from esr_distill.config import MonitoringConfig
from esr_distill.devices import Devices
from esr_distill.devices.sharding import whole_head
from esr_distill.devices.shares import in_order, share_of
from esr_distill.evaluation.accuracy import estimate_mean
from esr_distill.evaluation.evaluate import decode_replies
from esr_distill.evaluation.grades import Reply, grade_replies
from esr_distill.evaluation.repetition import is_repetitive
from esr_distill.evaluation.scorers import SCORERS, expected_answer
from esr_distill.hidden_states import last_hidden_states, output_head
from esr_distill.input_error import InputError
from esr_distill.metrics import by_position, mean_or_none
from esr_distill.monitoring.position_bins import count_by_position
from esr_distill.monitoring.teacher_rank import TeacherRanks, rank_summary, teacher_ranks
from esr_distill.prefix_positions import gather_rows, select_prefix_positions
from esr_distill.prompts import PromptBatch, PromptSet, PromptStream, pad_prompts
from esr_distill.rollout import RolloutBackend, RolloutBatch, RolloutRequest
from esr_distill.rollout.choose_backend import make_backend
from esr_distill.rollout.eval_mode import eval_mode
from esr_distill.score_positions import score_positions
from esr_distill.step_parts import rows_of
from esr_distill.teacher_prompts import teacher_hidden_states
from esr_distill.training_run import TrainingRun
from esr_kernels import DivergenceOutput

# Request ids of a probe begin here: no training step gets that far, so their random streams are others whatever the seeds.
FIRST_REQUEST = 2**62


@dataclass(frozen=True)
class FullLengthProbe:
    """The prompts of a probe, ready to be answered again and again, `batch_size` at a time in each of the processes `devices`."""

    prompts: PromptSet
    settings: MonitoringConfig
    scorer: str
    batch_size: int
    rollouts: RolloutBackend
    devices: Devices

    @classmethod
    def prepare(cls, run: TrainingRun) -> "FullLengthProbe | None":
        """None where `monitoring.probe_every` is unset.

        Raises:
            InputError: fewer prompts than asked for, or one that leaves no room for its answer in a model's context.
        """
        config = run.config
        if config.monitoring.probe_every is None:
            return None
        prompts = choose_prompts(run.prompts, config.monitoring)
        limit, source = preflight.prompt_limit(
            None, config.monitoring.probe_tokens, "monitoring.probe_tokens", run.student, run.teacher
        )
        if prompts.longest > limit:
            raise InputError(
                f"monitoring.probe_tokens must leave room for the probe's prompts, of at most {limit} tokens ({source}), "
                f"got one of {prompts.longest} tokens"
            )
        if any(answer is not None for answer in prompts.answers):
            SCORERS[config.evaluation.scorer].check("evaluation.scorer", config.evaluation.scorer)
        # The training backend keeps cache and captured steps for the horizon; a longer one would make it drop them.
        backend = make_backend(config.rollout, devices=run.devices)
        batch_size = config.rollout.batch_size // run.devices.world_size
        return cls(prompts, config.monitoring, config.evaluation.scorer, batch_size, backend, run.devices)

    @torch.no_grad()
    def measure(self, run: TrainingRun, trained_tokens: int) -> dict:
        """Answer the prompts with the student's present weights and score the answers, as JSON values: the same in all processes,
        which all call it, but for the seconds.

        `trained_tokens` are the first tokens of a rollout that training sees now; what lies behind them is told apart.
        """
        start = time.perf_counter()
        generators = [run.device] if run.device.type == "cuda" else []
        answers: list[tuple[Reply, DivergenceOutput, Tensor, TeacherRanks]] = []
        with eval_mode(run.student), torch.random.fork_rng(devices=generators):
            for prompts in self._batches():
                with run.autocast():
                    rollouts = self.rollouts.generate(run.student, prompts, self._request(run))
                for row, reply in enumerate(decode_replies(rollouts, run.tokenizer)):
                    answers.append((reply, *self._score(run, prompts, rollouts, row)))
            self.rollouts.release()
        answers = in_order(answers, len(self.prompts.token_ids), self.devices)
        replies, divergences, slots, ranks = zip(*answers, strict=True)
        divergence = DivergenceOutput(*map(torch.cat, zip(*divergences, strict=True)))
        slot_N = torch.cat(slots)
        is_behind_N = slot_N >= trained_tokens
        return {
            "prompts": len(replies),
            "max_tokens": self.settings.probe_tokens,
            "trained_tokens": trained_tokens,
            "mean_length": sum(reply.length for reply in replies) / len(replies),
            "finished": sum(reply.finished for reply in replies) / len(replies),
            "repetitive": sum(is_repetitive(reply.end_repeats) for reply in replies) / len(replies),
            "scored_tokens": slot_N.numel(),
            "divergence": mean_or_none(divergence.divergence_N),
            "divergence_before": mean_or_none(divergence.divergence_N[~is_behind_N]),
            "divergence_behind": mean_or_none(divergence.divergence_N[is_behind_N]),
            "tokens_behind": int(is_behind_N.sum()),
            "top1_agreement": mean_or_none(divergence.top1_agreement_N),
            "teacher_rank_of_drawn": rank_summary(torch.cat([rank.drawn_N for rank in ranks])),
            "teacher_rank_of_student_top": rank_summary(torch.cat([rank.student_top_N for rank in ranks])),
            **by_position(divergence, slot_N),
            "tokens_by_position": count_by_position(slot_N),
            **self._accuracy(replies),
            "seconds": time.perf_counter() - start,
        }

    def _request(self, run: TrainingRun) -> RolloutRequest:
        return replace(run.rollout_request, horizon=self.settings.probe_tokens, seed=self.settings.probe_seed)

    def _batches(self) -> list[PromptBatch]:
        """The prompts of this process."""
        share = share_of(len(self.prompts.token_ids), self.devices)
        pieces = [share[first : first + self.batch_size] for first in range(0, len(share), self.batch_size)]
        return [pad_prompts(self.prompts, piece, [FIRST_REQUEST + i for i in piece]) for piece in pieces]

    def _score(
        self, run: TrainingRun, prompts: PromptBatch, rollouts: RolloutBatch, row: int
    ) -> tuple[DivergenceOutput, Tensor, TeacherRanks]:
        """The training divergence at every token of one answer, the tokens' positions, and the teacher's ranks, on the CPU. One
        answer at a time: they are long."""
        prompts, rollouts = rows_of(prompts, rollouts, slice(row, row + 1))
        with run.autocast():
            student_hidden_1_T_D = last_hidden_states(run.student, rollouts)
        teacher_hidden_1_T_E = teacher_hidden_states(run.teacher, rollouts, prompts)
        positions = select_prefix_positions(rollouts, self.settings.probe_tokens)
        divergence = score_positions(run, student_hidden_1_T_D, teacher_hidden_1_T_E, positions)
        loss = run.config.loss
        ranks = teacher_ranks(
            gather_rows(student_hidden_1_T_D, positions),
            whole_head(output_head(run.student)),
            gather_rows(teacher_hidden_1_T_E, positions),
            whole_head(output_head(run.teacher)),
            positions.token_ids_N,
            stop_ids=run.stop.eos_ids if loss.merge_stop_ids else (),
            vocab_size=loss.vocab_size,
        )
        on_cpu = DivergenceOutput(*(value_N.cpu() for value_N in divergence)), positions.slot_N.cpu()
        return *on_cpu, TeacherRanks(ranks.drawn_N.cpu(), ranks.student_top_N.cpu())

    def _accuracy(self, replies: Sequence[Reply]) -> dict:
        """Over the prompts whose answer is known, None where none is."""
        expected = [None if text is None else expected_answer(text, self.scorer) for text in self.prompts.answers]
        known = [place for place, answer in enumerate(expected) if answer is not None]
        if not known:
            return {"answers_known": 0, "accuracy": None, "standard_error": None}
        grades = grade_replies([replies[i] for i in known], [expected[i] for i in known], self.scorer, 1)
        estimate = estimate_mean(grades.correct_Q_S.mean(-1))
        return {
            "answers_known": len(known),
            "accuracy": estimate.value,
            "standard_error": estimate.standard_error,
        }


def choose_prompts(prompts: PromptSet | PromptStream, settings: MonitoringConfig) -> PromptSet:
    """`monitoring.probe_prompts` of them, by `monitoring.probe_seed`; of a stream, out of its first window."""
    is_stream = isinstance(prompts, PromptStream)
    available = prompts.window if is_stream else len(prompts.token_ids)
    if settings.probe_prompts > available:
        where = "data.stream_prompts" if is_stream else "the number of prompts"
        raise InputError(f"monitoring.probe_prompts must be at most {available}, {where}, got {settings.probe_prompts}")
    return prompts.at_turns(range(settings.probe_prompts), settings.probe_seed)


def describe_probe(record: dict, step: int) -> str:
    """One line for the log."""
    parts = [
        f"step {step}, full-length probe: {record['prompts']} prompts, mean length {record['mean_length']:.1f} tokens, "
        f"finished {100 * record['finished']:.0f} %, repetitive {100 * record['repetitive']:.0f} %"
    ]
    for name, where in (("divergence_before", "in"), ("divergence_behind", "behind")):
        if record[name] is not None:
            parts.append(f"divergence {record[name]:.4f} {where} the first {record['trained_tokens']} tokens")
    if record["accuracy"] is not None:
        parts.append(f"accuracy {100 * record['accuracy']:.1f} % of {record['answers_known']}")
    return ", ".join(parts)
