from esr_distill.rollout.generate import choose_sampler_impl, generate_rollouts
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_distill.sampler_settings import GREEDY, SamplerSettings

__all__ = ["GREEDY", "RolloutBatch", "SamplerSettings", "choose_sampler_impl", "generate_rollouts"]
