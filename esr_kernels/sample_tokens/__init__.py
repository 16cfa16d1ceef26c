"""The sampler: draws rollout tokens and stops rows without asking the host."""

from esr_kernels.sample_tokens.api import sample_tokens
from esr_kernels.sample_tokens.state import SamplerState

__all__ = ["SamplerState", "sample_tokens"]
