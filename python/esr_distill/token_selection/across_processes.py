"""Weights by rules that compare the rollouts of a whole batch, where each process has a part of it."""

import torch
from torch import Tensor

from esr_distill.devices import Devices
from esr_distill.prefix_positions import PrefixPositions
from esr_distill.token_selection.selection import TokenSelection, weights_of
from esr_kernels import DivergenceOutput


def weights_across(
    selection: TokenSelection, positions: PrefixPositions, divergence: DivergenceOutput, num_rows: int, devices: Devices
) -> Tensor:
    """`selection.weights_N` of this process's candidates, as they are among those of all processes, which each call it.

    Args:
        num_rows: rollouts of one process; the batch has those of the first process first.
    """
    kept_before = [None if kept_N is None else kept_N.cpu() for kept_N in selection.kept_before_N(positions)]
    places = positions.row_N + devices.rank * num_rows, positions.column_N, positions.slot_N, positions.token_ids_N
    mine = kept_before, [place_N.cpu() for place_N in places], [value_N.detach().cpu() for value_N in divergence]
    masks, all_places, values = zip(*devices.gathered(mine), strict=True)
    weights_N = weights_of(
        selection.config,
        [None if kept[0] is None else torch.cat(kept) for kept in zip(*masks, strict=True)],
        PrefixPositions(*(torch.cat(place) for place in zip(*all_places, strict=True))),
        DivergenceOutput(*(torch.cat(value) for value in zip(*values, strict=True))),
    )
    counts = [len(places[0]) for places in all_places]
    return weights_N.split(counts)[devices.rank].to(positions.row_N.device)
