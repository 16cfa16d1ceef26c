"""Times of the fused ops on a GPU, each behind its correctness gate, against what torch offers and the peers.

python -m bench.bench_ops                           # results to bench/results/ and the GPU's name
python -m bench.bench_ops --cases tiles,slices
TRITON_INTERPRET=1 python -m bench.bench_ops --smoke     # results to runs/bench-smoke

Cases, in bench/cases: K1 to K3 logit_cases.py, L1 to L5 and L7 linear_cases.py, L6 topk_cases.py, B1, B2 and B4 prefix_cases.py,
C1 to C3 sampler_cases.py, and sweeps.py. After each group of rows the result file is written whole: a run that is killed keeps
what it has measured. The exit status is 1 when one of our own rows was refused or failed.

--smoke runs every case on a CPU, the kernels in Triton's interpreter and the sampler natively, on tiny shapes, to prove that
all run and all gates hold. Its times mean nothing and it writes nowhere under bench/results.
"""

import argparse
import gc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.cases.comparison import Group, derived, measured_rows
from bench.cases.linear_cases import l1_groups, l2_groups, l3_groups, l4_groups, l5_groups, l7_groups
from bench.cases.logit_cases import k1_groups, k2_groups, k3_groups
from bench.cases.prefix_cases import b1_groups, b2_groups, b4_groups
from bench.cases.sampler_cases import c1_groups, c2_groups, c3_groups
from bench.cases.settings import Settings, full_settings, smoke_settings
from bench.cases.sweeps import slice_groups, tile_groups
from bench.cases.topk_cases import l6_groups
from bench.ceilings import Ceilings
from bench.reports.ops_report import measured, write_report
from bench.timing import Budget, Stopwatch
from esr_distill.complete_files import write_json
from esr_distill.machine import machine_record

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
GroupMakers = list[Callable[[], Group]]
# In the order of a default run: what is wanted most comes first.
CASES: dict[str, Callable[[Settings, Ceilings], GroupMakers]] = {
    "K1": lambda settings, _: k1_groups(settings),
    "L1": l1_groups,
    "B2": b2_groups,
    "C1": lambda settings, _: c1_groups(settings),
    "C2": lambda settings, _: c2_groups(settings),
    "L6": l6_groups,
    "B1": b1_groups,
    "L7": l7_groups,
    "L3": l3_groups,
    "L2": l2_groups,
    "L5": l5_groups,
    "C3": lambda settings, _: c3_groups(settings),
    "K2": lambda settings, _: k2_groups(settings),
    "K3": lambda settings, _: k3_groups(settings),
    "B4": b4_groups,
    "L4": l4_groups,
    "tiles": lambda settings, _: tile_groups(settings),
    "slices": slice_groups,
}
SWEEPS = ("tiles", "slices")
DEFAULT_CASES = tuple(name for name in CASES if name not in SWEEPS)


def case_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be among {','.join(CASES)}, got {','.join(unknown)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must name each case once, got {text}")
    return names


def positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
    return seconds


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results; default: bench/results/ and the GPU's name")
    parser.add_argument(
        "--cases", type=case_names, default=DEFAULT_CASES, help=f"among {','.join(CASES)}; default: all but the sweeps"
    )
    parser.add_argument(
        "--budget-seconds", type=positive_seconds, default=240.0, help="fewer repetitions when short (default: 240)"
    )
    parser.add_argument("--commit", help="recorded where there is no git to ask")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU: does every case run?")
    options = parser.parse_args(argv)
    if options.smoke:
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--smoke runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
        options.out = options.out or ROOT / "runs" / "bench-smoke"
        if options.out.resolve().is_relative_to(RESULTS):
            parser.error(f"--out must not be under bench/results with --smoke, got {options.out}")
    elif not torch.cuda.is_available():
        parser.error(f"needs a CUDA device, and torch {torch.__version__} sees none; 'make bench-smoke' needs none")
    else:
        gpu = "-".join(re.findall("[a-z0-9]+", torch.cuda.get_device_name().lower()))
        options.out = options.out or RESULTS / gpu
    return options


def result_file(out: Path, cases: tuple[str, ...]) -> Path:
    """A selection of cases has its own file, so that it replaces no full run."""
    return out / ("ops.json" if cases == DEFAULT_CASES else f"ops-{'-'.join(cases)}.json")


def run(options: argparse.Namespace, console: Console) -> dict:
    settings = smoke_settings() if options.smoke else full_settings()
    stopwatch = Stopwatch(torch.device(settings.device))
    ceilings = Ceilings(stopwatch, is_smoke=settings.is_smoke)
    machine = machine_record()
    makers = {name: CASES[name](settings, ceilings) for name in options.cases}
    num_groups = sum(map(len, makers.values()))
    counts = {"fewest": 2, "most": 2} if settings.is_smoke else {}
    budget = Budget(options.budget_seconds, num_groups, **counts)
    results = {
        "is_smoke": settings.is_smoke,
        "is_finished": False,
        "cases": list(options.cases),
        "budget_seconds": options.budget_seconds,
        "machine": {**machine, "commit": machine["commit"] or options.commit},
        "ceilings": ceilings.record(),
        "rows": [],
        "failed_groups": [],
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("inputs", total=num_groups)
        for name, groups in makers.items():
            torch.compiler.reset()  # its cache holds few shapes
            for make_group in groups:
                progress.update(bar, description=name)
                try:
                    for row in measured_rows(make_group(), stopwatch, budget):
                        results["rows"].append(row | derived(row, ceilings.copy_gb_per_s()))
                        print_line(progress.console, summary_line(results["rows"][-1]))
                except Exception as error:  # one group must not cost the others; the exit status says that it failed
                    results["failed_groups"].append(
                        {"case": name, "message": f"{type(error).__name__}: {error}"[:1000]}
                    )
                    print_line(progress.console, f"{name} failed: {error}")
                stopwatch.synchronize()  # raises where the device no longer answers
                free_memory(stopwatch)
                budget.group_is_done()
                results["ceilings"] = ceilings.record()
                write_json(result_file(options.out, options.cases), results)
                progress.advance(bar)
    results["is_finished"] = True
    write_json(result_file(options.out, options.cases), results)
    return results


def free_memory(stopwatch: Stopwatch) -> None:
    gc.collect()
    if stopwatch.is_cuda:
        torch.cuda.empty_cache()


def summary_line(row: dict) -> str:
    size = f"B {row['B']}" if "B" in row else f"N {row['N']}"
    setting = f"{row['case']:>6} {measured(row):<29} {row['dtype']:<8} {row['pass']:<22} {size:<8}"
    line = f"{setting} {row['implementation']:<44}"
    if row["status"] != "timed":
        return f"{line} {row['status']}: {row['message'].splitlines()[0]}"
    line += f" {row['median_ms']:10.4f} ms"
    if "ratio_to_products" in row:
        return f"{line}  {row['ratio_to_products']:.3f} x bare products"
    return f"{line}  {row['gb_per_s']:.0f} GB/s, {row['share_of_copy']:.0%} of copy"


def print_line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def our_failures(results: dict) -> list[dict]:
    return [row for row in results["rows"] if row["is_ours"] and row["status"] != "timed"]


def main(argv: list[str] | None = None) -> int:
    options = parsed(argv)
    console = Console()
    results = run(options, console)
    path = result_file(options.out, options.cases)
    print_line(console, f"{path} written")
    try:
        for written in write_report(results, path):
            print_line(console, f"{written} written")
    except ImportError as error:  # matplotlib is not everywhere where a GPU is
        console.print(
            f"no figure: {error}; python -m bench.reports.ops_report {path} draws it elsewhere", soft_wrap=True
        )
    failures = our_failures(results)
    for row in failures:
        print_line(console, f"error: {summary_line(row)}")
    return 1 if failures or results["failed_groups"] else 0


if __name__ == "__main__":
    sys.exit(main())
