"""Log-probs of the first response tokens of each rollout, from logits."""

from esr_kernels.prefix_logprobs.api import prefix_logprobs
from esr_kernels.prefix_logprobs.result import PrefixLogprobs

__all__ = ["PrefixLogprobs", "prefix_logprobs"]
