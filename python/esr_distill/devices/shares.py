"""Independent items, such as prompts to answer, divided over processes, and what came of them in one list again.

All shares are of one size, so that every process does the same things equally often. That is needed where one of them is a
meeting of all processes, as the forward of a sharded teacher is. Where items do not divide evenly, the last processes begin again
at the first item; what came of these repetitions is dropped.
"""

from esr_distill.devices import Devices


def share_of(count: int, devices: Devices) -> list[int]:
    """Which of `count` items are this process's: neighbours, and none twice."""
    size = -(-count // devices.world_size)
    first = devices.rank * size
    return [place % count for place in range(first, first + size)]


def in_order(results: list, count: int, devices: Devices) -> list:
    """The results of all items in the items' order, `count` of them, in every process. All processes call it.

    Args:
        results: of this process's share, in its order, as many of each item as of any other. Tensors must be on the CPU.
    """
    return [result for share in devices.gathered(results) for result in share][:count]
