"""How cost grows: the divergence with trained tokens and vocabulary, rollouts with batch and horizon, each with the others fixed.

python -m bench.bench_scaling                             # on a GPU the fused op and Qwen3-1.7B's shape; on a CPU, in 3 minutes
                                                          # and with one thread, the reference and the demo's student
python -m bench.bench_scaling --axes batch horizon --model folder
python -m bench.bench_scaling --smoke                     # tiny shapes; its times mean nothing

Divergence: reverse KL from hidden states, forward and backward with a trained head, within the error budget of the float64 oracle
before it is timed, or of the reference in float32 within 1e-4 of it in norm. Rollouts: by the in-process engine, forced to the
whole horizon, behind the gate of bench/bench_rollouts.py on as many rows as fit. The floor of each point is that of
bench/floor.py at the rates of this machine, measured in the same run. Slopes are those of a line through the logarithms of all
points of an axis: 1 is linear. scaling.json is written whole after each row, scaling.png at the end.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from bench.bench_rollouts import SAMPLER, gate, label, rollouts
from bench.cases.comparison import Candidate, Group, gate_rows, measured_rows, only_at
from bench.cases.linear_cases import HEAD_TRAINED, linear_gate, our_call
from bench.cases.our_candidates import AUTO, our_candidate
from bench.floor import ModelShape, Rates, StageFloor, StepSetting, Work, divergence_work, rollout_floor
from bench.gpu_rates import DTYPES, measured_rates
from bench.record_demo import RESULTS, ROOT, machine_folder
from bench.reports.scaling_report import write_figure
from bench.rollout_models import SHAPES, make_model, make_prompts
from bench.timing import ROUNDS, Budget, Stopwatch
from esr_distill.complete_files import write_json
from esr_distill.input_error import InputError
from esr_distill.machine import machine_record
from esr_distill.rollout import InProcessBackend
from esr_kernels import Impl
from esr_kernels.testing.cases import DIVERGENCES, Shape
from esr_kernels.testing.inputs import LinearInputs, make_linear_inputs, make_upstream
from esr_kernels.testing.oracle import Results, evaluate_linear_divergence

FILE_NAME = "scaling.json"
DIVERGENCE = "reverse_kl"
DEMO_STUDENT = ROOT / "python" / "esr_distill" / "demo" / "models" / "rewrite" / "student"
REFERENCE_NORM_LIMIT = 1e-4
GATE_LOGIT_BYTES = 4_000_000_000  # `generate` keeps 8 bytes for each logit of the gate
AXES = ("tokens", "vocabulary", "batch", "horizon")


@dataclass(frozen=True)
class Sizes:
    """Points of every axis, and what is fixed meanwhile."""

    row_counts: tuple[int, ...]
    vocab_sizes: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    horizons: tuple[int, ...]
    fixed: Shape
    batch_size: int
    horizon: int
    prompt: int
    model: str
    dtype: str
    repetitions: int
    point_seconds: float  # when these are spent no further repetition begins; there are two at least


ON_GPU = Sizes(
    row_counts=(264, 528, 1056, 2112, 4224, 8448, 16896),
    vocab_sizes=(8192, 16384, 32768, 65536, 131072, 262144),
    batch_sizes=(8, 16, 32, 64, 128, 256),
    horizons=(25, 50, 100, 200, 400),
    fixed=Shape(rows=3200, vocab_size=151_936, student_size=2048, teacher_size=4096),
    batch_size=32,
    horizon=100,
    prompt=200,
    model="qwen3-1.7b",
    dtype="bfloat16",
    repetitions=10,
    point_seconds=10.0,
)
ON_CPU = Sizes(
    row_counts=(32, 64, 128, 256, 512, 1024),
    vocab_sizes=(1024, 2048, 4096, 8192, 16384, 32768),
    batch_sizes=(1, 2, 4, 8, 16, 32, 64),
    horizons=(8, 16, 32, 64, 128, 256),
    fixed=Shape(rows=128, vocab_size=8192, student_size=256, teacher_size=512),
    batch_size=8,
    horizon=32,
    prompt=24,
    model=str(DEMO_STUDENT),
    dtype="float32",
    repetitions=8,
    point_seconds=4.0,
)
SMOKE = Sizes(
    row_counts=(3, 5),
    vocab_sizes=(67, 131),
    batch_sizes=(1, 3),
    horizons=(3, 5),
    fixed=Shape(rows=3, vocab_size=67, student_size=8, teacher_size=12),
    batch_size=2,
    horizon=4,
    prompt=6,
    model="tiny",
    dtype="float32",
    repetitions=2,
    point_seconds=1.0,
)


def log_slope(points: list[tuple[float, float]]) -> float | None:
    """Slope of the least-squares line through the logarithms; None of fewer than two different sizes."""
    x, y = [[math.log(value) for value in values] for values in zip(*points, strict=True)] if points else ([], [])
    if len(set(x)) < 2:
        return None
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def slopes(rows: list[dict]) -> dict[str, dict]:
    """By axis: the slope of the measured medians and that of the floors, through the points that were timed."""
    found = {}
    for axis in dict.fromkeys(row["axis"] for row in rows):
        timed = [row for row in rows if row["axis"] == axis and row["status"] == "timed"]
        found[axis] = {"points": len(timed)} | {
            name: log_slope([(row["size"], row[key]) for row in timed])
            for name, key in (("measured", "median_s"), ("floor", "floor_s"))
        }
    return found


def reference_run(inputs: LinearInputs, upstream_N: Tensor | None) -> Results:
    divergence = DIVERGENCES[DIVERGENCE]
    return evaluate_linear_divergence(inputs, divergence, upstream_N, impl=Impl.REFERENCE, trained=HEAD_TRAINED)


def divergence_floor(shape: Shape, dtype: torch.dtype, rates: Rates) -> StageFloor:
    """Forward and backward of the op, the head's gradient written once."""

    def with_head(hidden: int) -> ModelShape:
        return ModelShape(1, hidden, 1, 1, 1, 1, shape.vocab_size, tied=True, dtype_bytes=dtype.itemsize)

    student, teacher = with_head(shape.student_size), with_head(shape.teacher_size)
    forward, backward = divergence_work(student, teacher, shape.rows)
    backward = Work(backward.flop, backward.bytes + student.dtype_bytes * student.head_weights)
    return StageFloor.sum(StageFloor.of(work, rates) for work in (forward, backward))


def divergence_row(shape: Shape, sizes: Sizes, device: str, rates: Rates) -> dict:
    """One point: the fused op on a GPU, the reference on a CPU, behind the gate."""
    dtype = sizes.dtype
    inputs = make_linear_inputs(shape, dtype=DTYPES[dtype], device=device)
    upstream_N = make_upstream(shape.rows, seed=1, device=device)
    if device == "cuda":
        candidate = our_candidate(our_call(inputs, DIVERGENCE, HEAD_TRAINED), AUTO, None)
    else:
        candidate = Candidate("reference", reference_run, norm_limit=REFERENCE_NORM_LIMIT)
    group = Group(
        case="scaling",
        setting={
            "N": shape.rows,
            "V": shape.vocab_size,
            "D": shape.student_size,
            "E": shape.teacher_size,
            "dtype": dtype,
        },
        inputs=[inputs],
        upstream=upstream_N,
        gate=linear_gate(inputs, DIVERGENCE, HEAD_TRAINED, upstream_N),
        gate_upstream=only_at(gate_rows(shape.rows, upstream_N.device), upstream_N),
        candidates=[candidate],
        counted_bytes=0,
        counted_flop=0,
    )
    budget = Budget(sizes.point_seconds, 1, fewest=ROUNDS, most=sizes.repetitions)
    (row,) = measured_rows(group, Stopwatch(torch.device(device)), budget)
    floor = divergence_floor(shape, DTYPES[dtype], rates)
    kept = {name: row[name] for name in (*group.setting, "implementation", "status")}
    kept |= {"floor_s": floor.seconds, "floor_bound": floor.bound}
    kept |= {
        name: row[name] for name in ("errors", "message", "peak_bytes", "first_call_s", "repetitions") if name in row
    }
    if row["status"] == "timed":
        times = {"median_s": "median_ms", "low_s": "p10_ms", "high_s": "p90_ms"}
        kept |= {name: 1e-3 * row[key] for name, key in times.items()}
    return kept


def timed_rollouts(run: Callable[[], object], stopwatch: Stopwatch, sizes: Sizes) -> dict:
    """Median, least and most seconds, after a first call that may capture graphs."""
    first, observed, seconds = stopwatch.seconds(run), stopwatch.observed(run), []
    while len(seconds) < ROUNDS or (len(seconds) < sizes.repetitions and sum(seconds) < sizes.point_seconds):
        seconds.append(stopwatch.seconds(run))
    times = {"median_s": statistics.median(seconds), "low_s": min(seconds), "high_s": max(seconds)}
    return times | {"first_call_s": first, "repetitions": len(seconds), **observed}


class RolloutPoints:
    """Points of one model, which is loaded when the first is asked for."""

    def __init__(self, sizes: Sizes, device: str, rates: Rates) -> None:
        self.sizes, self.device, self.rates = sizes, device, rates
        self.model: PreTrainedModel | None = None

    def row(self, batch_size: int, horizon: int) -> dict:
        sizes = self.sizes
        self.model = self.model or make_model(sizes.model, self.device, DTYPES[sizes.dtype])
        setting = StepSetting(batch_size, sizes.prompt, horizon)
        floor = rollout_floor(ModelShape.of(self.model.config), setting, self.rates)
        row = {"model": label(sizes.model), "B": batch_size, "P": sizes.prompt, "K": horizon, "dtype": sizes.dtype}
        row |= {"implementation": "in-process engine", "floor_s": floor.seconds, "floor_bound": floor.bound}
        engine, stopwatch = InProcessBackend(), Stopwatch(torch.device(self.device))
        prompts = make_prompts(self.model, batch_size, sizes.prompt, is_ragged=False)
        vocab_size = self.model.get_output_embeddings().weight.shape[0]
        rows = max(1, min(batch_size, GATE_LOGIT_BYTES // (8 * horizon * vocab_size)))
        try:
            some = make_prompts(self.model, rows, sizes.prompt, is_ragged=True)
            row |= gate(self.model, some, horizon, engine, sizes.dtype) | {"gate_rows": rows, "status": "timed"}
            run = partial(rollouts, self.model, prompts, horizon, SAMPLER, engine)
            row |= timed_rollouts(run, stopwatch, sizes)
        except (AssertionError, InputError, RuntimeError, ValueError) as error:
            row |= {"status": "refused" if isinstance(error, AssertionError) else "failed", "message": str(error)[:500]}
        engine.release()
        if stopwatch.is_cuda:
            torch.cuda.empty_cache()
        return row


def points(sizes: Sizes, device: str, rates: Rates) -> dict[str, list[tuple[int, Callable[[], dict]]]]:
    """By axis: (size, what measures it), from small to large."""
    fixed = sizes.fixed
    divergence = partial(divergence_row, sizes=sizes, device=device, rates=rates)
    of_rollouts = RolloutPoints(sizes, device, rates)

    def shape(rows: int, vocab_size: int) -> Shape:
        return Shape(rows, vocab_size, fixed.student_size, fixed.teacher_size)

    return {
        "tokens": [(n, partial(divergence, shape(n, fixed.vocab_size))) for n in sizes.row_counts],
        "vocabulary": [(v, partial(divergence, shape(fixed.rows, v))) for v in sizes.vocab_sizes],
        "batch": [(b, partial(of_rollouts.row, b, sizes.horizon)) for b in sizes.batch_sizes],
        "horizon": [(k, partial(of_rollouts.row, sizes.batch_size, k)) for k in sizes.horizons],
    }


def even(text: str) -> int:
    if not text.isdigit() or int(text) == 0 or int(text) % ROUNDS:
        raise argparse.ArgumentTypeError(f"must be an even number > 0, got {text}")
    return int(text)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number > 0, got {text}")
    return int(text)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="default: all")
    parser.add_argument("--model", help=f"of the rollouts: {', '.join(SHAPES)} or a folder")
    parser.add_argument("--repetitions", type=even, help="timed calls of a point, fewer where they take long")
    parser.add_argument(
        "--threads", type=positive, default=1, help="of torch on a CPU: a second one stalls on a busy machine"
    )
    parser.add_argument("--out", type=Path, help=f"folder of {FILE_NAME}; default: bench/results, by the machine")
    parser.add_argument("--commit", help="recorded where there is no git to ask")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: does it run?")
    options = parser.parse_args(argv)
    options.device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    options.axes = [axis for axis in AXES if axis in options.axes]
    if options.model is not None and options.model not in SHAPES and not Path(options.model).is_dir():
        parser.error(f"--model must be among {', '.join(SHAPES)} or a folder, got {options.model!r}")
    if options.smoke:
        options.out = options.out or ROOT / "runs" / "scaling-smoke"
        if options.out.resolve().is_relative_to(RESULTS):
            parser.error(f"--out must not be under bench/results with --smoke, got {options.out}")
    return options


def told(row: dict) -> str:
    start = f"{row['axis']} {row['size']}: {row['implementation']}"
    if row["status"] != "timed":
        return f"{start} {row['status']}: {row['message'].splitlines()[0]}"
    return f"{start} {1e3 * row['median_s']:.3f} ms, floor {1e3 * row['floor_s']:.3f} ms"


def print_line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def main(argv: list[str] | None = None) -> int:
    options, console = parsed(argv), Console()
    torch.set_num_threads(options.threads)
    sizes = SMOKE if options.smoke else ON_GPU if options.device == "cuda" else ON_CPU
    sizes = replace(sizes, model=options.model or sizes.model, repetitions=options.repetitions or sizes.repetitions)
    machine = machine_record()
    machine["commit"] = machine["commit"] or options.commit
    rates = measured_rates(torch.device(options.device), sizes.dtype, is_smoke=options.smoke)
    results = {"is_smoke": options.smoke, "is_finished": False, "machine": machine, "rates": asdict(rates)}
    results |= {"axes": options.axes, "rows": [], "slopes": {}}
    path = (options.out or RESULTS / machine_folder(machine)) / FILE_NAME
    found = points(sizes, options.device, rates)
    with Progress(console=console) as progress:
        bar = progress.add_task("points", total=sum(len(found[axis]) for axis in options.axes))
        for axis in options.axes:
            for size, measure in found[axis]:
                progress.update(bar, description=f"{axis} {size}")
                row = {"axis": axis, "size": size} | measure()
                results["rows"].append(row)
                results["slopes"] = slopes(results["rows"])
                write_json(path, results)
                print_line(progress.console, told(row))
                progress.advance(bar)
    results["is_finished"] = True
    write_json(path, results)
    print_line(console, f"{path} written")
    try:
        write_figure(results, path.with_suffix(".png"))
        print_line(console, f"{path.with_suffix('.png')} written")
    except ImportError as error:  # matplotlib is not everywhere where a GPU is
        print_line(console, f"no figure: {error}; python -m bench.reports.scaling_report {path} draws it elsewhere")
    return 0 if all(row["status"] == "timed" for row in results["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
