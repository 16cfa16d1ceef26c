"""Log-probs of many ids per row, from hidden states and an output head."""

from esr_kernels.gather_logprobs.api import gather_logprobs

__all__ = ["gather_logprobs"]
