"""What a captured step has burnt in, beside shapes: it must be captured anew when this changes."""

import torch
from transformers import PreTrainedModel


def identity(model: PreTrainedModel) -> tuple:
    """What a captured step has burnt in: where weights lie, and which adapters are switched on."""
    places = tuple(parameter.data_ptr() for parameter in model.parameters())
    adapters = tuple(
        (tuple(module.active_adapters), module.disable_adapters, module.merged)
        for module in model.modules()
        if hasattr(module, "disable_adapters") and hasattr(module, "active_adapters") and hasattr(module, "merged")
    )
    return id(model), places, adapters


def autocast_of(model: PreTrainedModel) -> tuple:
    device_type = next(model.parameters()).device.type
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
