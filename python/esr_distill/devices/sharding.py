"""Weights, gradients and optimizer states in shards: torch's fully_shard (FSDP2), one shard for each process.

The body is sharded layer by layer, with the body itself as the root of the rest (embeddings, last norm), since the loop calls the
body and not the whole model. The output head is a group of its own that is never run: the loss reads its weight (`whole_head`). A
tied head is the embeddings' shard. Gradients are summed, not averaged, as `gradients.py` says.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from transformers import PreTrainedModel

from esr_distill.devices import Devices
from esr_distill.input_error import InputError
from esr_kernels import OutputHead


def shard_model(model: PreTrainedModel, devices: Devices, option: str, *, reshard_after_forward: bool = True) -> None:
    """Replace the weights by this process's shards. All processes must have loaded the same model. Without
    `reshard_after_forward` the gathered weights stay until backward has used them.

    Raises:
        InputError: a model whose body has no list of layers.
    """
    body, head = model.base_model, model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    layers = layers_of(body)
    if not layers or body is model:
        raise InputError(
            f"devices.shard must be none for {option}, whose body has no list of layers, got {type(model).__name__}"
        )
    is_tied = head.weight is embeddings.weight
    mesh = init_device_mesh(devices.device.type, (devices.world_size,))
    groups = [*layers, body] if is_tied and head.bias is None else [*layers, body, head]
    if is_tied and head.bias is not None:
        raise InputError(
            f"devices.shard must be none for {option}, whose tied head has a bias, got {type(model).__name__}"
        )
    for group in groups:
        fully_shard(group, mesh=mesh, reshard_after_forward=reshard_after_forward)
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)  # gloo has no other
    if is_tied:
        head.weight = embeddings.weight


def layers_of(body: nn.Module) -> list[nn.Module]:
    """The blocks of the longest list of modules in the body."""
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(tensor: Tensor | None) -> Tensor | None:
    """All of a sharded tensor, in every process. Its gradient goes back to the shards, summed over processes."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)


def whole_head(head: OutputHead) -> OutputHead:
    """The head with all of its weight, for a model in shards; itself otherwise."""
    if not isinstance(head.weight, DTensor):
        return head
    return replace(head, weight=whole(head.weight), bias=whole(head.bias))


class WholeCopy:
    """A model like the sharded one with plain weights, which are there only inside `weights()`: to draw rollouts, to evaluate, to
    save. It is made before the model is sharded."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.sharded = model
        self.names = [name for name, _ in model.named_parameters()]
        # deepcopy takes these for the copies of the parameters, so that none is copied and ties stay
        self.parameters = [nn.Parameter(torch.empty(0), requires_grad=False) for _ in self.names]
        memo = {id(old): new for old, new in zip(model.parameters(), self.parameters, strict=True)}
        self.model = copy.deepcopy(model, memo).eval()

    @contextmanager
    def weights(self) -> Iterator[PreTrainedModel]:
        """The model with the present weights. All processes enter it together."""
        present = dict(self.sharded.named_parameters())
        try:
            with torch.no_grad():
                for name, parameter in zip(self.names, self.parameters, strict=True):
                    parameter.data = whole(present[name].detach())
            yield self.model
        finally:
            for parameter in self.parameters:
                parameter.data = torch.empty(0)


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict:
    """The optimizer's state with plain tensors, the same whatever the number of shards. All processes call it."""
    state = optimizer.state_dict()
    whole_state = {
        index: {name: whole(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return state | {"state": whole_state}


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Put a state from `whole_optimizer_state` back, each process its shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def shard(value: object, parameter: nn.Parameter) -> object:
        is_like = isinstance(value, Tensor) and value.shape == parameter.shape and isinstance(parameter, DTensor)
        if not is_like:
            return value
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)

    state = {
        index: {name: shard(value, parameters[index]) for name, value in entry.items()}
        for index, entry in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": state})
