"""Divergence per row against a teacher known only at K token ids."""

from esr_kernels.topk_divergence.api import topk_divergence
from esr_kernels.topk_divergence.topk_ids import select_topk_ids

__all__ = ["select_topk_ids", "topk_divergence"]
