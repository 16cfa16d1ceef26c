"""Checks that look at the values of integer tensors: on the CPU only, for elsewhere the host would have to wait."""

import torch
from torch import Tensor


def can_look_at(values: Tensor) -> bool:
    """Whether values may be read: on the CPU, and not while a graph is traced, which must hold for other values too."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def check_values(op: str, name: str, values: Tensor, least: int, most: int | Tensor, limit: str = "") -> None:
    """Raise with the first row that holds a value outside [least, most]; `limit` names a `most` given per row."""
    outside = (values < least) | (values > most)
    if outside.any():
        index = tuple(outside.nonzero()[0].tolist())
        bound = int(torch.as_tensor(most).expand(values.shape)[index])
        bound = f"{limit} = {bound}" if limit else f"{bound}"
        raise ValueError(f"{op}: {name} must be in [{least}, {bound}], got {int(values[index])} in row {index[0]}")
