"""Teachers that are not simply a model on the device: the student without its adapter, and one that waits in the CPU's memory.

Both answer what the loop asks of a model that scores: a body that gives hidden states, an output head, configs.
`last_hidden_states`, `PromptPrefill` and `output_head` take them as they take a transformers model.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from esr_distill.models.adapters import adapter_off
from esr_distill.rollout.eval_mode import eval_mode


class Teacher(ABC):
    """A model that scores and gets no gradient, prepared for it while `scoring` lasts.

    Args:
        model: whose weights are read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @abstractmethod
    def scoring(self) -> Iterator[None]:
        """Context in which the body of `model` is the teacher's, on the device. `base_model` enters it by itself."""

    @torch.no_grad()
    def base_model(self, **inputs: object):
        """The body's forward, as `model.base_model(...)`."""
        with self.scoring():
            return self.model.base_model(**inputs)

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def generation_config(self) -> GenerationConfig:
        return self.model.generation_config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()


class AdapterFreeTeacher(Teacher):
    """The student without its adapter: one copy of the weights serves both, and the teacher never changes.

    Scoring switches the adapter off and back on, and the student to eval mode and back. The graph that the student's own forward
    left for backward is not touched.
    """

    @contextmanager
    def scoring(self) -> Iterator[None]:
        with adapter_off(self.model), eval_mode(self.model):
            yield


@dataclass(frozen=True)
class HeadOnDevice:
    """An output layer's tensors, copied to the device."""

    weight: Tensor
    bias: Tensor | None


class OffloadedTeacher(Teacher):
    """A teacher whose weights lie in the CPU's memory (pinned, for a CUDA device) and are copied to the device to score.

    The copy of the body is there while `scoring` lasts, that of the output head as long as somebody holds what
    `get_output_embeddings` gave: the divergence needs it until backward is done.

    Args:
        model: lies on the CPU.
        device: where it scores.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        super().__init__(model)
        self.device = device
        for parameter in model.parameters():
            if device.type == "cuda":
                parameter.data = parameter.data.pin_memory()
        for module in model.modules():  # rotary frequencies and the like: small, and read in every forward
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @contextmanager
    def scoring(self) -> Iterator[None]:
        with on_device(self.model.base_model.parameters(), self.device):
            yield

    def get_output_embeddings(self) -> HeadOnDevice:
        layer = self.model.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        tensors = [None if tensor is None else copied(tensor.detach(), self.device) for tensor in (layer.weight, bias)]
        return HeadOnDevice(*tensors)


@contextmanager
def on_device(parameters: Iterable[nn.Parameter], device: torch.device) -> Iterator[None]:
    """Parameters are copies on the device inside, and what they were afterwards: nothing is copied back."""
    at_rest = [(parameter, parameter.data) for parameter in parameters]
    try:
        for parameter, data in at_rest:
            parameter.data = copied(data, device)
        yield
    finally:
        for parameter, data in at_rest:
            parameter.data = data


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True, copy=True)
