"""Does each sampled-token loss have, over all tokens that could be drawn, the gradient that it is named by?

Expectations are sums over a small vocabulary, not samples. Gradients are those of the student's logits.

python -m pytest tests/kernels/test_sampled_kl.py
"""

import math

import numpy as np
import pytest
import torch
from numpy_divergences import kl, softmax

from esr_kernels import (
    reverse_kl_estimate,
    reverse_kl_policy_gradient_loss,
    sampled_forward_kl_loss,
    sampled_reverse_kl_loss,
)

INF, NAN = math.inf, math.nan
ESTIMATE, POLICY = reverse_kl_estimate, reverse_kl_policy_gradient_loss
LOSSES = K2_LOSS, K3_LOSS, _ = sampled_reverse_kl_loss, sampled_forward_kl_loss, POLICY
GENERATOR = np.random.default_rng(11)
Z, Z_TEACHER, Z_BEHAVIOUR = 1.3 * GENERATOR.standard_normal((3, 4, 7))
P, Q, MU = softmax(Z), softmax(Z_TEACHER), softmax(Z_BEHAVIOUR)
K1, RATIO, UPSTREAM = np.log(P / Q), P / MU, GENERATOR.standard_normal(4)
SCORE = np.eye(7) - P[:, None]  # (row, token, logit): gradient of log p(token)
TEACHER, BEHAVIOUR, EXACT_KL = torch.tensor(Q).log(), torch.tensor(MU).log(), torch.tensor(kl(P, Q))[:, None]
# The gradients of the two KLs, from the literature.
REVERSE, FORWARD = P * (K1 - kl(P, Q)[:, None]), P - Q


def token_gradients(loss_of, z=Z) -> np.ndarray:
    """(row, token, logit): gradient of the loss of each row as if that token had been drawn."""
    gradients = []
    for token in range(7):
        logits = torch.tensor(z, requires_grad=True)
        losses = loss_of(torch.log_softmax(logits, dim=-1))
        (losses[:, token] * torch.tensor(UPSTREAM)).sum().backward()
        gradients.append(logits.grad.numpy() / UPSTREAM[:, None])
    return np.stack(gradients, axis=1)


def expected_gradient(loss_of, drawn_from=P, z=Z) -> np.ndarray:
    return (drawn_from[:, :, None] * token_gradients(loss_of, z)).sum(axis=1)


def policy_gradient(**options):
    return lambda student: POLICY(student, TEACHER, **options)


def assert_close(actual, expected, rtol=1e-11) -> None:
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize(
    ("loss_of", "drawn_from", "expected"),
    [
        (lambda student: K2_LOSS(student, TEACHER), P, REVERSE),
        (lambda student: K3_LOSS(student, TEACHER), P, FORWARD),
        (policy_gradient(), P, REVERSE),
        (policy_gradient(baseline=EXACT_KL), P, REVERSE),
        (policy_gradient(behaviour_logprobs=BEHAVIOUR), MU, REVERSE),
        (policy_gradient(behaviour_logprobs=BEHAVIOUR, baseline=EXACT_KL), MU, REVERSE),
        (policy_gradient(behaviour_logprobs=BEHAVIOUR, max_ratio=1e9), MU, REVERSE),
        (policy_gradient(behaviour_logprobs=BEHAVIOUR, clip_range=(1.0, INF)), MU, REVERSE),
    ],
    ids=["k2", "k3", "policy", "baseline", "behaviour", "behaviour_baseline", "no_truncation", "no_clipping"],
)
def test_expected_gradient_is_that_of_the_named_divergence(loss_of, drawn_from, expected):
    assert_close(expected_gradient(loss_of, drawn_from), expected)


def test_expectations_hold_where_a_token_is_impossible_for_one_side():
    """q = 0 has a limit in forward KL; p = 0 has ratio 0 for a behaviour that draws the token."""
    q, z = Q.copy(), Z.copy()
    q[:, 2], z[:, 4] = 0, -INF
    q /= q.sum(-1, keepdims=True)
    assert_close(expected_gradient(lambda student: K3_LOSS(student, torch.tensor(q).log())), P - q)
    p = softmax(z)
    k1 = np.log(np.where(p > 0, p, 1) / Q)
    reverse = p * (k1 - (p * k1).sum(-1, keepdims=True))
    assert_close(expected_gradient(policy_gradient(behaviour_logprobs=BEHAVIOUR), MU, z), reverse)
    assert_close(expected_gradient(policy_gradient(), p, z), reverse)


def test_what_is_refused_has_another_expected_gradient():
    """Each refused combination, written out: this is why the ops raise."""
    k1 = torch.tensor(K1)

    def as_cost(cost):
        return expected_gradient(lambda student: cost * student)

    assert_close(expected_gradient(lambda student: student - TEACHER), 0)
    assert_close(as_cost(torch.exp(-k1) - 1 + k1), REVERSE - FORWARD)
    for named in (REVERSE, FORWARD):
        k2 = as_cost(k1**2 / 2)
        cosines = (k2 * named).sum(-1) / np.linalg.norm(k2, axis=-1) / np.linalg.norm(named, axis=-1)
        assert (np.abs(cosines) < 0.999).all()
    # The KL of the position, or of its first three tokens, is one number whichever token is drawn.
    assert_close(as_cost(EXACT_KL), 0)
    assert_close(as_cost(torch.tensor(P * K1)[:, :3].sum(-1, keepdim=True)), 0)


def test_the_exact_kl_as_baseline_lowers_the_variance():
    def variance(loss_of):  # in sum, not in every row
        return (P * ((token_gradients(loss_of) - REVERSE[:, None]) ** 2).sum(-1)).sum()

    assert variance(policy_gradient(baseline=EXACT_KL)) < 0.85 * variance(policy_gradient())


@pytest.mark.parametrize("bound", [0.5, 1.0, 1.7])
def test_truncated_ratios(bound):
    assert (RATIO > bound).any() and (RATIO < bound).any()
    slope = np.minimum(RATIO, bound) * (K1 - 0.25)
    loss_of = policy_gradient(behaviour_logprobs=BEHAVIOUR, max_ratio=bound, baseline=torch.tensor(0.25))
    assert_close(token_gradients(loss_of), slope[..., None] * SCORE)
    assert_close(expected_gradient(loss_of, MU), ((MU * slope)[..., None] * SCORE).sum(1))
    assert_close(loss_of(torch.tensor(P).log()).numpy(), slope * np.log(P))


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.5, 0), (0, 0.5)])
def test_clipped_ratios(low, high):
    """A token counts 0 where its ratio is out of range on the side that its cost pushes it to."""
    cost = K1 - 0.25
    is_clipped = ((cost < 0) & (RATIO > 1 + high)) | ((cost > 0) & (RATIO < 1 - low))
    assert is_clipped.any() and (((RATIO > 1 + high) | (RATIO < 1 - low)) & ~is_clipped).any()
    loss_of = policy_gradient(behaviour_logprobs=BEHAVIOUR, clip_range=(low, high), baseline=torch.tensor(0.25))
    gradients = token_gradients(loss_of)
    assert (gradients[is_clipped] == 0).all()
    assert_close(gradients, np.where(is_clipped, 0, RATIO * cost)[..., None] * SCORE)
    bound = np.where(cost < 0, 1 + high, 1 - low)
    assert_close(loss_of(torch.tensor(P).log()).numpy(), np.where(is_clipped, bound, RATIO) * cost)


def test_values_worked_by_hand():
    """p(y) = 1/2 and q(y) = 1/4: k1 = log 2."""
    student, teacher = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    k1, k2, k3 = math.log(2), 0.5 * math.log(2) ** 2, 0.5 - 1 + math.log(2)
    estimates = [ESTIMATE(student, teacher, estimator=name).item() for name in ("k1", "k2", "k3")]
    assert estimates == pytest.approx([k1, k2, k3], rel=1e-14)
    losses = [loss(student, teacher).item() for loss in LOSSES]
    assert losses == pytest.approx([k2, k3, -k1 * math.log(2)], rel=1e-14)


def test_k1_and_k3_are_unbiased_estimates_without_gradient():
    student = torch.tensor(P).log().requires_grad_()
    with torch.no_grad():
        k1, k2, k3 = (ESTIMATE(student, TEACHER, estimator=name) for name in ("k1", "k2", "k3"))
    assert_close((P * k1.numpy()).sum(-1), kl(P, Q))  # numpy() raises for a tensor with gradient
    assert_close((P * k3.numpy()).sum(-1), kl(P, Q))
    assert (k1 < 0).any() and (k3 >= 0).all()
    assert (np.abs((P * k2.numpy()).sum(-1) / kl(P, Q) - 1) > 0.01).all()


def test_k3_keeps_its_digits_in_float32():
    """Near r = 1e-4 the rounding of (expm1(r) + 1) - 1 alone would be 6e-4 of the gradient."""
    student = -torch.linspace(0.3, 3.0, 37)
    teacher = student + torch.linspace(-1.3e-4, 1.7e-4, 37)
    r = teacher.double().numpy() - student.double().numpy()  # exact, also in float32
    loss = K3_LOSS(student.requires_grad_(), teacher)
    loss.backward(torch.full((37,), -0.75))
    np.testing.assert_allclose(loss.detach().numpy(), np.expm1(r) - r, rtol=2e-3, atol=1e-11)
    np.testing.assert_allclose(student.grad.double().numpy(), 0.75 * np.expm1(r), rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("student_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(loss, student_dtype, teacher_dtype):
    student, teacher = torch.tensor(P).log().to(student_dtype), TEACHER.to(teacher_dtype)
    log_p = student.double().numpy()
    r = teacher.double().numpy() - log_p
    slope = 1 - np.exp(r) if loss is K3_LOSS else -r
    value = {K2_LOSS: r**2 / 2, K3_LOSS: np.exp(r) - 1 - r, POLICY: -r * log_p}[loss]
    result = loss(student.requires_grad_(), teacher)
    result.backward(torch.tensor(UPSTREAM)[:, None].expand(4, 7).to(result.dtype))
    computed_in = torch.float64 if torch.float64 in (student_dtype, teacher_dtype) else torch.float32
    assert (result.dtype, student.grad.dtype) == (computed_in, student_dtype)
    rtol = 1e-12 if computed_in == torch.float64 else 1e-5
    np.testing.assert_allclose(result.detach().numpy(), value, rtol=rtol, atol=rtol)
    rtol = max(rtol, torch.finfo(student_dtype).eps)
    np.testing.assert_allclose(student.grad.double().numpy(), slope * UPSTREAM[:, None], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 7), (2, 3, 4)])
@pytest.mark.parametrize("op", [ESTIMATE, *LOSSES])
def test_any_shape_and_no_look_at_a_value(op, shape):
    """Every token is computed alone; tensors on the meta device have no values to look at."""
    student, teacher = -torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    one_by_one = [op(s, t).item() for s, t in zip(student.flatten(), teacher.flatten(), strict=True)]
    together = op(student, teacher)
    assert together.shape == shape and together.flatten().tolist() == pytest.approx(one_by_one, rel=1e-5)
    meta = torch.empty(shape, device="meta")
    for bound in [{"clip_range": (0.2, 0.2)}, {"max_ratio": 2.0}]:
        options = {"behaviour_logprobs": meta, "baseline": meta, **bound} if op is POLICY else {}
        assert op(meta, meta, **options).shape == shape


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1), (3, 5)])
def test_baseline_broadcasts(shape):
    student = torch.full((3, 5), -0.5, requires_grad=True)
    loss = POLICY(student, torch.full((3, 5), -1.25), baseline=torch.full(shape, 0.25, dtype=torch.float16))
    loss.backward(torch.full((3, 5), -0.75))
    assert (loss == -0.25).all() and (student.grad == 0.5 * -0.75).all()


BOUNDS = {"max_ratio": {"max_ratio": 2.0}, "clip_range": {"clip_range": (0.2, 0.2)}}


def one_token(form, student, teacher, behaviour=-0.5, **options) -> tuple[float, float]:
    """Value and gradient of one token between two ordinary ones, which must not notice."""
    loss = {"k2": K2_LOSS, "k3": K3_LOSS}.get(form, POLICY)
    if form in ("behaviour", *BOUNDS):
        options |= {"behaviour_logprobs": torch.tensor([-1.0, behaviour, -2.0]), **BOUNDS.get(form, {})}
    logprobs = torch.tensor([-1.0, student, -2.0], requires_grad=True)
    losses = loss(logprobs, torch.tensor([-1.5, teacher, -1.5]), **(options if loss is POLICY else {}))
    losses.backward(torch.tensor([0.7, -0.5, -0.4]))
    assert losses[::2].isfinite().all() and logprobs.grad[::2].isfinite().all() and (logprobs.grad[::2] != 0).all()
    return losses[1].item(), logprobs.grad[1].item() / -0.5


@pytest.mark.parametrize("form", ["k2", "k3", "policy", "behaviour", *BOUNDS])
def test_edge_cases(form):
    for student in (-0.5, 0.0, -300.0):  # at -300 the ratio to the behaviour underflows
        assert one_token(form, student, -INF) == (INF, 1.0 if form == "k3" else 0.0)
    for teacher, behaviour in [(-0.5, -0.5), (-0.5, -INF), (-INF, -0.5), (-INF, -INF)]:  # never drawn
        assert one_token(form, -INF, teacher, behaviour, baseline=torch.tensor(0.3)) == (0.0, 0.0)
    assert one_token(form, 0.0, 0.0, behaviour=0.0) == (0.0, 0.0)  # padding
    for student, teacher in [(NAN, -0.5), (-0.5, NAN)]:
        value, grad = one_token(form, student, teacher)
        assert math.isnan(value) and grad == 0.0


def test_overflow_of_k3_and_of_the_ratio():
    assert one_token("k3", -100.0, -1.0) == (INF, 0.0)
    assert one_token("k3", -80.0, -1.0) == pytest.approx((math.exp(79), -math.exp(79)), rel=1e-5)
    assert one_token("behaviour", -0.5, -1.0, behaviour=-INF) == (INF, 0.0)
    assert one_token("max_ratio", -0.5, -1.0, behaviour=-INF) == (2.0 * 0.5 * -0.5, 2.0 * 0.5)
    assert one_token("clip_range", -1.0, -0.5, behaviour=-INF) == pytest.approx((1.2 * -0.5, 0.0))


def test_estimates_at_the_edges():
    student, teacher = torch.tensor([-0.5, -INF, -INF, 0.0]), torch.tensor([-INF, -0.5, -INF, 0.0])
    values = [ESTIMATE(student, teacher, estimator=name).tolist() for name in ("k1", "k2", "k3")]
    assert values == 3 * [[INF, 0.0, 0.0, 0.0]]


ONES, GRAD = torch.ones(3, 5), torch.ones(3, 5, requires_grad=True)
NO_GRAD = r"must not require grad \(a constant\), got requires_grad=True; detach it"
NO_PAIR = r"clip_range must be \(low, high\), 0 <= low <= 1 and high >= 0, got"
NO_PAIRS = [0.2, (0.2,), (-0.1, 0.2), (1.1, 0.2), (0.2, -0.1), (0.2, NAN), ("0.2", 0.2), (True, 0.2)]
NO_BEHAVIOUR = "clip_range and max_ratio need behaviour_logprobs, whose ratio they bound, got"
WRONG_TENSORS = [
    ({"student_logprobs": [0.0]}, "student_logprobs must be a tensor, got list"),
    ({"teacher_logprobs": None}, "teacher_logprobs must be a tensor, got NoneType"),
    ({"teacher_logprobs": ONES.int()}, "teacher_logprobs must have dtype bfloat16, float16, .*64, got int32"),
    ({"teacher_logprobs": ONES[:, :1]}, r"must have the shape of student_logprobs, \(3, 5\), got \(3, 1\)"),
    ({"teacher_logprobs": ONES.to("meta")}, "on one device, got student_logprobs: cpu, teacher_logprobs: meta"),
    ({"teacher_logprobs": GRAD}, f"teacher_logprobs {NO_GRAD}"),
]


@pytest.mark.parametrize(
    ("op", "options", "message"),
    [
        *((op, options, message) for op in (ESTIMATE, *LOSSES) for options, message in WRONG_TENSORS),
        (ESTIMATE, {"estimator": "k4"}, r"estimator must be one of \['k1', 'k2', 'k3'\], got 'k4'$"),
        (ESTIMATE, {"student_logprobs": GRAD}, "must not require grad, .* detach it .* sampled_reverse_kl_loss or "),
        (ESTIMATE, {"student_logprobs": GRAD}, "or reverse_kl_policy_gradient_loss, .* sampled_forward_kl_loss: .* k1"),
        (K2_LOSS, {"estimator": "k1"}, r"estimator must be one of \['k2'\], got 'k1': .* gradient is 0: pure noise"),
        (K2_LOSS, {"estimator": "k3"}, "got 'k3': .* that of forward KL: use sampled_forward_kl_loss"),
        (K3_LOSS, {"estimator": "k1"}, r"estimator must be one of \['k3'\], got 'k1': .* gradient is 0: pure noise"),
        (K3_LOSS, {"estimator": "k2"}, "got 'k2': .* that of reverse KL: use sampled_reverse_kl_loss"),
        (K3_LOSS, {"estimator": ["k3"]}, r"estimator must be one of \['k3'\], got \['k3'\]$"),
        (POLICY, {"cost": "k2"}, r"cost must be one of \['k1'\], got 'k2': as a cost .* that of neither KL"),
        (POLICY, {"cost": "k3"}, "got 'k3': as a cost .* that of reverse KL minus forward KL"),
        (POLICY, {"cost": "kl"}, "got 'kl': of one sign, it does not depend on the token drawn, .* gradient is 0"),
        (POLICY, {"cost": "topk_kl"}, "got 'topk_kl': .* does not depend on the token drawn, .* gradient is 0"),
        (POLICY, {"cost": "jsd"}, r"cost must be one of \['k1'\], got 'jsd'$"),
        (POLICY, {"behaviour_logprobs": ONES[0]}, r"behaviour_logprobs must have the shape .*, got \(5,\)"),
        (POLICY, {"behaviour_logprobs": GRAD}, f"behaviour_logprobs {NO_GRAD}"),
        (POLICY, {"baseline": GRAD}, f"baseline {NO_GRAD}"),
        (POLICY, {"baseline": 0.5}, "baseline must be a tensor, got float"),
        (POLICY, {"baseline": ONES[:, 0]}, r"baseline must broadcast to student_logprobs, \(3, 5\), got \(3,\)"),
        (POLICY, {"baseline": ONES[None]}, r"baseline must broadcast to .*, \(3, 5\), got \(1, 3, 5\)"),
        (POLICY, {"max_ratio": 2.0, "behaviour_logprobs": None}, f"{NO_BEHAVIOUR} clip_range=None and max_ratio=2.0"),
        (POLICY, {"clip_range": (0.2, 0.3), "behaviour_logprobs": None}, NO_BEHAVIOUR),
        (POLICY, {"clip_range": (0.2, 0.3), "max_ratio": 2.0}, "clip_range and max_ratio must not both be given, got"),
        (POLICY, {"max_ratio": 0.0}, r"max_ratio must be finite and > 0, got 0\.0"),
        *((POLICY, {"clip_range": bad}, NO_PAIR) for bad in NO_PAIRS),
    ],
)
def test_wrong_arguments_raise(op, options, message):
    behaviour = {"behaviour_logprobs": ONES} if op is POLICY else {}
    with pytest.raises((TypeError, ValueError), match=f"^{op.__name__}: .*{message}"):
        op(**{"student_logprobs": ONES, "teacher_logprobs": ONES, **behaviour, **options})
