"""A group of candidates that compute the same thing on the same inputs: gate, then first call, memory and time.

A candidate of ours whose results are outside the error budget of `esr_kernels.testing` is refused: no time is taken. For
other implementations the error is a column, and only one that computes something else is refused.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bench.baselines.peers import NotInstalled
from bench.timing import ROUNDS, Budget, Burst, Sample, Stopwatch, summary
from esr_kernels.logit_storage import LogitStorage
from esr_kernels.testing.error_budget import check_results, relative_error_in_norm
from esr_kernels.testing.oracle import Oracle, Results

# Rows that are compared with the float64 oracle, evenly spaced over all rows.
GATE_ROWS = 256
# Relative error in norm above which another implementation computes something else, not the same inexactly.
SOMETHING_ELSE = 0.5
# Single calls of which the host's time is taken where samples are of several.
EAGER_CALLS = 5

# Names of the differentiable result of an op; their errors and those of the gradients are reported.
VALUES = ("divergence", "logprobs", "loss")

Inputs = tuple  # a named tuple of tensors and heads, or of such
Run = Callable[[Inputs, Tensor | None], Results]
Part = Callable[[str, Tensor], Tensor]


class Gate(NamedTuple):
    """The float64 oracle on a part of what is computed."""

    part: Part  # what of a result, by its name, the oracle was asked for
    oracle: Oracle
    same_dtype: Results  # PyTorch at the same dtype

    def compared(self, actual: Results) -> Results:
        return {name: self.part(name, tensor) for name, tensor in actual.items()}

    def errors(self, actual: Results) -> dict[str, float]:
        """Relative error in norm of the value and of each gradient."""
        names = [name for name in actual if name in VALUES or name.startswith("grad_")]
        actual = self.compared({name: actual[name] for name in names})
        return {name: relative_error_in_norm(actual[name], self.oracle.values[name]) for name in names}

    def check(self, actual: Results, norm_limit: float | None = None) -> None:
        """Check results against the error budget or, where a limit is given, their errors in norm against that.

        Raises:
            AssertionError: some result is outside.
        """
        if norm_limit is not None:
            for name, error in self.errors(actual).items():
                assert error <= norm_limit, f"{name}: relative error in norm {error:.3g}, at most {norm_limit}"
            return
        values, bounds, same_dtype = (
            {name: results[name] for name in actual} for results in (*self.oracle, self.same_dtype)
        )
        check_results(self.compared(actual), oracle=Oracle(values, bounds), same_dtype=same_dtype)


class Rewindable(Protocol):
    """What calls of a candidate change and later calls depend on."""

    def rewind(self) -> None:
        """To where it was before the first call, without waiting for the device."""

    def check(self, num_calls: int) -> None:
        """Raises AssertionError where not each of so many calls since the last `rewind` has done its work."""


@dataclass(frozen=True)
class Candidate:
    """One implementation in one setting. What `run` returns is what is timed; `results` names it for the gate."""

    name: str
    run: Run
    is_ours: bool = True
    storage: LogitStorage = LogitStorage.FLOAT32
    norm_limit: float | None = None  # in place of the error budget
    facts: dict = field(default_factory=dict)
    results: Callable[[object, Tensor | None], Results] = lambda raw, upstream: raw
    state: Rewindable | None = None  # rewound before each sample, checked after the last


@dataclass(frozen=True)
class Group:
    """Candidates on the same inputs, with the work counted that none of them can avoid."""

    case: str
    setting: dict
    inputs: list[Inputs]  # rotated
    upstream: Tensor | None  # one entry per value of the op; None: forward alone
    gate: Callable[[LogitStorage], Gate]
    gate_upstream: Tensor | None
    candidates: list[Candidate]
    counted_bytes: int
    counted_flop: int
    floor_ms: float | None = None  # of the bare matrix products
    calls_per_sample: int | None = None  # timed as one; None: each call by itself


def gate_rows(num_rows: int, device: torch.device) -> Tensor:
    return torch.linspace(0, num_rows - 1, min(num_rows, GATE_ROWS), device=device).round().long()


def at_rows(rows: Tensor) -> Part:
    """Results at these rows. Gradients of a head are sums over rows and compared whole."""
    return lambda name, tensor: tensor if name.endswith("weight") else tensor[rows]


def only_at(rows: Tensor, upstream_N: Tensor) -> Tensor:
    """The upstream gradient with 0 at all other rows: the head's gradient is then a sum over these rows alone."""
    return torch.zeros_like(upstream_N).index_copy(0, rows, upstream_N[rows])


def measured_rows(group: Group, stopwatch: Stopwatch, budget: Budget) -> Iterator[dict]:
    """One row of results per candidate, as it would be written to JSON."""
    rows, is_timed = [], []
    for candidate in group.candidates:
        row, is_good = prepared_row(group, candidate, stopwatch)
        rows.append(row)
        is_timed.append(is_good)
    order = [i for i in range(len(rows)) if is_timed[i]]
    timed = {i: Timed(group, group.candidates[i], rows[i], stopwatch) for i in order}
    samples: dict[int, list[Sample]] = {i: [] for i in order}
    repetitions = {}
    for i in order:
        (warm,) = timed[i].samples(1)  # after the three calls of prepared_row
        repetitions[i] = budget.repetitions(1e-3 * warm.device_ms, len(order))
    for turn in range(ROUNDS):
        for i in order if turn % 2 == 0 else reversed(order):
            samples[i] += timed[i].samples(repetitions[i] // ROUNDS)
    for i in order:
        rows[i] |= timed[i].summary(samples[i])
        if rows[i]["status"] == "timed":
            rows[i]["samples_ms"] = timed[i].call_ms(samples[i])
    yield from rows


class Timed:
    """A candidate while it is timed, call by call or, where the group says so, several calls as one sample."""

    def __init__(self, group: Group, candidate: Candidate, row: dict, stopwatch: Stopwatch) -> None:
        self.stopwatch, self.state, self.stalled = stopwatch, candidate.state, None
        self.call, self.inputs = partial(timed_call, candidate, group.upstream), group.inputs
        self.burst = None
        if group.calls_per_sample is not None:
            self.host_ms = min(sample.host_ms for sample in self.samples(EAGER_CALLS))
            self.burst = Burst(
                self.call, group.inputs, group.calls_per_sample, may_be_captured=row["host_syncs"] == 0
            )  # on a CPU host_syncs is None
            self.call, self.inputs = self.burst, [None]

    def samples(self, count: int) -> list[Sample]:
        """Of the burst, where there is one, else of single calls."""
        if self.state is None:
            return self.stopwatch.samples(self.call, self.inputs, count)
        samples = self.stopwatch.samples(self.call, self.inputs, count, before=self.state.rewind)
        try:
            self.state.check(self.burst.num_calls if self.burst else 1)
        except AssertionError as error:
            self.stalled = str(error)
        return samples

    def call_ms(self, samples: list[Sample]) -> list[float]:
        """Milliseconds of a call on the device, sample by sample."""
        num_calls = self.burst.num_calls if self.burst else 1
        return [float(f"{sample.device_ms / num_calls:.6g}") for sample in samples]

    def summary(self, samples: list[Sample]) -> dict:
        """Times per call, or the refusal of calls that did not do their work. The host's time is always that of a call."""
        if self.stalled is not None:
            return {"status": "refused", "message": f"timed calls: {self.stalled}"}
        if self.burst is None:
            return summary(samples)
        num_calls = self.burst.num_calls
        per_call = summary([Sample(device / num_calls, host / num_calls) for device, host in samples])
        return per_call | {"host_ms": self.host_ms, "calls_per_sample": num_calls, "captured": self.burst.is_captured}


def timed_call(candidate: Candidate, upstream: Tensor | None, inputs: Inputs) -> object:
    return candidate.run(inputs, upstream)


def prepared_row(group: Group, candidate: Candidate, stopwatch: Stopwatch) -> tuple[dict, bool]:
    """First call, gate and peak memory of one candidate; whether it may be timed.

    Whatever an implementation raises becomes its row's status, so that one failure does not cost the others; but an error
    after which the device does not answer ends the run.
    """
    row = {"case": group.case, **group.setting, "implementation": candidate.name, "is_ours": candidate.is_ours}
    row |= {"counted_bytes": group.counted_bytes, "counted_flop": group.counted_flop, "floor_ms": group.floor_ms}
    row |= candidate.facts
    call = partial(timed_call, candidate, group.upstream, group.inputs[0])
    try:
        row["first_call_s"] = stopwatch.seconds(call)
        raw = candidate.run(group.inputs[0], group.gate_upstream)
        results, gate = candidate.results(raw, group.gate_upstream), group.gate(candidate.storage)
        row["errors"] = gate.errors(results)
        gate.check(results, candidate.norm_limit)
        del raw, results
        row |= stopwatch.observed(call)
        status, message = "timed", None
    except NotInstalled as error:
        status, message = "not installed", str(error)
    except torch.OutOfMemoryError as error:
        status, message = "out of memory", str(error)
    except AssertionError as error:
        status, message = "refused", str(error)
    except Exception as error:
        status, message = "failed", f"{type(error).__name__}: {error}"
    if status != "timed" and stopwatch.is_cuda:
        stopwatch.synchronize()
        torch.cuda.empty_cache()
    row |= {"status": status} if message is None else {"status": status, "message": message[:1000]}
    return row, status == "timed"


def derived(row: dict, copy_gb_per_s: float) -> dict:
    """Rates and ratios of a timed row, from what is counted and what this machine can do."""
    if row["status"] != "timed":
        return {}
    seconds = 1e-3 * row["median_ms"]
    figures = {}
    if row["floor_ms"] is None:
        figures["gb_per_s"] = 1e-9 * row["counted_bytes"] / seconds
        figures["share_of_copy"] = figures["gb_per_s"] / copy_gb_per_s
        if "schedule_bytes" in row:
            figures["schedule_share_of_copy"] = 1e-9 * row["schedule_bytes"] / seconds / copy_gb_per_s
    else:
        figures["ratio_to_products"] = row["median_ms"] / row["floor_ms"]
        figures["tflop_per_s"] = 1e-12 * row["counted_flop"] / seconds
    return figures


def largest_gradient_error(row: dict) -> float:
    """NaN where there is none."""
    errors = [error for name, error in row.get("errors", {}).items() if name.startswith("grad_")]
    return max(errors, default=math.nan)
