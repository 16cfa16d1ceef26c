"""Two rules of every fused op's autograd function: which tensors it may save, and that its backward is not recorded."""

import torch
from torch import Tensor


def can_be_saved(argument: object) -> bool:
    """Whether `save_for_backward` takes it: a tensor, but not one made in inference mode, as a teacher's may be.

    Inside torch.compile, which does not trace the question, tensors are saved by the compiled graph.
    """
    return isinstance(argument, Tensor) and (torch.compiler.is_compiling() or not argument.is_inference())


def check_no_second_derivative(op: str) -> None:
    """Raise in a backward that is itself recorded: its gradient would silently count as a constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: impl=Impl.FUSED has no second derivative, got a backward with create_graph=True; "
            "pass impl=Impl.REFERENCE"
        )
