"""A whole run."""

from dataclasses import dataclass, field

from esr_distill.config.data import DataConfig
from esr_distill.config.devices import DevicesConfig
from esr_distill.config.evaluation import EvaluationConfig
from esr_distill.config.horizon import HorizonScheduleConfig
from esr_distill.config.loss import LossConfig
from esr_distill.config.model import ModelConfig
from esr_distill.config.monitoring import MonitoringConfig
from esr_distill.config.optimizer import OptimizerConfig
from esr_distill.config.require import require
from esr_distill.config.rollout import RolloutConfig
from esr_distill.config.run import RunConfig
from esr_distill.config.selection import SelectionConfig


@dataclass(frozen=True)
class TrainConfig:
    """A distillation run: horizon, trained positions, divergence, normaliser, stop rule and the two temperatures are
    independent of each other; Early Stopping Rollout, full rollouts and loss-masked full rollouts are combinations."""

    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    horizon: HorizonScheduleConfig = field(default_factory=HorizonScheduleConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        tokens, horizon = self.loss.prefix_tokens, self.rollout.horizon
        require(tokens is None or tokens <= horizon, "loss.prefix_tokens", f"<= rollout.horizon = {horizon}", tokens)
        if self.horizon.kind == "adaptive":
            require(
                tokens is None,
                "loss.prefix_tokens",
                "unset for horizon.kind adaptive, which looks at the last tokens",
                tokens,
            )
        start = self.horizon.start
        moves = start is None or start < horizon
        require(moves, "horizon.start", f"below rollout.horizon = {horizon}, or the horizon never moves", start)
        probed = self.monitoring.probe_tokens
        must_be = f">= rollout.horizon = {horizon} with monitoring.probe_every"
        is_long = self.monitoring.probe_every is None or probed >= horizon
        require(is_long, "monitoring.probe_tokens", must_be, probed)

    @property
    def trained_tokens(self) -> int:
        """Response tokens of each rollout that train: the prefix if one is set, else all up to the horizon."""
        return self.loss.prefix_tokens or self.rollout.horizon
