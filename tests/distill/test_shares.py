"""Which items does each process work on, and do results come back in the items' order?  pytest tests/distill/test_shares.py"""

from dataclasses import dataclass, field

import pytest
import torch

from esr_distill.devices import Devices
from esr_distill.devices.shares import in_order, share_of

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Gathered(Devices):
    """A process to which the others' values were already sent."""

    values: list = field(default_factory=list)

    def gathered(self, value: object) -> list:
        assert value == self.values[self.rank]
        return self.values


@pytest.mark.parametrize(
    ("count", "shares"),
    [
        (5, [[0, 1, 2, 3, 4]]),
        (6, [[0, 1, 2], [3, 4, 5]]),
        (5, [[0, 1], [2, 3], [4, 0]]),
        (5, [[0, 1], [2, 3], [4, 0], [1, 2]]),  # the last has none of its own
        (2, [[0], [1], [0], [1], [0]]),
        (1, [[0], [0], [0]]),
        (0, [[], []]),
    ],
)
@pytest.mark.parametrize("each", [1, 3])
def test_shares_and_their_results(count, shares, each):
    """`each` results of an item; what another process makes of an item is told apart by its rank."""
    size = len(shares)
    assert [share_of(count, Devices(CPU, rank, size)) for rank in range(size)] == shares
    results = [[(place, n, rank) for place in share for n in range(each)] for rank, share in enumerate(shares)]
    for rank in range(size):
        found = in_order(results[rank], count * each, Gathered(CPU, rank, size, results))
        assert [(place, n) for place, n, _ in found] == [(place, n) for place in range(count) for n in range(each)]
        # an item's result is that of the first process that has it
        assert all(place in shares[by] and not any(place in s for s in shares[:by]) for place, _, by in found)
