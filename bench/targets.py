"""What the benchmark is to reach, as values: each target with its ratio, and whether that is met, missed or not measured.

Targets were set before anything was measured, for an H200 unless they say that they are of a processor. "Ours" and "worst" are as
in bench/reports/ratios.py. Where several files of a machine hold a case, the one that does worst counts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bench.reports.case_states import OTHER_CASES
from bench.reports.ratios import (
    Measure,
    Measured,
    against,
    against_lm_like,
    flatness,
    gradient_copies,
    of_setting,
    only,
    our_figure,
    pareto_lead,
    prefix_saving,
    recorded,
)
from bench.reports.result_files import kind_of

AT_LEAST, AT_MOST = "at least", "at most"
MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
LOGPROBS = ", log-probs"


@dataclass(frozen=True)
class Target:
    case: str
    text: str  # the ratio, in words
    measure: Measure
    direction: str
    threshold: float
    is_of_processor: bool = False

    def measured(self, rows: list[dict]) -> Measured:
        """The worst ratio over the settings of the case."""
        return self.measure(rows, min if self.direction == AT_LEAST else max)

    def state(self, measured: Measured) -> str:
        """A part that was not measured may miss a target, never meet it."""
        if measured.ratio is None:
            return NOT_MEASURED
        is_reached = (
            measured.ratio >= self.threshold if self.direction == AT_LEAST else measured.ratio <= self.threshold
        )
        if not is_reached:
            return MISSED
        return NOT_MEASURED if measured.missing else MET


class TargetRow(NamedTuple):
    """A target on one machine; `machine` and `file` None where no machine of its kind has been measured."""

    target: Target
    machine: str | None
    file: str | None
    measured: Measured

    @property
    def state(self) -> str:
        return self.target.state(self.measured)


def at_least(case: str, text: str, threshold: float, measure: Measure, **options) -> Target:
    return Target(case, text, measure, AT_LEAST, threshold, **options)


def at_most(case: str, text: str, threshold: float, measure: Measure, **options) -> Target:
    return Target(case, text, measure, AT_MOST, threshold, **options)


def has_rows_above(count: int) -> Callable[[dict], bool]:
    return lambda row: row["N"] > count


def microseconds(row: dict) -> float:
    return 1e3 * row["median_ms"]


def times_floor(row: dict) -> float:
    return 1 / row["share_of_copy"]


def peak_gb(row: dict) -> float | None:
    return None if row["peak_bytes"] is None else 1e-9 * row["peak_bytes"]


def num_stages(row: dict) -> int | None:
    return len(row["stage_s"]) or None


def is_small_batch(row: dict) -> bool:
    return row["B"] <= 64


def is_large_batch(row: dict) -> bool:
    return row["B"] >= 128


HEAD_TRAINED = of_setting(d_weight=True)
C1_32, C1_512 = (of_setting(B=size, dtype="bfloat16") for size in (32, 512))
QWEN_32, QWEN_512 = (of_setting(model="qwen3-1.7b", batch_size=size) for size in (32, 512))
PLAIN = of_setting(sampler="T 1")
PRODUCTS = "time over that of the bare products"

TARGETS = (
    at_least("K1", "share of the copy rate, by the bytes that no schedule avoids", 0.85, recorded("share_of_copy")),
    at_least("K1", "times faster than torch.compile", 2.5, against("compile*")),
    at_least("K1", "times faster than FLA's kernel", 1.5, against("FLA*")),
    at_least("K1", "times faster than Liger's log-softmax and JSD", 8, against("Liger*")),
    at_least("K1", "times faster than TRL's eager JSD", 8, against("TRL*")),
    at_least("K2", "share of the copy rate", 0.85, recorded("share_of_copy")),
    at_most(
        "K2",
        "peak memory over that of the gradient: none of the size of the logits beside it",
        1.1,
        our_figure(gradient_copies, "peak memory"),
    ),
    at_least("K3", "lowest GB/s over highest, from 32,000 ids to 262,144", 0.9, flatness("gb_per_s")),
    at_most("L1", PRODUCTS, 1.10, recorded("ratio_to_products")),
    at_least("L1", "times faster than torch.compile over bfloat16 logits", 1.05, against("compile, bfloat16 logits")),
    at_least("L1", "times faster than torch.compile over float32 logits", 1.2, against("compile, float32 logits")),
    at_least("L1", "times faster than TRL", 1.9, against("TRL*")),
    at_least("L1", "times faster than Liger's fused JSD", 3.5, against("Liger fused*")),
    at_least("L2", "times faster than TRL", 2.5, against("TRL*")),
    at_most("L3", PRODUCTS, 1.13, recorded("ratio_to_products")),
    at_least("L4", "times faster than TRL", 1.8, against("TRL*")),
    at_least("L4", "times faster than Liger's chunked JSD", 1.15, against("Liger chunked*")),
    at_most("L4", "GB beyond the inputs, gradients included", 7, our_figure(peak_gb, "peak memory")),
    at_most("L5", f"{PRODUCTS}, above 1000 rows", 1.2, only(has_rows_above(1000), recorded("ratio_to_products"))),
    at_most("L6", PRODUCTS, 1.10, recorded("ratio_to_products")),
    at_least("L6", "times faster than verl", 2, against("verl*")),
    at_least(
        "L7",
        "times faster than whoever is as exact, at a gradient error of at most 2e-3: ours alone on the Pareto front",
        1,
        pareto_lead,
    ),
    at_most("B1", PRODUCTS, 1.08, recorded("ratio_to_products")),
    at_least("B1", "times faster than Liger", 1, against("Liger*")),
    at_most("B2", f"{PRODUCTS}, head trained", 1.10, only(HEAD_TRAINED, recorded("ratio_to_products"))),
    at_least("B2", "times faster than Liger, head trained", 1.3, only(HEAD_TRAINED, against("Liger*"))),
    at_least("B2", "times faster than TRL, head trained", 1.5, only(HEAD_TRAINED, against("TRL*"))),
    at_least("B3", "times faster than QuACK", 0.93, against("QuACK*")),
    at_least(
        "B4",
        "times faster on the first 100 tokens than on all 2000 (the method's saving, not the kernel's)",
        20,
        prefix_saving,
    ),
    at_most(
        "C1",
        "time over that of reading the logits once, 512 rows, bfloat16",
        2,
        only(C1_512, our_figure(times_floor, "")),
    ),
    at_most("C1", "microseconds, 32 rows, bfloat16", 10, only(C1_32, our_figure(microseconds, ""))),
    at_least("C1", "times faster than vLLM without log-probs, 512 rows, bfloat16", 5, only(C1_512, against("vLLM"))),
    at_least(
        "C2", "times faster than the best of the others, 128 rows and more", 3, only(is_large_batch, against("*"))
    ),
    at_least("C2", "times faster than the best of the others, 32 rows", 1.5, only(of_setting(B=32), against("*"))),
    at_most("C3", "time on flat and one-hot logits over that on LM-like ones", 2, against_lm_like),
    at_most(
        "C4",
        "time over that of the head's product alone, up to 64 rows",
        1.05,
        only(is_small_batch, recorded("ratio_to_products")),
    ),
    at_least("D1", "share of the floor's rate, Qwen3-1.7B, 32 rows", 0.70, only(QWEN_32, recorded("share_of_floor"))),
    at_least("D1", "share of the floor's rate, Qwen3-1.7B, 512 rows", 0.75, only(QWEN_512, recorded("share_of_floor"))),
    at_least("D1", "times faster than generate, Qwen3-1.7B, 32 rows", 10, only(QWEN_32, against("generate"))),
    at_least(
        "D1", "times faster than the best generate, Qwen3-1.7B, 32 rows", 1.5, only(QWEN_32, against("generate*"))
    ),
    at_most(
        "D2",
        "waits of the host in 100 steps, Qwen3-1.7B",
        0,
        only(of_setting(model="qwen3-1.7b"), recorded("host_syncs")),
    ),
    at_least(
        "E1",
        "stages of a step with a time of their own (what is claimed is the measured total alone)",
        6,
        our_figure(num_stages, "stages"),
    ),
    at_least(
        "sampler",
        "times faster than torch.multinomial with log-probs",
        1,
        only(PLAIN, against("torch.multinomial" + LOGPROBS)),
        is_of_processor=True,
    ),
    at_least(
        "rollouts",
        "times faster than generate, as the trainer draws by default",
        2,
        against("generate", ours="ours"),
        is_of_processor=True,
    ),
    at_least(
        "rollouts",
        "times faster than generate, with rollout.compile_step",
        2,
        against("generate", ours="ours, compiled step"),
        is_of_processor=True,
    ),
)

# Cases that are rows of other files than those of the ops.
KIND_OF_CASE = OTHER_CASES | {"rollouts": "rollouts", "sampler": "sampler_cpu"}


def rows_of(case: str, file: str, results: dict) -> list[dict]:
    """The rows of a case in one file; none where the file is of another kind."""
    if kind_of(file) != KIND_OF_CASE.get(case, "ops"):
        return []
    return [row for row in results["rows"] if case in KIND_OF_CASE or row["case"] == case]


def unfinished(case: str, results: dict) -> str:
    """What of a case a run did not come to, in words; empty where it did all."""
    reasons = ["a group failed"] if any(group["case"] == case for group in results.get("failed_groups", ())) else []
    if not results.get("is_finished", True) and (case in KIND_OF_CASE or results["rows"][-1]["case"] == case):
        reasons.append("the run was not finished")
    return "; ".join(reasons)


def measured_in(target: Target, file: str, results: dict) -> Measured | None:
    """None where the file has no row of the case."""
    rows = rows_of(target.case, file, results)
    if not rows:
        return None
    measured = target.measured(rows)
    missing = "; ".join(filter(None, (measured.missing, unfinished(target.case, results))))
    return measured._replace(missing=missing)


def target_rows(results_by_file: dict[str, dict]) -> list[TargetRow]:
    """Every target on every machine of its kind; keys are "folder/file.json", folders are machines."""
    kinds: dict[str, bool] = {}
    for path, results in results_by_file.items():
        machine = path.split("/")[0]
        kinds[machine] = kinds.get(machine, True) and not results["machine"]["gpu"]
    rows = []
    for target in TARGETS:
        machines = [name for name, is_processor in kinds.items() if is_processor == target.is_of_processor]
        rows += [on_machine(target, name, results_by_file) for name in machines]
        if not machines:
            rows.append(TargetRow(target, None, None, Measured(None)))
    return rows


def on_machine(target: Target, machine: str, results_by_file: dict[str, dict]) -> TargetRow:
    found = []
    for path, results in results_by_file.items():
        folder, file = path.split("/")
        measured = measured_in(target, file, results) if folder == machine else None
        if measured is not None:
            found.append(TargetRow(target, machine, file, measured))
    return min(found, key=badness, default=TargetRow(target, machine, None, Measured(None, missing="no row")))


def badness(row: TargetRow) -> tuple[int, float]:
    """What was missed first, the worst of it first; what was not measured last."""
    ratio = row.measured.ratio or 0.0
    rank = (MISSED, MET, NOT_MEASURED).index(row.state)
    return rank, ratio if row.target.direction == AT_LEAST else -ratio


HEADINGS = ("case", "target", "wanted", "measured", "state", "where")


def cells(row: TargetRow) -> tuple[str, ...]:
    """A target as text; columns as in HEADINGS."""
    target, measured = row.target, row.measured
    number = "" if measured.ratio is None else f"{measured.ratio:.3g} ({measured.note})"
    state = f"**{MISSED}**" if row.state == MISSED else row.state
    if measured.missing:
        state += f": {measured.missing}" if row.state == NOT_MEASURED else f"; not measured: {measured.missing}"
    where = "" if row.file is None else f"{row.machine}, `{row.file}`"
    wanted = f"{target.direction} {target.threshold:g}"
    return target.case, target.text, wanted, number, state, where
