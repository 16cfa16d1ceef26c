"""Two rules of every fused op's autograd function: which tensors it may save, and that its backward is not recorded."""

import torch
from torch import Tensor


def can_be_saved(argument: object) -> bool:
    """Whether `save_for_backward` takes it: a tensor, but not one made in inference mode, as a teacher's may be.

    Inside torch.compile, which does not trace the question, tensors are saved by the compiled graph.
    """
    return isinstance(argument, Tensor) and (torch.compiler.is_compiling() or not argument.is_inference())


def save_for_backward(ctx, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward` that takes all of them; `restore_saved` gives them back."""
    ctx.save_for_backward(*(tensor if can_be_saved(tensor) else None for tensor in tensors))
    ctx.unsaved = tuple(None if can_be_saved(tensor) else tensor for tensor in tensors)


def restore_saved(ctx) -> list[Tensor | None]:
    """The tensors of `save_for_backward`."""
    return [
        saved if unsaved is None else unsaved for saved, unsaved in zip(ctx.saved_tensors, ctx.unsaved, strict=True)
    ]


def check_no_second_derivative(op: str) -> None:
    """Raise in a backward that is itself recorded: its gradient would silently count as a constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: impl=Impl.FUSED has no second derivative, got a backward with create_graph=True; "
            "pass impl=Impl.REFERENCE"
        )
