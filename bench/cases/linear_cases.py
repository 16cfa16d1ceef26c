"""L1 to L5 and L7: `linear_divergence` from hidden states and output heads, compute-bound.

    L1  both KLs, student and teacher of different width, head trained: storages and schedules of ours, full logits, peers
    L2  Jensen-Shannon, the same
    L3  frozen head: the gradient of the hidden states alone
    L4  64,000 rows
    L5  row counts from 320 to 6400: does any fall off the waves of the products' tiles?
    L7  error of the gradient against time, from far apart (about 0.5 nats) to nearly converged (5e-4)

Upstream gradients are normal, one per row. For the gate all but 256 of them are 0: the gradient of the head is then a sum
over those rows, which the oracle can afford, while the op runs over all rows and chunks as it does when it is timed. Some
others give the loss of all rows together (`scalar_loss`): one upstream gradient for all, and only the gradient of the hidden
states is compared, row by row.

Inputs are not rotated: the heads alone are 1.9 GB.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch

from bench.baselines.auto_chunker import AutoChunked, run_auto_chunked
from bench.baselines.peers import DIVERGENCE_PEERS, SCALAR_LOSSES, divergence_peers
from bench.baselines.pytorch import compiled, from_hidden, run_on_hidden
from bench.cases.comparison import SOMETHING_ELSE, Candidate, Gate, Group, at_rows, gate_rows, only_at
from bench.cases.our_candidates import AUTO, FLOAT32, TILE_RELATIVE, LinearOpCall, Setting, our_candidate
from bench.cases.settings import Settings
from bench.ceilings import Ceilings, LinearWork
from esr_kernels import Impl, LogitStorage
from esr_kernels.testing.cases import DIVERGENCES, Shape
from esr_kernels.testing.inputs import LinearInputs, make_linear_inputs, make_upstream
from esr_kernels.testing.oracle import evaluate_linear_divergence, linear_divergence_oracle

HEAD_TRAINED = ("student_hidden", "student_weight")
HEAD_FROZEN = ("student_hidden",)
EAGER, COMPILED_16, COMPILED_32 = "eager", "compile, bfloat16 logits", "compile, float32 logits"
AUTO_CHUNKED = "auto-chunker, bfloat16 logits"


def l1_groups(settings: Settings, ceilings: Ceilings) -> list[Callable[[], Group]]:
    ours = [(FLOAT32, None), (TILE_RELATIVE, None), (AUTO, None)]
    reverse = partial(
        linear_group,
        settings,
        ceilings,
        "L1",
        "reverse_kl",
        ours=[*ours, (FLOAT32, settings.recompute_bytes), (TILE_RELATIVE, settings.recompute_bytes)],
        others=(EAGER, COMPILED_16, COMPILED_32, AUTO_CHUNKED, *divergence_peers("reverse_kl")),
    )
    others = (AUTO_CHUNKED, *divergence_peers("forward_kl"))
    return [
        reverse,
        partial(linear_group, settings, ceilings, "L1", "forward_kl", ours=ours, others=others),
    ]


def l2_groups(settings: Settings, ceilings: Ceilings) -> list[Callable[[], Group]]:
    ours = [(FLOAT32, None), (TILE_RELATIVE, None)]
    others = (COMPILED_16, COMPILED_32, AUTO_CHUNKED, *divergence_peers("jsd_0.5"))
    return [partial(linear_group, settings, ceilings, "L2", "jsd_0.5", ours=ours, others=others)]


def l3_groups(settings: Settings, ceilings: Ceilings) -> list[Callable[[], Group]]:
    ours = [(FLOAT32, None), (TILE_RELATIVE, None)]
    others = (COMPILED_16, COMPILED_32, *divergence_peers("reverse_kl"))
    group = partial(linear_group, settings, ceilings, "L3", "reverse_kl", ours=ours, others=others)
    return [partial(group, trained=HEAD_FROZEN)]


def l4_groups(settings: Settings, ceilings: Ceilings) -> list[Callable[[], Group]]:
    shape = replace(settings.shape, rows=settings.many_rows)
    ours = [(AUTO, None), (TILE_RELATIVE, None), (FLOAT32, settings.keep_bytes)]
    others = (COMPILED_16, COMPILED_32, *divergence_peers("reverse_kl"))
    return [partial(linear_group, settings, ceilings, "L4", "reverse_kl", shape=shape, ours=ours, others=others)]


def l5_groups(settings: Settings, ceilings: Ceilings) -> list[Callable[[], Group]]:
    group = partial(linear_group, settings, ceilings, "L5", "reverse_kl", ours=[(AUTO, None)])
    return [partial(group, shape=replace(settings.shape, rows=rows)) for rows in settings.row_counts]


def l7_groups(settings: Settings, ceilings: Ceilings) -> list[Callable[[], Group]]:
    ours = [(FLOAT32, None), (TILE_RELATIVE, None)]
    others = (EAGER, COMPILED_16, COMPILED_32, *divergence_peers("reverse_kl"))
    group = partial(linear_group, settings, ceilings, "L7", "reverse_kl", ours=ours, others=others)
    # 16-bit logits are meant to be wrong here.
    return [partial(group, gap=gap, norm_limit=float("inf")) for gap in settings.gaps]


def linear_group(
    settings: Settings,
    ceilings: Ceilings,
    case: str,
    name: str,
    *,
    ours: list[Setting],
    others: tuple[str, ...] = (),
    shape: Shape | None = None,
    trained: tuple[str, ...] = HEAD_TRAINED,
    gap: float = 0.5,
    norm_limit: float = SOMETHING_ELSE,
) -> Group:
    """Ours in each (storage, workspace in bytes), and the named others."""
    shape = shape or settings.shape
    trains_head = trained == HEAD_TRAINED
    inputs = make_linear_inputs(shape, gap=gap, dtype=torch.bfloat16, device=settings.device)
    upstream_N = make_upstream(shape.rows, seed=1, device=settings.device)
    call = our_call(inputs, name, trained)
    candidates = [our_candidate(call, *setting) for setting in ours]
    for other in others:
        run = other_run(other, name, trains_head, settings.compile_backend)
        facts = {"scalar_loss": other in (AUTO_CHUNKED, *SCALAR_LOSSES)}
        candidates.append(Candidate(other, run, is_ours=False, norm_limit=norm_limit, facts=facts))
    gate = linear_gate(inputs, name, trained, upstream_N)
    work = LinearWork.of(
        shape.rows, shape.vocab_size, shape.student_size, teacher_size=shape.teacher_size, trained=trained
    )
    return Group(
        case=case,
        setting={
            "op": "linear_divergence",
            "divergence": name,
            "dtype": "bfloat16",
            "pass": "forward and backward",
            "N": shape.rows,
            "V": shape.vocab_size,
            "D": shape.student_size,
            "E": shape.teacher_size,
            "gap": gap,
            "mean_divergence": gate(FLOAT32).oracle.values["divergence"].mean().item(),
            "d_weight": trains_head,
            "upstream": "normal, one per row",
        },
        inputs=[inputs],
        upstream=upstream_N,
        gate=gate,
        gate_upstream=only_at(gate_rows(shape.rows, upstream_N.device), upstream_N),
        candidates=candidates,
        counted_bytes=0,
        counted_flop=work.flop(),
        floor_ms=ceilings.floor_ms(work),
    )


def our_call(inputs: LinearInputs, name: str, trained: tuple[str, ...]) -> LinearOpCall:
    evaluate = partial(evaluate_linear_divergence, impl=Impl.FUSED, trained=trained)
    hidden_N_D = inputs.student_hidden_N_D
    return LinearOpCall.of(
        "linear_divergence",
        lambda inputs, upstream_N, **options: evaluate(inputs, DIVERGENCES[name], upstream_N, **options),
        hidden_N_D,
        inputs.student_head.weight,
        num_rows=hidden_N_D.shape[0],
        num_sides=2,
        trained=trained,
    )


@cache  # so that L7 compiles once for all gaps
def other_run(other: str, name: str, trains_head: bool, backend: str) -> Callable:
    if other in DIVERGENCE_PEERS:
        return partial(DIVERGENCE_PEERS[other], name=name, trains_head=trains_head)
    function = from_hidden(name, has_float32_logits=other == COMPILED_32)
    if other == AUTO_CHUNKED:
        return partial(run_auto_chunked, AutoChunked(function, backend), trains_head=trains_head)
    if other != EAGER:
        function = compiled(function, backend)
    return partial(run_on_hidden, function, trains_head=trains_head)


def linear_gate(
    inputs: LinearInputs, name: str, trained: tuple[str, ...], upstream_N: torch.Tensor
) -> Callable[[LogitStorage], Gate]:
    """The oracle on some of the rows, with the bounds of a storage."""
    rows = gate_rows(len(upstream_N), upstream_N.device)
    some = inputs._replace(
        student_hidden_N_D=inputs.student_hidden_N_D[rows], teacher_hidden_N_E=inputs.teacher_hidden_N_E[rows]
    )
    arguments = some, DIVERGENCES[name], upstream_N[rows]

    @cache
    def gate(storage: LogitStorage) -> Gate:
        return Gate(
            at_rows(rows),
            linear_divergence_oracle(*arguments, trained=trained, logits=storage),
            evaluate_linear_divergence(*arguments, impl=Impl.REFERENCE, trained=trained),
        )

    return gate
