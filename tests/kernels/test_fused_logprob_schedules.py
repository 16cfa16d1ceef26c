"""Do schedules, chunk sizes, storages and slices of the vocabulary leave the log-probs and their gradients alone?

python -m pytest tests/kernels/test_fused_logprob_schedules.py
"""

import functools

import pytest
import torch
from torch import Tensor

from esr_kernels import Impl, LogitStorage
from esr_kernels.output_projection import gradients, plan, projection
from esr_kernels.output_projection.plan import Schedule, logit_bytes_per_row, padded_vocab_size, plan_linear_op
from esr_kernels.testing.cases import Shape
from esr_kernels.testing.error_budget import check_against, relative_error_in_norm
from esr_kernels.testing.logprob_inputs import GatherInputs, PrefixInputs, make_gather_inputs, make_prefix_inputs
from esr_kernels.testing.logprob_oracle import (
    evaluate_gather_logprobs,
    evaluate_linear_prefix_logprobs,
    gather_logprobs_oracle,
    linear_prefix_logprobs_oracle,
)
from esr_kernels.testing.oracle import Results, converted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
FLOAT32_STORAGE, TILE_RELATIVE = LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16
ALL = ("hidden", "weight", "bias")
VOCAB, SIZE, ROWS = 300, 24, 5
VALUE, HIDDEN, KEEP, RECOMPUTE = Schedule.VALUE, Schedule.HIDDEN, Schedule.KEEP, Schedule.RECOMPUTE
both_linear_ops = pytest.mark.parametrize("op", ["linear_prefix", "gather"])
every_format = pytest.mark.parametrize(
    ("dtype", "storage"),
    [(FLOAT32, FLOAT32_STORAGE), (FLOAT32, TILE_RELATIVE), (BFLOAT16, TILE_RELATIVE)],
    ids=str,
)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def prefix_inputs(vocab_size: int = VOCAB, **options) -> PrefixInputs:
    """Five valid slots: that many rows are projected."""
    inputs = make_prefix_inputs(3, 5, vocab_size, SIZE, horizon=3, has_bias=True, **options)
    starts, lengths = torch.tensor([2, 5, 1], device=DEVICE), torch.tensor([2, 0, 4], device=DEVICE)
    return converted(inputs, DEVICE)._replace(starts_B=starts, lengths_B=lengths)


def gather_inputs(vocab_size: int = VOCAB, **options) -> GatherInputs:
    inputs = make_gather_inputs(Shape(ROWS, vocab_size, SIZE, SIZE + 1), 3, has_bias=True, **options)
    return converted(inputs, DEVICE)


def make_inputs(op: str, **options) -> GatherInputs | PrefixInputs:
    return gather_inputs(**options) if op == "gather" else prefix_inputs(**options)


def upstream_of(op: str) -> Tensor:
    shape = (ROWS, 3) if op == "gather" else (3, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def evaluate(op: str, inputs: GatherInputs | PrefixInputs, **options) -> Results:
    evaluate_op = evaluate_gather_logprobs if op == "gather" else evaluate_linear_prefix_logprobs
    return evaluate_op(inputs, upstream_of(op), impl=Impl.FUSED, **options)


def check(op: str, inputs: GatherInputs | PrefixInputs, **options) -> Results:
    trained = options.pop("trained", ALL)
    evaluate_op, oracle_of = evaluate_linear_prefix_logprobs, linear_prefix_logprobs_oracle
    if op == "gather":
        evaluate_op, oracle_of = evaluate_gather_logprobs, gather_logprobs_oracle
    arguments = functools.partial(oracle_of, trained=trained), functools.partial(evaluate_op, trained=trained)
    return check_against(*arguments, inputs, upstream_of(op), **options)


def options_for(
    chunk_rows: int, schedule: Schedule, dtype: torch.dtype, storage: LogitStorage, vocab_size: int = VOCAB
) -> dict:
    """What makes an op take `chunk_rows` rows at a time under `schedule`; for gather_logprobs HIDDEN is KEEP or RECOMPUTE."""
    itemsize = 2 if dtype.itemsize == 2 else 4
    budget = chunk_rows * logit_bytes_per_row(vocab_size, storage, itemsize, num_sides=1)
    if schedule is KEEP:
        budget += ROWS * padded_vocab_size(vocab_size) * itemsize
    chosen = plan_linear_op(
        "an op",
        ROWS,
        vocab_size,
        num_sides=1,
        needs_hidden_gradient=schedule is not VALUE,
        needs_head_gradient=schedule in (KEEP, RECOMPUTE),
        gradient_itemsize=itemsize,
        storage=storage,
        workspace_bytes=budget,
    )
    assert chosen == (schedule, storage, min(chunk_rows, ROWS))
    trained = {VALUE: (), HIDDEN: ("hidden",)}.get(schedule, ALL)
    return {"logits": storage, "workspace_bytes": budget, "trained": trained}


@pytest.fixture
def any_chunk_may_be_kept(monkeypatch):
    """d(logits) are kept however few rows of logits then fit beside them: small shapes would else not be chunked."""
    monkeypatch.setattr(plan, "POOR_CHUNK_ROWS", 1)


def assert_agree(actual: Results, expected: Results, dtype: torch.dtype, storage: LogitStorage) -> None:
    """Within float32 rounding, where a matrix product of another height may round another way; in float16 storage one such
    rounding may move a stored logit by a unit in its last place, and a 16-bit gradient by one in its own.
    """
    is_float32 = storage is FLOAT32_STORAGE
    norm_error = 1e-3 if dtype.itemsize == 2 else 3e-6 if is_float32 else 3e-4
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if is_float32 else {"rtol": 2e-4, "atol": 2e-5}
    for name, value in actual.items():
        if name.startswith("grad_"):
            assert relative_error_in_norm(value, expected[name]) < norm_error, name
        else:
            torch.testing.assert_close(value, expected[name], **tolerance)


@every_format
@both_linear_ops
def test_n7_schedules_and_chunk_sizes_agree(any_chunk_may_be_kept, op, dtype, storage):
    """One row, two, all rows or more at a time; d(logits) (or logits) kept, made again, or not wanted at all."""
    inputs = make_inputs(op, seed=1, dtype=dtype)
    whole = evaluate(op, inputs, **options_for(ROWS, KEEP, dtype, storage))
    assert (whole["grad_weight"] != 0).any()
    for schedule, chunk_rows in ((KEEP, 1), (KEEP, ROWS + 1), (RECOMPUTE, 2), (HIDDEN, 1), (VALUE, 2)):
        results = evaluate(op, inputs, **options_for(chunk_rows, schedule, dtype, storage))
        assert_agree(results, whole, dtype, storage)


@pytest.mark.parametrize(("schedule", "storage"), [(HIDDEN, FLOAT32_STORAGE), (RECOMPUTE, TILE_RELATIVE)], ids=str)
@both_linear_ops
def test_n7_chunks_of_two_rows_are_within_the_error_budget(op, storage, schedule):
    """Each chunk with its own ids, upstream gradients and units; the last of one row."""
    inputs = make_inputs(op, seed=2, dtype=BFLOAT16, softcap=6.0, logit_scale=0.7)
    check(op, inputs, temperature=1.4, **options_for(2, schedule, BFLOAT16, storage))


@pytest.mark.parametrize(("op", "dtype"), [("linear_prefix", torch.float16), ("gather", BFLOAT16)], ids=str)
def test_n7_the_weight_gradients_error_does_not_grow_with_the_number_of_chunks(op, dtype):
    """One row a chunk: sums kept in 16 bits would lose more with every chunk, sums in float32 lose nothing."""
    inputs = make_inputs(op, seed=3, dtype=dtype)
    oracle_of = gather_logprobs_oracle if op == "gather" else linear_prefix_logprobs_oracle
    oracle = oracle_of(inputs, upstream_of(op)).values["grad_weight"]
    error, error_of_whole = (
        relative_error_in_norm(
            evaluate(op, inputs, **options_for(rows, schedule, dtype, FLOAT32_STORAGE))["grad_weight"], oracle
        )
        for rows, schedule in ((1, RECOMPUTE), (ROWS, KEEP))
    )
    assert error < 2.5e-3 and error < 1.1 * error_of_whole


@pytest.fixture
def slices_of_256_ids(monkeypatch):
    """Three slices of the head and of the projection, the last of them ragged, as larger vocabularies have."""
    monkeypatch.setattr(gradients, "SLICE_IDS", 256)
    monkeypatch.setattr(projection, "CONVERSION_ROWS", 256)
    monkeypatch.setattr(projection, "PROJECTION_COLUMNS", 256)
    monkeypatch.setattr(plan, "PROJECTION_COLUMNS", 256)


@pytest.mark.parametrize(
    ("schedule", "storage"), [(HIDDEN, TILE_RELATIVE), (KEEP, TILE_RELATIVE), (RECOMPUTE, FLOAT32_STORAGE)], ids=str
)
@both_linear_ops
def test_slices_of_the_vocabulary(slices_of_256_ids, op, storage, schedule):
    """Ids at both ends of each slice are picked from the slice that holds them."""
    inputs = make_inputs(op, vocab_size=600, seed=4, dtype=BFLOAT16)
    edges = torch.tensor([0, 255, 256, 511, 512, 599, 300, 1, 598, 257, 128, 127, 383, 384, 2], device=DEVICE)
    if op == "gather":
        inputs = inputs._replace(token_ids_N_K=edges.view(ROWS, 3))
    else:
        inputs = inputs._replace(token_ids_B_T=edges.view(3, 5))
    rows = ROWS if schedule is KEEP else 2
    check(op, inputs, **options_for(rows, schedule, BFLOAT16, storage, vocab_size=600))


@pytest.mark.parametrize("schedule", [KEEP, RECOMPUTE])
@both_linear_ops
def test_slices_of_a_16_bit_head_below_float32_hidden_states(slices_of_256_ids, op, schedule):
    """The head is converted slice by slice, and so is its gradient."""
    inputs = make_inputs(op, vocab_size=600, seed=5, dtype=BFLOAT16)
    inputs = inputs._replace(**{inputs._fields[0]: inputs[0].float()})
    rows = ROWS if schedule is KEEP else 2
    check(op, inputs, **options_for(rows, schedule, FLOAT32, FLOAT32_STORAGE, vocab_size=600))


@both_linear_ops
def test_auto_gives_the_result_of_the_storage_that_it_picks(slices_of_256_ids, op):
    """Float32 while all rows fit; tile-relative where that lets more rows fit."""
    inputs = make_inputs(op, vocab_size=600, seed=6, dtype=BFLOAT16)
    bytes_of = {s: logit_bytes_per_row(600, s, 2, num_sides=1) for s in (FLOAT32_STORAGE, TILE_RELATIVE)}
    tight = 4 * bytes_of[TILE_RELATIVE]
    assert tight // bytes_of[FLOAT32_STORAGE] == 3
    results = {}
    for budget, picked, other in ((None, FLOAT32_STORAGE, TILE_RELATIVE), (tight, TILE_RELATIVE, FLOAT32_STORAGE)):
        for storage in (LogitStorage.AUTO, picked, other):
            options = {"logits": storage, "workspace_bytes": budget, "trained": ()}
            results[storage] = evaluate(op, inputs, **options)["logprobs"]
        assert torch.equal(results[LogitStorage.AUTO], results[picked]), picked
        assert not torch.equal(results[LogitStorage.AUTO], results[other]), picked


@both_linear_ops
def test_equal_rows_give_equal_results_whatever_their_chunk(op):
    """Rows of one hidden state and id, projected two at a time: a chunk that read another one's ids would show."""
    inputs = make_inputs(op, seed=7, dtype=FLOAT32)
    hidden = inputs[0].clone()
    hidden[..., :] = hidden.flatten(0, -2)[0]
    inputs = inputs._replace(**{inputs._fields[0]: hidden})
    options = options_for(2, RECOMPUTE, FLOAT32, FLOAT32_STORAGE)
    if op == "gather":
        ids = torch.tensor([[9, 11, -1], [9, 11, -1], [9, 12, 4], [-1, 11, 9], [11, 9, 9]], device=DEVICE)
        inputs = inputs._replace(token_ids_N_K=ids)
        places = (ids == 9).nonzero(), (ids == 11).nonzero()
    else:
        ids = torch.tensor([[0, 9, 9, 11, 0], [0, 0, 0, 0, 0], [0, 11, 9, 11, 0]], device=DEVICE)
        inputs = inputs._replace(token_ids_B_T=ids)
        places = torch.tensor([[0, 0], [2, 1]]), torch.tensor([[0, 1], [2, 0], [2, 2]])
    logprobs = evaluate(op, inputs, **options)["logprobs"]
    of_9, of_11 = (logprobs[tuple(place.T)] for place in places)
    for values in (of_9, of_11):
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-6, atol=1e-6)
    assert (of_9[0] - of_11[0]).abs() > 0.01
