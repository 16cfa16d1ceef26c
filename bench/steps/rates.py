"""What the machine can do, measured in the same run: bytes copied and floating-point operations of a product, a second."""

import torch

from bench.ceilings import REPETITIONS, WARM_UP_CALLS
from bench.timing import Stopwatch, summary

# Far larger than a cache, and on a CPU small enough to take a few seconds.
COPY_BYTES = {"cuda": 2**32, "cpu": 2**29}
SQUARE = {"cuda": 8192, "cpu": 1024}
SMOKE_COPY_BYTES, SMOKE_SQUARE = 2**16, 64


def measured_rates(stopwatch: Stopwatch, dtype: torch.dtype, *, is_smoke: bool) -> dict[str, float]:
    """`copy_gb_per_s`, read plus written, and `flop_per_s` of a product of two square matrices in `dtype`."""
    kind = stopwatch.device.type
    size, side = (SMOKE_COPY_BYTES, SMOKE_SQUARE) if is_smoke else (COPY_BYTES[kind], SQUARE[kind])
    repetitions = 2 if is_smoke else REPETITIONS
    return {
        "copy_gb_per_s": 2e-6 * size / copy_ms(stopwatch, size, repetitions),
        "flop_per_s": 2e3 * side**3 / product_ms(stopwatch, side, dtype, repetitions),
    }


def copy_ms(stopwatch: Stopwatch, size: int, repetitions: int) -> float:
    source = torch.ones(size // 2, dtype=torch.int16, device=stopwatch.device)
    target = torch.empty_like(source)
    return median_ms(stopwatch, lambda _: target.copy_(source), repetitions)


def product_ms(stopwatch: Stopwatch, side: int, dtype: torch.dtype, repetitions: int) -> float:
    a, b = (torch.randn(side, side, device=stopwatch.device).to(dtype) for _ in range(2))
    return median_ms(stopwatch, lambda _: a @ b, repetitions)


def median_ms(stopwatch: Stopwatch, call, repetitions: int) -> float:
    stopwatch.samples(call, [None], WARM_UP_CALLS)
    return summary(stopwatch.samples(call, [None], repetitions))["median_ms"]
