"""Are the samplers of FlashInfer and vLLM called so that they draw what is asked?  pytest tests/bench/test_sampler_peers.py

Stand-ins have the parameters and the semantics that were read in their sources; the gate of the benchmark is the judge.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

ROWS, VOCAB = 6, 301


def draw(probs):
    return torch.multinomial(probs, 1).squeeze(1).int()


def check_stream(seed, offset, rows):
    for place in (seed, offset):
        assert place.dtype == torch.int64 and place.shape == (rows,)
    assert seed.unique().numel() == rows


def column(value):
    return value[:, None] if isinstance(value, torch.Tensor) else value


def fi_softmax(logits, temperature=None, enable_pdl=None):
    return (logits.float() / column(temperature)).softmax(-1)


def fi_sampling_from_logits(
    logits, indices=None, deterministic=True, generator=None, check_nan=False, seed=None, offset=None
):
    check_stream(seed, offset, len(logits))
    return draw(logits.float().softmax(-1))


def fi_top_k_renorm_probs(probs, top_k):
    ranked = probs.sort(-1, descending=True).values
    top_k = torch.as_tensor(top_k).expand(len(probs)).long()
    kept = probs.where(probs >= ranked.gather(1, top_k[:, None] - 1), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def fi_top_p_renorm_probs(probs, top_p, is_deterministic=False):
    ranked, order = probs.sort(-1, descending=True)
    ranked = ranked.where(ranked.cumsum(-1) - ranked < column(top_p), 0.0)
    kept = torch.zeros_like(probs).scatter(1, order, ranked)
    return kept / kept.sum(-1, keepdim=True)


def fi_top_p(
    probs,
    top_p,
    indices=None,
    deterministic=True,
    generator=None,
    check_nan=False,
    seed=None,
    offset=None,
    return_valid=False,
):
    check_stream(seed, offset, len(probs))
    return draw(fi_top_p_renorm_probs(probs, top_p))


def fi_min_p(
    probs,
    min_p,
    indices=None,
    deterministic=True,
    generator=None,
    check_nan=False,
    seed=None,
    offset=None,
    return_valid=False,
):
    check_stream(seed, offset, len(probs))
    return draw(probs.where(probs >= column(min_p) * probs.amax(-1, keepdim=True), 0.0))


def fi_top_k_top_p(
    logits,
    top_k,
    top_p,
    indices=None,
    filter_apply_order="top_k_first",
    deterministic=True,
    generator=None,
    check_nan=False,
    seed=None,
    offset=None,
):
    assert filter_apply_order == "top_k_first" and isinstance(top_k, int)
    return fi_top_p(fi_top_k_renorm_probs(logits.float().softmax(-1), top_k), top_p, seed=seed, offset=offset)


def vllm_apply_temperature(logits, expanded_idx_mapping, temperature):
    logits /= temperature[expanded_idx_mapping.long()][:, None]


def vllm_apply_min_p(logits, expanded_idx_mapping, min_p):
    least = logits.amax(-1, keepdim=True) + min_p[expanded_idx_mapping.long()][:, None].log()
    logits.masked_fill_(logits < least, -torch.inf)


def vllm_apply_top_k_top_p(logits, k, p, mask_value=float("-inf")):
    assert logits.dtype == torch.float32 and (k is None or (k.shape == (ROWS,) and k.dtype == torch.int32))
    probs = logits.softmax(-1)
    probs = probs if k is None else fi_top_k_renorm_probs(probs, k)
    probs = probs if p is None else fi_top_p_renorm_probs(probs, p)
    return logits.masked_fill_(probs == 0, mask_value)


def vllm_gumbel_sample(
    logits,
    expanded_idx_mapping,
    temperature,
    seed,
    pos,
    apply_temperature,
    is_drafting,
    logits_cache=None,
    logits_cache_col=None,
    use_fp64=False,
):
    assert expanded_idx_mapping.tolist() == list(range(ROWS)) and expanded_idx_mapping.dtype == torch.int32
    check_stream(seed, pos, ROWS)
    assert temperature.dtype == torch.float32 and not (apply_temperature or is_drafting)
    return draw(logits.float().softmax(-1)).long()


def vllm_compute_token_logprobs(logits, token_ids):
    return logits.float().log_softmax(-1).gather(-1, token_ids)


MODULES = {
    "flashinfer.sampling": {
        "softmax": fi_softmax,
        "sampling_from_logits": fi_sampling_from_logits,
        "top_k_renorm_probs": fi_top_k_renorm_probs,
        "top_p_renorm_probs": fi_top_p_renorm_probs,
        "top_p_sampling_from_probs": fi_top_p,
        "min_p_sampling_from_probs": fi_min_p,
        "top_k_top_p_sampling_from_logits": fi_top_k_top_p,
    },
    "vllm.v1.worker.gpu.sample.gumbel": {
        "apply_temperature": vllm_apply_temperature,
        "gumbel_sample": vllm_gumbel_sample,
    },
    "vllm.v1.worker.gpu.sample.min_p": {"apply_min_p": vllm_apply_min_p},
    "vllm.v1.worker.gpu.sample.logprob": {"compute_token_logprobs": vllm_compute_token_logprobs},
    "vllm.v1.sample.ops.topk_topp_triton": {"apply_top_k_top_p_triton": vllm_apply_top_k_top_p},
}


@pytest.mark.parametrize("has_logprobs", [False, True])
@pytest.mark.parametrize("setting", range(6))
@pytest.mark.parametrize("name", ["FlashInfer", "vLLM"])
def test_a_peer_draws_from_the_distribution_asked_for(bench, monkeypatch, name, setting, has_logprobs):
    for module, contents in MODULES.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**contents))
    cases, gate = bench("cases.sampler_cases"), bench("cases.sampler_gate")
    settings = [cases.NO_FILTER, *((one,) for one in cases.USUAL), cases.MIXED][setting]
    make_inputs = bench("cases.sampler_inputs").make_inputs
    dtype = torch.bfloat16 if has_logprobs else torch.float32  # float32 logits must not be changed in place
    (inputs,) = make_inputs(settings, "LM-like", (ROWS, VOCAB), dtype, "cpu", copies=1)
    logits_B_V = inputs.logits_B_V.clone()
    torch.manual_seed(3)
    results = gate.drawn(bench("baselines.sampler_peers").SAMPLER_PEERS[name][has_logprobs], inputs)
    assert set(results) == {"token_ids", *(["logprobs"] if has_logprobs else [])}
    gate.SamplerGate(inputs).check(results, norm_limit=0.5)
    assert torch.equal(inputs.logits_B_V, logits_B_V)
    # of each call its own place in the stream
    assert (inputs.positions_B == len(results["token_ids"]) * gate.POSITIONS_OF_A_CALL).all()


def test_a_peer_that_is_not_installed_says_so(bench, monkeypatch):
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)
    settings = bench("cases.settings").smoke_settings()
    group = bench("cases.sampler_cases").c2_groups(settings)[0]()
    peers = [candidate for candidate in group.candidates if candidate.facts["is_peer"]]
    assert [peer.name for peer in peers] == ["FlashInfer", "FlashInfer, log-probs", "vLLM", "vLLM, log-probs"]
    for peer in peers:
        with pytest.raises(bench("baselines.peers").NotInstalled, match=f"^{peer.name.split(',')[0]}: "):
            peer.run(group.inputs[0], None)
