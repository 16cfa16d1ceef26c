"""A decode step captured in a CUDA graph. Not run on a GPU yet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from esr_distill.input_error import InputError
from esr_distill.rollout.decode_rows import DecodeStep, row_fields

WARM_UP_CALLS = 2  # libraries choose and allocate in the first calls, which a capture must not do


def capture_step(step: DecodeStep, pool: tuple[int, int]) -> Callable[[], None]:
    """A call that replays `step`. Its state is afterwards what it was before; the column that it writes is written anew.

    Raises:
        InputError: the model's step asks the host, which a graph cannot.
    """
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), _weights_cast_in_the_graph():
        for _ in range(WARM_UP_CALLS):
            with unchanged(step):
                step()
    torch.cuda.current_stream().wait_stream(side)
    try:
        with torch.cuda.graph(graph, pool=pool), _weights_cast_in_the_graph():
            step()
    except RuntimeError as error:
        raise InputError(
            "rollout.cuda_graphs must be false for a model whose step cannot be captured in a CUDA graph, got "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return graph.replay


def _weights_cast_in_the_graph() -> torch.autocast:
    """Autocast as it is, but without its cache: a weight that was cast before would stay what it was when weights change."""
    dtype = torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype=dtype, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False)


@contextmanager
def unchanged(step: DecodeStep) -> Iterator[None]:
    """All numbers that a call changes get their values back."""
    changed: list[Tensor] = [
        *row_fields(step.rows.state).values(),
        step.rows.state.active,
        step.rows.position_B_1,
        step.rows.cache.column_1,
        step.step_1,
    ]
    before = [tensor.clone() for tensor in changed]
    yield
    for tensor, value in zip(changed, before, strict=True):
        tensor.copy_(value)


class ActivePoll:
    """The number of running rows, read without waiting: what was true some steps ago."""

    def __init__(self, active: Tensor) -> None:
        self.active = active
        self.seen = torch.empty((), dtype=active.dtype, pin_memory=True)
        self.copied = torch.cuda.Event()
        self.is_asked = False

    def all_finished(self) -> bool:
        """Whether the last question is answered by 0; asks the next one."""
        answered = self.is_asked and self.copied.query()
        if answered and self.seen.item() == 0:
            return True
        if answered or not self.is_asked:
            self.seen.copy_(self.active, non_blocking=True)
            self.copied.record()
            self.is_asked = True
        return False
