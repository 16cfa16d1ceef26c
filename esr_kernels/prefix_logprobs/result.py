"""The result of the prefix log-prob ops."""

from typing import NamedTuple

from torch import Tensor


class PrefixLogprobs(NamedTuple):
    """Per response slot t < K of each rollout; float32, or float64 for float64 inputs.

    logprobs_B_K: log-prob of response token t, differentiable; 0 where the mask is False.
    entropy_B_K: entropy in nats of the distribution that token t is drawn from, detached; 0 where the mask is False.
    mask_B_K: bool, slot t holds a response token.
    is_top1_B_K: bool, token t is the likeliest one (of several, that with the lowest id); False where the mask is False.
    """

    logprobs_B_K: Tensor
    entropy_B_K: Tensor
    mask_B_K: Tensor
    is_top1_B_K: Tensor
