"""Every option of the loop, defined once: frozen dataclasses, checked on construction, parsed by the command line.

The defaults are those of the paper (arXiv 2605.27028): horizon 100, rollouts at temperature 0.7 and top-p 0.95, reverse KL
over the whole vocabulary, averaged over the positions of a rollout and then over rollouts.
"""

from esr_distill.config.data import DataConfig
from esr_distill.config.devices import DevicesConfig
from esr_distill.config.evaluation import EvalConfig, EvaluationConfig, ScorerName
from esr_distill.config.horizon import HorizonScheduleConfig
from esr_distill.config.lora import LoraSettings
from esr_distill.config.loss import DivergenceName, LossConfig
from esr_distill.config.model import ModelConfig
from esr_distill.config.monitoring import MonitoringConfig, TrackerName
from esr_distill.config.optimizer import OptimizerConfig
from esr_distill.config.rollout import RolloutConfig
from esr_distill.config.run import RunConfig
from esr_distill.config.selection import ScoreName, SelectionConfig, SelectionRule, WeightRule
from esr_distill.config.train import TrainConfig

__all__ = [
    "DataConfig",
    "DevicesConfig",
    "DivergenceName",
    "EvalConfig",
    "EvaluationConfig",
    "HorizonScheduleConfig",
    "LoraSettings",
    "LossConfig",
    "ModelConfig",
    "MonitoringConfig",
    "OptimizerConfig",
    "RolloutConfig",
    "RunConfig",
    "ScoreName",
    "ScorerName",
    "SelectionConfig",
    "SelectionRule",
    "TrackerName",
    "TrainConfig",
    "WeightRule",
]
