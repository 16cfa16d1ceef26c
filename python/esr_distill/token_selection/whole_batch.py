"""Weights by rules that compare the rollouts of a whole batch, which is divided over processes and over parts of each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esr_distill.devices import Devices
from esr_distill.prefix_positions import PrefixPositions
from esr_distill.token_selection.selection import TokenSelection, weights_of
from esr_kernels import DivergenceOutput

PartOfBatch = tuple[TokenSelection, PrefixPositions, DivergenceOutput]


def weights_of_batch(parts: Sequence[PartOfBatch], num_rows: int, devices: Devices) -> list[Tensor]:
    """`selection.weights_N` of each part of this process, as they are among those of all processes, which each call it.

    Args:
        parts: what the selection was made for, its candidates and their scores, in the order of the batch.
        num_rows: rollouts of one part. The batch has those of the first process first.
    """
    first_row = devices.rank * len(parts) * num_rows
    mine = [
        (
            [None if kept_N is None else kept_N.cpu() for kept_N in selection.kept_before_N(positions)],
            PrefixPositions(
                (positions.row_N + first_row + place * num_rows).cpu(),
                positions.column_N.cpu(),
                positions.slot_N.cpu(),
                positions.token_ids_N.cpu(),
            ),
            DivergenceOutput(*(value_N.detach().cpu() for value_N in divergence)),
        )
        for place, (selection, positions, divergence) in enumerate(parts)
    ]
    everybodys = [part for process in devices.gathered(mine) for part in process]
    masks, positions, divergences = zip(*everybodys, strict=True)
    weights_N = weights_of(
        parts[0][0].config,
        [None if kept[0] is None else torch.cat(kept) for kept in zip(*masks, strict=True)],
        PrefixPositions(*(torch.cat(place) for place in zip(*(vars(p).values() for p in positions), strict=True))),
        DivergenceOutput(*(torch.cat(value) for value in zip(*divergences, strict=True))),
    )
    weights = weights_N.split([len(p.row_N) for p in positions])
    first = devices.rank * len(parts)
    return [weights_M.to(parts[0][1].row_N.device) for weights_M in weights[first : first + len(parts)]]
