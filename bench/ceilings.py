"""What this machine can do, measured in the same run: its copy rate and the bare matrix products of the linear ops.

The floor of a linear op is the sum of the products that no schedule can leave out:

    logits of the student     (N, D) x (D, V)    bfloat16 to float32
    logits of the teacher     (N, E) x (E, V)    bfloat16 to float32, where the op projects one
    d(hidden)                 (N, V) x (V, D)    bfloat16, where a gradient is wanted
    d(weight)                 (V, N) x (N, D)    bfloat16, where the head is trained

Nothing that our own schedule does beside them (conversions, slices, accumulation in float32) is part of it.
"""

import time
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from bench.timing import Stopwatch, summary

REPETITIONS = 20
SUSTAINED_SECONDS = 10.0
WARM_UP_CALLS = 3
COPY_BYTES = 2**32
SQUARE = 8192
# Larger products are timed at this many rows (4 whole waves of tiles on 132 multiprocessors) and scaled.
MOST_ROWS = 8448


class LinearWork(NamedTuple):
    """The products of the minimal schedule of a linear op: name for `Ceilings.gemm_ms`, hidden size."""

    num_rows: int
    vocab_size: int
    products: tuple[tuple[str, int], ...]

    @classmethod
    def of(
        cls,
        num_rows: int,
        vocab_size: int,
        hidden_size: int,
        *,
        trained: tuple[str, ...],
        teacher_size: int | None = None,
    ) -> "LinearWork":
        """`trained` names the tensors that get a gradient, as the oracles of `esr_kernels.testing` do."""
        products = [("logits", hidden_size)]
        if teacher_size is not None:
            products.append(("logits", teacher_size))
        products += [(f"{name.removeprefix('student_')}_gradient", hidden_size) for name in trained]
        return cls(num_rows, vocab_size, tuple(products))

    def flop(self) -> int:
        """Floating-point operations."""
        return 2 * self.num_rows * self.vocab_size * sum(size for _, size in self.products)


class Ceilings:
    """Each figure is measured when it is first asked for."""

    def __init__(self, stopwatch: Stopwatch, *, is_smoke: bool) -> None:
        self.stopwatch, self.is_smoke = stopwatch, is_smoke
        self.measured_gemms: dict[str, float] = {}

    @cache  # noqa: B019 (one instance per run)
    def copy_gb_per_s(self) -> float:
        """Bytes read plus bytes written of a large copy, in GB/s."""
        size = 2**16 if self.is_smoke else COPY_BYTES
        source = torch.ones(size // 2, dtype=torch.int16, device=self.stopwatch.device)
        target = torch.empty_like(source)
        return 2e-6 * size / self._median_ms(lambda _: target.copy_(source))

    @cache  # noqa: B019
    def square_tflop_per_s(self) -> float:
        """Rate of a bfloat16 product of two square matrices."""
        size = 64 if self.is_smoke else SQUARE
        a, b = self._normal(size, size), self._normal(size, size)
        return 2e-9 * size**3 / self._median_ms(lambda _: a @ b)

    @cache  # noqa: B019
    def sustained_tflop_per_s(self) -> float:
        """The same rate after ten seconds of nothing else: what is left when the card is warm and has lowered its clocks."""
        size, seconds = (64, 0.01) if self.is_smoke else (SQUARE, SUSTAINED_SECONDS)
        a, b = self._normal(size, size), self._normal(size, size)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            samples = self.stopwatch.samples(lambda _: a @ b, [None], REPETITIONS)
        return 2e-9 * size**3 / summary(samples)["median_ms"]

    @cache  # noqa: B019
    def gemm_ms(self, product: str, rows: int, vocab_size: int, size: int) -> float:
        """Time of one bare product: "logits", "hidden_gradient" or "weight_gradient"."""
        measured_rows = min(rows, MOST_ROWS)
        hidden, weight = self._normal(measured_rows, size), self._normal(vocab_size, size)
        if product == "logits":
            milliseconds = self._median_ms(lambda _: product_in_float32(hidden, weight.T))
        else:
            gradient = self._normal(measured_rows, vocab_size)
            a, b = {"hidden_gradient": (gradient, weight), "weight_gradient": (gradient.T, hidden)}[product]
            milliseconds = self._median_ms(lambda _: a @ b)
        milliseconds *= rows / measured_rows
        self.measured_gemms[f"{product} N={rows} V={vocab_size} D={size}"] = milliseconds
        return milliseconds

    def floor_ms(self, work: LinearWork) -> float:
        """Sum of the bare products of the minimal schedule."""
        return sum(self.gemm_ms(product, work.num_rows, work.vocab_size, size) for product, size in work.products)

    def record(self, *, sustained: bool = False) -> dict:
        """All figures so far; with the sustained rate if asked, which takes its ten seconds."""
        return {
            "copy_gb_per_s": self.copy_gb_per_s(),
            "square_bfloat16_tflop_per_s": self.square_tflop_per_s(),
            "sustained_bfloat16_tflop_per_s": self.sustained_tflop_per_s() if sustained else None,
            "bare_products_ms": dict(self.measured_gemms),
        }

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.stopwatch.device).bfloat16()

    def _median_ms(self, call) -> float:
        repetitions = 2 if self.is_smoke else REPETITIONS
        self.stopwatch.samples(call, [None], WARM_UP_CALLS)
        return summary(self.stopwatch.samples(call, [None], repetitions))["median_ms"]


@torch.library.custom_op("esr_bench::product_in_float32", mutates_args=())
def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 16-bit operands, summed and returned in float32; a CPU has no such product and converts first.

    An op of its own, because torch.compile does not take torch.mm with out_dtype in every version.
    """
    if a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


@product_in_float32.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)
