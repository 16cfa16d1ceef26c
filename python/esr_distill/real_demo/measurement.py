"""What the demo measures of a model: greedy replies to held-out problems, and the distance to the teacher by position."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel

from esr_distill.config import DataConfig, EvaluationConfig
from esr_distill.evaluation.accuracy import estimate_mean
from esr_distill.evaluation.evaluate import Evaluation
from esr_distill.evaluation.scorers import last_number, normalize_number, number_after_hash
from esr_distill.models import find_stop_ids, load_model, load_tokenizer
from esr_distill.prompts import PromptRecord
from esr_distill.real_demo.gsm8k import Problem

MAX_REPLY_TOKENS = 160
REPLY_BATCH_SIZE, DIVERGENCE_BATCH_SIZE = 24, 16
DIVERGENCE_PROBLEMS = 32
TEACHER_FORMAT = re.compile(r"####\s*\$?-?\d")


@dataclass(frozen=True)
class Measurement:
    """Held-out problems, ready for greedy replies (`replies`) and for sampled rollouts (`rollouts`). All in float32."""

    replies: Evaluation
    rollouts: Evaluation
    horizon: int
    device: torch.device

    @classmethod
    def prepare(
        cls, model_folder: Path, problems: list[Problem], data: DataConfig, *, horizon: int, device: torch.device
    ) -> "Measurement":
        """Rollouts, on the first problems only, run twice as long as the horizon: half of their positions lie past it."""
        model = load_float32(model_folder, device)
        tokenizer = load_tokenizer(str(model_folder), "student")
        replies = Evaluation.prepare(
            [PromptRecord(problem.question, problem.answer) for problem in problems],
            tokenizer,
            data,
            EvaluationConfig(max_tokens=MAX_REPLY_TOKENS, batch_size=REPLY_BATCH_SIZE),
            stop=find_stop_ids(tokenizer, model),
            model=model,
            device=device,
        )
        first = replace(
            replies.problems,
            token_ids=replies.problems.token_ids[:DIVERGENCE_PROBLEMS],
            answers=replies.problems.answers[:DIVERGENCE_PROBLEMS],
        )
        settings = replace(replies.settings, max_tokens=2 * horizon, batch_size=DIVERGENCE_BATCH_SIZE)
        return cls(replies, replace(replies, problems=first, settings=settings), horizon, device)

    def of(self, folder: Path, teacher_folder: Path | None, console: Console) -> dict:
        """Replies of the model at `folder` and, if a teacher is given, its divergence from it; as JSON values."""
        model = load_float32(folder, self.device)
        result = self.reply_record(model, console)
        if teacher_folder is not None:
            result |= self.divergence(model, load_float32(teacher_folder, self.device), console)
        return result

    def reply_record(self, model: PreTrainedModel, console: Console) -> dict:
        """Accuracy, share of replies in the teacher's format, finished share, mean length, and the first replies."""
        replies = self.replies.replies(model, console if console.is_terminal else None)
        answers, count = self.replies.problems.answers, len(replies)
        correct = [
            final_answer(reply.text) == normalize_number(answer) for reply, answer in zip(replies, answers, strict=True)
        ]
        accuracy = estimate_mean(np.array(correct))
        return {
            "accuracy": accuracy.value,
            "standard_error": accuracy.standard_error,
            "count": count,
            "teacher_format": sum(TEACHER_FORMAT.search(reply.text) is not None for reply in replies) / count,
            "finished": sum(reply.finished for reply in replies) / count,
            "mean_length": sum(reply.length for reply in replies) / count,
            "examples": [reply.text for reply in replies[:4]],
        }

    def divergence(self, model: PreTrainedModel, teacher: PreTrainedModel, console: Console) -> dict:
        """Mean KL(model || teacher) on the model's own rollouts, sampled at temperature 1: by position, in and past
        the horizon. A mean over positions weighs each drawn token alike; it is None where no rollout got that far."""
        sum_K, count_K = self.rollouts.own_divergence(model, teacher, console if console.is_terminal else None)
        return {
            "reverse_kl_inside_horizon": ratio(sum_K[: self.horizon], count_K[: self.horizon]),
            "reverse_kl_past_horizon": ratio(sum_K[self.horizon :], count_K[self.horizon :]),
            "reverse_kl_by_position": (sum_K / count_K).tolist(),
            "rollouts_by_position": count_K.tolist(),
        }


def final_answer(reply: str) -> str | None:
    """The first number after "#", else the last number: an untouched model states its answer in any form, and one that
    does not stop goes on writing numbers after it."""
    return number_after_hash(reply) or last_number(reply)


def ratio(sums_K: torch.Tensor, counts_K: torch.Tensor) -> float | None:
    """Sum over sum; None for nothing over nothing."""
    return (sums_K.sum() / counts_K.sum()).item() if counts_K.sum() > 0 else None


def load_float32(folder: Path, device: torch.device) -> PreTrainedModel:
    """A model for measuring: float32, so that rounding adds nothing to small divergences; no gradients."""
    model = load_model(str(folder), "model", dtype="float32", attn_implementation="sdpa", device=device)
    return model.requires_grad_(False)
