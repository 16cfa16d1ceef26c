"""How rollouts are drawn."""

from dataclasses import dataclass
from typing import Literal

from esr_distill.config.require import require
from esr_distill.sampler_settings import SamplerSettings


@dataclass(frozen=True)
class RolloutConfig:
    """How rollouts are drawn.

    Args:
        horizon: Response tokens after which a rollout stops (EOS stops it earlier). ESR is a short horizon.
        batch_size: Rollouts in a step, those of all processes and all accumulation steps together.
        samples_per_prompt: Rollouts for each prompt, which is read once for all of them; batch_size is a multiple of it.
        sampling_temperature: Temperature of sampling; 0 is greedy.
        top_k: Keep only the k most probable tokens; 0 is off.
        top_p: Keep the smallest set of tokens whose probability reaches top_p; 1 is off.
        min_p: Drop tokens less probable than min_p times the most probable one; 0 is off.
        backend: Who draws; inprocess decodes with the trainer's own weights, hf_generate is transformers' generate, vllm is a
            server (docs/vllm.md).
        vllm_url: Where the server of the vllm backend listens, such as http://host:8000.
        vllm_weights_folder: Folder that trainer and server see, through which the server gets the weights.
        vllm_weights_folder_on_server: Path of that folder on the server; unset is the same.
        cuda_graphs: On a CUDA device, capture a decode step and replay it; false launches every kernel of every step.
        overlap_teacher: Let the teacher read the prompts while rollouts are drawn, on a CUDA device in a stream of its own;
            that time is part of the rollout's.
        compile_step: Pass the decode step of inprocess through torch.compile, which takes its time in the first rollout.
    """

    horizon: int = 100
    batch_size: int = 16
    samples_per_prompt: int = 1
    sampling_temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    backend: Literal["inprocess", "hf_generate", "vllm"] = "inprocess"
    vllm_url: str | None = None
    vllm_weights_folder: str | None = None
    vllm_weights_folder_on_server: str | None = None
    cuda_graphs: bool = True
    overlap_teacher: bool = False
    compile_step: bool = False

    def __post_init__(self) -> None:
        require(self.horizon >= 1, "rollout.horizon", ">= 1", self.horizon)
        require(self.batch_size >= 1, "rollout.batch_size", ">= 1", self.batch_size)
        samples, batch_size = self.samples_per_prompt, self.batch_size
        divides = samples >= 1 and batch_size % samples == 0
        require(divides, "rollout.samples_per_prompt", f">= 1 and a divisor of batch_size {batch_size}", samples)
        is_inprocess = self.backend == "inprocess"
        require(
            is_inprocess or self.cuda_graphs, "rollout.cuda_graphs", "true unless rollout.backend is inprocess", False
        )
        require(
            is_inprocess or not self.compile_step,
            "rollout.compile_step",
            "false unless rollout.backend is inprocess",
            True,
        )
        require(self.sampling_temperature >= 0, "rollout.sampling_temperature", ">= 0", self.sampling_temperature)
        require(self.top_k >= 0, "rollout.top_k", ">= 0", self.top_k)
        require(0 <= self.top_p <= 1, "rollout.top_p", "in [0, 1]", self.top_p)
        require(0 <= self.min_p <= 1, "rollout.min_p", "in [0, 1]", self.min_p)

        for name in ("vllm_url", "vllm_weights_folder"):
            value, is_vllm = getattr(self, name), self.backend == "vllm"
            must_be = "set for rollout.backend vllm" if is_vllm else "unset unless rollout.backend is vllm"
            require((value is not None) == is_vllm, f"rollout.{name}", must_be, value)
        on_server = self.vllm_weights_folder_on_server
        require(
            on_server is None or self.backend == "vllm",
            "rollout.vllm_weights_folder_on_server",
            "unset unless rollout.backend is vllm",
            on_server,
        )

    @property
    def sampler(self) -> SamplerSettings:
        return SamplerSettings(self.sampling_temperature, self.top_k, self.top_p, self.min_p)
