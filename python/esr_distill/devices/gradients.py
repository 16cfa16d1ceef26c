"""Gradients of all processes become one gradient, which is then clipped.

Each process has the gradient of its own rollouts, already divided by what the whole step is divided by, so the gradient of the
step is the plain sum. It is an all-reduce after backward and not torch's DistributedDataParallel: that one reduces from hooks
which it arms in its own `forward`, but the loop calls the body and the head's weight apart, and several times before a step;
where a process has no rollout that reaches a weight, hooks wait for ever. A sum afterwards has no such conditions, and every
process gets the same bits. What it gives up is the overlap with backward; with rollouts and a teacher's forward in each step,
the sum is a small part (not measured on GPUs).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from esr_distill.devices import Devices

BUCKET_BYTES = 32 * 2**20


def finish_gradients(model: nn.Module, devices: Devices, factor: float, max_norm: float) -> Tensor:
    """Sum over processes (sharded gradients were summed in backward), times `factor`, clipped to `max_norm`. Returns the norm
    before clipping, the same in every process."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if devices.world_size > 1 and not any(isinstance(parameter, DTensor) for parameter in parameters):
        sum_gradients(parameters, devices)
    if factor != 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], devices: Devices) -> None:
    """Each gradient becomes its sum over processes. One that no process has stays None; one that some have counts as 0 in the
    others."""
    parameters = list(parameters)
    has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    distributed.all_reduce(has_gradient, op=distributed.ReduceOp.MAX)
    shared = [parameter for parameter, has in zip(parameters, has_gradient.tolist(), strict=True) if has]
    for parameter in shared:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in buckets([parameter.grad for parameter in shared]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        distributed.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, of at most BUCKET_BYTES together unless one alone has more."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (gradient.dtype != bucket[0].dtype or size + gradient.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
