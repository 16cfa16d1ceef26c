"""Are masked, infinite, extreme and nearly certain rows defined in the fused log-prob ops, and confined to themselves?

python -m pytest tests/kernels/test_fused_logprob_edge_cases.py
"""

import math

import pytest
import torch
from torch import Tensor

from esr_kernels import Impl, LogitStorage, OutputHead, gather_logprobs, linear_prefix_logprobs, prefix_logprobs
from esr_kernels.testing.cases import Shape
from esr_kernels.testing.error_budget import check_against, relative_error_in_norm
from esr_kernels.testing.logprob_inputs import make_gather_inputs, make_prefix_inputs
from esr_kernels.testing.logprob_oracle import (
    evaluate_gather_logprobs,
    evaluate_linear_prefix_logprobs,
    evaluate_prefix_logprobs,
    gather_logprobs_oracle,
    linear_prefix_logprobs_oracle,
    prefix_logprobs_oracle,
)
from esr_kernels.testing.oracle import Results, converted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
FLOAT32_STORAGE, TILE_RELATIVE = LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16
OPS = ("prefix", "linear", "gather")
every_op = pytest.mark.parametrize("op", OPS)
every_storage = pytest.mark.parametrize("storage", [FLOAT32_STORAGE, TILE_RELATIVE])
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def evaluate(op: str, logits_N_V: Tensor, ids_N: Tensor, upstream_N: Tensor, *, impl=Impl.FUSED, **options) -> Results:
    """Log-prob, d(logits), and for the prefix ops entropy and top-1 flag, of rows with one id each.

    Hidden states that are unit vectors project to the columns of the weight, whose gradient is then d(logits), transposed.
    """
    num_rows = len(logits_N_V)
    if op == "prefix":
        leaf = torch.cat([logits_N_V, logits_N_V[:1]])[None].detach().requires_grad_()
        inputs, function = (leaf,), prefix_logprobs
    else:
        leaf = logits_N_V.T.contiguous().detach().requires_grad_()
        hidden_N_D = torch.eye(num_rows, dtype=leaf.dtype, device=leaf.device)
        inputs = hidden_N_D, leaf
        if op == "gather":
            logprobs = gather_logprobs(*inputs, ids_N[:, None], impl=impl, **options)
            (gradient,) = torch.autograd.grad(logprobs, leaf, upstream_N[:, None].to(logprobs.dtype))
            return {"logprob": logprobs[:, 0].detach(), "gradient": gradient.T}
        inputs, function = (torch.cat([hidden_N_D, hidden_N_D[:1]])[None], leaf), linear_prefix_logprobs
    ids_B_T, starts_B = torch.cat([ids_N[:1], ids_N])[None], torch.ones(1, dtype=torch.int64, device=ids_N.device)
    result = function(*inputs, ids_B_T, starts_B, num_rows, impl=impl, **options)
    (gradient,) = torch.autograd.grad(result.logprobs_B_K, leaf, upstream_N[None].to(result.logprobs_B_K.dtype))
    return {
        "logprob": result.logprobs_B_K[0].detach(),
        "entropy": result.entropy_B_K[0],
        "is_top1": result.is_top1_B_K[0],
        "gradient": gradient[0, :-1] if op == "prefix" else gradient.T,
    }


def exact_values(logits_N_V: Tensor, ids_N: Tensor, upstream_N: Tensor) -> Results:
    """In float64 by the formulas, for finite logits."""
    z = logits_N_V.double()
    logp, rows = z - z.logsumexp(-1, keepdim=True), torch.arange(len(z), device=z.device)
    gradient = -upstream_N.double()[:, None] * logp.exp()
    gradient[rows, ids_N] = upstream_N.double() * -torch.expm1(logp[rows, ids_N])
    return {"logprob": logp[rows, ids_N], "entropy": -(logp.exp() * logp).sum(-1), "gradient": gradient}


def integers(num_rows: int, vocab_size: int, seed: int) -> Tensor:
    """Even logits: exact in float32 also after adding 2^24."""
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randint(-4, 5, (num_rows, vocab_size), generator=generator)).to(DEVICE)


@pytest.mark.parametrize("offset", [2.0**24, 1e4, -1e4, -150.0])
@every_op
def test_n4_a_common_offset_changes_nothing(op, offset):
    """Also where all logits are far below -104, whose exponentials are 0 in float32."""
    logits, ids = integers(3, 150, seed=1), torch.tensor([0, 77, 149], device=DEVICE)
    upstream = torch.tensor([1.5, -0.7, 2.0], device=DEVICE)
    exact = exact_values(logits, ids, upstream)
    results = evaluate(op, logits + offset, ids, upstream)
    for name in exact.keys() & results.keys():
        torch.testing.assert_close(results[name].double(), exact[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("offset", [3e38, -3e38])
@every_op
def test_n4_logits_near_the_ends_of_float32_that_are_all_equal(op, offset):
    logits, ids = torch.full((2, 150), offset, device=DEVICE), torch.tensor([0, 149], device=DEVICE)
    results = evaluate(op, logits, ids, torch.ones(2, device=DEVICE))
    torch.testing.assert_close(results["logprob"], torch.full((2,), -math.log(150.0), device=DEVICE))
    assert results["gradient"].isfinite().all()
    if op != "gather":
        assert results["is_top1"].tolist() == [True, False]  # a tie goes to the lowest id


def confident_logits(remainder: float, vocab_size: int = 300, token: int = 130) -> tuple[Tensor, Tensor]:
    """Two rows in which one token has probability 1 - remainder, and their log-probs there, in float64."""
    rest = 0.5 * torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rest[:, token] = -INF
    rest[:, token] = rest.logsumexp(-1) + math.log((1 - remainder) / remainder)
    logits = rest.float().to(DEVICE)
    others = logits.double().clone()
    others[:, token] = -INF
    # log p = -log(1 + sum of the others' e), without the difference of two large numbers
    exact = -torch.log1p((others - logits.double()[:, token : token + 1]).exp().sum(-1))
    return logits, exact


@pytest.mark.parametrize("remainder", [0.6, 0.1, 1e-3, 1e-5, 1e-7])
@every_op
def test_n5_a_nearly_certain_token_keeps_the_digits_of_1_minus_p(op, remainder):
    """Its log-prob and its gradient, u (1 - p), each to 1e-5 of itself; as a difference of numbers near 1, in float32, either
    would have none left at 1e-7. The required bar is 1 %."""
    logits, exact = confident_logits(remainder)
    ids, upstream = torch.full((2,), 130, device=DEVICE), torch.tensor([1.7, -0.3], device=DEVICE)
    results = evaluate(op, logits, ids, upstream)
    torch.testing.assert_close(results["logprob"].double(), exact, rtol=1e-5, atol=0)
    gradient = upstream.double() * -torch.expm1(exact)
    torch.testing.assert_close(results["gradient"][:, 130].double(), gradient, rtol=1e-5, atol=0)


@pytest.mark.parametrize("remainder", [1e-2, 1e-7])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@every_storage
def test_n5_a_nearly_certain_token_by_bias(storage, dtype, remainder):
    """From hidden states, at 16 bits and tile-relative too: log-prob, and the bias gradient of the token, within 1 %."""
    inputs = converted(make_prefix_inputs(1, 3, 300, 16, horizon=2, seed=3, has_bias=True, dtype=dtype), DEVICE)
    bias = inputs.head.bias.float()
    inputs.head.weight[130] = 0.0
    bias[130] = -INF
    bias[130] = OutputHead(inputs.head.weight, bias).logits(inputs.hidden_B_T_D[0, 0]).logsumexp(-1)
    bias[130] += math.log((1 - remainder) / remainder)
    inputs = inputs._replace(
        head=OutputHead(inputs.head.weight, bias),
        token_ids_B_T=torch.full_like(inputs.token_ids_B_T, 130),
        starts_B=torch.tensor([1], device=DEVICE),
        lengths_B=torch.tensor([1], device=DEVICE),
    )
    upstream = torch.tensor([[1.7, NAN]], device=DEVICE)
    results = evaluate_linear_prefix_logprobs(inputs, upstream, impl=Impl.FUSED, logits=storage)
    oracle = linear_prefix_logprobs_oracle(inputs, upstream).values
    for name, index in (("logprobs", (0, 0)), ("grad_bias", (130,))):
        actual, expected = results[name][index].item(), oracle[name][index].item()
        assert actual == pytest.approx(expected, rel=0.01 if storage == TILE_RELATIVE else 1e-3), name


@pytest.mark.parametrize("remainder", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("ids", [[130, 7, 8], [7, 130, 8], [7, 130, 130], [7, 8, 9]], ids=str)
def test_n5_a_nearly_certain_token_beside_others(ids, remainder):
    """Each entry of d(logits) at an id to 1e-5 of what is summed for it: u_i (1 - p_i) - p_i (the other u)."""
    logits, exact = confident_logits(remainder)
    upstream = torch.tensor([[0.8, -1.3, 2.2], [3e-7, 1.0, -1e-7]], device=DEVICE)
    weight = logits.T.contiguous().requires_grad_()
    ids_N_K = torch.tensor([ids, ids], device=DEVICE)
    logprobs = gather_logprobs(torch.eye(2, device=DEVICE), weight, ids_N_K)
    gradient = torch.autograd.grad(logprobs, weight, upstream)[0].T.double()
    z = logits.double()
    logp = (z - z[:, 130:131]) + exact[:, None]
    torch.testing.assert_close(logprobs.detach().double(), logp.gather(1, ids_N_K), rtol=1e-5, atol=0)
    for row in range(2):
        for token in set(ids):
            own = sum(u for u, i in zip(upstream[row].tolist(), ids, strict=True) if i == token)
            other = sum(u for u, i in zip(upstream[row].tolist(), ids, strict=True) if i != token)
            gain, loss = own * -math.expm1(logp[row, token].item()), math.exp(logp[row, token].item()) * other
            assert abs(gradient[row, token].item() - (gain - loss)) <= 1e-5 * (abs(gain) + abs(loss)), (row, token)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_n2_masked_ids_and_masked_rows_of_logits(dtype):
    """-inf at some ids, at the target, at all ids but the target, and at all of a row; against the oracle."""
    inputs = converted(make_prefix_inputs(2, 4, 300, 16, horizon=3, seed=4), DEVICE)
    starts = torch.tensor([1, 1], device=DEVICE)
    inputs = inputs._replace(starts_B=starts, lengths_B=starts + 2)
    logits = inputs.logits()
    logits[0, 0, [0, 127, 128, 299]] = -INF
    inputs.token_ids_B_T[0, 1:4] = torch.tensor([7, 9, 11], device=DEVICE)
    logits[0, 1, 9] = -INF
    logits[0, 2] = -INF
    logits[1, 0] = -INF
    inputs.token_ids_B_T[1, 1] = 200
    logits[1, 0, 200] = -3.0
    upstream = torch.tensor([[1.5, -2.0, 3.0], [0.5, 1.0, -1.0]], device=DEVICE)
    results = check_against(prefix_logprobs_oracle, evaluate_prefix_logprobs, logits.to(dtype), inputs, upstream)
    assert results["logprobs"][0, 1] == -INF and results["logprobs"][1, 0] == 0
    assert results["grad_logits"][0, 1, 9] == -2.0 and results["grad_logits"][0, 1].isfinite().all()
    assert (results["grad_logits"][0, 0, [0, 127, 128, 299]] == 0).all()
    # A row of nothing: log-prob -inf, entropy 0, not top-1, gradient 0
    assert results["logprobs"][0, 2] == -INF and results["entropy"][0, 2] == 0 and not results["is_top1"][0, 2]
    assert (results["grad_logits"][0, 2] == 0).all() and (results["grad_logits"][1, 0] == 0).all()


@every_storage
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_n2_ids_masked_by_a_bias_of_minus_infinity(dtype, storage):
    """A whole tile of 128 columns among them: as if the ids did not exist; a masked id itself has log-prob -inf."""
    inputs = converted(make_gather_inputs(Shape(3, 400, 24, 25), 4, seed=5, dtype=dtype, has_bias=True), DEVICE)
    masked = [0, 7, *range(128, 256), 399]
    inputs.head.bias[masked] = -INF
    kept = [column for column in range(400) if column not in masked]
    few = torch.tensor([[3, 5, 3, -1], [250, 9, 100, 0], [-1, 260, 268, 11]], device=DEVICE)
    ids = torch.tensor([*kept, -1], device=DEVICE)[few]
    upstream = torch.randn(3, 4, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    results = evaluate_gather_logprobs(inputs._replace(token_ids_N_K=ids), upstream, impl=Impl.FUSED, logits=storage)
    without = inputs._replace(head=OutputHead(inputs.head.weight[kept], inputs.head.bias[kept]), token_ids_N_K=few)
    oracle = gather_logprobs_oracle(without, upstream, logits=storage)
    assert ((results["logprobs"].double() - oracle.values["logprobs"]).abs() <= 2 * oracle.bounds["logprobs"]).all()
    # Where 16 bits are stored, 1e-3 of independent error may join that of rounding the exact gradient to its dtype.
    stored = 1e-3 if dtype == BFLOAT16 or storage == TILE_RELATIVE else 1e-6
    for name, value in (("hidden", results["grad_hidden"]), ("weight", results["grad_weight"][kept])):
        expected = oracle.values[f"grad_{name}"]
        rounding = relative_error_in_norm(expected.to(dtype), expected)
        assert relative_error_in_norm(value, expected) < math.hypot(rounding, stored), name
    assert (results["grad_weight"][masked] == 0).all() and (results["grad_bias"][masked] == 0).all()
    asked = ids.clone()
    asked[:, 0] = torch.tensor([0, 130, 399], device=DEVICE)
    logprobs = gather_logprobs(inputs.hidden_N_D, inputs.head, asked, logits=storage)
    assert (logprobs[:, 0] == -INF).all() and torch.equal(logprobs[:, 1:], results["logprobs"][:, 1:])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_n2_a_bias_of_minus_infinity_below_a_soft_cap(dtype):
    """Such ids are as unlikely as the soft cap lets them be, not impossible, and nothing reaches the weight through them."""
    inputs = make_gather_inputs(Shape(3, 300, 24, 25), 4, seed=13, dtype=dtype, has_bias=True, softcap=4.0)
    inputs = converted(inputs, DEVICE)
    inputs.head.bias[[3, 130]] = -INF
    inputs.token_ids_N_K[:, 1] = 130
    upstream = torch.randn(3, 4, generator=torch.Generator().manual_seed(14)).to(DEVICE)
    results = check_against(gather_logprobs_oracle, evaluate_gather_logprobs, inputs, upstream)
    assert results["logprobs"][:, 1].isfinite().all() and (results["grad_weight"][[3, 130]] == 0).all()


@every_storage
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_n2_all_ids_masked(dtype, storage):
    """Log-probs -inf, entropy 0, no top-1; no gradient anywhere."""
    inputs = converted(make_prefix_inputs(1, 4, 300, 16, horizon=2, seed=6, dtype=dtype, has_bias=True), DEVICE)
    inputs.head.bias[:] = -INF
    starts = torch.tensor([1], device=DEVICE)
    inputs = inputs._replace(starts_B=starts, lengths_B=starts + 1)
    upstream = torch.tensor([[1.0, -2.0]], device=DEVICE)
    results = evaluate_linear_prefix_logprobs(inputs, upstream, impl=Impl.FUSED, logits=storage)
    assert (results.pop("logprobs") == -INF).all() and results.pop("mask").all()
    assert all((value == 0).all() for value in results.values())  # entropy, flags, gradients
    gathered = make_gather_inputs(Shape(3, 300, 16, 17), 3, seed=6, dtype=dtype)
    gathered = converted(gathered._replace(head=inputs.head), DEVICE)
    results = evaluate_gather_logprobs(gathered, torch.ones(3, 3, device=DEVICE), impl=Impl.FUSED, logits=storage)
    is_id = gathered.token_ids_N_K >= 0
    assert torch.equal(results.pop("logprobs"), torch.where(is_id, -INF, 0.0))
    assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("column", [60, 5], ids=["another id", "the token"])
def test_n8_poisoned_logits_stay_in_their_slot(column, dtype, poison):
    logits, ids = integers(4, 300, seed=7).to(dtype), torch.tensor([1, 5, 5, 299], device=DEVICE)
    upstream = torch.tensor([1.0, -0.5, 0.0, 2.0], device=DEVICE)
    expected = evaluate("prefix", logits, ids, upstream)
    logits[1:3, column] = poison
    results = evaluate("prefix", logits, ids, upstream)
    for name in ("logprob", "entropy"):
        assert results[name].isnan().tolist() == [False, True, True, False]
    assert not results["is_top1"][1:3].any()
    assert results["gradient"][1].isnan().all() and (results["gradient"][2] == 0).all()  # upstream 0 in row 2
    for name in expected:
        assert torch.equal(results[name][[0, 3]], expected[name][[0, 3]]), name


@pytest.mark.parametrize(
    ("op", "poison", "storage"),
    [
        ("linear", NAN, FLOAT32_STORAGE),
        ("linear", INF, TILE_RELATIVE),
        ("gather", INF, FLOAT32_STORAGE),
        ("gather", NAN, TILE_RELATIVE),
    ],
    ids=str,
)
def test_n8_poisoned_hidden_states_stay_in_their_row(op, poison, storage):
    """Values and input gradients of the other rows keep their bits; with upstream 0 the head does not see the row either."""
    generator = torch.Generator().manual_seed(8)
    hidden, weight = torch.randn(4, 16, generator=generator).to(DEVICE), torch.randn(300, 16, generator=generator)
    ids, weight = torch.tensor([1, 5, 5, 299], device=DEVICE), weight.to(DEVICE)

    def run(hidden: Tensor, upstream: Tensor, is_trained: bool = True) -> tuple[Tensor, ...]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(is_trained)]
        if op == "gather":
            value = gather_logprobs(*leaves, ids[:, None], logits=storage)[:, 0]
        else:
            starts, ids_B_T = torch.ones(1, dtype=torch.int64, device=DEVICE), torch.cat([ids[:1], ids])[None]
            hidden_B_T_D = torch.cat([leaves[0], leaves[0][:1]])[None]
            value = linear_prefix_logprobs(hidden_B_T_D, leaves[1], ids_B_T, starts, 4, logits=storage).logprobs_B_K[0]
        return value.detach(), *torch.autograd.grad(value, leaves[: 1 + is_trained], upstream)

    upstream = torch.tensor([1.0, -0.5, 0.0, 2.0], device=DEVICE)
    poisoned = hidden.clone()
    poisoned[1:3, 3] = poison
    for is_trained in (True, False):
        (value, gradient, *_), (wanted, wanted_gradient, *_) = (
            run(x, upstream, is_trained) for x in (poisoned, hidden)
        )
        assert value.isnan().tolist() == [False, True, True, False]
        assert gradient[1].isnan().any() and (gradient[2] == 0).all()
        assert torch.equal(value[[0, 3]], wanted[[0, 3]]) and torch.equal(gradient[[0, 3]], wanted_gradient[[0, 3]])
    upstream[1] = 0.0
    (*_, of_head), (*_, wanted_of_head) = run(poisoned, upstream), run(hidden, upstream)
    assert torch.equal(of_head, wanted_of_head)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@every_op
def test_n9_gradient_rows_sum_to_zero(op, dtype):
    """To rounding of the sum in float32; a 16-bit entry is off by half its own last place besides (and for its d(logits) in
    float16, by an eighth of that at most)."""
    logits = 2 * torch.randn(3, 515, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)
    ids, upstream = torch.tensor([3, 400, 514], device=DEVICE), torch.tensor([2.0, -0.5, 3.5], device=DEVICE)
    logits[0, 3] += 12.0  # a token of probability 0.99 and more
    gradient = evaluate(op, logits, ids, upstream)["gradient"]
    assert gradient.dtype == dtype
    precision, gradient = torch.finfo(dtype), gradient.double()
    size = gradient.abs().sum(-1)
    own_rounding = 0.6 * precision.eps * (size + 515 * precision.smallest_normal)
    assert (size > 0).all() and (gradient.sum(-1).abs() <= own_rounding + 1e-6 * upstream.abs()).all()


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=str)
@every_op
def test_n8_large_finite_logits(op, dtype):
    """+-6e4: a certain token, an impossible one, and one of two equal winners."""
    logits = torch.full((3, 140), -6e4, dtype=dtype, device=DEVICE)
    logits[0, 3] = logits[1, 139] = logits[2, 3] = logits[2, 70] = 6e4
    ids, upstream = torch.tensor([3, 5, 70], device=DEVICE), torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    results = evaluate(op, logits, ids, upstream)
    high, low = logits[0, 3].item(), logits[0, 0].item()
    expected = torch.tensor([0.0, low - high, -math.log(2.0)], device=DEVICE)
    torch.testing.assert_close(results["logprob"], expected, rtol=1e-6, atol=0)
    gradient = torch.zeros(3, 140, device=DEVICE)
    gradient[1, 5], gradient[1, 139], gradient[2, 70], gradient[2, 3] = -2.0, 2.0, 0.25, -0.25
    torch.testing.assert_close(results["gradient"].float(), gradient, rtol=1e-6, atol=0)
    if op != "gather":
        assert results["is_top1"].tolist() == [True, False, False]
        torch.testing.assert_close(results["entropy"], torch.tensor([0, 0, math.log(2.0)], device=DEVICE))


@every_storage
@pytest.mark.parametrize("largest", [1e3, 6e4, 3e6])
def test_n8_large_finite_logits_of_hidden_states(largest, storage):
    """Beyond float16's largest number too: no NaN, no infinity; the ids' own logits keep 24 bits in either storage."""
    inputs = converted(make_gather_inputs(Shape(4, 300, 24, 25), 3, seed=10), DEVICE)
    top = inputs.head.logits(inputs.hidden_N_D).abs().max().item()
    inputs = inputs._replace(head=OutputHead(inputs.head.weight, logit_scale=largest / top))
    upstream = torch.randn(4, 3, generator=torch.Generator().manual_seed(11)).to(DEVICE)
    results = evaluate_gather_logprobs(inputs, upstream, impl=Impl.FUSED, logits=storage)
    oracle = gather_logprobs_oracle(inputs, upstream).values
    assert all(value.isfinite().all() for value in results.values())
    atol = largest * 2.0**-20  # the float32 product of 24 columns is off by a few of its last places
    torch.testing.assert_close(results["logprobs"].double(), oracle["logprobs"], rtol=1e-6, atol=atol)


@every_storage
def test_top1_ties_go_to_the_lowest_id(storage):
    """Within a tile of 128 columns, between two of them, and between two tiles of a program; for both prefix ops."""
    logits = torch.zeros(6, 4200, device=DEVICE)
    for row, columns in enumerate(([5, 90], [5, 90], [90, 300], [90, 4150], [90, 4150], [4100, 4199])):
        logits[row, columns] = 3.0
    ids = torch.tensor([5, 90, 90, 90, 4150, 4100], device=DEVICE)
    upstream = torch.ones(6, device=DEVICE)
    results = evaluate("linear", logits, ids, upstream, logits=storage)
    assert results["is_top1"].tolist() == [True, False, True, True, False, True]
    assert torch.equal(evaluate("prefix", logits, ids, upstream)["is_top1"], results["is_top1"])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_no_mix_of_extreme_logits_makes_nan(temperature):
    """N2, N4, N8 at once: rows of five logits drawn from the extremes of float32, against float64 of the same."""
    extremes = torch.tensor([0.0, 1.0, -1.0, 50.0, -50.0, 200.0, -200.0, 6e4, -6e4, 1e38, -1e38, -INF, -INF])
    generator = torch.Generator().manual_seed(12)
    logits = extremes[torch.randint(0, len(extremes), (24, 5), generator=generator)].to(DEVICE)
    ids = torch.randint(0, 5, (24,), generator=generator).to(DEVICE)
    upstream = torch.randn(24, generator=generator).to(DEVICE)
    results = evaluate("prefix", logits, ids, upstream, temperature=temperature)
    exact = evaluate("prefix", logits.double(), ids, upstream, temperature=temperature, impl=Impl.REFERENCE)
    for name in ("logprob", "entropy", "gradient"):  # what float32 cannot hold is infinite in it
        torch.testing.assert_close(results[name], exact[name].float(), rtol=2e-6, atol=2e-6)
    assert torch.equal(results["is_top1"], exact["is_top1"])
