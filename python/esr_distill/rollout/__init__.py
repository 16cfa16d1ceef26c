from esr_distill.rollout.backend import RolloutBackend
from esr_distill.rollout.generate import generate_rollouts
from esr_distill.rollout.inprocess import InProcessBackend
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_distill.rollout.rollout_request import RolloutRequest
from esr_distill.sampler_settings import GREEDY, SamplerSettings

__all__ = [
    "GREEDY",
    "InProcessBackend",
    "RolloutBackend",
    "RolloutBatch",
    "RolloutRequest",
    "SamplerSettings",
    "generate_rollouts",
]
