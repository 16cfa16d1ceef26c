"""What a step reports: stage times, and the divergence by response position."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from esr_distill.complete_files import write_text
from esr_distill.prefix_positions import PrefixPositions
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_kernels import DivergenceOutput

# First response position of each bin of the divergence by position.
POSITION_BINS = (0, 5, 10, 25, 50, 100, 200, 500, 1000, 2000)


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
    rollouts: RolloutBatch,
    clock: StageClock,
) -> dict:
    """All numbers of one step, as JSON values. Entropies and divergences are in nats."""
    lengths_B = rollouts.response_lengths_B.float()
    return {
        "kind": "step",
        "step": step + 1,
        "loss": loss.item(),
        "divergence": divergence.divergence_N.mean().item(),
        "divergence_by_position": mean_by_position(divergence.divergence_N.detach(), positions.slot_N),
        "student_entropy": divergence.student_entropy_N.mean().item(),
        "teacher_entropy": divergence.teacher_entropy_N.mean().item(),
        "sampled_reverse_kl": (divergence.student_logprob_N - divergence.teacher_logprob_N).mean().item(),
        "top1_agreement": divergence.top1_agreement_N.mean().item(),
        "trained_tokens": positions.row_N.numel(),
        "response_tokens": int(lengths_B.sum().item()),
        "longest_rollout": int(lengths_B.max().item()),
        "mean_length": lengths_B.mean().item(),
        "stopped_by_eos": rollouts.stopped_by_eos_B.float().mean().item(),
        "grad_norm": grad_norm.item(),
        "learning_rate": learning_rate,
        "seconds": clock.total,
        "stage_seconds": dict(clock.seconds),
    }


def mean_by_position(value_N: Tensor, slot_N: Tensor) -> dict[str, float]:
    """Mean of a value by bin of response position, e.g. {"0-4": .., "5-9": ..}; empty bins are left out."""
    ends = [*POSITION_BINS[1:], None]
    means = {}
    for first, end in zip(POSITION_BINS, ends, strict=True):
        inside_N = (slot_N >= first) & (slot_N < end) if end else slot_N >= first
        if inside_N.any():
            means[f"{first}-{end - 1}" if end else f"{first}+"] = value_N[inside_N].mean().item()
    return means


class MetricsFile:
    """metrics.jsonl: one JSON object a line, on the disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            os.fsync(lines.fileno())

    def drop_after(self, step: int) -> None:
        """Forget the lines of steps later than `step`: a resumed run writes them again."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))


def read_metrics(path: Path, kind: str | None = None) -> list[dict]:
    """The records of a metrics file, all or of one kind ("step", "evaluation"); none if there is no file.

    A last line cut short by a crash is left out.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if kind is None or record["kind"] == kind]
