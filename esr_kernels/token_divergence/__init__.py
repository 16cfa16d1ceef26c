"""Divergence per row from two sets of logits."""

from esr_kernels.token_divergence.api import token_divergence

__all__ = ["token_divergence"]
