"""C4: the output head on the hidden states of a decode step, then one token per row.

    counted bytes   the head and the hidden states, read once; logits need not exist
    floor           the head's product alone, timed in the same run, as many at a time as the candidates

The head is bfloat16, and so are its logits, as a model in bfloat16 gives them to the sampler of the rollouts
(`esr_distill.rollout.decode_rows`); a fused peer draws from sums in float32. Temperature 1, no filter. To reach: at most 1.05
times the product alone, up to 64 rows.

Gate: `bench/cases/sampler_gate.py` on the logits of the same product. Ours is compared to the bit with the reference on them,
others by the distribution. Ours makes the log-probs in the same call; others draw without (`has_logprobs`).
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.baselines.sampler_baselines import multinomial
from bench.baselines.sampler_peers import flash_sampling_ids, flashinfer_ids
from bench.cases.comparison import SOMETHING_ELSE, Candidate, Group
from bench.cases.sampler_cases import MULTINOMIAL, NO_FILTER
from bench.cases.sampler_gate import drawn, results_of_state, sampler_gate
from bench.cases.sampler_inputs import RewoundState, RowParameters, SamplerInputs, make_state
from bench.cases.settings import Settings
from bench.ceilings import REPETITIONS, WARM_UP_CALLS, Ceilings
from bench.timing import Burst, summary
from esr_kernels import Impl, sample_tokens
from esr_kernels.testing.oracle import Results

AFTER_HEAD = " after the head"
FLASH_SAMPLING = "FlashSampling"


class HeadInputs(NamedTuple):
    """`sampler.logits_B_V` are those of the gate, made by the same product."""

    hidden_B_D: Tensor
    weight_V_D: Tensor
    sampler: SamplerInputs

    def logits(self) -> Tensor:
        return linear(self.hidden_B_D, self.weight_V_D)

    def with_logits(self) -> SamplerInputs:
        """The product, and what a sampler takes beside it."""
        return self.sampler._replace(logits_B_V=self.logits())


DrawFromHead = Callable[[HeadInputs], Tensor]


def c4_groups(settings: Settings, ceilings: Ceilings) -> list[Callable[[], Group]]:
    hidden_sizes = settings.shape.student_size, settings.shape.teacher_size
    return [
        partial(head_group, settings, ceilings, hidden_size, batch_size)
        for hidden_size in hidden_sizes
        for batch_size in settings.batch_sizes
    ]


def head_group(settings: Settings, ceilings: Ceilings, hidden_size: int, batch_size: int) -> Group:
    inputs = make_head_inputs(batch_size, settings.vocab_size, hidden_size, settings.device)
    others: dict[str, DrawFromHead] = {
        MULTINOMIAL + AFTER_HEAD: lambda inputs: multinomial(inputs.with_logits()),
        "FlashInfer" + AFTER_HEAD: lambda inputs: flashinfer_ids(inputs.with_logits()),
        FLASH_SAMPLING: flash_sampling(inputs.hidden_B_D.device),
    }
    return Group(
        case="C4",
        setting={
            "op": "head and sample_tokens",
            "dtype": "bfloat16",
            "pass": "forward",
            "B": batch_size,
            "V": settings.vocab_size,
            "D": hidden_size,
        },
        inputs=[inputs],
        upstream=None,
        gate=sampler_gate(inputs.sampler),
        gate_upstream=None,
        candidates=[our_head_sampler(inputs), *(other_head_sampler(*other, inputs) for other in others.items())],
        counted_bytes=inputs.weight_V_D.nbytes + inputs.hidden_B_D.nbytes,
        counted_flop=2 * batch_size * settings.vocab_size * hidden_size,
        floor_ms=product_ms(ceilings, inputs, settings.calls_per_sample),
        calls_per_sample=settings.calls_per_sample,
    )


def make_head_inputs(batch_size: int, vocab_size: int, hidden_size: int, device: str) -> HeadInputs:
    """Logits of about -1.1 log(rank), as of a language model, with ids in random order and noise of 1 nat from row to row."""
    generator = torch.Generator(device).manual_seed(hidden_size + batch_size)
    hidden_B_D = torch.randn(batch_size, hidden_size, generator=generator, device=device)
    weight_V_D = torch.randn(vocab_size, hidden_size, generator=generator, device=device) / hidden_size**0.5
    ranks_V = torch.rand(vocab_size, generator=generator, device=device).argsort() + 1
    hidden_B_D[:, 0], weight_V_D[:, 0] = 1, -1.1 * ranks_V.log()
    hidden_B_D, weight_V_D = hidden_B_D.bfloat16(), weight_V_D.bfloat16()
    rows_B = torch.arange(batch_size, device=device)
    sampler = SamplerInputs(
        logits_B_V=linear(hidden_B_D, weight_V_D),
        state=make_state(NO_FILTER, rows_B),
        settings=NO_FILTER,
        parameters=RowParameters.of(NO_FILTER, batch_size, vocab_size, rows_B.device),
        rows_B=rows_B.int(),
        seeds_B=rows_B,
        positions_B=torch.zeros_like(rows_B),
    )
    return HeadInputs(hidden_B_D, weight_V_D, sampler)


def product_ms(ceilings: Ceilings, inputs: HeadInputs, calls_per_sample: int) -> float:
    """Time of the head's product alone, timed like the candidates; kept among the bare products of the run."""
    stopwatch = ceilings.stopwatch
    stopwatch.samples(HeadInputs.logits, [inputs], WARM_UP_CALLS)
    burst = Burst(HeadInputs.logits, [inputs], calls_per_sample, may_be_captured=stopwatch.is_cuda)
    stopwatch.samples(burst, [None], WARM_UP_CALLS)
    samples = stopwatch.samples(burst, [None], 2 if ceilings.is_smoke else REPETITIONS)
    milliseconds = summary(samples)["median_ms"] / calls_per_sample
    batch_size, vocab_size = inputs.sampler.logits_B_V.shape
    name = f"bfloat16 logits N={batch_size} V={vocab_size} D={inputs.hidden_B_D.shape[1]}"
    ceilings.measured_gemms[name] = milliseconds
    return milliseconds


def our_head_sampler(inputs: HeadInputs) -> Candidate:
    """Nothing is returned: the results stand in the state, where the gate reads them."""

    def run(inputs: HeadInputs, upstream: None) -> None:
        sample_tokens(inputs.logits(), inputs.sampler.state, impl=Impl.FUSED)

    def run_and_read(sampler: SamplerInputs) -> Results:
        run(inputs, None)
        return results_of_state(sampler.state)

    return Candidate(
        "ours",
        run,
        facts={"has_logprobs": True, "is_peer": False},
        results=lambda raw, upstream: drawn(run_and_read, inputs.sampler),
        state=RewoundState(inputs.sampler.state),
    )


def other_head_sampler(name: str, draw: DrawFromHead, inputs: HeadInputs) -> Candidate:
    return Candidate(
        name,
        lambda inputs, upstream: {"token_ids": draw(inputs)},
        is_ours=False,
        norm_limit=SOMETHING_ELSE,  # whatever it is, not to the bit
        facts={"has_logprobs": False, "is_peer": not name.startswith(MULTINOMIAL)},
        results=lambda raw, upstream: drawn(lambda sampler: {"token_ids": draw(inputs)}, inputs.sampler),
    )


def flash_sampling(device: torch.device) -> DrawFromHead:
    """With a new seed for each call: its place in the random stream is a number of the host."""
    temperature = torch.ones((), device=device)
    seeds = count(3, 2)  # odd and above 1: Triton compiles anew for 1 and for multiples of 16
    return lambda inputs: flash_sampling_ids(inputs.hidden_B_D, inputs.weight_V_D, temperature, next(seeds))
