"""Argument checks shared by the ops. Every message names the op, the argument, what it must be and what it was.

Only shapes, dtypes, devices and Python numbers are looked at: reading a tensor's values would make the host wait for
the device.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int32, torch.int64)


def check_tensor(op: str, name: str, tensor: object, dims: str, sizes: dict[str, int], dtypes: tuple) -> None:
    """Check that `tensor` is a tensor of one of `dtypes` whose axes are `dims`, e.g. "N V".

    `sizes` maps dimension letters to sizes already known; letters met for the first time are added to it, so that
    consecutive calls also check that arguments agree with each other.

    Raises:
        TypeError: not a tensor, or the dtype is not in `dtypes`.
        ValueError: the number of axes or a size is wrong.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor ({dims}), got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must have dtype {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    letters = dims.split()
    shape = tuple(tensor.shape)
    expected = tuple(sizes.get(letter, -1) for letter in letters)
    if len(shape) != len(letters) or any(e not in (-1, s) for e, s in zip(expected, shape, strict=False)):
        known = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
        raise ValueError(f"{op}: {name} must have shape ({', '.join(letters)}) = ({known}), got {shape}")
    sizes.update(zip(letters, shape, strict=True))


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Check that all given tensors are on one device (None is skipped)."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"{op}: all tensors must be on one device, got {', '.join(f'{n}: {d}' for n, d in devices.items())}"
        )


def check_positive(op: str, name: str, value: float) -> float:
    """Check that a Python number is finite and > 0; returns it as float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number > 0, got {type(value).__name__}")
    if not 0 < value < math.inf:  # not isfinite, which torch.compile does not trace for a number that varies
        raise ValueError(f"{op}: {name} must be finite and > 0, got {value}")
    return float(value)


def check_no_teacher_grad(op: str, **tensors: Tensor | None) -> None:
    """Check that no teacher tensor asks for a gradient: the teacher is frozen by contract."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{op}: {name} must not require grad (the teacher is frozen), got requires_grad=True; detach it"
            )


def check_token_set(op: str, name: str, ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """Check a set of token ids given as Python ints, each in [0, vocab_size). Returns them sorted, each once."""
    if not isinstance(ids, Iterable):
        raise TypeError(f"{op}: {name} must be an iterable of ints, got {type(ids).__name__}")
    ids = tuple(ids)
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"{op}: {name} must hold ints, got {type(i).__name__}")
        if not 0 <= i < vocab_size:
            raise ValueError(f"{op}: {name} must be in [0, {vocab_size}), got {i}")
    return tuple(sorted(set(ids)))


def check_workspace_bytes(op: str, workspace_bytes: int | None) -> None:
    """Check that `workspace_bytes` is None or an int > 0."""
    if workspace_bytes is None:
        return
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"{op}: workspace_bytes must be an int > 0 or None, got {type(workspace_bytes).__name__}")
    if workspace_bytes <= 0:
        raise ValueError(f"{op}: workspace_bytes must be > 0 or None, got {workspace_bytes}")
