"""Options of the real-model demo. The defaults are what `make demo-real` runs."""

from dataclasses import dataclass
from typing import Literal

from esr_distill.input_error import InputError


@dataclass(frozen=True)
class RealDemoConfig:
    """How long the teacher is fine-tuned and the student distilled.

    Args:
        output_dir: Folder of the models, the run, the measurements and the result.
        teacher_steps: Fine-tuning steps that make the teacher; 0 is refused, an untouched teacher has nothing to teach.
        steps: Distillation steps.
        horizon: Response tokens of each rollout.
        problems: Held-out problems of the evaluation.
        seed: Seed of prompts and sampling.
        autocast: Train under bfloat16 autocast; auto is on for CPUs with bfloat16 instructions and for CUDA.
        device: Where the models live; auto takes CUDA when there is one.
    """

    output_dir: str = "runs/demo-real"
    teacher_steps: int = 50
    steps: int = 20
    horizon: int = 48
    problems: int = 48
    seed: int = 0
    autocast: Literal["auto", "on", "off"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        # An accuracy on one problem has no standard error.
        for name, least in (("teacher_steps", 1), ("steps", 1), ("horizon", 1), ("problems", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.seed < 0:
            raise InputError(f"seed must be >= 0, got {self.seed}")
