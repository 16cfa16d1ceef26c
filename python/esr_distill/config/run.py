"""The run itself."""

from dataclasses import dataclass
from typing import Literal

from esr_distill.config.require import require


@dataclass(frozen=True)
class RunConfig:
    """The run itself.

    Args:
        output_dir: Folder of checkpoints, metrics.jsonl and the resolved config.yaml.
        steps: Optimizer steps.
        seed: Seed of the order of prompts, of sampling, and of a new adapter and its dropout.
        save_every: Steps between checkpoints; the last step is always saved.
        keep_checkpoints: How many of the newest checkpoints are kept.
        keep_best: Keep, beside the newest, the checkpoint that is best by this measure of evaluation (accuracy: the highest; of
            equal ones the first). It needs evaluation.prompts, and every save_every a multiple of evaluation.every.
    """

    output_dir: str = "runs/esr"
    steps: int = 200
    seed: int = 0
    save_every: int = 50
    keep_checkpoints: int = 2
    keep_best: Literal["accuracy"] | None = None

    def __post_init__(self) -> None:
        require(bool(self.output_dir), "run.output_dir", "a folder", self.output_dir)
        require(self.steps >= 1, "run.steps", ">= 1", self.steps)
        require(0 <= self.seed < 2**64, "run.seed", "in [0, 2**64)", self.seed)
        require(self.save_every >= 1, "run.save_every", ">= 1", self.save_every)
        require(self.keep_checkpoints >= 1, "run.keep_checkpoints", ">= 1", self.keep_checkpoints)
