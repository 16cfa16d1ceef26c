"""How long a call takes on the device that runs it, and how often it may be repeated.

On a CUDA device between two events around each call, on a CPU by the host's clock. Inputs rotate from call to call, so that
no call finds its own inputs in the cache. Calls of a few microseconds are timed many at once (`Burst`).
"""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

ROUNDS = 2  # candidates of a group take turns, the second time in reverse order: a drift of clocks falls on all
TIMED_SHARE = 0.4  # of the budget; the rest is for inputs, gates and compilation


class Sample(NamedTuple):
    device_ms: float  # what the device took
    host_ms: float  # what the host took to enqueue it


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        """One call with everything that it waits for: compilation, if it is the first."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def samples(
        self, call: Callable, inputs: Sequence, count: int, before: Callable[[], None] | None = None
    ) -> list[Sample]:
        """`count` calls in a row, each on the next of `inputs`; the host does not wait in between.

        `before` is called ahead of each, outside of its time.
        """
        before = before or (lambda: None)
        if not self.is_cuda:
            samples = []
            for i in range(count):
                before()
                milliseconds = 1e3 * self.seconds(lambda i=i: call(inputs[i % len(inputs)]))
                samples.append(Sample(milliseconds, milliseconds))
            return samples
        events, host_ms = [], []
        self.synchronize()
        for i in range(count):
            before()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin = time.perf_counter()
            start.record()
            call(inputs[i % len(inputs)])
            stop.record()
            host_ms.append(1e3 * (time.perf_counter() - begin))
            events.append((start, stop))
        self.synchronize()
        return [Sample(start.elapsed_time(stop), host) for (start, stop), host in zip(events, host_ms, strict=True)]

    def observed(self, call: Callable[[], object]) -> dict[str, int | None]:
        """What one call does beside taking time; None on a CPU.

        `peak_bytes`: the most memory beyond what was held before, results included. `host_syncs`: how often the host waited
        for the device.
        """
        if not self.is_cuda:
            return {"peak_bytes": None, "host_syncs": None}
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.synchronize()
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) - before,
            "host_syncs": sum("synchronizing" in str(warning.message) for warning in caught),
        }


class Burst:
    """Several calls on inputs in turn as one call, for what is shorter than the gap between two events.

    They are captured in one CUDA graph if they may be and can be, else enqueued one after the other. Only what never makes
    the host wait may be captured: a capture that fails may leave torch's random generator unusable.
    """

    def __init__(self, call: Callable, inputs: Sequence, num_calls: int, *, may_be_captured: bool) -> None:
        self.call, self.inputs, self.num_calls = call, inputs, num_calls
        self.graph = self._captured() if may_be_captured else None

    @property
    def is_captured(self) -> bool:
        return self.graph is not None

    def __call__(self, _: object = None) -> None:
        if self.is_captured:
            self.graph.replay()
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        for i in range(self.num_calls):
            self.call(self.inputs[i % len(self.inputs)])

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                self._enqueue()
        except Exception:  # whatever it is, the calls can still be enqueued
            torch.cuda.set_stream(stream)  # a failed capture leaves its own stream behind
            return None
        return graph


def summary(samples: Sequence[Sample]) -> dict:
    """Median and the 10th and 90th percentile of the device's time.

    The host's time is the least: once the queue of launches is full, the host waits for the device.
    """
    device_ms = torch.tensor([sample.device_ms for sample in samples], dtype=torch.float64)
    p10, median, p90 = torch.quantile(device_ms, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {
        "median_ms": median,
        "p10_ms": p10,
        "p90_ms": p90,
        "repetitions": len(samples),
        "host_ms": min(sample.host_ms for sample in samples),
    }


class Budget:
    """Seconds for a number of groups. When they run short, later groups get fewer repetitions; every group is measured."""

    def __init__(self, seconds: float, num_groups: int, *, fewest: int = 4, most: int = 50) -> None:
        self.end = time.perf_counter() + seconds
        self.groups_left = num_groups
        self.fewest, self.most = fewest, most

    def repetitions(self, call_seconds: float, num_candidates: int) -> int:
        """Calls of one candidate of the present group, in all rounds: even, from `fewest` to `most`."""
        left = max(0.0, self.end - time.perf_counter())
        share = TIMED_SHARE * left / max(1, self.groups_left) / max(1, num_candidates)
        count = int(share / max(call_seconds, 1e-7))
        return ROUNDS * (max(self.fewest, min(self.most, count)) // ROUNDS)

    def group_is_done(self) -> None:
        self.groups_left -= 1
