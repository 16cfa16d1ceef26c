"""Options of the demo. The defaults are what `make demo` runs."""

from dataclasses import dataclass
from typing import Literal

from esr_distill.input_error import InputError


@dataclass(frozen=True)
class DemoConfig:
    """Which task, and how long.

    Args:
        task: rewrite is the task where a short horizon suffices; pointer is one where it does not.
        output_dir: Folder of results.json, the picture, report.html and the runs; unset means runs/demo or runs/demo-pointer.
        steps: Optimizer steps of each arm.
        problems: Held-out problems of the final evaluation.
        seed: Seed of prompts and sampling.
        device: Where the models live; auto takes CUDA when there is one.
    """

    task: Literal["rewrite", "pointer"] = "rewrite"
    output_dir: str | None = None
    steps: int = 140
    problems: int = 512
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "problems"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise InputError(f"seed must be >= 0, got {self.seed}")
