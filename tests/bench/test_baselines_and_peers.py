"""Do the implementations that ours are compared with compute the same?  pytest tests/bench/test_baselines_and_peers.py

On float32 inputs, so that only the order of sums differs.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from esr_kernels import ForwardKL, Impl
from esr_kernels.testing.cases import Shape
from esr_kernels.testing.inputs import make_upstream
from esr_kernels.testing.logprob_inputs import make_topk_inputs
from esr_kernels.testing.logprob_oracle import evaluate_linear_prefix_logprobs, evaluate_topk_divergence

TRAINED = ("hidden", "weight")
START, HORIZON = 3, 4


def logprobs(hidden, weight, tokens):
    return (hidden @ weight.T).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)


def trl(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
    assert (bias, temperature, softcap, logit_scale, outputs) == (None, 1.0, None, 1.0, ()) and chunk_size > 0
    return logprobs(hidden, weight, targets), None, None, None, None


def liger(hidden, weight, target, temperature=1.0, ignore_index=-100, tiles=1, return_entropy=False, ids=None):
    return -logprobs(hidden, weight, target)


def verl(hidden, weight, labels, temperature, reduction, group=None):
    assert temperature == 1.0 and reduction == "none" and hidden.is_contiguous() and labels.is_contiguous()
    return logprobs(hidden, weight, labels), torch.zeros(len(labels))


def verl_topk(student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format):
    assert config.distillation_loss.log_prob_min_clamp is None and data_format == "thd"
    teacher, ids = (nested.values().unsqueeze(0) for nested in (teacher_topk_log_probs, teacher_topk_ids))
    student = student_logits.log_softmax(-1).gather(-1, ids)
    return {"distillation_losses": (teacher.exp() * (teacher - student)).sum(-1)}


def cut_cross_entropy(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
):
    assert (softcap, reduction, shift) == (None, "none", False) and (targets != ignore_index).all()
    return -logprobs(e, c, targets)


# Stand-ins with the positions and the signs that were read in the wheels.
PEER_MODULES = {
    "trl.kernels.chunked_logprob": {"ChunkedLogProbFunction": SimpleNamespace(apply=trl)},
    "trl.trainer.utils": {"maybe_gather_lm_head_ctx": None},
    "liger_kernel.ops.fused_linear_scaled_cross_entropy": {
        "LigerFusedLinearScaledCrossEntropyFunction": SimpleNamespace(apply=liger)
    },
    "cut_cross_entropy": {"linear_cross_entropy": cut_cross_entropy},
    "verl.utils.kernel.linear_cross_entropy": {"linear_cross_entropy": verl},
    "verl.trainer.distillation.fsdp.losses": {"compute_forward_kl_topk": verl_topk},
}


@pytest.fixture
def peers(bench, monkeypatch):
    for name, contents in PEER_MODULES.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**contents))
    return bench("baselines.peers")


@pytest.fixture
def rollouts(bench):
    settings = bench("cases.settings").smoke_settings()
    return bench("cases.prefix_rollouts").make_rollouts(settings, 16, start=START, tokens=HORIZON, dtype=torch.float32)


def check_logprobs(baselines, function, rollouts):
    upstream_B_K = make_upstream(2 * HORIZON, seed=3).view(2, HORIZON)
    expected = evaluate_linear_prefix_logprobs(rollouts, upstream_B_K, impl=Impl.REFERENCE, trained=TRAINED)
    results = baselines.run_on_rollouts(function, rollouts, upstream_B_K, trained=TRAINED)
    assert set(results) == {"logprobs", "grad_hidden", "grad_weight"}
    for name, tensor in results.items():
        torch.testing.assert_close(tensor, expected[name])
    frozen = baselines.run_on_rollouts(function, rollouts, upstream_B_K, trained=("hidden",))
    assert set(frozen) == {"logprobs", "grad_hidden"}
    assert set(baselines.run_on_rollouts(function, rollouts, None, trained=())) == {"logprobs"}


def test_log_probs_written_in_pytorch_are_those_of_the_reference(bench, rollouts):
    baselines = bench("baselines.pytorch")
    of_rows = baselines.of_response_rows(baselines.logprobs_of_rows, START, HORIZON)
    check_logprobs(baselines, of_rows, rollouts)
    check_logprobs(baselines, baselines.of_whole_sequences(START, HORIZON), rollouts)


@pytest.mark.parametrize(
    "name",
    [
        "TRL chunked log-prob",
        "Liger fused_linear_scaled_cross_entropy",
        "verl linear_cross_entropy",
        "cut-cross-entropy",
    ],
)
def test_log_probs_of_a_peer_have_its_arguments_and_our_sign(bench, peers, rollouts, name):
    baselines = bench("baselines.pytorch")
    check_logprobs(baselines, baselines.of_response_rows(peers.LOGPROB_PEERS[name], START, HORIZON), rollouts)


def test_a_peer_whose_backward_cannot_be_imported_is_not_installed(bench, peers, rollouts, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    baselines = bench("baselines.pytorch")
    function = baselines.of_response_rows(peers.trl_logprobs, START, HORIZON)
    assert set(baselines.run_on_rollouts(function, rollouts, None, trained=())) == {"logprobs"}
    with pytest.raises(peers.NotInstalled, match="TRL: .*trl.trainer.utils"):
        baselines.run_on_rollouts(function, rollouts, None, trained=TRAINED)


def test_top_k_divergence_written_in_pytorch_is_that_of_the_reference(bench):
    baselines = bench("baselines.pytorch")
    inputs, upstream_N = make_topk_inputs(Shape(5, 67, 8, 9), 6), make_upstream(5, seed=4)
    expected = evaluate_topk_divergence(inputs, ForwardKL(), upstream_N, impl=Impl.REFERENCE, trained=TRAINED)
    results = baselines.run_on_topk(baselines.forward_kl_with_tail, inputs, upstream_N, trained=TRAINED)
    assert set(results) == {"divergence", "grad_hidden", "grad_weight"}
    for name, tensor in results.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_verls_top_k_divergence_lacks_the_term_of_the_tail(bench, peers):
    baselines = bench("baselines.pytorch")
    inputs, upstream_N = make_topk_inputs(Shape(5, 67, 8, 9), 6), make_upstream(5, seed=4)
    student_N_K = torch.log_softmax(inputs.student_head.logits(inputs.student_hidden_N_D).double(), dim=-1)
    student_N_K = student_N_K.gather(-1, inputs.teacher_ids_N_K)
    p_tail_N, q_tail_N = (1 - x.double().exp().sum(-1) for x in (student_N_K, inputs.teacher_logprobs_N_K))
    (function,) = peers.TOPK_PEERS.values()
    without, with_tail = (
        baselines.run_on_topk(f, inputs, upstream_N, trained=TRAINED)["divergence"]
        for f in (function, baselines.forward_kl_with_tail)
    )
    tail_term_N = (q_tail_N * (q_tail_N / p_tail_N).log()).float()
    torch.testing.assert_close(without + tail_term_N, with_tail, rtol=1e-4, atol=1e-5)
    assert tail_term_N.abs().min() > 1e-3
