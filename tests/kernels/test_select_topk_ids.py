"""Are the ids of select_topk_ids the likeliest, alone and united with others, in any dtype and chunk, and fit for the ops?

python -m pytest tests/kernels/test_select_topk_ids.py
"""

import pytest
import torch

from esr_kernels import (
    ForwardKL,
    GeneralizedJSD,
    Impl,
    OutputHead,
    gather_logprobs,
    linear_divergence,
    select_topk_ids,
    topk_divergence,
)
from esr_kernels.testing.cases import Shape
from esr_kernels.testing.inputs import make_linear_inputs
from esr_kernels.testing.oracle import converted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SHAPE = Shape(rows=7, vocab_size=131, student_size=9, teacher_size=12)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def model(dtype=FLOAT32, shape: Shape = SHAPE, **head):
    """Hidden states and head; in 16 bits no two logits of a row are equal."""
    inputs = converted(make_linear_inputs(shape, seed=1, dtype=dtype, **head), DEVICE)
    return inputs.student_hidden_N_D, inputs.student_head


def exact_logits(hidden, head) -> torch.Tensor:
    """hidden @ weight.T + bias, scaled and capped, in float64."""
    bias = None if head.bias is None else head.bias.double()
    return OutputHead(head.weight.double(), bias, head.logit_scale, head.softcap).logits(hidden.double())


def as_sets(ids_N_K: torch.Tensor) -> list[set[int]]:
    return [set(row) for row in ids_N_K.tolist()]


HEADS = {
    "plain": {},
    "bias": {"has_bias": True},
    "scale and softcap": {"logit_scale": 0.5, "softcap": 20.0},
    "all": {"has_bias": True, "logit_scale": 2.0, "softcap": 30.0},
}


@pytest.mark.parametrize("num_ids", [1, 5, 131])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32, FLOAT64], ids=str)
def test_the_ids_are_the_likeliest(dtype, head, num_ids):
    """In falling order. Scale and soft cap do not change it."""
    hidden, head = model(dtype, **HEADS[head])
    ids = select_topk_ids(hidden, head, num_ids)
    assert ids.shape == (7, num_ids) and ids.dtype == torch.int64 and ids.device == hidden.device
    logits = exact_logits(hidden, head)
    assert torch.equal(ids, logits.argsort(dim=-1, descending=True)[:, :num_ids])


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [(FLOAT32, BFLOAT16), (BFLOAT16, FLOAT32), (FLOAT16, BFLOAT16), (FLOAT64, BFLOAT16), (BFLOAT16, FLOAT64)],
    ids=str,
)
def test_hidden_states_and_head_may_differ_in_dtype(hidden_dtype, weight_dtype):
    """Nothing is rounded on the way: neither operand to the other's 16 bits, nor the logits."""
    hidden, head = model(BFLOAT16, has_bias=True)
    head = OutputHead(head.weight.to(weight_dtype), head.bias.float())
    expected = exact_logits(hidden, head).topk(20).indices
    assert torch.equal(select_topk_ids(hidden.to(hidden_dtype), head, 20), expected)


def test_a_bare_weight_is_a_head():
    hidden, head = model()
    assert torch.equal(select_topk_ids(hidden, head.weight, 4), select_topk_ids(hidden, head, 4))


def test_masked_ids_come_last():
    hidden, head = model(has_bias=True)
    head.bias[::2] = -torch.inf
    ids = select_topk_ids(hidden, head, 70)
    assert (ids[:, :65] % 2 == 1).all() and (ids[:, 65:] % 2 == 0).all()


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 7, 100])
def test_chunks_change_nothing_and_follow_the_workspace(monkeypatch, rows_at_once):
    """4 V bytes a row; a workspace below one row takes one row all the same."""
    from esr_kernels.topk_divergence import topk_ids

    hidden, head = model(has_bias=True)
    chunks = []
    product = topk_ids.order_preserving_logits
    monkeypatch.setattr(
        topk_ids,
        "order_preserving_logits",
        lambda hidden_n_D, head: chunks.append(len(hidden_n_D)) or product(hidden_n_D, head),
    )
    workspace = 4 * 131 * rows_at_once + 1 if rows_at_once > 1 else 1
    ids = select_topk_ids(hidden, head, 5, workspace_bytes=workspace)
    assert torch.equal(ids, exact_logits(hidden, head).topk(5).indices)
    full, rest = divmod(7, min(rows_at_once, 7))
    assert chunks == [min(rows_at_once, 7)] * full + [rest] * (rest > 0)


def test_union_by_hand():
    """The given ids first and in their order, then the likeliest; -1 for whatever stands earlier in its row."""
    logits = torch.tensor([[0.0, 5.0, 4.0, 3.0, 2.0], [5.0, 0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    given = torch.tensor([[3, 0, 1], [2, 2, -1], [-1, -100, 4]], dtype=torch.int32)
    arguments = [t.to(DEVICE) for t in (logits, torch.eye(5), given)]
    ids = select_topk_ids(*arguments[:2], 3, united_with_N_K=arguments[2])
    expected = [[3, 0, 1, -1, 2, -1], [2, -1, -1, 0, 4, 3], [-1, -100, 4, -1, 3, 2]]
    assert ids.tolist() == expected and ids.dtype == torch.int64
    assert given.tolist() == [[3, 0, 1], [2, 2, -1], [-1, -100, 4]]


@pytest.mark.parametrize("num_given", [0, 1, 40])
def test_union_is_the_union_of_sets_each_id_once(num_given):
    hidden, head = model()
    given = torch.randint(-1, 131, (7, num_given), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ids = select_topk_ids(hidden, head, 25, united_with_N_K=given)
    assert ids.shape == (7, num_given + 25)
    likeliest = exact_logits(hidden, head).topk(25).indices
    for row, wanted, more in zip(ids.tolist(), as_sets(given), as_sets(likeliest), strict=True):
        held = [i for i in row if i != -1]
        assert len(held) == len(set(held)) and set(held) == (wanted | more) - {-1}


def test_no_rows():
    hidden, head = model(shape=Shape(0, 131, 9, 12))
    assert select_topk_ids(hidden, head, 5).shape == (0, 5)
    given = torch.zeros((0, 3), dtype=torch.int32, device=DEVICE)
    assert select_topk_ids(hidden, head, 5, united_with_N_K=given).shape == (0, 8)


def test_nothing_is_recorded_or_written_and_autocast_does_not_round():
    """bfloat16 logits near 1000 would differ by multiples of 4."""
    hidden, weight = torch.full((1, 2), 100.0, device=DEVICE), 10 + torch.arange(50, device=DEVICE)[:, None] / 200
    weight = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast(DEVICE, dtype=BFLOAT16):
        ids = select_topk_ids(*inputs, 6)
    assert ids.tolist() == [[49, 48, 47, 46, 45, 44]]
    assert not ids.requires_grad and (hidden == 100).all() and hidden.grad is None
    assert torch.equal(weight[:, 0], 10 + torch.arange(50, device=DEVICE) / 200)


def test_a_row_of_nan_keeps_to_itself():
    hidden, head = model()
    expected = select_topk_ids(hidden, head, 4)
    hidden[2, 3] = torch.nan
    ids = select_topk_ids(hidden, head, 4)
    assert torch.equal(ids[[0, 1, 3, 4, 5, 6]], expected[[0, 1, 3, 4, 5, 6]])
    assert ((ids[2] >= 0) & (ids[2] < 131)).all()


def test_all_ids_of_the_recipe_give_the_full_divergence():
    """The docstring's recipe, with so many ids that no tail is left, is `linear_divergence`; with fewer it is below."""
    linear = converted(make_linear_inputs(SHAPE, seed=3, dtype=FLOAT64, has_bias=True), DEVICE)
    student, teacher = linear[:2], linear[2:]

    def recipe(num_ids, divergence):
        teacher_ids = select_topk_ids(*teacher, num_ids)
        ids = select_topk_ids(*student, num_ids, united_with_N_K=teacher_ids)
        logprobs = gather_logprobs(*teacher, ids, impl=Impl.REFERENCE)
        return topk_divergence(*student, ids, logprobs, divergence, impl=Impl.REFERENCE).divergence_N

    for divergence in (GeneralizedJSD(0.5), ForwardKL()):
        full = linear_divergence(*linear, divergence, impl=Impl.REFERENCE).divergence_N
        torch.testing.assert_close(recipe(131, divergence), full, rtol=1e-9, atol=1e-12)
        values = [recipe(num_ids, divergence) for num_ids in (1, 4, 16)]
        assert (values[0] > 0).all() and (values[2] < full).all()
        assert (values[0] <= values[1]).all() and (values[1] <= values[2]).all()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden_N_D": [1.0]}, TypeError, r"hidden_N_D must be a tensor \(N D\), got list"),
        ({"hidden_N_D": torch.zeros(4, 3, 2)}, ValueError, r"hidden_N_D must have shape \(N, D\) = .*, got \(4, 3, 2\)"),
        ({"hidden_N_D": torch.zeros(4, 3).long()}, TypeError, r"hidden_N_D must have dtype .*, got int64"),
        ({"head": "lm_head"}, TypeError, r"head must be an OutputHead or a weight tensor .*, got str"),
        ({"head": torch.zeros(10, 4)}, ValueError, r"head\.weight must have shape \(V, D\) = \(V, 3\), got \(10, 4\)"),
        ({"num_ids": 0}, ValueError, r"num_ids must be in \[1, V\] = \[1, 10\], got 0"),
        ({"num_ids": 11}, ValueError, r"num_ids must be in \[1, V\] = \[1, 10\], got 11"),
        ({"num_ids": 2.0}, TypeError, r"num_ids must be an int in \[1, V\], got float"),
        ({"num_ids": True}, TypeError, r"num_ids must be an int in \[1, V\], got bool"),
        ({"united_with_N_K": torch.zeros(4, 2)}, TypeError, r"united_with_N_K must have dtype int32, int64, got float32"),
        ({"united_with_N_K": torch.zeros(5, 2).int()}, ValueError, r"united_with_N_K must have shape .*, got \(5, 2\)"),
        ({"united_with_N_K": torch.zeros(4, dtype=torch.int32)}, ValueError, r"united_with_N_K must have shape .*, got \(4,\)"),
        (
            {"united_with_N_K": torch.zeros(4, 2, dtype=torch.int64, device="meta")},
            ValueError,
            r"all tensors must be on one device, got .*united_with_N_K: meta",
        ),
        ({"workspace_bytes": 0}, ValueError, r"workspace_bytes must be > 0 or None, got 0"),
        ({"workspace_bytes": 1e9}, TypeError, r"workspace_bytes must be an int > 0 or None, got float"),
    ],
)  # fmt: skip
def test_wrong_arguments_raise(changed, error, message):
    good = {"hidden_N_D": torch.zeros(4, 3), "head": torch.zeros(10, 3), "num_ids": 2}
    with pytest.raises(error, match="select_topk_ids: " + message):
        select_topk_ids(**{**good, **changed})
