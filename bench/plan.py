"""What a step will take and hold on GPUs that you name: times by stage, tokens per second, and memory by part.

python -m bench.plan --student qwen3-1.7b --teacher qwen3-8b --gpus 8 --gpu h200
python -m bench.plan --student folder --teacher folder --gpu l40s --results bench/results/nvidia-h200

A predicted time is the floor of bench/floor.py over the share of it that was measured for that stage, in the esr_speedup.json of
this GPU's folder under bench/results or, where --results names it, of another machine's. Where no share was measured the floor
stands alone: a lower bound, no prediction. Communication is counted bytes over the rate of a link, and was not measured.
Memory is counted (bench/memory_model.py).
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from bench.floor import STAGES, StageFloor, StepSetting, add_step_options, describe, digits, shares, step_floor, step_of
from bench.gpu_rates import GPUS, PublishedGPU, Rates, device_name, measured_rates, published_gpu
from bench.memory_model import ACTIVATIONS, memory_parts, peak_bytes
from bench.model_shape import ModelShape
from bench.record_demo import RESULTS, machine_folder
from esr_distill.complete_files import read_json

RESULT_FILE = "esr_speedup.json"
LAYOUTS = {False: "data parallel", True: "sharded weights"}


@dataclass(frozen=True)
class Layout:
    """`gpus` with a batch each. Sharded: every weight, gradient and moment lies on one of them and is gathered when used."""

    gpus: int = 1
    is_sharded: bool = False
    link_bytes_per_s: float | None = None  # of one GPU in one direction

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus must be >= 1, got {self.gpus}")
        if self.gpus > 1 and not (self.link_bytes_per_s or 0) > 0:
            raise ValueError(f"link_bytes_per_s must be > 0 for {self.gpus} GPUs, got {self.link_bytes_per_s}")


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step by stage. Without shares `stage_s` are floors, and so are all figures derived from them."""

    floors: dict[str, StageFloor]
    stage_s: dict[str, float]
    shares: dict[str, float] | None
    communication_s: dict[str, float]
    tokens: int
    outside: frozenset[str] = frozenset()  # stages with less or more work than any that was measured

    @property
    def step_s(self) -> float:
        """Where communication hides behind the work of its own stage."""
        return sum(max(seconds, self.communication_s.get(stage, 0.0)) for stage, seconds in self.stage_s.items())

    @property
    def exposed_step_s(self) -> float:
        """Where none of it does."""
        return sum(self.stage_s.values()) + sum(self.communication_s.values())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


class MeasuredShares:
    """Shares of the floor that measured steps reached, by stage, against how long one launch of the stage works.

    A stage's time is that of its kernels and of launching them, so its share grows with the floor of one layer's pass: that is
    what two measured settings are compared by. Between them the share is interpolated, both as logarithms; outside it is
    that of the nearest.
    """

    def __init__(self, points: Mapping[str, list[tuple[float, float]]], source: str) -> None:
        self.source = source
        self.points: dict[str, list[tuple[float, float]]] = {}
        for stage, measured in points.items():
            by_work: dict[float, list[float]] = {}
            for work, share in measured:
                by_work.setdefault(work, []).append(math.log(share))
            self.points[stage] = sorted((math.log(work), statistics.mean(logs)) for work, logs in by_work.items())

    @classmethod
    def of(cls, rows: list[dict], rates: Rates, source: str) -> "MeasuredShares":
        points: dict[str, list[tuple[float, float]]] = {stage: [] for stage in STAGES}
        for row in rows:
            student, teacher, setting = case_of(row)
            floors = step_floor(student, teacher, setting, rates)
            reached = shares(row["stage_s"], floors)
            for stage, floor in floors.items():
                points[stage].append((work_of_launch(stage, floor, student, teacher, setting), reached[stage]))
        return cls(points, source)

    def is_outside(self, stage: str, work: float) -> bool:
        return not self.points[stage][0][0] <= math.log(work) <= self.points[stage][-1][0]

    def share(self, stage: str, work: float) -> float:
        points, x = self.points[stage], math.log(work)
        if x <= points[0][0]:
            return math.exp(points[0][1])
        for (left, low), (right, high) in zip(points, points[1:], strict=False):
            if x <= right:
                return math.exp(low + (high - low) * (x - left) / (right - left))
        return math.exp(points[-1][1])


def work_of_launch(
    stage: str, floor: StageFloor, student: ModelShape, teacher: ModelShape, setting: StepSetting
) -> float:
    """Floor seconds of one layer's pass: a rollout passes all layers for every token, the head's op stands alone."""
    layers = {"teacher_forward": teacher.layers, "divergence": 1}.get(stage, student.layers)
    return floor.seconds / (layers * (setting.horizon if stage == "rollout" else 1))


def case_of(row: dict) -> tuple[ModelShape, ModelShape, StepSetting]:
    """Of a row of a result file; trained_tokens, samples_per_prompt and is_head_trained are all, 1 and true where it has none."""
    setting = StepSetting(
        row["batch_size"],
        row["prompt"],
        row["horizon"],
        row.get("trained_tokens"),
        row.get("samples_per_prompt", 1),
        row.get("is_head_trained", True),
    )
    return ModelShape(**row["student_shape"]), ModelShape(**row["teacher_shape"]), setting


def measured_cases(results: dict, dtype: str | None = None) -> list[dict]:
    """Rows of ours that were timed; with `dtype` those alone."""
    rows = [row for row in results["rows"] if row["implementation"] == "ours" and row["status"] == "timed"]
    return [row for row in rows if dtype is None or row["dtype"] == dtype]


def rates_of(results: dict) -> Rates:
    """As they were measured in the run of a result file."""
    machine, rates = results["machine"], results["rates"]
    source = f"measured at commit {machine['commit']}"
    return Rates(1e9 * rates["copy_gb_per_s"], rates["flop_per_s"], device_name(machine), source)


def communication(student: ModelShape, teacher: ModelShape, setting: StepSetting, layout: Layout) -> dict[str, float]:
    """Seconds by stage in which a GPU's link sends what must be sent: of n GPUs (n - 1)/n of a tensor to gather it or to reduce
    and scatter it, twice that to reduce it for all.

    Data parallel: the gradients, in backward. Sharded: weights are gathered in 16 bits where they are multiplied so, once for
    the rollouts, once for each forward and once more for backward, whose gradients are reduced and scattered.
    """
    if layout.gpus == 1:
        return {}
    seconds_per_byte = (layout.gpus - 1) / layout.gpus / layout.link_bytes_per_s
    gradients = seconds_per_byte * student.dtype_bytes * student.trained_parameters(setting.is_head_trained)
    if not layout.is_sharded:
        return {"backward": 2 * gradients}
    gather, gather_teacher = (seconds_per_byte * x.value_bytes * x.parameters() for x in (student, teacher))
    return {
        "rollout": gather,
        "student_forward": gather,
        "teacher_forward": gather_teacher,
        "backward": gather + gradients,
    }


def predict(
    student: ModelShape,
    teacher: ModelShape,
    setting: StepSetting,
    rates: Rates,
    measured: MeasuredShares | None = None,
    layout: Layout = Layout(),
) -> Prediction:
    """Floor over measured share, stage by stage; without shares the floors. Sharded moments are updated in equal parts."""
    floors = step_floor(student, teacher, setting, rates)
    reached, outside = None, frozenset()
    if measured is not None:
        work = {stage: work_of_launch(stage, floor, student, teacher, setting) for stage, floor in floors.items()}
        reached = {stage: measured.share(stage, work[stage]) for stage in floors}
        outside = frozenset(stage for stage in floors if measured.is_outside(stage, work[stage]))
    stage_s = {stage: floor.seconds / (reached[stage] if reached else 1.0) for stage, floor in floors.items()}
    if layout.is_sharded:
        stage_s["optimizer"] /= layout.gpus
    tokens = layout.gpus * setting.batch_size * setting.horizon
    return Prediction(floors, stage_s, reached, communication(student, teacher, setting, layout), tokens, outside)


def leave_one_out(results: dict) -> list[dict]:
    """Each measured step predicted from the shares of the others of its dtype: seconds measured and predicted, relative error."""
    cases, rates = [], rates_of(results)
    for row in measured_cases(results):
        others = [other for other in measured_cases(results, row["dtype"]) if other is not row]
        if not others:
            continue
        student, teacher, setting = case_of(row)
        predicted = predict(student, teacher, setting, rates, MeasuredShares.of(others, rates, "the other cases"))
        cases.append(
            {
                "pair": row["pair"],
                **asdict(setting),
                "dtype": row["dtype"],
                "measured_s": row["step_s"],
                "predicted_s": predicted.step_s,
                "error": abs(predicted.step_s - row["step_s"]) / row["step_s"],
            }
        )
    return cases


@dataclass(frozen=True)
class Target:
    """The device that is planned for."""

    rates: Rates
    folder: str
    memory_bytes: float
    link_bytes_per_s: float | None = None
    link: str = ""

    @classmethod
    def published(cls, gpu: PublishedGPU, dtype: str) -> "Target":
        return cls(gpu.rates(dtype), gpu.folder, 1e9 * gpu.memory_gb, 1e9 * gpu.link_gb_per_s, gpu.link)

    @classmethod
    def here(cls, dtype: str) -> "Target":
        """This machine's own GPU. Raises ValueError where there is none."""
        if not torch.cuda.is_available():
            raise ValueError(f"--gpu must be among {', '.join(GPUS)} where there is no CUDA device, got none")
        memory = torch.cuda.get_device_properties(0).total_memory
        folder = machine_folder({"gpu": torch.cuda.get_device_name()})
        known = next((gpu for gpu in GPUS.values() if gpu.folder == folder), None)
        rates = measured_rates(torch.device("cuda"), dtype)
        link, name = (None, "") if known is None else (1e9 * known.link_gb_per_s, known.link)
        return cls(rates, folder, memory, link, name)


def read_results(folder: Path | None, target: Target) -> dict | None:
    """The result file that --results names, else the target's own, if there is one.

    Raises:
        ValueError: a named folder without a result, or one of a smoke run.
    """
    path = (folder or RESULTS / target.folder) / RESULT_FILE
    if not path.is_file():
        if folder is None:
            return None
        raise ValueError(f"--results must be a folder with {RESULT_FILE}, got {folder}")
    results = read_json(path)
    if results["is_smoke"]:
        raise ValueError(f"--results must be of a full run, got the smoke run in {path}")
    return results


def measured_shares(results: dict | None, target: Target, dtype: str) -> tuple[MeasuredShares | None, str]:
    """Shares of a result file, and a sentence that says whose they are or that there are none."""
    if results is None:
        return None, "Shares of the floor are not measured for this GPU: every time below is a floor, a lower bound."
    rates, rows = rates_of(results), measured_cases(results, dtype)
    if not rows:
        return None, f"No share was measured in {dtype} on {rates.name}: every time below is a floor, a lower bound."
    source = f"{rates.name}, {len(rows)} steps, {rates.source}"
    told = f"Predicted: floor over the shares measured on {source}."
    if machine_folder(results["machine"]) != target.folder:
        told += f" That is another machine: nothing was measured on {target.rates.name}."
    return MeasuredShares.of(rows, rates, source), told + (
        "" if results["is_finished"] else " The run was not finished."
    )


def time_table(predictions: Mapping[str, Prediction]) -> Table:
    """Milliseconds by stage and of the step; several GPUs have a column for each layout, and one for what its link takes."""
    first, is_alone = next(iter(predictions.values())), len(predictions) == 1
    is_floor = first.shares is None
    time = "floor ms" if is_floor else "predicted ms"
    table = Table(Column("stage", no_wrap=True), *([] if is_floor else ["floor ms", "share"]))
    for name in predictions:
        table.add_column(time if is_alone else f"{name} ms")
        if not is_alone:
            table.add_column("link ms")
    rows = []
    for stage, floor in first.floors.items():
        begin = [stage]
        if not is_floor:
            share = f"{first.shares[stage]:.1%}{'*' if stage in first.outside else ''}"
            begin += [digits(1e3 * floor.seconds), share]
        rows.append((begin, [(p.stage_s[stage], p.communication_s.get(stage)) for p in predictions.values()]))
    steps = {"step": lambda p: p.step_s}
    if not is_alone:
        steps = {"step, link hidden": lambda p: p.step_s, "step, link not hidden": lambda p: p.exposed_step_s}
    blank = [] if is_floor else ["", ""]
    rows += [([name, *blank], [(seconds(p), None) for p in predictions.values()]) for name, seconds in steps.items()]
    for begin, pairs in rows:
        texts = [["" if value is None else digits(1e3 * value) for value in pair] for pair in pairs]
        table.add_row(*begin, *(texts[0][:1] if is_alone else sum(texts, [])))
    rate = [[f"{p.tokens_per_s:,.0f}", ""] for p in predictions.values()]
    table.add_row("tokens/s", *blank, *(rate[0][:1] if is_alone else sum(rate, [])))
    return table


def memory_table(columns: Mapping[str, tuple[list, list]], memory_bytes: float) -> Table:
    """GB of every part by layout, (without, with) checkpoints of activations; the peaks, and whether they fit."""
    table = Table(Column("held, GB", no_wrap=True), "when", *columns)
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for layout, (kept, checkpointed) in columns.items():
        for part in kept:
            rows.setdefault((part.name, part.phase), {})[layout] = part.bytes
            if part.name == ACTIVATIONS:
                (other,) = (other for other in checkpointed if other.name == ACTIVATIONS)
                rows.setdefault((f"{ACTIVATIONS}, checkpoints", part.phase), {})[layout] = other.bytes
    for (name, phase), sizes in rows.items():
        table.add_row(name, phase, *(digits(1e-9 * sizes[layout]) if layout in sizes else "" for layout in columns))
    for i, name in enumerate(("peak", "peak, checkpoints")):
        peaks = [peak_bytes(parts[i]) for parts in columns.values()]
        fits = ("fits" if peak <= memory_bytes else "DOES NOT FIT" for peak in peaks)
        table.add_row(name, "", *(f"{digits(1e-9 * peak)}: {fit}" for peak, fit in zip(peaks, fits, strict=True)))
    table.add_row("memory", "", *[digits(1e-9 * memory_bytes)] * len(columns))
    return table


def parsed(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_step_options(parser)
    parser.add_argument("--gpus", type=int, default=1, help="each with its own batch")
    parser.add_argument("--gpu", help=f"{', '.join(GPUS)}; default: this machine's")
    parser.add_argument("--full-horizon", type=int, default=2000, help="of rollouts that are not stopped early")
    parser.add_argument("--results", type=Path, help=f"folder of {RESULT_FILE}, where shares are another machine's")
    parser.add_argument("--link-gb-per-s", type=float, help="of one GPU, one direction; default: its data sheet's")
    options = parser.parse_args(argv)
    options.dtype = options.dtype or "bfloat16"
    return parser, options


def main(argv: list[str] | None = None) -> int:
    parser, options = parsed(argv)
    console = Console()
    try:
        student, teacher, setting = step_of(options)
        full = replace(setting, horizon=options.full_horizon, trained_tokens=None)
        gpu = None if options.gpu is None else published_gpu(options.gpu, "--gpu")
        target = Target.here(options.dtype) if gpu is None else Target.published(gpu, options.dtype)
        results = read_results(options.results, target)
        if results is not None and machine_folder(results["machine"]) == target.folder:
            target = replace(target, rates=rates_of(results))
        measured, told = measured_shares(results, target, options.dtype)
        if options.link_gb_per_s is not None:
            target = replace(target, link_bytes_per_s=1e9 * options.link_gb_per_s, link="as given")
        kinds = (False, True) if options.gpus > 1 else (False,)
        layouts = {kind: Layout(options.gpus, kind, target.link_bytes_per_s) for kind in kinds}
        case = student, teacher, setting
        predictions = {
            LAYOUTS[kind] if options.gpus > 1 else "one GPU": predict(*case, target.rates, measured, layout)
            for kind, layout in layouts.items()
        }
        longer = predict(student, teacher, full, target.rates, measured, layouts[False])
        held = partial(memory_parts, *case, memory_bytes=target.memory_bytes, gpus=options.gpus)
        columns = {
            name: tuple(held(is_sharded=kind, is_checkpointed=is_checkpointed) for is_checkpointed in (False, True))
            for name, kind in zip(predictions, kinds, strict=True)
        }
        full_parts = memory_parts(student, teacher, full, memory_bytes=target.memory_bytes, gpus=options.gpus)
    except ValueError as error:
        parser.error(str(error))
    short = next(iter(predictions.values()))
    link = f"; link {digits(1e-9 * target.link_bytes_per_s)} GB/s ({target.link})" if options.gpus > 1 else ""
    lines = [
        f"{options.student} learns from {options.teacher}, {options.dtype}, {options.gpus} x {setting.batch_size} rollouts "
        f"of {setting.horizon} tokens after {setting.prompt}",
        describe(target.rates) + link,
        told,
        "The link's times are counted, not measured; esr-distill itself runs on one GPU." if options.gpus > 1 else "",
    ]
    full_peak = peak_bytes(full_parts)
    ending = (
        f"Horizon {setting.horizon} against {full.horizon}: a step {longer.step_s / short.step_s:.3g} times as fast "
        f"({'a ratio of floors, no bound' if measured is None else 'predicted'}); at {full.horizon} the first column's peak "
        f"would be {digits(1e-9 * full_peak)} GB and {'fit' if full_peak <= target.memory_bytes else 'not fit'}. Times are "
        "without checkpoints, which repeat the student's forward in backward. Memory is counted, without CUDA's own."
    )
    for line in filter(None, lines):
        console.print(line, soft_wrap=True, highlight=False)
    star = ["* Outside of what was measured: the share of the nearest case."] if short.outside else []
    console.print(time_table(predictions), *star, memory_table(columns, target.memory_bytes), highlight=False, sep="\n")
    console.print(ending, soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
