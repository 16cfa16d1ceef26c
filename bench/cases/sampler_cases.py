"""C1 to C3: `sample_tokens` on logits of the size of a decode step, memory-bound.

    C1  temperature 1, no filter, from 1 row to 512; bfloat16, two sizes in float32
    C2  top-k, top-p and min-p as they are used, and rows with different parameters
    C3  flat and one-hot logits against LM-like ones, without filter and with top-k and top-p

Counted bytes: the logits, read once. Ours also makes the log-prob under the softmax and under the distribution drawn from,
the next input id and the stop flags, all in the same call; others are measured with and without log-probs (in C3 without).
Logits that fit in the cache are read again and again, as a sampler finds them after an LM head; larger ones rotate between two
batches. Gate: `bench/cases/sampler_gate.py`.
"""

from collections.abc import Callable
from functools import partial

import torch

from bench.baselines.sampler_baselines import (
    Draw,
    compiled_races,
    hugging_face,
    ids_only,
    multinomial,
    one_sort,
    with_logprobs,
)
from bench.baselines.sampler_peers import SAMPLER_PEERS
from bench.cases.comparison import SOMETHING_ELSE, Candidate, Group
from bench.cases.sampler_gate import drawn, results_of_state, sampler_gate
from bench.cases.sampler_inputs import (
    FLAT,
    LM_LIKE,
    ONE_HOT,
    RewoundState,
    SamplerInputs,
    SamplerSetting,
    SettingOfRows,
    make_inputs,
    name_of,
)
from bench.cases.settings import Settings
from esr_kernels import Impl, sample_tokens
from esr_kernels.testing.oracle import Results

NO_FILTER = (SamplerSetting(),)
TOP_K_AND_P = (SamplerSetting(top_k=20, top_p=0.95),)
USUAL = (
    SamplerSetting(temperature=0.6, top_k=20, top_p=0.95),
    SamplerSetting(top_p=0.9),
    SamplerSetting(min_p=0.05),
    SamplerSetting(top_k=50, top_p=0.9),
)
MIXED = (*USUAL, SamplerSetting())
MULTINOMIAL, RACE, HUGGING_FACE, ONE_SORT = (
    "torch.multinomial",
    "exponential race, compile",
    "Hugging Face warpers",
    "one sort, eager",
)
WITH_LOGPROBS = ", log-probs"


def c1_groups(settings: Settings) -> list[Callable[[], Group]]:
    sizes = [(settings.half_dtype, size) for size in settings.batch_sizes]
    sizes += [(torch.float32, size) for size in settings.float32_batch_sizes]
    return [partial(sampler_group, settings, "C1", NO_FILTER, size, dtype=dtype) for dtype, size in sizes]


def c2_groups(settings: Settings) -> list[Callable[[], Group]]:
    return [
        partial(sampler_group, settings, "C2", setting, size)
        for setting in (*((one,) for one in USUAL), MIXED)
        for size in settings.filter_batch_sizes
    ]


def c3_groups(settings: Settings) -> list[Callable[[], Group]]:
    return [
        partial(sampler_group, settings, "C3", setting, size, kind=kind, has_logprobs=(False,))
        for setting in (NO_FILTER, TOP_K_AND_P)
        for size in settings.extreme_batch_sizes
        for kind in (LM_LIKE, FLAT, ONE_HOT)
    ]


def sampler_group(
    settings: Settings,
    case: str,
    setting: SettingOfRows,
    batch_size: int,
    *,
    dtype: torch.dtype | None = None,
    kind: str = LM_LIKE,
    has_logprobs: tuple[bool, ...] = (False, True),
) -> Group:
    """Ours, and the others with and without log-probs."""
    dtype = dtype or settings.half_dtype
    num_bytes = batch_size * settings.vocab_size * dtype.itemsize
    copies = 1 if num_bytes <= settings.cached_logit_bytes else 2
    inputs = make_inputs(setting, kind, (batch_size, settings.vocab_size), dtype, settings.device, copies=copies)
    others = [*torch_candidates(inputs[0], settings.compile_backend), *peer_candidates(inputs[0])]
    others = [other for other in others if other.facts["has_logprobs"] in has_logprobs]
    return Group(
        case=case,
        setting={
            "op": "sample_tokens",
            "dtype": str(dtype).removeprefix("torch."),
            "pass": "forward",
            "B": batch_size,
            "V": settings.vocab_size,
            "sampler": name_of(setting),
            "logits": kind,
            "inputs": copies,
        },
        inputs=inputs,
        upstream=None,
        gate=sampler_gate(inputs[0]),
        gate_upstream=None,
        candidates=[our_sampler(inputs[0]), *others],
        counted_bytes=num_bytes,
        counted_flop=0,
        calls_per_sample=settings.calls_per_sample,
    )


def our_sampler(inputs: SamplerInputs) -> Candidate:
    """Nothing is returned: the results stand in the state, where the gate reads them."""

    def run(inputs: SamplerInputs, upstream: None) -> None:
        sample_tokens(inputs.logits_B_V, inputs.state, impl=Impl.FUSED)

    def run_and_read(inputs: SamplerInputs) -> Results:
        run(inputs, None)
        return results_of_state(inputs.state)

    return Candidate(
        "ours",
        run,
        facts={"has_logprobs": True, "is_peer": False},
        results=lambda raw, upstream: drawn(run_and_read, inputs),
        state=RewoundState(inputs.state),
    )


def torch_candidates(inputs: SamplerInputs, backend: str) -> list[Candidate]:
    """What PyTorch and transformers offer for the setting: without and with log-probs."""
    settings = inputs.settings
    if len(settings) > 1:
        pairs = {ONE_SORT: (ids_only(one_sort), with_logprobs(one_sort))}
    elif settings[0].has_filter:
        draw_ids = hugging_face(settings[0])
        pairs = {HUGGING_FACE: (ids_only(draw_ids), with_logprobs(draw_ids))}
    else:
        pairs = {
            MULTINOMIAL: (ids_only(multinomial), with_logprobs(multinomial)),
            RACE: compiled_races(backend),
        }
    return [other_sampler(name, draw, inputs, i) for name, pair in pairs.items() for i, draw in enumerate(pair)]


def peer_candidates(inputs: SamplerInputs) -> list[Candidate]:
    pairs = SAMPLER_PEERS.items()
    return [other_sampler(name, draw, inputs, i) for name, pair in pairs for i, draw in enumerate(pair)]


def other_sampler(name: str, draw: Draw, inputs: SamplerInputs, has_logprobs: int) -> Candidate:
    return Candidate(
        name + (WITH_LOGPROBS if has_logprobs else ""),
        lambda inputs, upstream: draw(inputs),
        is_ours=False,
        norm_limit=SOMETHING_ELSE,  # whatever it is, not to the bit
        facts={"has_logprobs": bool(has_logprobs), "is_peer": name in SAMPLER_PEERS},
        results=lambda raw, upstream: drawn(draw, inputs),
    )
