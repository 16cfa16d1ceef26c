"""Which implementation of an op runs. Chosen by the caller, never silently."""

import os
from enum import Enum
from importlib.util import find_spec

import torch
from torch import Tensor

MOST_IDS = 1024


class Impl(str, Enum):
    """`FUSED`: the kernels. `REFERENCE`: plain PyTorch on any device and float dtype, the specification of the op."""

    FUSED = "fused"
    REFERENCE = "reference"


def check_impl(op: str, impl: Impl | str) -> Impl:
    """Accept a member or its value.

    Raises:
        ValueError: `impl` is no member of `Impl`.
    """
    try:
        return Impl(impl)
    except ValueError:
        raise ValueError(f"{op}: impl must be one of {[i.value for i in Impl]}, got {impl!r}") from None


def require_kernels(op: str, **tensors: Tensor | None) -> None:
    """Raise where the Triton kernels of `Impl.FUSED` cannot run on these tensors, saying what is missing.

    Raises:
        TypeError: a float64 tensor; the kernels compute in float32.
        NotImplementedError: Triton is missing, or the device is not CUDA (nor the CPU under Triton's interpreter).
    """
    instead = "or pass impl=Impl.REFERENCE for plain PyTorch"
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            raise TypeError(
                f"{op}: {name} must have dtype bfloat16, float16 or float32 with impl=Impl.FUSED, whose kernels compute in "
                f"float32, got float64; convert it, {instead}"
            )
    device = next(tensor.device for tensor in tensors.values() if tensor is not None)
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        raise NotImplementedError(
            f"{op}: impl=Impl.FUSED needs tensors on a CUDA device, got {device}; move them there, {instead} (to run the "
            f"kernels slowly on a CPU, set TRITON_INTERPRET=1 before Triton is imported)"
        )
    if find_spec("triton") is None:
        raise NotImplementedError(
            f"{op}: impl=Impl.FUSED needs Triton, which is not installed; pip install triton, {instead}"
        )


def check_number_of_ids(op: str, name: str, num_ids: int) -> None:
    """Raise where a row asks for more ids than a program of `Impl.FUSED` holds in its registers.

    Raises:
        ValueError: K > 1024.
    """
    if num_ids > MOST_IDS:
        raise ValueError(
            f"{op}: {name} must have at most {MOST_IDS} ids per row with impl=Impl.FUSED, got {num_ids}; pass "
            "impl=Impl.REFERENCE for plain PyTorch"
        )
