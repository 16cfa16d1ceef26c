"""Is gather_logprobs under FUSED within the error budget, with repeats and padding among the ids, for every dtype and head?

python -m pytest tests/kernels/test_fused_gather_logprobs.py
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from esr_kernels import Impl, LogitStorage, OutputHead, gather_logprobs, linear_prefix_logprobs
from esr_kernels.gather_logprobs import api
from esr_kernels.gather_logprobs.reference import gather_logprobs_reference
from esr_kernels.testing.cases import SMALL_SHAPES, Shape
from esr_kernels.testing.error_budget import check_against, relative_error_in_norm
from esr_kernels.testing.logprob_inputs import GatherInputs, make_gather_inputs
from esr_kernels.testing.logprob_oracle import evaluate_gather_logprobs, gather_logprobs_oracle
from esr_kernels.testing.oracle import Results, converted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
TILE_RELATIVE = LogitStorage.TILE_RELATIVE_FP16
SMALL = Shape(rows=4, vocab_size=643, student_size=24, teacher_size=25)
every_storage = pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, TILE_RELATIVE])
# One for each schedule: the logits of all rows kept, or made again for one row or two (float32) at a time.
WORKSPACES = {"keep": None, "recompute": 8000}
every_workspace = pytest.mark.parametrize("workspace", WORKSPACES)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def gather_inputs(shape: Shape = SMALL, num_ids: int = 7, **options) -> GatherInputs:
    return converted(make_gather_inputs(shape, num_ids, **options), DEVICE)


def upstream_of(inputs: GatherInputs) -> Tensor:
    return torch.randn(inputs.token_ids_N_K.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)


def check(inputs: GatherInputs, upstream: Tensor | None = None, **options) -> Results:
    upstream = upstream_of(inputs) if upstream is None else upstream
    return check_against(gather_logprobs_oracle, evaluate_gather_logprobs, inputs, upstream, **options)


def fused(inputs: GatherInputs, upstream: Tensor | None = None, **options) -> Results:
    upstream = upstream_of(inputs) if upstream is None else upstream
    return evaluate_gather_logprobs(inputs, upstream, impl=Impl.FUSED, **options)


@every_workspace
@every_storage
@pytest.mark.parametrize(("dtype", "temperature"), [(FLOAT32, 0.3), (FLOAT16, 5.0), (BFLOAT16, 0.7)], ids=str)
def test_every_dtype_storage_and_temperature(dtype, temperature, storage, workspace):
    """With all that a head can have, padding, a repeated id and a row of padding."""
    inputs = gather_inputs(seed=1, dtype=dtype, has_bias=True, logit_scale=0.8, softcap=7.0)
    options = {"logits": storage, "temperature": temperature, "workspace_bytes": WORKSPACES[workspace]}
    if dtype == FLOAT32 and storage == TILE_RELATIVE:
        check_float32_inputs_stored_tile_relative(inputs, options)
    else:
        results = check(inputs, **options)
        assert (results["grad_hidden"][1] == 0).all() and (results["logprobs"][1] == 0).all()


def check_float32_inputs_stored_tile_relative(inputs: GatherInputs, options: dict) -> None:
    """The caller asks for 11 bits of the distance to a tile's maximum: the bars of 16 bits hold, those of float32 cannot."""
    actual, oracle = fused(inputs, **options), gather_logprobs_oracle(inputs, upstream_of(inputs), **options)
    error = (actual["logprobs"].double() - oracle.values["logprobs"]).abs()
    assert (error <= oracle.bounds["logprobs"]).all()
    for name in ("grad_hidden", "grad_weight", "grad_bias"):
        assert relative_error_in_norm(actual[name], oracle.values[name]) < 2e-3, name


HEADS = {
    "bias": {"has_bias": True},
    "logit scale": {"logit_scale": 0.25},
    "softcap and scale": {"softcap": 5.0, "logit_scale": 2.0},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_s5_heads(head, dtype):
    storage = LogitStorage.FLOAT32 if dtype == FLOAT32 else TILE_RELATIVE
    check(gather_inputs(seed=2, dtype=dtype, **HEADS[head]), logits=storage, temperature=1.3)


@every_workspace
@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), [(FLOAT32, BFLOAT16), (BFLOAT16, FLOAT32)], ids=str)
def test_s5_hidden_states_weight_and_bias_may_differ_in_dtype(hidden_dtype, weight_dtype, workspace):
    inputs = gather_inputs(seed=3, dtype=BFLOAT16, has_bias=True)
    head = OutputHead(inputs.head.weight.to(weight_dtype), inputs.head.bias.to(FLOAT16))
    inputs = inputs._replace(hidden_N_D=inputs.hidden_N_D.to(hidden_dtype), head=head)
    results = check(inputs, workspace_bytes=WORKSPACES[workspace])
    dtypes = [results[f"grad_{name}"].dtype for name in ("hidden", "weight", "bias")]
    assert dtypes == [hidden_dtype, weight_dtype, FLOAT16]


@pytest.mark.parametrize("num_ids", [1, 6])
@pytest.mark.parametrize("name", [name for name in SMALL_SHAPES if name != "ragged"])
def test_s1_s3_shapes(name, num_ids):
    """V aligned to nothing, D not a multiple of 8, one row, no row, several tiles of a program; one id or several."""
    storage = TILE_RELATIVE if num_ids == 6 else LogitStorage.FLOAT32
    inputs = gather_inputs(SMALL_SHAPES[name], num_ids, seed=4, dtype=BFLOAT16, has_bias=True)
    results = check(inputs, logits=storage)
    assert results["grad_weight"].shape == inputs.head.weight.shape
    if len(inputs.hidden_N_D) == 0:
        assert (results["grad_weight"] == 0).all() and (results["grad_bias"] == 0).all()


def test_s1_a_vocabulary_of_one_id():
    inputs = gather_inputs(Shape(3, 1, 4, 5), 2, seed=5)._replace(
        token_ids_N_K=torch.tensor([[0, 0], [-1, 0], [-1, -1]], device=DEVICE)
    )
    for name, value in fused(inputs).items():
        assert (value == 0).all(), name


@every_workspace
@pytest.mark.parametrize("trained", ["all", "hidden", "none"])
def test_s3_no_id_per_row(trained, workspace):
    """K = 0: log-probs of shape (N, 0), and gradients of zero for whoever asks."""
    inputs = gather_inputs(num_ids=0, seed=6, has_bias=True)
    names = {"all": ("hidden", "weight", "bias"), "hidden": ("hidden",), "none": ()}[trained]
    results = fused(inputs, trained=names, workspace_bytes=WORKSPACES[workspace])
    assert results.pop("logprobs").shape == (4, 0)
    assert list(results) == [f"grad_{name}" for name in names]
    assert all((gradient == 0).all() for gradient in results.values())


@every_workspace
def test_s3_rows_of_padding_alone(workspace):
    inputs = gather_inputs(seed=7, dtype=BFLOAT16, has_bias=True)
    inputs = inputs._replace(token_ids_N_K=torch.full_like(inputs.token_ids_N_K, -1))
    for name, value in fused(inputs, workspace_bytes=WORKSPACES[workspace]).items():
        assert (value == 0).all(), name


def test_the_largest_number_of_ids():
    """1024 ids a row, of which 300 exist: every id several times, padding among them."""
    generator = torch.Generator().manual_seed(8)
    inputs = gather_inputs(Shape(1, 300, 8, 9), 1024, seed=8)
    ids = torch.randint(-1, 300, (1, 1024), generator=generator).to(DEVICE)
    check(inputs._replace(token_ids_N_K=ids))


@every_workspace
@pytest.mark.parametrize(
    ("dtype", "storage"),
    [(FLOAT32, LogitStorage.FLOAT32), (FLOAT32, TILE_RELATIVE), (BFLOAT16, TILE_RELATIVE)],
    ids=str,
)
def test_repeated_ids_have_upstream_gradients_of_their_own(dtype, storage, workspace):
    """d(logits) in numpy: each slot adds its own u (onehot - p). The likeliest id comes three times in row 0, of which two
    cancel; in row 2 all slots hold one id."""
    inputs = gather_inputs(num_ids=5, seed=9, dtype=dtype)
    likeliest = inputs.token_ids_N_K[0, 0].item()
    other = (likeliest + 100) % SMALL.vocab_size
    rows = [[likeliest, other, likeliest, -1, likeliest], [7, 7, 642, 642, 0], [3] * 5, [-1, -1, 9, -1, 9]]
    inputs = inputs._replace(token_ids_N_K=torch.tensor(rows, device=DEVICE))
    upstream = upstream_of(inputs)
    upstream[0, 2] = -upstream[0, 0]
    results = fused(inputs, upstream, logits=storage, workspace_bytes=WORKSPACES[workspace])

    hidden, weight = (x.double().cpu().numpy() for x in (inputs.hidden_N_D, inputs.head.weight))
    z = hidden @ weight.T
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_logits, logprobs = np.zeros_like(p), np.zeros((4, 5))
    for n, row in enumerate(rows):
        for k, token in enumerate(row):
            if token >= 0:
                logprobs[n, k] = np.log(p[n, token])
                d_logits[n] += upstream[n, k].item() * ((np.arange(p.shape[1]) == token) - p[n])
    bar = {(FLOAT32, LogitStorage.FLOAT32): 2e-6, (FLOAT32, TILE_RELATIVE): 1e-3}.get((dtype, storage), 2e-3)
    for actual, expected in (("hidden", d_logits @ weight), ("weight", d_logits.T @ hidden)):
        error = relative_error_in_norm(results[f"grad_{actual}"].cpu(), torch.from_numpy(expected))
        assert error < bar, actual
    tolerance = 2e-6 if storage == LogitStorage.FLOAT32 else 2.0**-14 * 10
    torch.testing.assert_close(
        results["logprobs"].double().cpu(), torch.from_numpy(logprobs), rtol=0, atol=10 * tolerance
    )
    for n, row in enumerate(rows):  # equal ids, equal bits
        assert len({(token, results["logprobs"][n, k].item()) for k, token in enumerate(row)}) == len(set(row))


@every_workspace
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_n8_padding_is_deaf_to_poison(dtype, workspace):
    """NaN hidden states in a row of padding and NaN upstream at padding: every result and gradient the same, bit for bit."""
    clean = gather_inputs(seed=10, dtype=dtype, has_bias=True)
    hidden, upstream = clean.hidden_N_D.clone(), upstream_of(clean)
    hidden[1] = NAN
    dirty_upstream = upstream.masked_fill(clean.token_ids_N_K == -1, NAN)
    options = {"workspace_bytes": WORKSPACES[workspace]}
    expected = fused(clean, upstream, **options)
    actual = fused(clean._replace(hidden_N_D=hidden), dirty_upstream, **options)
    for name in expected:
        assert expected[name].isfinite().all() and torch.equal(actual[name], expected[name]), name


@every_workspace
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_n8_a_nan_row_with_upstream_zero_adds_nothing_to_the_head(dtype, workspace):
    """Its log-probs are NaN and its gradient 0; with any other upstream it shows in the head."""
    inputs = gather_inputs(seed=11, dtype=dtype, has_bias=True)
    upstream, options = upstream_of(inputs), {"workspace_bytes": WORKSPACES[workspace]}
    upstream[2] = 0.0
    expected = fused(inputs, upstream, **options)
    inputs.hidden_N_D[2, 3] = NAN
    results = fused(inputs, upstream, **options)
    is_id = inputs.token_ids_N_K[2] >= 0
    assert results["logprobs"][2][is_id].isnan().all() and (results["grad_hidden"][2] == 0).all()
    for name in ("grad_hidden", "grad_weight", "grad_bias"):
        torch.testing.assert_close(results[name], expected[name], rtol=1e-6, atol=1e-7)
    upstream[2] = 0.5
    poisoned = fused(inputs, upstream, **options)
    assert poisoned["grad_hidden"][2].isnan().any() and poisoned["grad_weight"].isnan().any()
    assert poisoned["grad_hidden"][[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("upstream_there", [0.0, 2.5, NAN])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_ids_out_of_range_give_nan_without_gradient(monkeypatch, dtype, upstream_there):
    """On a device, where nobody looks at ids: the other slots of the row, and the other rows, do not notice."""
    monkeypatch.setattr(api, "can_look_at", lambda values: False)
    inputs = gather_inputs(num_ids=4, seed=12, dtype=dtype)
    wild = torch.tensor([[5, -100, 5, 9], [643, 8, -1, 642], [-2, -1, -(2**40), 2**31 + 5], [1, 2, 3, 4]])
    is_wild = (wild < -1) | (wild > 642)
    without = inputs._replace(token_ids_N_K=wild.masked_fill(is_wild, -1).to(DEVICE))
    upstream = upstream_of(inputs).masked_fill(is_wild.to(DEVICE), upstream_there)
    expected = fused(without, upstream)
    actual = fused(inputs._replace(token_ids_N_K=wild.to(DEVICE)), upstream)
    assert torch.equal(actual["logprobs"].isnan().cpu(), is_wild)
    assert torch.equal(actual["logprobs"].nan_to_num(0.0), expected["logprobs"])
    for name in ("grad_hidden", "grad_weight"):
        # A bound that counts their upstream gradients may scale a 16-bit row by another power of two.
        bar = 1e-6 if dtype == FLOAT32 else 1e-3
        assert actual[name].isfinite().all() and relative_error_in_norm(actual[name], expected[name]) < bar, name
    reference = gather_logprobs_reference(inputs.hidden_N_D, inputs.head, wild.to(DEVICE), 1.0)
    torch.testing.assert_close(actual["logprobs"], reference, rtol=2e-6, atol=4e-6, equal_nan=True)


def test_one_id_per_row_is_the_prefix_op():
    """Two ways to one number: rows (N, D) with one id each, and a rollout of N + 1 columns."""
    inputs = gather_inputs(num_ids=1, seed=13, has_bias=True, softcap=6.0)
    inputs.token_ids_N_K[1] = 600
    gathered = fused(inputs, temperature=0.7)["logprobs"]
    hidden_B_T_D = torch.cat([inputs.hidden_N_D, torch.full_like(inputs.hidden_N_D[:1], NAN)])[None]
    ids_B_T = torch.cat([inputs.token_ids_N_K.new_zeros(1), inputs.token_ids_N_K[:, 0]])[None]
    starts_B = torch.ones(1, dtype=torch.int64, device=DEVICE)
    result = linear_prefix_logprobs(hidden_B_T_D, inputs.head, ids_B_T, starts_B, 4, temperature=0.7)
    torch.testing.assert_close(gathered[:, 0], result.logprobs_B_K[0], rtol=1e-6, atol=1e-6)


LAYOUTS = {
    "columns of more": lambda x: torch.cat([x.new_full((len(x), 3), 5), x, x], dim=1)[:, 3 : 3 + x.shape[1]],
    "every second row": lambda x: torch.stack([x, x.new_full(x.shape, 5)], dim=1).flatten(0, 1)[::2],
    "transposed": lambda x: x.T.contiguous().T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_s2_strided_inputs_and_upstream(layout):
    """The same to float32 rounding, for PyTorch may multiply strided matrices in another order."""
    inputs, move, options = gather_inputs(seed=14), LAYOUTS[layout], {}
    options["workspace_bytes"] = WORKSPACES["keep" if layout == "transposed" else "recompute"]
    strided = GatherInputs(
        move(inputs.hidden_N_D), OutputHead(move(inputs.head.weight)), move(inputs.token_ids_N_K.int())
    )
    upstream = move(upstream_of(inputs))
    assert not any(x.is_contiguous() for x in (strided.hidden_N_D, strided.head.weight, strided[2], upstream))
    expected, actual = fused(inputs, **options), fused(strided, upstream, **options)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=2e-6)


def test_x7_inputs_are_not_written_to():
    inputs = gather_inputs(seed=15, dtype=BFLOAT16, has_bias=True)
    upstream = upstream_of(inputs)
    tensors = [inputs.hidden_N_D, inputs.head.weight, inputs.head.bias, inputs.token_ids_N_K, upstream]
    before = [tensor.clone() for tensor in tensors]
    for storage in (LogitStorage.FLOAT32, TILE_RELATIVE):
        for workspace in WORKSPACES.values():
            fused(inputs, upstream, logits=storage, workspace_bytes=workspace)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


def test_without_gradient_there_is_the_same_value():
    inputs = gather_inputs(seed=16)
    expected = fused(inputs)["logprobs"]
    hidden = inputs.hidden_N_D.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = gather_logprobs(hidden, inputs.head, inputs.token_ids_N_K)
        assert not value.requires_grad and torch.equal(value, expected)
