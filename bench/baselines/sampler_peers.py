"""Samplers of FlashInfer, vLLM and FlashSampling, where they are installed; see bench/baselines/peers.py.

Read in the public sources of FlashInfer 0.6.18 and of vLLM's GPU model runner; our calls bind to the signatures in the wheel of
FlashInfer 0.7.2, which was imported and not run. Both take their place in the random stream from the caller, as a CUDA graph
needs it, and timed calls do not advance it: the same random numbers each time. FlashInfer's `filter_apply_order="joint"` takes
top-p of the whole vocabulary, which is another distribution, and is not measured.

FlashSampling, which draws inside the product of the output head, was read in its public repository (commit 1e5d8fa3). It is no
package, its file imports FlashInfer and nvtx, and its import asks for a CUDA device, so its call has not been run.
"""

from dataclasses import astuple

import torch
from torch import Tensor

from bench.baselines.peers import imported
from bench.baselines.sampler_baselines import Draw, ids_only, with_logprobs
from bench.cases.sampler_inputs import SamplerInputs
from esr_kernels.testing.oracle import Results


def flashinfer(name: str):
    return imported("FlashInfer", "flashinfer.sampling", name)


def flashinfer_ids(inputs: SamplerInputs) -> Tensor:
    """The function that FlashInfer has for this setting; the temperature in its softmax, or in float32 before its top-k."""
    stream = {"seed": inputs.seeds_B, "offset": inputs.positions_B}
    logits_B_V = inputs.logits_B_V
    if len(inputs.settings) > 1:
        return flashinfer_mixed_ids(inputs, stream)
    (setting,) = inputs.settings
    temperature, top_k, top_p, min_p = astuple(setting)
    if not setting.has_filter and temperature == 1:
        return flashinfer("sampling_from_logits")(logits_B_V, **stream)
    if min_p > 0 and (top_k > 0 or top_p < 1):
        return flashinfer_mixed_ids(inputs, stream)
    if top_k > 0:
        logits_B_V = logits_B_V if temperature == 1 else logits_B_V.float() / temperature
        function = flashinfer("top_k_top_p_sampling_from_logits")
        return function(logits_B_V, top_k, top_p, filter_apply_order="top_k_first", **stream)
    probs_B_V = flashinfer("softmax")(logits_B_V, temperature=temperature)
    if min_p > 0:
        return flashinfer("min_p_sampling_from_probs")(probs_B_V, min_p, **stream)
    return flashinfer("top_p_sampling_from_probs")(probs_B_V, top_p, **stream)


def flashinfer_mixed_ids(inputs: SamplerInputs, stream: dict) -> Tensor:
    """All filters, each with one value per row, one after the other."""
    parameters = inputs.parameters
    probs_B_V = flashinfer("softmax")(inputs.logits_B_V, temperature=parameters.temperature_B)
    probs_B_V = flashinfer("top_k_renorm_probs")(probs_B_V, parameters.top_k_B)
    probs_B_V = flashinfer("top_p_renorm_probs")(probs_B_V, parameters.top_p_B)
    return flashinfer("min_p_sampling_from_probs")(probs_B_V, parameters.min_p_B, **stream)


def vllm(module: str, name: str):
    return imported("vLLM", f"vllm.v1.{module}", name)


def vllm_ids(inputs: SamplerInputs) -> Tensor:
    """Its Triton kernels in the order of its sampler; Gumbel noise is added in float32, as it does by default.

    Without a filter it gets the logits as they are, without the float32 copy that its sampler makes first.
    """
    scores_B_V, parameters = inputs.logits_B_V, inputs.parameters
    is_on = {
        name: any(getattr(setting, name) != off for setting in inputs.settings)
        for name, off in (("temperature", 1), ("top_k", 0), ("top_p", 1), ("min_p", 0))
    }
    gumbel = "worker.gpu.sample.gumbel"
    if any(is_on.values()):
        scores_B_V = scores_B_V.to(torch.float32, copy=True)  # the following change it in place
    if is_on["temperature"]:
        vllm(gumbel, "apply_temperature")(scores_B_V, inputs.rows_B, parameters.temperature_B)
    if is_on["min_p"]:
        vllm("worker.gpu.sample.min_p", "apply_min_p")(scores_B_V, inputs.rows_B, parameters.min_p_B)
    if is_on["top_k"] or is_on["top_p"]:
        top_k_B = parameters.top_k_B if is_on["top_k"] else None
        top_p_B = parameters.top_p_B if is_on["top_p"] else None
        scores_B_V = vllm("sample.ops.topk_topp_triton", "apply_top_k_top_p_triton")(scores_B_V, top_k_B, top_p_B)
    return vllm(gumbel, "gumbel_sample")(
        scores_B_V,
        inputs.rows_B,
        parameters.temperature_B,
        inputs.seeds_B,
        inputs.positions_B,
        apply_temperature=False,
        is_drafting=False,
    )


def vllm_with_logprobs(inputs: SamplerInputs) -> Results:
    ids_B = vllm_ids(inputs)
    function = vllm("worker.gpu.sample.logprob", "compute_token_logprobs")
    return {"token_ids": ids_B, "logprobs": function(inputs.logits_B_V, ids_B[:, None])}


def flash_sampling_ids(hidden_B_D: Tensor, weight_V_D: Tensor, temperature: Tensor, seed: int) -> Tensor:
    """Gumbel noise in the epilogue of the product, its logits in float32; no filter and no log-probs."""
    function = imported("FlashSampling", "fused_mm_sampling.core", "fused_mm_sample_triton")
    ids_B_1 = function(weights=weight_V_D, hidden_states=hidden_B_D, num_samples=1, temperature=temperature, seed=seed)
    return ids_B_1.squeeze(1)


# Each without and with log-probs; FlashInfer makes none, so they are PyTorch's.
SAMPLER_PEERS: dict[str, tuple[Draw, Draw]] = {
    "FlashInfer": (ids_only(flashinfer_ids), with_logprobs(flashinfer_ids)),
    "vLLM": (ids_only(vllm_ids), vllm_with_logprobs),
}
