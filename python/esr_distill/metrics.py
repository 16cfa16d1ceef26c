"""What a step reports: stage times, what both models say by response position, how rollouts end."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from esr_distill.complete_files import write_text
from esr_distill.input_error import InputError
from esr_distill.json_numbers import finite_or_none
from esr_distill.monitoring.position_bins import means_by_position
from esr_distill.prefix_positions import PrefixPositions
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_kernels import DivergenceOutput

# Gets what a step drew and scored; it must change nothing.
StepWatch = Callable[[RolloutBatch, PrefixPositions, DivergenceOutput], None]
ROUNDING = 1e-4  # nats, in the comparison of a log-prob with an entropy


class StageClock:
    """Seconds by stage: `with clock("rollout"): ...`. On a GPU each stage ends when the device has finished it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def check_finite(loss: Tensor, grad_norm: Tensor, step: int) -> None:
    """Stop before a step that would write NaN into the weights.

    Raises:
        FloatingPointError: loss or gradient norm is not finite.
    """
    if not (math.isfinite(loss.item()) and math.isfinite(grad_norm.item())):
        raise FloatingPointError(
            f"step {step + 1}: loss {loss.item()} and gradient norm {grad_norm.item()} must be finite; "
            "the weights were not changed by this step"
        )


def step_metrics(
    step: int,
    loss: Tensor,
    grad_norm: Tensor,
    learning_rate: float,
    divergence: DivergenceOutput,
    positions: PrefixPositions,
    weights_N: Tensor,
    rollouts: RolloutBatch,
    horizon: int,
    clock: StageClock,
    watch: StepWatch | None = None,
) -> dict:
    """All numbers of one step, as JSON values; `watch` sees what they are made of.

    Entropies and divergences are in nats, means over the scored positions; of these the ones with a weight above 0 are trained.
    None where there is nothing to take a mean of, or the mean is not finite.
    """
    if watch is not None:
        watch(rollouts, positions, divergence)
    lengths_B, stopped_B = rollouts.response_lengths_B, rollouts.stopped_by_eos_B
    tokens = int(lengths_B.sum())
    is_kept_N = weights_N > 0
    is_last_N = positions.slot_N == lengths_B[positions.row_N] - 1
    is_eos_N = is_last_N & stopped_B[positions.row_N]
    # Teacher minus student, of the token that was drawn: below 0 where the teacher thinks less of it.
    log_ratio_N = divergence.teacher_logprob_N - divergence.student_logprob_N
    record = {
        "kind": "step",
        "step": step + 1,
        "loss": loss.item(),
        "divergence": mean_or_none(divergence.divergence_N),
        **by_position(divergence, positions.slot_N),
        "student_entropy": mean_or_none(divergence.student_entropy_N),
        "teacher_entropy": mean_or_none(divergence.teacher_entropy_N),
        "sampled_reverse_kl": mean_or_none(-log_ratio_N),
        "top1_agreement": mean_or_none(divergence.top1_agreement_N),
        "late_agreement": mean_or_none(divergence.top1_agreement_N[positions.slot_N >= 3 * horizon // 4]),
        **teacher_first(divergence),
        "horizon": horizon,
        "scored_tokens": positions.row_N.numel(),
        "trained_tokens": int(is_kept_N.sum()),
        "mean_weight": mean_or_none(weights_N[is_kept_N]),
        "response_tokens": tokens,
        "longest_rollout": int(lengths_B.max().item()),
        "mean_length": lengths_B.float().mean().item(),
        "stopped_by_eos": stopped_B.float().mean().item(),
        "eos_in_prefix": int((is_eos_N & is_kept_N).sum()) / rollouts.batch_size,
        "stop_density": int(stopped_B.sum()) / tokens,
        "stop_log_ratio": mean_or_none(log_ratio_N[is_eos_N]),
        "grad_norm": grad_norm.item(),
        "learning_rate": learning_rate,
        "seconds": clock.total,
        "stage_seconds": dict(clock.seconds),
        "tokens_per_second": tokens / clock.total if clock.total else None,
    }
    return finite_or_none(record)


def mean_or_none(value: Tensor) -> float | None:
    return value.mean().item() if value.numel() else None


def by_position(divergence: DivergenceOutput, slot_N: Tensor) -> dict[str, dict[str, float]]:
    """Divergence, both entropies and top-1 agreement by bin of response position."""
    values = {
        "divergence_by_position": divergence.divergence_N,
        "student_entropy_by_position": divergence.student_entropy_N,
        "teacher_entropy_by_position": divergence.teacher_entropy_N,
        "top1_agreement_by_position": divergence.top1_agreement_N,
    }
    return means_by_position(values, slot_N)


def teacher_first(divergence: DivergenceOutput) -> dict[str, float | None]:
    """Bounds on the share of drawn tokens that are the teacher's likeliest, from what is known of the teacher's distribution q.

    A token with q(y) > 1/2 is the likeliest. One with -log q(y) > H(q) is not, as the likeliest has -log q <= H(q): an entropy is
    a mean of -log q. Between these the rank is not known: only its own probability and the entropy are there, not the others'.
    """
    logprob_N, entropy_N = divergence.teacher_logprob_N, divergence.teacher_entropy_N
    return {
        "teacher_first_at_least": mean_or_none((logprob_N > math.log(0.5)).float()),
        "teacher_first_at_most": mean_or_none((-logprob_N <= entropy_N + ROUNDING).float()),
    }


class MetricsFile:
    """metrics.jsonl: one JSON object a line, on the disk when `write` returns. What is not finite becomes null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(finite_or_none(record), allow_nan=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())

    def drop_after(self, step: int) -> None:
        """Forget the lines of steps later than `step`: a resumed run writes them again."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))


def read_metrics(path: Path, kind: str | None = None) -> list[dict]:
    """The records of a metrics file, all or of one kind ("step", "evaluation"); none if there is no file.

    A last line cut short by a crash is left out.

    Raises:
        InputError: a line that no run wrote.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    records = [_record(line, path, number) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]
    return [record for record in records if kind is None or record.get("kind") == kind]


def _record(line: bytes, path: Path, number: int) -> dict:
    try:
        record = json.loads(line)
    except ValueError:  # no UTF-8, or no JSON
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        shown = line.decode(errors="replace").strip()[:60]
        raise InputError(
            f"{path}, line {number}, must be a record with a step, got {shown!r}; remove the line to go on"
        )
    return record
