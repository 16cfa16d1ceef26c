"""One run of the benchmark of the ops: what is measured, and the result file that is written after each group of rows."""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.cases.comparison import Group, derived, measured_rows
from bench.cases.head_cases import c4_groups
from bench.cases.linear_cases import l1_groups, l2_groups, l3_groups, l4_groups, l5_groups, l7_groups
from bench.cases.logit_cases import k1_groups, k2_groups, k3_groups
from bench.cases.prefix_cases import b1_groups, b2_groups, b3_groups, b4_groups
from bench.cases.sampler_cases import c1_groups, c2_groups, c3_groups
from bench.cases.settings import Settings, full_settings, smoke_settings
from bench.cases.sweeps import slice_groups, tile_groups
from bench.cases.topk_cases import l6_groups
from bench.ceilings import Ceilings
from bench.record_demo import RESULTS, ROOT, machine_folder
from bench.reports.case_states import state_of
from bench.timing import Budget, Stopwatch
from esr_distill.complete_files import write_json
from esr_distill.machine import machine_record

MakeGroup = Callable[[], Group]
# In the order of a default run: what is wanted most comes first.
CASES: dict[str, Callable[[Settings, Ceilings], list[MakeGroup]]] = {
    "K1": lambda settings, _: k1_groups(settings),
    "L1": l1_groups,
    "B2": b2_groups,
    "C1": lambda settings, _: c1_groups(settings),
    "C2": lambda settings, _: c2_groups(settings),
    "L6": l6_groups,
    "B1": b1_groups,
    "L7": l7_groups,
    "L3": l3_groups,
    "C4": c4_groups,
    "B3": b3_groups,
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


class WrongOption(ValueError):
    """An option of the benchmark that cannot be: its name, what it must be, what it was."""


@dataclass(frozen=True)
class OpsOptions:
    """What is asked of a run; `out` None is bench/results and the GPU's name, or runs/bench-smoke."""

    is_smoke: bool = False
    cases: tuple[str, ...] = DEFAULT_CASES
    out: Path | None = None
    budget_seconds: float = 240.0
    commit: str | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.cases if name not in CASES]
        if unknown or not self.cases:
            raise WrongOption(f"--cases must be among {','.join(CASES)}, got {','.join(unknown) or 'none'}")
        if len(set(self.cases)) < len(self.cases):
            raise WrongOption(f"--cases must name each case once, got {','.join(self.cases)}")
        if not 0 < self.budget_seconds < float("inf"):
            raise WrongOption(f"--budget-seconds must be > 0, got {self.budget_seconds:g}")
        if self.is_smoke:
            if os.environ.get("TRITON_INTERPRET") != "1":
                raise WrongOption("--smoke must run the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
            if self.folder({}).resolve().is_relative_to(RESULTS):
                raise WrongOption(f"--out must not be under bench/results with --smoke, got {self.out}")
        elif not torch.cuda.is_available():
            raise WrongOption(
                f"the benchmark needs a CUDA device, and torch {torch.__version__} sees none; 'make bench-smoke' needs none"
            )

    def folder(self, machine: dict) -> Path:
        if self.out is not None:
            return self.out
        return ROOT / "runs" / "bench-smoke" if self.is_smoke else RESULTS / machine_folder(machine)


class OpsRun:
    """Measures groups one after the other. A run that is killed leaves what it has measured."""

    def __init__(self, options: OpsOptions) -> None:
        settings = smoke_settings() if options.is_smoke else full_settings()
        self.options = options
        self.stopwatch = Stopwatch(torch.device(settings.device))
        self.ceilings = Ceilings(self.stopwatch, is_smoke=settings.is_smoke)
        machine = machine_record()
        self.folder = options.folder(machine)
        self.groups = [(case, make) for case in options.cases for make in CASES[case](settings, self.ceilings)]
        self.budget: Budget | None = None
        self.num_planned = self.num_measured = 0
        self.last_case: str | None = None
        self.results = {
            "is_smoke": settings.is_smoke,
            "is_finished": False,
            "cases": list(options.cases),
            "budget_seconds": options.budget_seconds,
            "machine": {**machine, "commit": machine["commit"] or options.commit},
            "ceilings": {},
            "rows": [],
            "failed_groups": [],
        }

    def begin(self, num_groups: int) -> None:
        """The budget runs from here on, for so many groups: all, or those that were selected."""
        counts = {"fewest": 2, "most": 2} if self.options.is_smoke else {}
        self.budget = Budget(self.options.budget_seconds, num_groups, **counts)
        self.num_planned = num_groups

    @property
    def path(self) -> Path:
        """A selection has its own file, so that it replaces no full run."""
        if self.num_planned < len(self.groups):
            return self.folder / "ops-selected.json"
        cases = self.options.cases
        return self.folder / ("ops.json" if cases == DEFAULT_CASES else f"ops-{'-'.join(cases)}.json")

    def measure(self, case: str, make_group: MakeGroup) -> list[dict]:
        """The rows of one group.

        Raises:
            Exception: whatever the inputs or the gate raised; it is in the result file, and the next group can be measured.
        """
        if case != self.last_case:
            torch.compiler.reset()  # its cache holds few shapes
            self.last_case = case
        rows = []
        try:
            for row in measured_rows(make_group(), self.stopwatch, self.budget):
                rows.append(row | derived(row, self.ceilings.copy_gb_per_s()))
        except Exception as error:
            message = f"{type(error).__name__}: {error}"[:1000]
            self.results["failed_groups"].append({"case": case, "message": message})
            raise
        finally:
            self.results["rows"] += rows
            self.stopwatch.synchronize()  # raises where the device no longer answers
            gc.collect()
            if self.stopwatch.is_cuda:
                torch.cuda.empty_cache()
            self.budget.group_is_done()
            self.num_measured += 1
            self.write()
        return rows

    def write(self, *, sustained: bool = False) -> None:
        self.results["ceilings"] = self.ceilings.record(sustained=sustained)
        write_json(self.path, self.results)

    def finish(self) -> None:
        """Write the file once more; it is finished where every planned group was measured, or failed by itself."""
        self.results["is_finished"] = self.num_measured == self.num_planned
        self.write(sustained=self.results["is_finished"])

    def states(self) -> list[str]:
        """A line for each case: what became of its rows."""
        rows, failed = self.results["rows"], self.results["failed_groups"]
        cases = dict.fromkeys(row["case"] for row in rows)
        lines = [f"{case:>6}: {state_of([row for row in rows if row['case'] == case])}" for case in cases]
        return lines + [f"{group['case']:>6}: failed: {group['message']}" for group in failed]


def our_failures(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["is_ours"] and row["status"] != "timed"]


def row_name(row: dict) -> str:
    """The setting and the implementation in one name, the same in every run."""
    parts = [row["case"], row["op"]]
    parts += [str(row[key]) for key in ("divergence", "sampler", "logits", "dtype", "pass") if key in row]
    parts += [f"{key}={row[key]}" for key in ("B", "N", "V", "D", "E", "T", "K", "horizon", "gap") if key in row]
    if row.get("d_weight") is False:
        parts.append("head frozen")
    return f"{' '.join(parts)} [{row['implementation']}]"
