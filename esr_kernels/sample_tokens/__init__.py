"""The sampler: draws rollout tokens and stops rows without asking the host."""

from esr_kernels.sample_tokens.api import sample_tokens
from esr_kernels.sample_tokens.native import is_native_sampler_built
from esr_kernels.sample_tokens.state import SamplerState

__all__ = ["SamplerState", "is_native_sampler_built", "sample_tokens"]
