"""The ways to make one training step that are compared, by the names that stand in the results."""

from collections.abc import Callable
from functools import partial

import torch

from bench.floor import StepSetting
from bench.steps.clock import MemoryClock, clocks_of_train_step
from bench.steps.eager import eager_step
from bench.steps.record import StepRecord, Steps
from bench.steps.runs import Pair, make_run
from bench.steps.trl import TrlSteps
from esr_distill.train_step import train_step

OURS, COMPILED = "ours", "ours, compiled step"
EAGER, TRL = "generate + eager full logits", "TRL DistillationTrainer"


class OurSteps:
    """`train_step` itself, on the in-process engine (CUDA graphs on a GPU) and the fused op."""

    def __init__(self, pair: Pair, setting: StepSetting, *, compile_step: bool = False) -> None:
        self.run, self.done = make_run(pair, setting, compile_step=compile_step), 0

    def step(self) -> StepRecord:
        with clocks_of_train_step() as clocks:
            metrics = train_step(self.run, self.done)
        self.done += 1
        (clock,) = clocks
        return StepRecord(
            metrics["loss"],
            metrics["stage_seconds"],
            clock.peak_bytes or None,
            metrics["response_tokens"],
            metrics["longest_rollout"],
        )

    def release(self) -> None:
        self.run.rollouts.release()


class EagerSteps:
    """`generate`, full logits, log-softmax: what one writes without a library."""

    def __init__(self, pair: Pair, setting: StepSetting) -> None:
        self.run, self.done = make_run(pair, setting), 0
        torch.manual_seed(self.run.config.run.seed)

    def step(self) -> StepRecord:
        clock = MemoryClock(self.run.device)
        loss, rollouts = eager_step(self.run, self.done, clock)
        self.done += 1
        lengths_B = rollouts.response_lengths_B
        return StepRecord(loss, clock.seconds, clock.peak_bytes or None, int(lengths_B.sum()), int(lengths_B.max()))

    def release(self) -> None:
        """Nothing is held between steps."""


IMPLEMENTATIONS: dict[str, Callable[[Pair, StepSetting], Steps]] = {
    OURS: OurSteps,
    COMPILED: partial(OurSteps, compile_step=True),
    EAGER: EagerSteps,
    TRL: TrlSteps,
}
# Compilation takes longer than the steps that are timed, so it is measured where it is asked for.
DEFAULT_IMPLEMENTATIONS = (OURS, EAGER, TRL)
GATED = (OURS, COMPILED)
