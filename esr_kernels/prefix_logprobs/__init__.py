"""Log-probs of response tokens: from logits, from hidden states, and of many ids per row."""

from esr_kernels.prefix_logprobs.api import gather_logprobs, linear_prefix_logprobs, prefix_logprobs
from esr_kernels.prefix_logprobs.result import PrefixLogprobs

__all__ = ["PrefixLogprobs", "gather_logprobs", "linear_prefix_logprobs", "prefix_logprobs"]
