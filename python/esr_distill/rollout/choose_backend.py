"""The backend that `rollout.backend` names."""

from rich.console import Console

from esr_distill.config import RolloutConfig
from esr_distill.devices import Devices
from esr_distill.rollout.backend import RolloutBackend
from esr_distill.rollout.hf_generate import HFGenerateBackend
from esr_distill.rollout.inprocess import InProcessBackend
from esr_distill.rollout.vllm_server import VllmServerBackend


def make_backend(
    config: RolloutConfig, console: Console | None = None, devices: Devices | None = None
) -> RolloutBackend:
    """A backend that holds nothing yet. `console` is where it reports steps that it captures; `devices` are the processes that
    draw together, where one has to speak for all."""
    if config.backend == "hf_generate":
        return HFGenerateBackend()
    if config.backend == "vllm":
        return VllmServerBackend(
            config.vllm_url,
            config.vllm_weights_folder,
            weights_folder_on_server=config.vllm_weights_folder_on_server,
            devices=devices,
        )
    return InProcessBackend(
        use_graphs=config.cuda_graphs, compile_backend="inductor" if config.compile_step else None, console=console
    )
