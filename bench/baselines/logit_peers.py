"""Divergences from logits of other projects, where they are installed; see bench/baselines/peers.py.

Read in TRL 1.16.0, Liger 0.8.5 and fla-core 0.6.0 and run on a CPU against PyTorch in float32 and float16: TRL's function as it
is, the others in Triton's interpreter, Liger's kl_div without one cast of a Python number, which the interpreter lacks.

    TRL         its trainers' eager `generalized_jsd_loss`, in the dtype of the logits
    Liger       `jsd` and, for forward KL, `kl_div`: from log-probs, which are made in float32; a mean over rows
    FLA         the Triton kernel inside `fused_kl_div_loss`: forward KL alone; it overwrites the student's logits with the
                gradient, so they are copied first
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bench.baselines.peers import BETAS, NotInstalled, imported
from bench.baselines.stubs import function_in_source
from esr_kernels.testing.inputs import LogitPair
from esr_kernels.testing.oracle import Results


class RawResult(NamedTuple):
    """What a call makes: a value or one per row, and the gradient of the student's logits."""

    value: Tensor
    gradient_N_V: Tensor


class LogitPeer(NamedTuple):
    """`run` is timed, forward and backward; `results` is its result as ours has it, given the upstream gradient."""

    run: Callable[[LogitPair, Tensor, str], RawResult]
    results: Callable[[RawResult, Tensor], Results]
    divergences: tuple[str, ...]
    is_scalar: bool  # a mean over rows, with one upstream gradient for all


@cache
def trl_loss() -> Callable[..., Tensor]:
    """Its file imports a whole trainer, so the function is taken from the source.

    Raises:
        NotInstalled: TRL, or the function in it, is not there.
    """
    module, function_name = "trl.experimental.gkd.gkd_trainer", "GKDTrainer.generalized_jsd_loss"
    try:
        return function_in_source(module, function_name, {"torch": torch, "F": functional})
    except ImportError as error:
        raise NotInstalled(f"TRL: {error}") from error


def run_trl(inputs: LogitPair, upstream_N: Tensor, name: str) -> RawResult:
    """Without its reduction, which is a mean."""
    student = inputs.student_N_V.detach().requires_grad_()
    value_N = trl_loss()(student, inputs.teacher_N_V, beta=BETAS[name], reduction="none").sum(-1)
    return RawResult(value_N.detach(), *torch.autograd.grad(value_N, student, upstream_N.to(value_N.dtype)))


def run_liger_jsd(inputs: LogitPair, upstream_N: Tensor, name: str) -> RawResult:
    function = imported("Liger", "liger_kernel.ops.jsd", "LigerJSDFunction")
    return _from_logprobs(inputs, lambda student, teacher: function.apply(student, teacher, None, BETAS[name]))


def run_liger_kl_div(inputs: LogitPair, upstream_N: Tensor, name: str) -> RawResult:
    function = imported("Liger", "liger_kernel.ops.kl_div", "LigerKLDivLossFunction")
    return _from_logprobs(inputs, lambda student, teacher: function.apply(student, teacher, "batchmean", True))


def run_fla_kernel(inputs: LogitPair, upstream_N: Tensor, name: str) -> RawResult:
    """One value per row and the gradient for an upstream gradient of 1; its block size and warps are those of its caller."""
    kernel, most_columns, num_warps = (
        imported("FLA", "fla.modules.fused_kl_div.ops", part)
        for part in ("kl_div_kernel", "MAX_FUSED_SIZE", "STATIC_WARPS")
    )
    student_N_V, teacher_N_V = inputs.student_N_V.clone(), inputs.teacher_N_V
    num_rows, vocab_size = student_N_V.shape
    if student_N_V.stride() != teacher_N_V.stride():
        raise ValueError(
            f"FLA: both logits must have the same strides, got {student_N_V.stride()}, {teacher_N_V.stride()}"
        )
    value_N = torch.empty(num_rows, device=student_N_V.device)
    kernel[(num_rows,)](
        logits=student_N_V,
        target_logits=teacher_N_V,
        loss=value_N,
        s_logits=student_N_V.stride(0),
        s_loss=value_N.stride(0),
        reduction="none",
        N=num_rows,
        V=vocab_size,
        BV=min(most_columns, 1 << (vocab_size - 1).bit_length()),
        num_warps=num_warps,
    )
    return RawResult(value_N, student_N_V)


def _from_logprobs(inputs: LogitPair, loss: Callable[[Tensor, Tensor], Tensor]) -> RawResult:
    student = inputs.student_N_V.detach().requires_grad_()
    student_logprobs, teacher_logprobs = (
        logits.log_softmax(-1, dtype=torch.float32) for logits in (student, inputs.teacher_N_V)
    )
    value = loss(student_logprobs, teacher_logprobs)
    return RawResult(value.detach(), *torch.autograd.grad(value, student))


def results_per_row(raw: RawResult, upstream_N: Tensor) -> Results:
    return {"divergence": raw.value, "grad_student_logits": raw.gradient_N_V}


def results_of_unit_gradient(raw: RawResult, upstream_N: Tensor) -> Results:
    return results_per_row(raw._replace(gradient_N_V=raw.gradient_N_V.float() * upstream_N[:, None]), upstream_N)


def results_of_mean(raw: RawResult, upstream_N: Tensor) -> Results:
    """The gradient as if each row had its own upstream gradient; not the value, a mean."""
    return {"grad_student_logits": raw.gradient_N_V.float() * (len(upstream_N) * upstream_N[:, None])}


ALL, FORWARD_KL = tuple(BETAS), ("forward_kl",)
LOGIT_PEERS = {
    "TRL generalized_jsd_loss, eager": LogitPeer(run_trl, results_per_row, ALL, is_scalar=False),
    "Liger log_softmax and jsd": LogitPeer(run_liger_jsd, results_of_mean, ALL, is_scalar=True),
    "Liger log_softmax and kl_div": LogitPeer(run_liger_kl_div, results_of_mean, FORWARD_KL, is_scalar=True),
    "FLA kl_div_kernel": LogitPeer(run_fla_kernel, results_of_unit_gradient, FORWARD_KL, is_scalar=False),
}


def logit_peers(name: str) -> dict[str, LogitPeer]:
    """Those that compute the divergence of this name, with `run` for it alone."""
    return {
        peer: entry._replace(run=partial(entry.run, name=name))
        for peer, entry in LOGIT_PEERS.items()
        if name in entry.divergences
    }
