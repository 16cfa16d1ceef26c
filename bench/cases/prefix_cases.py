"""B1 to B4: log-probs of the first response tokens, from hidden states (compute-bound) and from logits (memory-bound).

    B1  `linear_prefix_logprobs` without gradient, 32 rollouts of 100 tokens after a prompt, at two hidden sizes
    B2  with backward and an upstream gradient for each token, head trained and frozen
    B3  their mean as a loss, cross entropy: the same upstream gradient for all tokens, head trained. The others
        of this case give the scalar alone and could not serve B2. To reach: 0.93 times the speed of QuACK's scaled-exp
    B4  the prefix of 100 tokens against all 2000 tokens of the same rollouts, from hidden states with backward, and from logits
        without: what Early Stopping Rollout saves by itself, at any quality of kernel

Inputs and gate: `bench/cases/prefix_rollouts.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from bench.baselines.cross_entropy import (
    CROSS_ENTROPY_PEERS,
    of_bfloat16_logits,
    of_float32_logits,
    run_mean_on_rollouts,
)
from bench.baselines.peers import LOGPROB_PEERS
from bench.baselines.pytorch import (
    compiled,
    logprobs_of_logits,
    logprobs_of_rows,
    of_response_rows,
    of_whole_sequences,
    results_of,
    run_on_rollouts,
)
from bench.cases.comparison import SOMETHING_ELSE, Candidate, Group, Run
from bench.cases.our_candidates import AUTO, FLOAT32, TILE_RELATIVE, LinearOpCall, Setting, our_candidate
from bench.cases.prefix_rollouts import (
    GateSlots,
    LogitRollouts,
    logits_gate,
    logits_of,
    make_rollouts,
    mean_gate,
    prefix_gate,
)
from bench.cases.settings import Settings
from bench.ceilings import Ceilings, LinearWork
from esr_kernels import Impl, prefix_logprobs
from esr_kernels.testing.inputs import make_upstream
from esr_kernels.testing.logprob_inputs import PrefixInputs
from esr_kernels.testing.logprob_oracle import evaluate_linear_prefix_logprobs
from esr_kernels.testing.oracle import Results

FORWARD, HEAD_TRAINED, HEAD_FROZEN = (), ("hidden", "weight"), ("hidden",)
WHOLE, ROWS_EAGER, ROWS_COMPILED = "whole sequences, eager", "rows of the prefix, eager", "rows of the prefix, compile"
OTHERS = (WHOLE, ROWS_COMPILED, *LOGPROB_PEERS)
TRL = "TRL chunked log-prob"
COMPILED_16, COMPILED_32 = "compile, bfloat16 logits", "compile, float32 logits"


def b1_groups(settings: Settings, ceilings: Ceilings) -> list[Callable[[], Group]]:
    sizes = settings.shape.student_size, settings.shape.teacher_size
    return [partial(stopped_group, settings, ceilings, "B1", size, FORWARD) for size in sizes]


def b2_groups(settings: Settings, ceilings: Ceilings) -> list[Callable[[], Group]]:
    size = settings.shape.student_size
    return [partial(stopped_group, settings, ceilings, "B2", size, trained) for trained in (HEAD_TRAINED, HEAD_FROZEN)]


def b3_groups(settings: Settings, ceilings: Ceilings) -> list[Callable[[], Group]]:
    return [partial(mean_group, settings, ceilings)]


def b4_groups(settings: Settings, ceilings: Ceilings) -> list[Callable[[], Group]]:
    return [partial(full_group, settings, ceilings), partial(full_logits_group, settings)]


def stopped_group(
    settings: Settings, ceilings: Ceilings, case: str, hidden_size: int, trained: tuple[str, ...]
) -> Group:
    """Rollouts that end at the horizon: ours in both storages, and the others."""
    start, horizon = settings.prompt_columns, settings.horizon
    inputs = make_rollouts(settings, hidden_size, start=start, tokens=horizon)
    candidates = [our_prefix(inputs, trained, horizon, (storage, None)) for storage in (FLOAT32, TILE_RELATIVE)]
    candidates += [other(name, other_run(name, start, horizon, trained, settings.compile_backend)) for name in OTHERS]
    return prefix_group(settings, ceilings, case, inputs, start, trained, candidates)


def mean_group(settings: Settings, ceilings: Ceilings) -> Group:
    """Rollouts that end at the horizon, and the mean of -log p over their tokens."""
    start, horizon = settings.prompt_columns, settings.horizon
    inputs = make_rollouts(settings, settings.shape.student_size, start=start, tokens=horizon)
    ours = [our_prefix(inputs, HEAD_TRAINED, horizon, (storage, None)) for storage in (FLOAT32, TILE_RELATIVE)]
    candidates = [replace(candidate, run=partial(with_loss, candidate.run)) for candidate in ours]
    for name in (COMPILED_16, COMPILED_32, *CROSS_ENTROPY_PEERS):
        run = partial(mean_run(name, settings.compile_backend), start=start, trained=HEAD_TRAINED)
        candidates.append(replace(other(name, run), facts={"scalar_loss": True}))
    group = prefix_group(settings, ceilings, "B3", inputs, start, HEAD_TRAINED, candidates)
    upstream_B_K = torch.full_like(group.upstream, -1 / group.upstream.numel())
    slots = GateSlots.of(inputs, start, horizon)
    gate_upstream_B_K = slots.upstream(torch.full_like(upstream_B_K, -1 / len(slots.slot_S)))
    return replace(
        group,
        setting=group.setting | {"upstream": "the same for all slots"},
        upstream=upstream_B_K,
        gate=mean_gate(inputs, slots, HEAD_TRAINED, gate_upstream_B_K),
        gate_upstream=gate_upstream_B_K,
    )


def full_group(settings: Settings, ceilings: Ceilings) -> Group:
    """Long rollouts: their prefix, and all of them; as few products as for the prefix only where d(logits) are kept."""
    inputs = make_rollouts(settings, settings.shape.student_size, start=1, tokens=settings.full_horizon)
    short, full = settings.horizon, settings.full_horizon
    candidates = [
        our_prefix(inputs, HEAD_TRAINED, short, (AUTO, None)),
        our_prefix(inputs, HEAD_TRAINED, full, (AUTO, None)),
        our_prefix(inputs, HEAD_TRAINED, full, (AUTO, settings.keep_bytes)),
        other(TRL, other_run(TRL, 1, full, HEAD_TRAINED, settings.compile_backend)),
    ]
    horizons = (short, full, full, full)
    works = [linear_work(inputs, horizon, HEAD_TRAINED) for horizon in horizons]
    candidates = [
        at_horizon(candidate, horizon, N=work.num_rows, counted_flop=work.flop(), floor_ms=ceilings.floor_ms(work))
        for candidate, horizon, work in zip(candidates, horizons, works, strict=True)
    ]
    return prefix_group(settings, ceilings, "B4", inputs, 1, HEAD_TRAINED, candidates)


def prefix_group(
    settings: Settings,
    ceilings: Ceilings,
    case: str,
    inputs: PrefixInputs,
    start: int,
    trained: tuple[str, ...],
    candidates: list[Candidate],
) -> Group:
    batch_size, num_columns, hidden_size = inputs.hidden_B_T_D.shape
    upstream_B_K = make_upstream(batch_size * inputs.horizon, seed=1, device=settings.device).view(batch_size, -1)
    slots = GateSlots.of(inputs, start, settings.horizon)
    work = linear_work(inputs, inputs.horizon, trained)
    return Group(
        case=case,
        setting={
            "op": "linear_prefix_logprobs",
            "dtype": "bfloat16",
            "pass": "forward and backward" if trained else "forward",
            "N": work.num_rows,
            "V": work.vocab_size,
            "D": hidden_size,
            "T": num_columns,
            "d_weight": "weight" in trained if trained else None,
            "upstream": "normal, one per slot" if trained else None,
        },
        inputs=[inputs],
        upstream=upstream_B_K if trained else None,
        gate=prefix_gate(inputs, slots, trained, upstream_B_K),
        gate_upstream=slots.upstream(upstream_B_K) if trained else None,
        candidates=candidates,
        counted_bytes=0,
        counted_flop=work.flop(),
        floor_ms=ceilings.floor_ms(work),
    )


def full_logits_group(settings: Settings) -> Group:
    """`prefix_logprobs` on the same rollouts, without gradient: it reads the rows of the prefix once."""
    dtype, short, full = settings.half_dtype, settings.horizon, settings.full_horizon
    rollouts = make_rollouts(settings, settings.shape.student_size, start=1, tokens=full, dtype=dtype)
    inputs = LogitRollouts(logits_of(rollouts), rollouts)
    batch_size, _, vocab_size = inputs.logits_B_T_V.shape
    slots = GateSlots.of(rollouts, 1, short)
    compiled_rows = compiled(logprobs_of_logits, settings.compile_backend)
    runs = {
        ("ours", short): fused_on_logits,
        ("ours", full): fused_on_logits,
        (ROWS_EAGER, short): partial(run_on_prefix_logits, logprobs_of_logits),
        (ROWS_COMPILED, short): partial(run_on_prefix_logits, compiled_rows),
    }
    candidates = []
    for (name, horizon), run in runs.items():
        candidate = Candidate(name, run) if name == "ours" else other(name, run)
        num_rows = batch_size * horizon
        counted_bytes = num_rows * vocab_size * dtype.itemsize
        candidates.append(at_horizon(candidate, horizon, N=num_rows, counted_bytes=counted_bytes))
    return Group(
        case="B4",
        setting={
            "op": "prefix_logprobs",
            "dtype": str(dtype).removeprefix("torch."),
            "pass": "forward",
            "N": batch_size * full,
            "V": vocab_size,
            "T": rollouts.token_ids_B_T.shape[1],
            "upstream": None,
        },
        inputs=[inputs],
        upstream=None,
        gate=logits_gate(inputs, slots),
        gate_upstream=None,
        candidates=candidates,
        counted_bytes=batch_size * full * vocab_size * dtype.itemsize,
        counted_flop=0,
    )


def linear_work(inputs: PrefixInputs, horizon: int, trained: tuple[str, ...]) -> LinearWork:
    vocab_size, hidden_size = inputs.head.weight.shape
    return LinearWork.of(inputs.starts_B.shape[0] * horizon, vocab_size, hidden_size, trained=trained)


def our_prefix(inputs: PrefixInputs, trained: tuple[str, ...], horizon: int, setting: Setting) -> Candidate:
    call = LinearOpCall.of(
        "linear_prefix_logprobs",
        partial(evaluate_linear_prefix_logprobs, impl=Impl.FUSED, trained=trained),
        inputs.hidden_B_T_D,
        inputs.head.weight,
        num_rows=inputs.starts_B.shape[0] * horizon,
        num_sides=1,
        trained=trained,
    )
    return our_candidate(call, *setting)


def at_horizon(candidate: Candidate, horizon: int, **work) -> Candidate:
    """The candidate on the first `horizon` slots of longer rollouts, with its own counted work."""

    def run(inputs: PrefixInputs | LogitRollouts, upstream_B_K: Tensor | None) -> Results:
        if isinstance(inputs, LogitRollouts):
            inputs = inputs._replace(rollouts=inputs.rollouts._replace(horizon=horizon))
        else:
            inputs = inputs._replace(horizon=horizon)
        return candidate.run(inputs, None if upstream_B_K is None else upstream_B_K[:, :horizon])

    return Candidate(
        f"{candidate.name}, horizon {horizon}",
        run,
        is_ours=candidate.is_ours,
        storage=candidate.storage,
        norm_limit=candidate.norm_limit,
        facts={**candidate.facts, **work, "horizon": horizon},
    )


def other(name: str, run: Run) -> Candidate:
    return Candidate(name, run, is_ours=False, norm_limit=SOMETHING_ELSE)


@cache  # so that groups of one case share what is compiled
def other_run(name: str, start: int, horizon: int, trained: tuple[str, ...], backend: str) -> Run:
    if name == WHOLE:
        return partial(run_on_rollouts, of_whole_sequences(start, horizon), trained=trained)
    of_rows = LOGPROB_PEERS[name] if name in LOGPROB_PEERS else compiled(logprobs_of_rows, backend)
    return partial(run_on_rollouts, of_response_rows(of_rows, start, horizon), trained=trained)


def with_loss(run: Run, inputs: PrefixInputs, upstream_B_K: Tensor) -> Results:
    """Log-probs and gradients, and the mean that the upstream gradients are of."""
    results = run(inputs, upstream_B_K)
    return results | {"loss": (results["logprobs"] * upstream_B_K).sum()}


@cache
def mean_run(name: str, backend: str) -> Run:
    written = {COMPILED_16: of_bfloat16_logits, COMPILED_32: of_float32_logits}
    function = CROSS_ENTROPY_PEERS[name] if name in CROSS_ENTROPY_PEERS else compiled(written[name], backend)
    return partial(run_mean_on_rollouts, function)


def fused_on_logits(inputs: LogitRollouts, upstream: None) -> Results:
    """The fields of the op's result, without gradient."""
    rollouts = inputs.rollouts
    with torch.no_grad():
        output = prefix_logprobs(
            inputs.logits_B_T_V, *rollouts[2:4], rollouts.horizon, lengths_B=rollouts.lengths_B, impl=Impl.FUSED
        )
    return {name.removesuffix("_B_K"): field for name, field in output._asdict().items()}


def run_on_prefix_logits(
    function: Callable[[Tensor, Tensor], Tensor], inputs: LogitRollouts, upstream: None
) -> Results:
    """Rollouts that start in column 1."""
    horizon = inputs.rollouts.horizon
    with torch.no_grad():
        tokens_B_K = inputs.rollouts.token_ids_B_T[:, 1 : 1 + horizon]
        return results_of("logprobs", function(inputs.logits_B_T_V[:, :horizon], tokens_B_K), {}, None)
