"""The native sampler: finds and loads what setup.py built from csrc/, once, when it is first asked for.

Two libraries, so that each loads where it can: the CPU half, which defines the operator, anywhere; the CUDA half only in a
PyTorch that has CUDA.
"""

from pathlib import Path

import torch
from torch import Tensor

from esr_kernels.sample_tokens.state import SamplerState

_OP = "sample_tokens"
_FOLDER = Path(__file__).parent
_loaded: set[str] = set()
_HOW_TO_BUILD = (
    "build it with `pip install --no-build-isolation --editable .` in the repository (it needs a C++ compiler{cuda}), "
    "or pass impl=Impl.REFERENCE for plain PyTorch"
)
# the tensors of a SamplerState in the order of the operator's schema (csrc/registration.cpp)
_STATE_TENSORS = (
    "token_ids_B_K",
    "logprobs_B_K",
    "sampling_logprobs_B_K",
    "lengths_B",
    "finished_B",
    "stopped_by_eos_B",
    "next_ids_B",
    "active",
    "invalid_B",
    "sampling_temperature_B",
    "top_k_B",
    "top_p_B",
    "min_p_B",
    "seed_B",
    "request_ids_B",
    "eos_ids_E",
)


def is_native_sampler_built(device: torch.device | str) -> bool:
    """Whether the half for this device lies in the package; it is not loaded."""
    device_type = torch.device(device).type
    return device_type in ("cpu", "cuda") and all(_library(half).exists() for half in {"cpu", device_type})


def sample_tokens_native(logits_B_V: Tensor, state: SamplerState) -> None:
    """See `sample_tokens`. One call of the operator `esr_kernels::sample_tokens`; the host waits for nothing.

    Raises:
        TypeError: float64 logits; the sampler computes in float32.
        NotImplementedError: the half of the library for this device is not built.
    """
    if logits_B_V.dtype == torch.float64:
        raise TypeError(
            f"{_OP}: logits_B_V must have dtype bfloat16, float16 or float32 with impl=Impl.FUSED, got float64; convert "
            "them, or pass impl=Impl.REFERENCE for plain PyTorch"
        )
    if logits_B_V.device.type not in _loaded:  # torch.compile can look at the set, not into the loading
        load_native_sampler(logits_B_V.device.type)
    if logits_B_V.stride(1) != 1 and logits_B_V.shape[1] > 1:
        logits_B_V = logits_B_V.contiguous()
    tensors = (getattr(state, name) for name in _STATE_TENSORS)
    torch.ops.esr_kernels.sample_tokens(logits_B_V.detach(), *tensors, state.pad_id)


def load_native_sampler(device_type: str) -> None:
    """Load the half for "cpu" or "cuda", once. Before `sample_tokens` is compiled into a graph, call this or the op itself.

    Raises:
        NotImplementedError: another device, or the half is not built.
    """
    if device_type in _loaded:
        return
    if device_type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"{_OP}: impl=Impl.FUSED needs tensors on the CPU or a CUDA device, got {device_type}; pass impl=Impl.REFERENCE "
            "for plain PyTorch"
        )
    if device_type == "cuda":
        load_native_sampler("cpu")  # it defines the operator
    library = _library(device_type)
    if not library.exists():
        raise NotImplementedError(
            f"{_OP}: impl=Impl.FUSED needs the native sampler for {device_type}, which is not built; "
            + _HOW_TO_BUILD.format(cuda=", nvcc and a PyTorch with CUDA" if device_type == "cuda" else "")
        )
    torch.ops.load_library(str(library))
    if device_type == "cpu":
        torch.library.register_fake("esr_kernels::sample_tokens", lambda *_: None)
    _loaded.add(device_type)


def _library(half: str) -> Path:
    return _FOLDER / f"_sampler_{half}.so"
