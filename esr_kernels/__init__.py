"""Ops for on-policy distillation with early stopped rollouts. Importing this builds nothing and touches no GPU."""

from esr_kernels.impl import Impl
from esr_kernels.output_head import OutputHead
from esr_kernels.prefix_logprobs import PrefixLogprobs, gather_logprobs, linear_prefix_logprobs, prefix_logprobs
from esr_kernels.sample_tokens import SamplerState, sample_tokens

__version__ = "0.1.0"

__all__ = [
    "Impl",
    "OutputHead",
    "PrefixLogprobs",
    "SamplerState",
    "__version__",
    "gather_logprobs",
    "linear_prefix_logprobs",
    "prefix_logprobs",
    "sample_tokens",
]
