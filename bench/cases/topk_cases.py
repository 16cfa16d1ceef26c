"""L6: `topk_divergence`, forward KL against a teacher known at its K likeliest ids, the rest in a tail bucket.

Forward and backward with a trained head; nothing of the teacher is projected, so the floor is three products. Upstream
gradients and the gate are those of `bench/cases/linear_cases.py`.
"""

from collections.abc import Callable
from functools import cache, partial

import torch

from bench.baselines.peers import TOPK_PEERS
from bench.baselines.pytorch import compiled, forward_kl_with_tail, run_on_topk
from bench.cases.comparison import SOMETHING_ELSE, Candidate, Gate, Group, at_rows, gate_rows, only_at
from bench.cases.our_candidates import FLOAT32, TILE_RELATIVE, LinearOpCall, our_candidate
from bench.cases.settings import Settings
from bench.ceilings import Ceilings, LinearWork
from esr_kernels import ForwardKL, Impl, LogitStorage
from esr_kernels.testing.inputs import make_upstream
from esr_kernels.testing.logprob_inputs import TopkInputs, make_topk_inputs
from esr_kernels.testing.logprob_oracle import evaluate_topk_divergence, topk_divergence_oracle
from esr_kernels.testing.oracle import Results

TRAINED = ("hidden", "weight")


def l6_groups(settings: Settings, ceilings: Ceilings) -> list[Callable[[], Group]]:
    return [partial(topk_group, settings, ceilings, num_ids) for num_ids in settings.numbers_of_ids]


def topk_group(settings: Settings, ceilings: Ceilings, num_ids: int) -> Group:
    shape = settings.shape
    inputs = make_topk_inputs(shape, num_ids, dtype=torch.bfloat16, device=settings.device)
    upstream_N = make_upstream(shape.rows, seed=1, device=settings.device)
    call = LinearOpCall.of(
        "topk_divergence",
        fused,
        inputs.student_hidden_N_D,
        inputs.student_head.weight,
        num_rows=shape.rows,
        num_sides=1,
        trained=TRAINED,
    )
    candidates = [our_candidate(call, storage, None) for storage in (FLOAT32, TILE_RELATIVE)]
    others = {
        "eager, bfloat16 logits": forward_kl_with_tail,
        "compile, bfloat16 logits": compiled(forward_kl_with_tail, settings.compile_backend),
        **TOPK_PEERS,
    }
    for name, function in others.items():
        run = partial(run_on_topk, function, trained=TRAINED)
        candidates.append(Candidate(name, run, is_ours=False, norm_limit=SOMETHING_ELSE))
    work = LinearWork.of(shape.rows, shape.vocab_size, shape.student_size, trained=TRAINED)
    return Group(
        case="L6",
        setting={
            "op": "topk_divergence",
            "divergence": "forward_kl",
            "dtype": "bfloat16",
            "pass": "forward and backward",
            "N": shape.rows,
            "V": shape.vocab_size,
            "D": shape.student_size,
            "K": num_ids,
            "d_weight": True,
            "upstream": "normal, one per row",
        },
        inputs=[inputs],
        upstream=upstream_N,
        gate=topk_gate(inputs, upstream_N),
        gate_upstream=only_at(gate_rows(shape.rows, upstream_N.device), upstream_N),
        candidates=candidates,
        counted_bytes=0,
        counted_flop=work.flop(),
        floor_ms=ceilings.floor_ms(work),
    )


def fused(inputs: TopkInputs, upstream_N: torch.Tensor, **options) -> Results:
    return evaluate_topk_divergence(inputs, ForwardKL(), upstream_N, impl=Impl.FUSED, trained=TRAINED, **options)


def topk_gate(inputs: TopkInputs, upstream_N: torch.Tensor) -> Callable[[LogitStorage], Gate]:
    """The oracle on some of the rows, with the bounds of a storage."""
    rows = gate_rows(len(upstream_N), upstream_N.device)
    some = TopkInputs(
        inputs.student_hidden_N_D[rows],
        inputs.student_head,
        inputs.teacher_ids_N_K[rows],
        inputs.teacher_logprobs_N_K[rows],
    )
    arguments = some, ForwardKL(), upstream_N[rows]

    @cache
    def gate(storage: LogitStorage) -> Gate:
        return Gate(
            at_rows(rows),
            topk_divergence_oracle(*arguments, trained=TRAINED, logits=storage),
            evaluate_topk_divergence(*arguments, impl=Impl.REFERENCE, trained=TRAINED),
        )

    return gate
