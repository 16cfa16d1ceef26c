"""Divergence per row against a teacher known only at K token ids."""

from esr_kernels.topk_divergence.api import topk_divergence

__all__ = ["topk_divergence"]
