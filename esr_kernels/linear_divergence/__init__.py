"""Divergence per row from hidden states and output heads."""

from esr_kernels.linear_divergence.api import linear_divergence

__all__ = ["linear_divergence"]
