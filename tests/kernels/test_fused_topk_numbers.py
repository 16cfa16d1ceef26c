"""Does the top-k kernel keep its accuracy in rows of many tiles and slices, at finite masks, tiny upstreams and float16's limits?

python -m pytest tests/kernels/test_fused_topk_numbers.py

Run as a program, this file prints what launches of several sizes would be compiled for, by the rules of compiled_kernels.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_kernels import ROOT, launched, specialise

from esr_kernels import ForwardKL, GeneralizedJSD, Impl, LogitStorage, OutputHead, ReverseKL
from esr_kernels.logit_rows import LogitRows
from esr_kernels.output_projection import gradients, projection, tile_relative_kernel
from esr_kernels.output_projection.picked_logits_kernel import PickedLogits, launch_pick_logits
from esr_kernels.output_projection.plan import logit_bytes_per_row
from esr_kernels.row_gradient import RowGradient
from esr_kernels.testing.cases import DIVERGENCES, Shape
from esr_kernels.testing.error_budget import check_against, relative_error_in_norm
from esr_kernels.testing.inputs import make_upstream
from esr_kernels.testing.logprob_inputs import TopkInputs, make_topk_inputs
from esr_kernels.testing.logprob_oracle import evaluate_topk_divergence, topk_divergence_oracle
from esr_kernels.testing.oracle import Results, converted
from esr_kernels.tile_config import TileConfig
from esr_kernels.topk_divergence import forward_kernel
from esr_kernels.topk_divergence.forward_kernel import Events, TopkOutputs, launch_topk_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
SHAPE = Shape(rows=3, vocab_size=600, student_size=24, teacher_size=40)
ALL = ("hidden", "weight", "bias")
SCHEDULES = {
    "hidden": {"trained": ("hidden",)},
    "keep": {"trained": ALL},
    "recompute": {
        "trained": ALL,
        "logits": LogitStorage.FLOAT32,
        "workspace_bytes": 2 * logit_bytes_per_row(600, LogitStorage.FLOAT32, 2, num_sides=1),
    },
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_storage = pytest.mark.parametrize("storage", [LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16])
both_16_bit_dtypes = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
TRUNCATED = {"tail_bucket": False, "renormalize": False}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def topk_inputs(seed: int, num_ids: int = 9, **options) -> TopkInputs:
    return converted(make_topk_inputs(SHAPE, num_ids, seed=seed, **options), DEVICE)


def upstream_of(inputs: TopkInputs) -> torch.Tensor:
    return make_upstream(len(inputs[0]), seed=1, device=DEVICE)


def check(inputs: TopkInputs, divergence, upstream=None, **options) -> Results:
    upstream = upstream_of(inputs) if upstream is None else upstream
    return check_against(topk_divergence_oracle, evaluate_topk_divergence, inputs, divergence, upstream, **options)


@pytest.fixture
def narrow_tiles_and_slices(monkeypatch):
    """A row of 600 ids as one of 151,936: tiles of 128 columns, slices of 256 of the head, all ragged at the end."""
    monkeypatch.setattr(
        forward_kernel, "choose_one_sided_tile_config", lambda vocab_size, num_ids: TileConfig(128, num_warps=1)
    )
    monkeypatch.setattr(tile_relative_kernel, "TILE", TileConfig(128, num_warps=1))
    monkeypatch.setattr(gradients, "SLICE_IDS", 256)
    for name in ("CONVERSION_ROWS", "PROJECTION_COLUMNS"):
        monkeypatch.setattr(projection, name, 256)


@every_storage
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "bfloat16 weights"])
def test_ids_in_every_tile_and_slice(narrow_tiles_and_slices, dtypes, storage):
    """The borders of tiles and slices among them; picked from the slice that holds them, and taken out of it alone."""
    dtype = getattr(torch, dtypes) if dtypes != "bfloat16 weights" else BFLOAT16
    inputs = topk_inputs(1, 12, dtype=dtype, has_bias=True)
    borders = [0, 127, 128, 255, 256, 257, 511, 512, 598, 599, -1, 384]
    inputs.teacher_ids_N_K[:2] = torch.tensor(borders, device=DEVICE)
    if dtypes == "bfloat16 weights":  # which are converted to float32, slice by slice too
        inputs = inputs._replace(student_hidden_N_D=inputs.student_hidden_N_D.float())
    if dtypes != "float32":
        check(inputs, ReverseKL(), logits=LogitStorage.FLOAT32 if dtypes == "bfloat16 weights" else storage)
    else:  # 2^-14 of sizes near 5, and for the gradient 11 bits of a tail
        options = {"impl": Impl.FUSED, "logits": storage}
        results = evaluate_topk_divergence(inputs, ReverseKL(), upstream_of(inputs), **options)
        oracle = topk_divergence_oracle(inputs, ReverseKL(), upstream_of(inputs)).values
        is_float32 = storage == LogitStorage.FLOAT32
        for name, value in results.items():
            assert relative_error_in_norm(value, oracle[name]) < (3e-6 if is_float32 else 1e-3), name


@every_storage
def test_a_row_that_rises_and_one_that_falls_from_tile_to_tile(narrow_tiles_and_slices, storage):
    """Every lane has a running maximum of its own: by 1e3 a row, at masked first tiles, with the ids low, high or between."""
    ramp = torch.linspace(0, 1e3, 600)[None]
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(6, 600, generator=generator)
    student[:2] += ramp
    student[2:4] -= ramp
    bias = torch.zeros(600)
    ids = torch.tensor([[599, 3], [5, 300], [0, 599], [300, 301], [128, 599], [0, 1]])
    logprobs = torch.tensor([[0.5, 0.3]] * 6).log()
    inputs = TopkInputs(student, OutputHead(torch.eye(600), bias), ids, logprobs)
    for divergence, masked in ((ReverseKL(), slice(0, 0)), (GeneralizedJSD(0.5), slice(0, 590))):
        inputs.student_head.bias[masked] = -INF
        moved, options = converted(inputs, DEVICE), {"logits": storage, "trained": ("hidden",)}
        results = evaluate_topk_divergence(moved, divergence, upstream_of(moved), impl=Impl.FUSED, **options)
        oracle = topk_divergence_oracle(moved, divergence, upstream_of(moved), **options)
        assert_near(results, oracle.values, 1e-5 if storage == LogitStorage.FLOAT32 else 2e-3)


def assert_near(results: Results, oracle: Results, tolerance: float) -> None:
    for name in oracle:
        torch.testing.assert_close(results[name].double(), oracle[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mask", [-1e31, -1e33, torch.finfo(FLOAT32).min])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_a_finite_mask_before_the_largest_logit(narrow_tiles_and_slices, name, mask):
    """Over the first tiles, with and without an id among them: the oracle's value, or +inf with gradient 0 above float32."""
    student = torch.randn(3, 500, generator=torch.Generator().manual_seed(3))
    student[:2, :384] = mask
    ids, logprobs = torch.tensor([[400, 499], [7, 499], [7, 499]]), torch.tensor([[0.5, 0.3]] * 3).log()
    inputs = converted(TopkInputs(student, OutputHead(torch.eye(500)), ids, logprobs), DEVICE)
    options = {"trained": ("hidden",)}
    results = evaluate_topk_divergence(inputs, DIVERGENCES[name], upstream_of(inputs), impl=Impl.FUSED, **options)
    oracle = topk_divergence_oracle(inputs, DIVERGENCES[name], upstream_of(inputs), **options).values
    assert results["grad_hidden"].isfinite().all()
    for row in range(3):
        if results["divergence"][row] == INF:
            assert oracle["divergence"][row] > 1e30 and (results["grad_hidden"][row] == 0).all()
        else:  # a few eps of sums near 1
            assert_near(*({field: x[field][row] for field in oracle} for x in (results, oracle)), 1e-5)


@every_schedule
@both_16_bit_dtypes
def test_forward_kl_of_an_id_that_the_student_all_but_excludes(dtype, schedule):
    """D near 1e37 in every row; the gradient is p - q all the same, and no larger than 1."""
    inputs = topk_inputs(4, dtype=dtype, has_bias=True)
    bias = inputs.student_head.bias.float()  # float16 has no such number, but a bias may be wider than its weight
    bias[inputs.teacher_ids_N_K[:, 0]] = torch.finfo(BFLOAT16).min
    inputs = inputs._replace(student_head=OutputHead(inputs.student_head.weight, bias))
    results = check(inputs, ForwardKL(), **SCHEDULES[schedule])
    assert (results["divergence"] > 1e30).all() and (results["divergence"] < INF).all()
    oracle = topk_divergence_oracle(inputs, ForwardKL(), upstream_of(inputs), **SCHEDULES[schedule]).values
    for name in {"grad_hidden", "grad_weight"} & set(results):
        assert relative_error_in_norm(results[name], oracle[name]) <= 2e-3, name


@every_schedule
@pytest.mark.parametrize("size", [1e-37, 1e-38])
def test_a_tiny_upstream(size, schedule):
    """The last bits of bfloat16 are gone here, and of PyTorch's gradient with them; finite, and as near as that."""
    inputs = topk_inputs(5, dtype=BFLOAT16, has_bias=True)
    upstream, options = (
        size * torch.tensor([1.0, -0.5, 2.0], device=DEVICE),
        {"trained": SCHEDULES[schedule]["trained"]},
    )
    results = evaluate_topk_divergence(inputs, ReverseKL(), upstream, impl=Impl.FUSED, **SCHEDULES[schedule])
    reference = evaluate_topk_divergence(inputs, ReverseKL(), upstream, impl=Impl.REFERENCE, **options)
    oracle = topk_divergence_oracle(inputs, ReverseKL(), upstream, **options).values
    for name in (f"grad_{name}" for name in options["trained"]):
        error, of_reference = (relative_error_in_norm(x[name], oracle[name]) for x in (results, reference))
        assert results[name].isfinite().all() and error < 1.2 * of_reference + 0.01, name


# Divergence and events; slope; logits of ids 7 and 50 and of all others; log-probs of 7 and 50; size of d(logits), whose bound is
# the power of two that a float16 row is scaled by.
NEAR_THE_BOUND = {
    "forward KL": (ForwardKL(), {}, 1.0, (15.0, 0.0), (-16.0, -1e-4), 1.0),
    "forward KL, slope 100": (ForwardKL(), {}, 100.0, (15.0, 0.0), (-16.0, -1e-4), 1e2),
    "forward KL, slope 0.01": (ForwardKL(), {}, 0.01, (15.0, 0.0), (-16.0, -1e-4), 1e-2),
    "JSD, slope 100": (GeneralizedJSD(0.5), {}, 100.0, (15.0, 15.0), (-0.01, -40.0), 1e1),
    "reverse KL, slope 100": (ReverseKL(), {}, 100.0, (15.0, 15.0), (-0.01, -40.0), 1e3),
    "reverse KL above 1e5": (ReverseKL(), {}, 1.0, (15.0, 12.0), (-0.01, -4e6), 2e5),
    "reverse KL above 1e5, slope 100": (ReverseKL(), {}, 100.0, (15.0, 12.0), (-0.01, -4e6), 2e7),
    "renormalized reverse KL above 1e5": (ReverseKL(), {"tail_bucket": False}, 1.0, (15.0, 12.0), (-0.01, -4e6), 2e5),
    "truncated reverse KL above 1e5": (ReverseKL(), TRUNCATED, 100.0, (15.0, 12.0), (-0.01, -4e6), 2e7),
    "truncated reverse KL below 0": (ReverseKL(), TRUNCATED, 100.0, (7.0, 6.0), (-0.7, -0.8), 5e1),
    "truncated forward KL below 0": (ForwardKL(), TRUNCATED, 100.0, (9.0, 9.0), (-3.0, -4.0), 1e1),
}


@both_16_bit_dtypes
@pytest.mark.parametrize("case", NEAR_THE_BOUND)
def test_gradients_near_the_bound_by_which_a_float16_row_is_scaled(case, dtype):
    """A larger scale would overflow, as would one that leaves out the slope, the divergence or its sign."""
    divergence, events, slope, student, teacher, size = NEAR_THE_BOUND[case]
    scale, temperature = slope**0.5, slope**-0.5
    inputs = topk_inputs(6, 2, dtype=dtype)
    bias = torch.zeros(SHAPE.vocab_size, device=DEVICE)
    bias[[7, 50]] = torch.tensor(student, device=DEVICE) * temperature / scale
    weight = 0.1 * inputs.student_head.weight * temperature / scale  # nearly flat beside these, at any temperature
    ids = torch.tensor([[7, 50]] * SHAPE.rows, device=DEVICE)
    logprobs = torch.tensor([teacher] * SHAPE.rows, device=DEVICE)
    inputs = TopkInputs(inputs.student_hidden_N_D, OutputHead(weight, bias, scale), ids, logprobs)
    options = {"loss_temperature": temperature, "trained": ("hidden", "weight"), **events}
    upstream = upstream_of(inputs) / size
    results = evaluate_topk_divergence(inputs, divergence, upstream, impl=Impl.FUSED, **options)
    oracle = topk_divergence_oracle(inputs, divergence, upstream, **options).values
    below, above = ("below" in case), ("above" in case)
    assert ((results["divergence"] < 0) if below else (results["divergence"] > (1e5 if above else 0.1))).all()
    # A float32 logit of 15 is exact to 15 eps, and p times 4e6 with it.
    torch.testing.assert_close(results["divergence"].double(), oracle["divergence"], rtol=1e-5, atol=1e-6)
    for name in ("grad_hidden", "grad_weight"):
        assert relative_error_in_norm(results[name], oracle[name]) <= 2e-3, name


@pytest.mark.parametrize("where", ["id", "tail"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5"])
def test_a_certain_event_under_a_soft_cap(name, dtype, where):
    """p > 1/2 where the soft cap takes two thirds of the gradient, at an id or at one of the tail."""
    inputs = topk_inputs(7, 3, dtype=dtype)
    bias = torch.zeros(SHAPE.vocab_size, device=DEVICE)
    bias[7] = 11.0
    head = OutputHead(0.1 * inputs.student_head.weight, bias, softcap=10.0)
    ids = torch.tensor([[7 if where == "id" else 8, 20, 599]] * SHAPE.rows, device=DEVICE)
    logprobs = torch.tensor([[0.6 if where == "id" else 0.01, 0.1, 0.05]] * SHAPE.rows, device=DEVICE).log()
    inputs = TopkInputs(inputs.student_hidden_N_D, head, ids, logprobs)
    student = head.logits(inputs.student_hidden_N_D)
    assert (student.softmax(-1)[:, 7] > 0.5).all() and (1 - (student[:, 7] / 10) ** 2 < 0.5).all()
    results = check(inputs, DIVERGENCES[name], trained=("hidden", "weight"))
    oracle = topk_divergence_oracle(inputs, DIVERGENCES[name], upstream_of(inputs), trained=("weight",)).values
    error = relative_error_in_norm(results["grad_weight"][7], oracle["grad_weight"][7])
    assert error < (2e-3 if dtype == BFLOAT16 else 1e-5)


@every_storage
@pytest.mark.parametrize("events", [{}, {"tail_bucket": False}, TRUNCATED], ids=["tail", "renormalized", "truncated"])
def test_n8_a_logit_of_infinity_makes_nan_where_it_is_compared(events, storage):
    """By the bias of id 7, which row 0 is given and the others not: they compare it in the tail or in the softmax's sum."""
    inputs = topk_inputs(8, 3, has_bias=True)
    inputs.teacher_ids_N_K[:] = torch.tensor([[7, 20, 599], [8, 20, 599], [8, 3, 6]], device=DEVICE)
    inputs.student_head.bias[7] = INF
    options = {"impl": Impl.FUSED, "logits": storage, **events}
    results = evaluate_topk_divergence(inputs, ReverseKL(), upstream_of(inputs), **options)
    is_renormalized = events == {"tail_bucket": False}
    assert results["divergence"].isnan().tolist() == [True, not is_renormalized, not is_renormalized]
    assert results["top1_agreement"].isnan().tolist() == [True, not is_renormalized, not is_renormalized]
    assert results["grad_hidden"].isfinite().all(-1).tolist() == [False, is_renormalized, is_renormalized]


@every_schedule
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_a_row_of_empty_slots_may_hold_anything(dtype, schedule):
    """Its NaN hidden state reaches neither the other rows nor the head, whatever its upstream gradient."""
    inputs = topk_inputs(21, dtype=dtype)
    inputs.teacher_ids_N_K[1] = -1
    upstream_N = make_upstream(SHAPE.rows, device=DEVICE)
    options = {"impl": Impl.FUSED, **SCHEDULES[schedule]}
    clean = evaluate_topk_divergence(inputs, ReverseKL(), upstream_N, **options)
    inputs.student_hidden_N_D[1] = float("nan")
    dirty = evaluate_topk_divergence(inputs, ReverseKL(), upstream_N, **options)
    for name, expected in clean.items():
        assert expected.isfinite().all() and torch.equal(dirty[name], expected), name
    assert (dirty["grad_hidden"][1] == 0).all() and dirty["grad_hidden"][0].abs().sum() > 0


# Rows of a chunk, rows before it, temperature.
SIZES = [(64, 0, 0.7), (7, 0, 1.0), (1, 3, 1.0), (16, 5, 2.0), (33, 31, 0.5)]


def chunk_of_rows(rows: int, start: int, temperature: float, num_ids: int) -> None:
    """A chunk of rows that starts anywhere in the tensors that hold few numbers per row."""

    def empty(*shape: int, dtype: torch.dtype = FLOAT32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, logprobs = empty(start + rows, num_ids, dtype=torch.int64)[start:], empty(start + rows, num_ids)[start:]
    logits, picked = LogitRows(empty(rows, 151936), 1 / temperature), empty(rows, num_ids)
    launch_pick_logits(logits, slice(0, 151936), PickedLogits(ids, picked, True))
    outputs = TopkOutputs(*(empty(start + rows)[start:] for _ in TopkOutputs._fields))
    gradient = RowGradient(empty(rows, 151936, dtype=FLOAT16), empty(start + rows)[start:], FLOAT16)
    events = ("GeneralizedJSD", 0.3), Events.TAIL, 151936
    launch_topk_divergence(logits, PickedLogits(ids, picked, True), logprobs, *events, outputs, gradient)


def test_x6_no_kernel_compiles_again_for_other_rows_chunks_or_temperatures():
    """Among them 1 row, multiples of 16, and addresses that are not; another number of ids is another kernel."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for kinds in json.loads(done.stdout):
        assert len(kinds) == len(SIZES) and len(kinds[0]) == 2  # two kernels a launch
        assert [size for size, kind in zip(SIZES, kinds, strict=True) if kind != kinds[0]] == []


if __name__ == "__main__":
    variants = [[launched("chunk", chunk_of_rows, *size, num_ids) for size in SIZES] for num_ids in (1, 20, 64)]
    print(json.dumps([[[str(vars(specialise(v))) for v in kernels] for kernels in sizes] for sizes in variants]))
