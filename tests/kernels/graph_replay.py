"""A step captured in a CUDA graph and replayed with changed inputs; used by the GPU tests of all ops (X1)."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class ReplayedStep(Protocol):
    """Forward and backward of an op on tensors that stay in place between calls."""

    __call__: Callable[[], list[Tensor]]

    def copy_from(self, other: "ReplayedStep") -> None:
        """Take over the values of another step's inputs, in the same memory."""


def assert_all_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def assert_graph_replays(step: ReplayedStep, other: ReplayedStep) -> None:
    """Capture `step`, replay it, and replay it twice more on the inputs of `other`: the results of eager calls, bit for bit."""
    expected_of_other = other()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert_all_equal(captured, expected)
    step.copy_from(other)
    for _ in range(2):
        graph.replay()
        assert_all_equal(captured, expected_of_other)
