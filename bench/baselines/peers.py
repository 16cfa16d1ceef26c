"""Kernels of other projects, where they are installed: divergences, log-probs of tokens, top-k divergence.

The library never imports them, and a benchmark runs without them: a peer that cannot be imported is a row that says so, and
one that does not compute a divergence is not listed for it. TRL and Liger put beta on the teacher in the mixture and take 0 for
forward, 1 for reverse KL; FLA has forward KL alone.

Signatures were read in the wheels of TRL 1.16.0, Liger 0.8.5, verl 0.9.1, fla-core 0.6.0 and cut-cross-entropy 25.1.1. What was
run on a CPU, against PyTorch: TRL's two functions, verl's top-k loss, Liger's chunked JSD and its log-probs, which are PyTorch
there; Liger's fused JSD, FLA and cut-cross-entropy in Triton's interpreter, the last in float16 and with another log1p, which the
interpreter lacks. Read alone: Liger's kernel for Hopper, verl's linear cross entropy.
"""

from contextlib import suppress
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.baselines.pytorch import (
    DivergenceOfIds,
    LogprobsOfRows,
    gradient_of_rows,
    results_of,
    student_leaves,
)
from bench.baselines.stubs import BARE, import_bare
from esr_kernels.testing.inputs import LinearInputs
from esr_kernels.testing.oracle import Results

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd_0.5": 0.5}
# Columns of a tile of the projection, as TRL's trainers set it.
TRL_CHUNK_SIZE = 32768


class NotInstalled(Exception):
    """A peer cannot be imported; the text says why."""


def imported(project: str, module: str, name: str) -> Any:
    """The name from a peer's module; where its trainers' packages are absent, from the bare wheel (stubs.py).

    Raises:
        NotInstalled: it cannot be imported, whatever its own imports raise.
    """
    try:
        return getattr(import_module(module), name)
    except Exception as error:
        if module in BARE:
            with suppress(Exception):
                return getattr(import_bare(module), name)
        raise NotInstalled(f"{project}: {error}") from error


def run_trl(inputs: LinearInputs, upstream_N: Tensor, *, name: str, trains_head: bool) -> Results:
    """TRL's ChunkedDivergenceFunction: per-row values, tiles of 4096 x 32768, projects again in backward."""
    function = imported("TRL", "trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")
    hidden, weight, leaves = student_leaves(inputs, trains_head=trains_head)
    divergence_N, _ = function.apply(
        hidden, weight, None, inputs.teacher_hidden_N_E, inputs.teacher_head.weight, None, BETAS[name], 1.0
    )
    return results_of("divergence", divergence_N, leaves, upstream_N)


def run_liger_fused(inputs: LinearInputs, upstream_N: Tensor, *, name: str, trains_head: bool) -> Results:
    """Liger's fused_linear_jsd: a mean over rows, its gradient made in forward."""
    function = imported("Liger", "liger_kernel.ops.fused_linear_jsd", "LigerFusedLinearJSDFunction")
    hidden, weight, leaves = student_leaves(inputs, trains_head=trains_head)
    teacher_weight = inputs.teacher_head.weight
    value = function.apply(hidden, weight, inputs.teacher_hidden_N_E, teacher_weight, None, BETAS[name])
    return gradient_of_rows(value, leaves, upstream_N, len(upstream_N))


def run_liger_chunked(inputs: LinearInputs, upstream_N: Tensor, *, name: str, trains_head: bool) -> Results:
    """Liger's chunked, compiled distillation loss without its cross-entropy part."""
    loss_class = imported("Liger", "liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    hidden, weight, leaves = student_leaves(inputs, trains_head=trains_head)
    labels_N = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
    loss = loss_class(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[name])
    value = loss(hidden, weight, inputs.teacher_hidden_N_E, inputs.teacher_head.weight, labels_N)
    value = value[0] if isinstance(value, tuple) else value
    return gradient_of_rows(value, leaves, upstream_N, len(upstream_N))


def run_fla(inputs: LinearInputs, upstream_N: Tensor, *, name: str, trains_head: bool) -> Results:
    """flash-linear-attention's fused_kl_div_loss: a mean over rows, bfloat16 logits, its gradient made in forward.

    Raises:
        ValueError: the divergence is not forward KL.
    """
    if name != "forward_kl":
        raise ValueError(f"FLA: the divergence must be forward_kl, got {name!r}")
    function = imported("FLA", "fla.modules.fused_kl_div", "fused_kl_div_loss")
    hidden, weight, leaves = student_leaves(inputs, trains_head=trains_head)
    value = function(hidden, inputs.teacher_hidden_N_E, weight, inputs.teacher_head.weight)
    return gradient_of_rows(value, leaves, upstream_N, len(upstream_N))


DIVERGENCE_PEERS = {
    "TRL chunked divergence": run_trl,
    "Liger fused_linear_jsd": run_liger_fused,
    "Liger chunked JSD": run_liger_chunked,
    "FLA fused_kl_div_loss": run_fla,
}
ONE_DIVERGENCE = {"FLA fused_kl_div_loss": "forward_kl"}
# Means over rows, with one upstream gradient for all: what is timed is a mean, though each row's gradient is compared.
SCALAR_LOSSES = ("Liger fused_linear_jsd", "Liger chunked JSD", "FLA fused_kl_div_loss")


def divergence_peers(name: str) -> tuple[str, ...]:
    """Those that compute the divergence of this name."""
    return tuple(peer for peer in DIVERGENCE_PEERS if ONE_DIVERGENCE.get(peer, name) == name)


def trl_logprobs(hidden_N_D: Tensor, weight_V_D: Tensor, tokens_N: Tensor) -> Tensor:
    """TRL's ChunkedLogProbFunction without its optional outputs: tiles of 4096 x 32768, projects again in backward."""
    function = imported("TRL", "trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    if hidden_N_D.requires_grad or weight_V_D.requires_grad:
        imported("TRL", "trl.trainer.utils", "maybe_gather_lm_head_ctx")  # its backward imports this
    no_bias, temperature, softcap, logit_scale, outputs = None, 1.0, None, 1.0, ()
    logprobs_N, *_ = function.apply(
        hidden_N_D, weight_V_D, no_bias, tokens_N, temperature, TRL_CHUNK_SIZE, softcap, logit_scale, outputs
    )
    return logprobs_N


def liger_logprobs(hidden_N_D: Tensor, weight_V_D: Tensor, tokens_N: Tensor) -> Tensor:
    """Liger's fused linear scaled cross entropy per token: its kernel for Hopper, elsewhere its chunked PyTorch.

    As it is by default, it waits for the device to check the tokens (LIGER_SCALED_CE_SM90_VALIDATE_TARGETS=0 turns that off).
    """
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    function = imported("Liger", module, "LigerFusedLinearScaledCrossEntropyFunction")
    device = hidden_N_D.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        # The class imports the kernel, which needs CuTe DSL, when it is first called.
        module = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
        imported("Liger", module, "LigerFusedScaledCrossEntropySM90Function")
    return -function.apply(hidden_N_D, weight_V_D, tokens_N)


def verl_logprobs(hidden_N_D: Tensor, weight_V_D: Tensor, tokens_N: Tensor) -> Tensor:
    """verl's fused linear cross entropy, which makes the entropy too; needs a hidden size that is a multiple of 128."""
    function = imported("verl", "verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    logprobs_N, _ = function(hidden_N_D, weight_V_D, tokens_N, 1.0, "none")
    return logprobs_N


def cut_cross_entropy_logprobs(hidden_N_D: Tensor, weight_V_D: Tensor, tokens_N: Tensor) -> Tensor:
    """cut-cross-entropy per token. As it is by default, its backward leaves out blocks of small gradients, and it adds under
    locks, in an order that changes; the host waits for a look at the tokens. Backward takes 16-bit hidden states alone.
    """
    function = imported("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")
    return -function(hidden_N_D, weight_V_D, tokens_N, reduction="none")


LOGPROB_PEERS: dict[str, LogprobsOfRows] = {
    "TRL chunked log-prob": trl_logprobs,
    "Liger fused_linear_scaled_cross_entropy": liger_logprobs,
    "verl linear_cross_entropy": verl_logprobs,
    "cut-cross-entropy": cut_cross_entropy_logprobs,
}


def verl_topk_without_tail(
    hidden_N_D: Tensor, weight_V_D: Tensor, teacher_ids_N_K: Tensor, teacher_logprobs_N_K: Tensor
) -> Tensor:
    """verl's compute_forward_kl_topk over full logits: the terms of the K ids alone, without its clamp of log-probs.

    It also finds the student's K likeliest ids and counts those that both have.
    """
    function = imported("verl", "verl.trainer.distillation.fsdp.losses", "compute_forward_kl_topk")
    logits_1_N_V = linear(hidden_N_D, weight_V_D)[None]
    offsets = hidden_N_D.shape[0] * torch.arange(2, device=hidden_N_D.device)
    teacher = [torch.nested.nested_tensor_from_jagged(t, offsets) for t in (teacher_logprobs_N_K, teacher_ids_N_K)]
    config = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=False))
    return function(logits_1_N_V, *teacher, config, "thd")["distillation_losses"].squeeze(0)


TOPK_PEERS: dict[str, DivergenceOfIds] = {"verl forward_kl_topk, no tail": verl_topk_without_tail}
