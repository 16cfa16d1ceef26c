"""Log-probs of the first response tokens of each rollout, from hidden states and an output head."""

from esr_kernels.linear_prefix_logprobs.api import linear_prefix_logprobs

__all__ = ["linear_prefix_logprobs"]
