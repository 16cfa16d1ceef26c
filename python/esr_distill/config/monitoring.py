"""What is shown and recorded while a run goes on."""

from dataclasses import dataclass, field
from typing import Literal

from esr_distill.config.require import require

TrackerName = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class MonitoringConfig:
    """What is shown and recorded beside metrics.jsonl, which is always written. None of it changes the run.

    Args:
        samples_every: Each this many steps, show rollouts of the step and add them to samples.jsonl; null is off.
        samples: How many rollouts are shown and recorded, the first ones of the batch.
        sample_width: Characters of a prompt and of a rollout that are shown; samples.jsonl has all of them.
        trackers: Who gets the numbers too, through accelerate's trackers, each by its own package, e.g. [tensorboard].
        project: Name of the project at wandb and trackio; the run has the name of its folder.
        probe_every: Each this many steps, before the first and after the last, answer some prompts at full length and let the
            teacher score all of it; unset is off.
        probe_prompts: How many prompts of data.prompts the probe answers, the same ones each time.
        probe_tokens: Response tokens after which an answer of the probe counts as cut.
        probe_seed: Seed of the choice of these prompts and of sampling, the same in every probe.
    """

    samples_every: int | None = 50
    samples: int = 4
    sample_width: int = 400
    trackers: list[TrackerName] = field(default_factory=list)
    project: str = "esr-distill"
    probe_every: int | None = None
    probe_prompts: int = 16
    probe_tokens: int = 2048
    probe_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples_every", "probe_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"monitoring.{name}", ">= 1 or unset", value)
        for name in ("samples", "sample_width", "probe_prompts", "probe_tokens"):
            value = getattr(self, name)
            require(value >= 1, f"monitoring.{name}", ">= 1", value)
        require(0 <= self.probe_seed < 2**64, "monitoring.probe_seed", "in [0, 2**64)", self.probe_seed)
        require(bool(self.project), "monitoring.project", "a name", self.project)
        is_unique = len(set(self.trackers)) == len(self.trackers)
        require(is_unique, "monitoring.trackers", "without repeats", self.trackers)
