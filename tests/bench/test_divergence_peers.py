"""Are the divergences of the peers called so that they compute ours?  pytest tests/bench/test_divergence_peers.py

Stand-ins have the parameters and the semantics that were read in the wheels; what they compute is written here by the formula,
and torch's kl_div is the judge.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import kl_div

from esr_kernels.testing.cases import Shape
from esr_kernels.testing.inputs import LogitPair, make_linear_inputs, make_logit_pair, make_upstream

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd_0.5")
NUM_ROWS, NUM_IDS = 5, 67


def of_teacher_and_student(teacher, student, beta):
    """Log-probs of both -> beta KL(teacher || m) + (1 - beta) KL(student || m) per row, with the limits at 0 and 1."""
    if beta == 0:
        return kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    if beta == 1:
        return kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    of_teacher, of_student = (
        kl_div(mixture, side, reduction="none", log_target=True).sum(-1) for side in (teacher, student)
    )
    return beta * of_teacher + (1 - beta) * of_student


def of_hidden(student_hidden, student_weight, teacher_hidden, teacher_weight, beta):
    teacher, student = (
        (hidden @ weight.T).log_softmax(-1)
        for hidden, weight in ((teacher_hidden, teacher_weight), (student_hidden, student_weight))
    )
    return of_teacher_and_student(teacher, student, beta)


def trl(
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    beta,
    temperature=1.0,
    *scales_and_softcaps,
):
    assert (student_bias, teacher_bias, temperature, scales_and_softcaps) == (None, None, 1.0, ())
    value = of_hidden(student_hidden, student_weight, teacher_hidden, teacher_weight, beta)
    return value, torch.zeros(len(value))


def liger_fused(
    student_input,
    student_weight,
    teacher_input,
    teacher_weight,
    shift_labels=None,
    jsd_beta=0.5,
    ignore_index=-100,
    temperature=1.0,
    accum_dtype=None,
    jsd_impl=None,
    jsd_mode=None,
):
    assert shift_labels is None and temperature == 1.0
    return of_hidden(student_input, student_weight, teacher_input, teacher_weight, jsd_beta).mean()


class LigerChunked:
    def __init__(
        self,
        weight_hard_loss=0.5,
        weight_soft_loss=0.5,
        beta=0.5,
        ignore_index=-100,
        temperature=1.0,
        compiled=True,
        chunk_size=1024,
        return_soft_hard_loss=False,
    ):
        assert (weight_hard_loss, weight_soft_loss, temperature, return_soft_hard_loss) == (0.0, 1.0, 1.0, False)
        self.beta, self.ignore_index = beta, ignore_index

    def __call__(
        self,
        student_input,
        student_weight,
        teacher_input,
        teacher_weight,
        true_labels,
        student_bias=None,
        teacher_bias=None,
    ):
        assert true_labels.shape == (len(student_input),) and (true_labels != self.ignore_index).all()
        return of_hidden(student_input, student_weight, teacher_input, teacher_weight, self.beta).mean()


def fla(x, target_x, weight, target_weight, reduction="batchmean", accumulate_grad_in_fp32=True):
    assert reduction == "batchmean" and not (target_x.requires_grad or target_weight.requires_grad)
    return of_hidden(x, weight, target_x, target_weight, 0.0).sum() / len(x)


def liger_jsd(_input, target, shift_labels=None, beta=0.5, ignore_index=-100, jsd_impl=None, jsd_mode=None):
    assert shift_labels is None and _input.dtype == target.dtype == torch.float32
    return of_teacher_and_student(target, _input, beta).sum() / len(_input)


def liger_kl_div(y_pred, y_true, reduction="batchmean", log_target=False, eps=1e-10):
    assert log_target and y_pred.dtype == y_true.dtype == torch.float32
    return kl_div(y_pred, y_true, reduction=reduction, log_target=True)


class FlaKernel:
    """`kernel[grid](...)`, which leaves the gradient in `logits` and the values in `loss`."""

    def __getitem__(self, grid):
        (self.num_programs,) = grid
        return self.launch

    def launch(self, *, logits, target_logits, loss, s_logits, s_loss, reduction, N, V, BV, num_warps):
        assert (s_logits, s_loss, num_warps) == (logits.stride(0), loss.stride(0), 32)
        assert self.num_programs == N == len(logits) and V == logits.shape[1] and BV == min(128, 4096)
        student, teacher = (x.float().log_softmax(-1) for x in (logits, target_logits))
        scale = 1 / N if reduction == "batchmean" else 1
        loss.copy_(scale * of_teacher_and_student(teacher, student, 0.0))
        logits.copy_(scale * (student.exp() - teacher.exp()))


MODULES = {
    "trl.kernels.chunked_divergence": {"ChunkedDivergenceFunction": SimpleNamespace(apply=trl)},
    "liger_kernel.ops.fused_linear_jsd": {"LigerFusedLinearJSDFunction": SimpleNamespace(apply=liger_fused)},
    "liger_kernel.chunked_loss": {"LigerFusedLinearJSDLoss": LigerChunked},
    "liger_kernel.ops.jsd": {"LigerJSDFunction": SimpleNamespace(apply=liger_jsd)},
    "liger_kernel.ops.kl_div": {"LigerKLDivLossFunction": SimpleNamespace(apply=liger_kl_div)},
    "fla.modules.fused_kl_div": {"fused_kl_div_loss": fla},
    "fla.modules.fused_kl_div.ops": {"kl_div_kernel": FlaKernel(), "MAX_FUSED_SIZE": 4096, "STATIC_WARPS": 32},
}

# Only its name, its parameters and what it does for reduction="none" are those of TRL.
TRL_SOURCE = """
import a_package_that_is_not_there

class GKDTrainer(a_package_that_is_not_there.Trainer):
    @staticmethod
    def generalized_jsd_loss(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0,
                             reduction="batchmean", num_items_in_batch=None):
        student, teacher = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
        if beta == 0:
            jsd = F.kl_div(student, teacher, reduction="none", log_target=True)
        elif beta == 1:
            jsd = F.kl_div(teacher, student, reduction="none", log_target=True)
        else:
            mixture = torch.log(beta * teacher.exp() + (1 - beta) * student.exp())
            jsd = beta * F.kl_div(mixture, teacher, reduction="none", log_target=True)
            jsd = jsd + (1 - beta) * F.kl_div(mixture, student, reduction="none", log_target=True)
        return jsd.sum() / len(jsd) if reduction == "batchmean" else jsd
"""


@pytest.fixture
def stand_ins(monkeypatch, tmp_path, bench):
    for name, contents in MODULES.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**contents))
    path = tmp_path / "trl" / "experimental" / "gkd" / "gkd_trainer.py"
    path.parent.mkdir(parents=True)
    path.write_text(TRL_SOURCE)
    (tmp_path / "trl" / "__init__.py").write_text("raise ImportError('nothing of TRL may be run')")
    monkeypatch.syspath_prepend(tmp_path)
    bench("baselines.logit_peers").trl_loss.cache_clear()
    yield
    bench("baselines.logit_peers").trl_loss.cache_clear()


def expected_of_hidden(inputs, name, upstream):
    """Value and gradients by the formula, one upstream gradient per row."""
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd_0.5": 0.5}[name]
    hidden, weight = (
        tensor.detach().requires_grad_() for tensor in (inputs.student_hidden_N_D, inputs.student_head.weight)
    )
    value = of_hidden(hidden, weight, inputs.teacher_hidden_N_E, inputs.teacher_head.weight, beta)
    gradients = torch.autograd.grad(value, [hidden, weight], upstream)
    return {"divergence": value.detach(), "grad_student_hidden": gradients[0], "grad_student_weight": gradients[1]}


PEERS_OF = {
    "forward_kl": [
        "TRL chunked divergence",
        "Liger fused_linear_jsd",
        "Liger chunked JSD",
        "FLA fused_kl_div_loss",
    ],
    "reverse_kl": ["TRL chunked divergence", "Liger fused_linear_jsd", "Liger chunked JSD"],
    "jsd_0.5": ["TRL chunked divergence", "Liger fused_linear_jsd", "Liger chunked JSD"],
}


@pytest.mark.parametrize("trains_head", [True, False])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_from_hidden_states_are_those_of_the_formula(bench, stand_ins, name, trains_head):
    peers = bench("baselines.peers")
    assert list(peers.divergence_peers(name)) == PEERS_OF[name]
    inputs = make_linear_inputs(Shape(NUM_ROWS, NUM_IDS, 9, 11))
    upstream = make_upstream(NUM_ROWS, seed=3)
    expected = expected_of_hidden(inputs, name, upstream)
    for peer in PEERS_OF[name]:
        results = peers.DIVERGENCE_PEERS[peer](inputs, upstream, name=name, trains_head=trains_head)
        names = {"grad_student_hidden"}
        if peer not in peers.SCALAR_LOSSES:
            names |= {"divergence"} | ({"grad_student_weight"} if trains_head else set())
        assert set(results) == names, peer
        for key, tensor in results.items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-6)


def test_a_divergence_that_a_peer_does_not_have_is_an_error_there(bench, stand_ins):
    inputs = make_linear_inputs(Shape(2, 9, 3, 4))
    with pytest.raises(ValueError, match="FLA: the divergence must be forward_kl, got 'reverse_kl'"):
        bench("baselines.peers").run_fla(inputs, make_upstream(2), name="reverse_kl", trains_head=True)


def test_the_gradient_of_a_mean_or_a_sum_becomes_that_of_each_row(bench):
    """(x1^2 + x2^2) / 2 has gradient x, the sum 2 x; with upstream gradients 3 and -5 of each row it is 2 x 3, 2 x (-5)."""
    gradient_of_rows = bench("baselines.pytorch").gradient_of_rows
    hidden = torch.tensor([[1.0], [2.0]], requires_grad=True)
    upstream, expected = torch.tensor([3.0, -5.0]), torch.tensor([[6.0], [-20.0]])
    for value, num_rows in ((hidden.square().mean(), 2), (hidden.square().sum(), 1)):
        results = gradient_of_rows(value, {"student_hidden": hidden}, upstream, num_rows)
        assert set(results) == {"grad_student_hidden"}
        assert torch.equal(results["grad_student_hidden"], expected)


LOGIT_PEERS_OF = {
    "forward_kl": [
        "TRL generalized_jsd_loss, eager",
        "Liger log_softmax and jsd",
        "Liger log_softmax and kl_div",
        "FLA kl_div_kernel",
    ],
    "reverse_kl": ["TRL generalized_jsd_loss, eager", "Liger log_softmax and jsd"],
    "jsd_0.5": ["TRL generalized_jsd_loss, eager", "Liger log_softmax and jsd"],
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_from_logits_are_those_of_the_formula(bench, stand_ins, name):
    peers = bench("baselines.logit_peers").logit_peers(name)
    assert list(peers) == LOGIT_PEERS_OF[name]
    inputs, upstream = make_logit_pair(NUM_ROWS, NUM_IDS, seed=2), make_upstream(NUM_ROWS, seed=3)
    student = inputs.student_N_V.clone().requires_grad_()
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd_0.5": 0.5}[name]
    value = of_teacher_and_student(inputs.teacher_N_V.log_softmax(-1), student.log_softmax(-1), beta)
    (gradient,) = torch.autograd.grad(value, student, upstream)
    before = LogitPair(*(logits.clone() for logits in inputs))
    for title, peer in peers.items():
        results = peer.results(peer.run(inputs, upstream), upstream)
        assert set(results) == {"grad_student_logits"} | (set() if peer.is_scalar else {"divergence"})
        torch.testing.assert_close(results["grad_student_logits"], gradient, rtol=1e-4, atol=1e-6)
        if not peer.is_scalar:
            torch.testing.assert_close(results["divergence"], value.detach(), rtol=1e-4, atol=1e-6)
        for now, then in zip(inputs, before, strict=True):
            assert torch.equal(now, then), f"{title} changed its inputs"


def test_flas_kernel_wants_one_stride_for_both(bench, stand_ins):
    inputs = make_logit_pair(3, 8)
    inputs = inputs._replace(teacher_N_V=torch.stack([inputs.teacher_N_V, inputs.teacher_N_V], 1)[:, 0])
    with pytest.raises(ValueError, match=r"both logits must have the same strides, got \(8, 1\), \(16, 1\)"):
        bench("baselines.logit_peers").run_fla_kernel(inputs, make_upstream(3), "forward_kl")


@pytest.mark.parametrize("case, names", [("k1_groups", DIVERGENCES), ("k3_groups", ("reverse_kl",))])
def test_logit_cases_list_the_peers_with_backward_and_only_what_they_compute(bench, monkeypatch, case, names):
    for module in (*MODULES, "trl"):
        monkeypatch.setitem(sys.modules, module, None)
    bench("baselines.logit_peers").trl_loss.cache_clear()
    settings = bench("cases.settings").smoke_settings()
    found = set()
    for make_group in getattr(bench("cases.logit_cases"), case)(settings):
        group = make_group()
        titles = [candidate.name for candidate in group.candidates if "scalar_loss" in candidate.facts]
        name = group.setting["divergence"]
        found.add(name)
        assert titles == (LOGIT_PEERS_OF[name] if group.upstream is not None else [])
        for candidate in group.candidates:
            if "scalar_loss" in candidate.facts:
                with pytest.raises(bench("baselines.peers").NotInstalled, match=f"^{candidate.name.split()[0]}: "):
                    candidate.run(group.inputs[0], group.upstream)
    assert found == set(names)
