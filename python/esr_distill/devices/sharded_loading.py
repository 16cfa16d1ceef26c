"""A frozen model that goes into shards as it is loaded: whole in the CPU's memory of one process, never whole on a device.

The main process reads it. The others are sent its structure, without weights, and each process is sent its shard of every weight.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from transformers import PreTrainedModel

from esr_distill.devices import Devices
from esr_distill.devices.sharding import shard_model


def load_in_shards(load: Callable[[], PreTrainedModel], devices: Devices, option: str) -> PreTrainedModel:
    """What `load` gives in the main process, on the CPU, in shards on the devices. All processes call it.

    Raises:
        InputError: what `load` raised in the main process, in every process.
    """
    weights: dict[str, Tensor] = {}

    def read() -> PreTrainedModel:
        model = load()
        weights.update(model.named_parameters())
        return without_weights(model)

    outline = devices.done_by_main(read)
    shard_model(outline, devices, option)
    outline._apply(lambda tensor: on_device(tensor, devices.device))
    with torch.no_grad():
        for name, shard in outline.named_parameters():
            # FSDP pads the storage behind the shard, so it is filled and not replaced
            shard.to_local().copy_(sent_shard(weights.get(name), shard))
    return outline


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with parameters on the meta device; ties stay, and so do buffers, which are small."""
    memo = {id(old): nn.Parameter(old.to("meta"), requires_grad=old.requires_grad) for old in model.parameters()}
    return copy.deepcopy(model, memo)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory on the device: for what has no weights yet, empty."""
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def sent_shard(weight: Tensor | None, shard: Tensor) -> Tensor:
    """This process's part of a weight that the main process has (the others pass None); it is whole on the devices meanwhile."""
    device = shard.device
    weight = torch.empty(shard.shape, dtype=shard.dtype, device=device) if weight is None else weight.to(device)
    return distribute_tensor(weight, shard.device_mesh, shard.placements).to_local()
