"""Ops for on-policy distillation with early stopped rollouts. Importing this builds nothing and touches no GPU."""

from esr_kernels.divergence import (
    AlphaDivergence,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from esr_kernels.divergence_output import DivergenceOutput
from esr_kernels.gather_logprobs import gather_logprobs
from esr_kernels.impl import Impl
from esr_kernels.linear_divergence import linear_divergence
from esr_kernels.linear_prefix_logprobs import linear_prefix_logprobs
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.output_head import OutputHead
from esr_kernels.prefix_logprobs import PrefixLogprobs, prefix_logprobs
from esr_kernels.sample_tokens import SamplerState, is_native_sampler_built, sample_tokens
from esr_kernels.sampled_kl import (
    reverse_kl_estimate,
    reverse_kl_policy_gradient_loss,
    sampled_forward_kl_loss,
    sampled_reverse_kl_loss,
)
from esr_kernels.token_divergence import token_divergence
from esr_kernels.topk_divergence import select_topk_ids, topk_divergence

__version__ = "0.1.0"

__all__ = [
    "AlphaDivergence",
    "Divergence",
    "DivergenceOutput",
    "ForwardKL",
    "GeneralizedJSD",
    "Impl",
    "LogitStorage",
    "OutputHead",
    "PrefixLogprobs",
    "ReverseKL",
    "SamplerState",
    "SkewForwardKL",
    "SkewReverseKL",
    "TotalVariation",
    "__version__",
    "gather_logprobs",
    "is_native_sampler_built",
    "linear_divergence",
    "linear_prefix_logprobs",
    "prefix_logprobs",
    "reverse_kl_estimate",
    "reverse_kl_policy_gradient_loss",
    "sample_tokens",
    "sampled_forward_kl_loss",
    "sampled_reverse_kl_loss",
    "select_topk_ids",
    "token_divergence",
    "topk_divergence",
]
