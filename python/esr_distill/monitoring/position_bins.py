"""Means by bin of response position: where in a rollout the two models differ."""

from collections.abc import Mapping

import torch
from torch import Tensor

# First response position of each bin.
POSITION_BINS = (0, 5, 10, 25, 50, 100, 200, 500, 1000, 2000)


def bin_names() -> list[str]:
    """ "0-4", "5-9", ..., "2000+"."""
    ends = POSITION_BINS[1:]
    return [*(f"{first}-{end - 1}" for first, end in zip(POSITION_BINS, ends, strict=False)), f"{POSITION_BINS[-1]}+"]


def means_by_position(values: Mapping[str, Tensor], slot_N: Tensor) -> dict[str, dict[str, float]]:
    """For each named value (N,) its mean in every bin that has a position. The device is waited for once, not once a bin."""
    bin_N = _bin_of(slot_N)
    counts_C = torch.bincount(bin_N, minlength=len(POSITION_BINS)).double()
    rows = [counts_C]
    for value_N in values.values():
        sums_C = torch.zeros_like(counts_C).index_add_(0, bin_N, value_N.detach().double())
        rows.append(sums_C / counts_C)
    counts, *means = torch.stack(rows).tolist()
    return {
        name: {label: mean for label, mean, count in zip(bin_names(), row, counts, strict=True) if count}
        for name, row in zip(values, means, strict=True)
    }


def count_by_position(slot_N: Tensor) -> dict[str, int]:
    """Number of positions in each bin that has one."""
    counts = torch.bincount(_bin_of(slot_N), minlength=len(POSITION_BINS)).tolist()
    return {label: count for label, count in zip(bin_names(), counts, strict=True) if count}


def _bin_of(slot_N: Tensor) -> Tensor:
    first_C = torch.tensor(POSITION_BINS, device=slot_N.device)
    return torch.bucketize(slot_N, first_C, right=True) - 1
