"""The three arms of the demo: the same start, prompts, steps and seed; only how far rollouts run and what trains differs."""

from dataclasses import dataclass
from pathlib import Path

from esr_distill.config import (
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    MonitoringConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from esr_distill.demo.settings import DemoConfig

MODELS = Path(__file__).parent / "models"
TRAINING_PROBLEMS, HELD_OUT_PROBLEMS = "problems/training.jsonl", "problems/held_out.jsonl"
BATCH_SIZE = 64
CURVE_PROBLEMS = 128
EVALUATE_EVERY = 20


@dataclass(frozen=True)
class TaskSettings:
    """Terms of a task's problems, horizon of ESR, a length that no right reply exceeds, and the learning rate."""

    min_terms: int
    max_terms: int
    horizon: int
    full_length: int
    learning_rate: float


TASK_SETTINGS = {
    "rewrite": TaskSettings(min_terms=2, max_terms=7, horizon=18, full_length=64, learning_rate=1e-4),
    "pointer": TaskSettings(min_terms=9, max_terms=9, horizon=24, full_length=80, learning_rate=2e-4),
}


@dataclass(frozen=True)
class Arm:
    """`horizon` ends the rollouts; the first `prefix_tokens` of each train (None: all of it)."""

    title: str
    horizon: int
    prefix_tokens: int | None


def arms_of(task: str) -> dict[str, Arm]:
    """The arms by folder name."""
    settings = TASK_SETTINGS[task]
    return {
        "full": Arm("full rollout", settings.full_length, None),
        "esr": Arm(f"ESR, horizon {settings.horizon}", settings.horizon, None),
        "full-loss-masked": Arm(
            f"full rollout, loss on first {settings.horizon}", settings.full_length, settings.horizon
        ),
    }


def arm_config(name: str, demo: DemoConfig, output_dir: Path) -> TrainConfig:
    """The training config of one arm; its prompts and problems are files that the demo wrote."""
    arm, settings = arms_of(demo.task)[name], TASK_SETTINGS[demo.task]
    return TrainConfig(
        model=ModelConfig(
            student=str(MODELS / demo.task / "student"), teacher=str(MODELS / demo.task / "teacher"), device=demo.device
        ),
        data=DataConfig(prompts=str(output_dir / TRAINING_PROBLEMS), chat_template=False),
        rollout=RolloutConfig(horizon=arm.horizon, batch_size=BATCH_SIZE, sampling_temperature=1.0, top_p=1.0),
        loss=LossConfig(prefix_tokens=arm.prefix_tokens, normalizer="token_mean"),
        optimizer=OptimizerConfig(
            learning_rate=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            schedule="constant",
            warmup_fraction=0.0,
        ),
        evaluation=EvaluationConfig(
            prompts=str(output_dir / HELD_OUT_PROBLEMS),
            every=EVALUATE_EVERY,
            scorer="number_after_hash",
            max_tokens=settings.full_length,
            batch_size=128,
            limit=CURVE_PROBLEMS,
        ),
        monitoring=MonitoringConfig(samples_every=None),
        run=RunConfig(
            output_dir=str(output_dir / name), steps=demo.steps, seed=demo.seed, save_every=50, keep_checkpoints=1
        ),
    )
