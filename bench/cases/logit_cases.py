"""K1 to K3: `token_divergence` from logits, memory-bound.

    K1  forward KL, reverse KL and Jensen-Shannon, bfloat16 and float32, forward alone and with backward
    K2  64,000 rows: no memory of the size of the logits but the gradient
    K3  reverse KL over vocabularies from 32,000 to 262,144 ids, one of them with rows that are not aligned

Counted bytes: each input read once, the gradient written once. Our schedule (`schedule_bytes`) reads the logits once more in
backward, and once more in forward for divergences other than the two KLs; later reads may come from the cache.

Peers are measured in K1 and K3, with backward: it is what they are for, and some make the gradient in any case. Where their loss
is a mean over rows, all rows have one upstream gradient while time is taken, and `scalar_loss` says so.

The drawn rows repeat after 640; values do not change what is read, and 640 rows do not fit in a cache.
"""

from collections.abc import Callable
from functools import cache, partial

import torch

from bench.baselines.logit_peers import logit_peers
from bench.baselines.pytorch import AS_WRITTEN, compiled, run_on_logits
from bench.cases.comparison import SOMETHING_ELSE, Candidate, Gate, Group, Run, at_rows, gate_rows
from bench.cases.settings import Settings
from esr_kernels import Impl, token_divergence
from esr_kernels.testing.cases import DIVERGENCES
from esr_kernels.testing.inputs import LogitPair, make_logit_pair, make_upstream
from esr_kernels.testing.oracle import Results, evaluate_token_divergence, token_divergence_oracle

DRAWN_ROWS = 640
KLS = ("forward_kl", "reverse_kl")


def k1_groups(settings: Settings) -> list[Callable[[], Group]]:
    return [
        partial(
            token_group,
            settings,
            "K1",
            name,
            dtype,
            settings.logit_rows,
            settings.vocab_size,
            has_backward=has_backward,
        )
        for name in AS_WRITTEN
        for dtype in (settings.half_dtype, torch.float32)
        for has_backward in (False, True)
    ]


def k2_groups(settings: Settings) -> list[Callable[[], Group]]:
    size = {"rows": settings.many_rows, "vocab_size": settings.vocab_size, "copies": 1, "has_others": False}
    names = ("reverse_kl", "jsd_0.5")
    return [
        partial(token_group, settings, "K2", name, settings.half_dtype, has_backward=True, **size) for name in names
    ]


def k3_groups(settings: Settings) -> list[Callable[[], Group]]:
    return [
        partial(
            token_group, settings, "K3", "reverse_kl", settings.half_dtype, settings.logit_rows, size, has_backward=True
        )
        for size in settings.vocab_sizes
    ]


def token_group(
    settings: Settings,
    case: str,
    name: str,
    dtype: torch.dtype,
    rows: int,
    vocab_size: int,
    *,
    has_backward: bool,
    copies: int = 2,
    has_others: bool = True,
) -> Group:
    """Ours and torch.compile, which is compared with backward only (it is compiled for each), eager PyTorch and the peers."""
    inputs = [drawn_logits(settings, rows, vocab_size, dtype, seed=seed) for seed in range(copies)]
    upstream_N = make_upstream(rows, seed=1, device=settings.device)
    itemsize = dtype.itemsize
    forward_reads = 1 if name in KLS else 2
    schedule_reads = forward_reads + (1 if has_backward else 0)
    facts = {"schedule_bytes": (2 * schedule_reads + has_backward) * rows * vocab_size * itemsize}
    candidates = [Candidate("ours", fused_run(name), facts=facts)]
    as_written = AS_WRITTEN[name]
    if has_others:
        candidates.append(other("eager", partial(run_on_logits, as_written)))
    if has_backward:
        candidates.append(other("compile", partial(run_on_logits, compiled(as_written, settings.compile_backend))))
    if has_backward and has_others:
        candidates += [
            other(title, peer.run, peer.results, scalar_loss=peer.is_scalar)
            for title, peer in logit_peers(name).items()
        ]
    return Group(
        case=case,
        setting={
            "op": "token_divergence",
            "divergence": name,
            "dtype": str(dtype).removeprefix("torch."),
            "pass": "forward and backward" if has_backward else "forward",
            "N": rows,
            "V": vocab_size,
            "upstream": "normal, one per row" if has_backward else None,
        },
        inputs=inputs,
        upstream=upstream_N if has_backward else None,
        gate=token_gate(inputs[0], name, upstream_N),
        gate_upstream=upstream_N if has_backward else None,
        candidates=candidates,
        counted_bytes=(3 if has_backward else 2) * rows * vocab_size * itemsize,
        counted_flop=0,
    )


def fused_run(name: str) -> Run:
    divergence = DIVERGENCES[name]

    def run(inputs: LogitPair, upstream_N: torch.Tensor | None) -> Results:
        if upstream_N is not None:
            return evaluate_token_divergence(inputs, divergence, upstream_N, impl=Impl.FUSED)
        with torch.no_grad():
            output = token_divergence(*inputs, divergence, impl=Impl.FUSED)
        return {field.removesuffix("_N"): tensor for field, tensor in output._asdict().items()}

    return run


def other(name: str, run: Run, results: Callable = lambda raw, upstream: raw, **facts) -> Candidate:
    return Candidate(name, run, is_ours=False, norm_limit=SOMETHING_ELSE, facts=facts, results=results)


def token_gate(inputs: LogitPair, name: str, upstream_N: torch.Tensor) -> Callable[..., Gate]:
    """The oracle on some of the rows, made when it is first asked for; `storage` plays no part."""

    @cache
    def gate() -> Gate:
        rows = gate_rows(len(upstream_N), upstream_N.device)
        arguments = LogitPair(*(logits[rows] for logits in inputs)), DIVERGENCES[name], upstream_N[rows]
        return Gate(
            at_rows(rows),
            token_divergence_oracle(*arguments),
            evaluate_token_divergence(*arguments, impl=Impl.REFERENCE),
        )

    return lambda storage: gate()


def drawn_logits(settings: Settings, rows: int, vocab_size: int, dtype: torch.dtype, *, seed: int) -> LogitPair:
    drawn = make_logit_pair(min(rows, DRAWN_ROWS), vocab_size, seed=seed, dtype=dtype, device=settings.device)
    repeats = -(-rows // DRAWN_ROWS)
    return LogitPair(*(logits.repeat(repeats, 1)[:rows] for logits in drawn))
