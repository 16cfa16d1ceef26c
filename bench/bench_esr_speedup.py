"""E1: how much faster a whole training step is at a short horizon, and against a step written by hand and TRL's.

python -m bench.bench_esr_speedup                         # on a GPU Qwen3 shapes with random weights, on a CPU the demo's models
python -m bench.bench_esr_speedup --only ours --pairs "qwen3-0.6b<-qwen3-1.7b" --batch-sizes 16
python -m bench.bench_esr_speedup --smoke                 # tiny shapes; its times mean nothing

A step is `train_step`: rollout, both forwards, divergence, backward, AdamW. Lengths are forced: no id ends a rollout, so a full
rollout is the largest horizon. What a real run saves also depends on where its rollouts end, which this does not measure.
Student, teacher, gradients and AdamW's moments have the type of --dtype. Ours must have the loss and the gradient of the step by
hand before it is timed (bench/steps/gate.py) and, on a CPU, the tokens of `generate` (bench/bench_rollouts.py). Rows that
are out of memory, or longer than the model has positions, say so. The result file is written whole after each row; the exit
status is 1 where ours was refused or failed.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging as transformers_logging

from bench.bench_rollouts import DTYPES, gate
from bench.floor import StepSetting
from bench.model_shape import ModelShape
from bench.record_demo import RESULTS, ROOT, machine_folder
from bench.rollout_models import make_prompts
from bench.steps.implementations import DEFAULT_IMPLEMENTATIONS, GATED, IMPLEMENTATIONS
from bench.steps.measurement import SettingRows, failure, take_turns
from bench.steps.rates import measured_rates
from bench.steps.runs import ARROW, Pair, make_pair, pair_label, pair_names
from bench.timing import ROUNDS, Stopwatch
from esr_distill.complete_files import write_json
from esr_distill.machine import machine_record
from esr_distill.rollout import InProcessBackend

DEMO_MODELS = ROOT / "python" / "esr_distill" / "demo" / "models" / "rewrite"
GATE_BATCH, GATE_HORIZON = 8, 20  # of the tokens of `generate`
FILE_NAME = "esr_speedup.json"


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What is measured where no option says otherwise."""

    pairs: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    horizons: tuple[int, ...]
    prompt: int
    dtype: str
    repetitions: int
    row_seconds: float
    threads: int
    gradient_checkpointing: str


ON_GPU = Defaults(
    pairs=("qwen3-0.6b<-qwen3-1.7b", "qwen3-1.7b<-qwen3-8b"),
    batch_sizes=(16, 64),
    horizons=(50, 100, 200, 500, 2000),
    prompt=200,
    dtype="bfloat16",
    repetitions=4,
    row_seconds=60.0,
    threads=torch.get_num_threads(),
    gradient_checkpointing="on",  # without it a full rollout of 2000 tokens does not fit
)
ON_CPU = Defaults(
    pairs=(f"{DEMO_MODELS / 'student'}{ARROW}{DEMO_MODELS / 'teacher'}",),
    batch_sizes=(16,),
    horizons=(10, 25, 50, 100, 200, 400),
    prompt=24,
    dtype="float32",
    repetitions=4,
    row_seconds=10.0,
    threads=1,  # these models are small: a second thread mostly waits, and on a busy machine for long
    gradient_checkpointing="off",
)
SMOKE = Defaults(
    pairs=("tiny<-tiny-teacher",),
    batch_sizes=(3,),
    horizons=(2, 5),
    prompt=6,
    dtype="float32",
    repetitions=2,
    row_seconds=10.0,
    threads=1,
    gradient_checkpointing="off",
)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number > 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds >= 0, got {text!r}")
    return value


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pairs", nargs="+", help="student<-teacher, each a shape of bench/rollout_models.py or a folder"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=positive, help="rollouts of a step")
    parser.add_argument("--horizons", nargs="+", type=positive, help="the largest one stands for a full rollout")
    parser.add_argument("--prompt", type=positive, help="tokens of each prompt")
    parser.add_argument("--repetitions", type=positive, help="timed steps of a row")
    parser.add_argument("--row-seconds", type=seconds, help="a row that has a time begins no step after these")
    parser.add_argument("--only", nargs="+", help="implementations, by the names in the results")
    parser.add_argument("--dtype", choices=DTYPES, help="of both models; default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--gradient-checkpointing", choices=("on", "off"), help="of the student; default: on on a GPU, off on a CPU"
    )
    parser.add_argument("--threads", type=positive, help="of torch; default: 1 where there is no GPU")
    parser.add_argument("--out", type=Path, help=f"folder of {FILE_NAME}; default: bench/results, by the machine")
    parser.add_argument("--commit", help="recorded where there is no git to ask")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: does it run?")
    options = parser.parse_args(argv)
    options.device = "cuda" if torch.cuda.is_available() and not options.smoke else "cpu"
    defaults = SMOKE if options.smoke else (ON_GPU if options.device == "cuda" else ON_CPU)
    for name, value in dataclasses.asdict(defaults).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.horizons, options.batch_sizes = sorted(set(options.horizons)), sorted(set(options.batch_sizes))
    options.pairs = list(dict.fromkeys(options.pairs))
    options.only = list(dict.fromkeys(options.only or DEFAULT_IMPLEMENTATIONS))
    unknown = [name for name in options.only if name not in IMPLEMENTATIONS]
    if unknown:
        parser.error(f"--only must name some of {'; '.join(IMPLEMENTATIONS)}, got {'; '.join(unknown)}")
    try:
        for pair in options.pairs:
            pair_names(pair)
    except ValueError as error:
        parser.error(str(error))
    if options.smoke:
        options.out = options.out or ROOT / "runs" / "esr-speedup-smoke"
        if options.out.resolve().is_relative_to(RESULTS):
            parser.error(f"--out must not be under bench/results with --smoke, got {options.out}")
    return options


def rollout_gate(pair: Pair, options: argparse.Namespace) -> dict:
    """The engine's tokens against those of `generate`, once per student. Not on a GPU, where bench_rollouts does it.

    Raises:
        AssertionError: tokens or log-probs are others.
    """
    if options.device != "cpu" or not any(name in GATED for name in options.only):
        return {}
    prompts = make_prompts(pair.student, GATE_BATCH, options.prompt, is_ragged=True)
    horizon = min(GATE_HORIZON, max(options.horizons))
    return gate(pair.student, prompts, horizon, InProcessBackend(), pair.dtype)


class Results:
    """The result file, written whole whenever rows have changed. Rows without a status are left out."""

    def __init__(self, options: argparse.Namespace, machine: dict, rates: dict) -> None:
        self.path = (options.out or RESULTS / machine_folder(machine)) / FILE_NAME
        self.finished: list[dict] = []
        self.record = {"machine": machine, "rates": rates, "is_smoke": options.smoke, "is_finished": False}

    def write(self, present: list[dict] = ()) -> None:
        """`present` are rows that may still change."""
        rows = [*self.finished, *(row for row in present if row["status"] is not None)]
        write_json(self.path, self.record | {"rows": rows})

    def add(self, rows: list[dict]) -> None:
        self.finished += rows
        self.write()

    def finish(self) -> None:
        self.record["is_finished"] = True
        self.write()


def told(row: dict) -> str:
    """A row in one line."""
    what = f"{row['status']}: {row['message']}"
    if row["status"] == "timed":
        what = f"{row['step_s']:.3f} s a step (of {row['repetitions']}), {row['tokens_per_s']:.0f} tokens/s"
    return f"{row['pair']}, B {row['batch_size']}, horizon {row['horizon']}: {row['implementation']}: {what}"


def pair_facts(name: str, options: argparse.Namespace, pair: Pair | None) -> dict:
    """What all rows of a pair say; no shapes where its models could not be made."""
    label = pair_label(name)
    student, teacher = label.split(ARROW)
    facts = {"pair": label, "student": student, "teacher": teacher, "dtype": options.dtype, "threads": options.threads}
    facts["gradient_checkpointing"] = options.gradient_checkpointing == "on"
    if pair is None:
        return facts | {"student_shape": None, "teacher_shape": None, "attention": None}
    for role, model in (("student", pair.student), ("teacher", pair.teacher)):
        facts[f"{role}_shape"] = dataclasses.asdict(ModelShape.of(model.config, DTYPES[options.dtype]))
    return facts | {"attention": pair.student.config._attn_implementation}


def measure_pair(name: str, options: argparse.Namespace, results: Results, stopwatch: Stopwatch) -> Iterator[dict]:
    """All rows of one pair; yields the row of each turn. Models that do not fit, or an engine that draws other tokens, become
    rows that say so."""
    pair, problem, columns = None, {}, {}
    try:
        pair = make_pair(name, options.device, options.dtype, has_checkpoints=options.gradient_checkpointing == "on")
        columns = rollout_gate(pair, options)
    except Exception as error:
        problem = failure(error)
    facts = pair_facts(name, options, pair)
    for batch_size in options.batch_sizes:
        groups = []
        for horizon in options.horizons:
            setting = StepSetting(batch_size, options.prompt, horizon)
            rows = SettingRows(pair, setting, options.only, facts | dataclasses.asdict(setting), stopwatch)
            for implementation in options.only:
                is_ours = implementation in GATED
                if pair is None or is_ours:
                    rows.rows[implementation] |= problem
                if is_ours:
                    rows.rows[implementation] |= columns
            groups.append(rows)
        rows = [row for group in groups for row in group.rows.values()]
        for row in take_turns(groups, options.only, options.repetitions, options.row_seconds):
            results.write(rows)
            yield row
        results.add(rows)


def main(argv: list[str] | None = None) -> int:
    options, console = parsed(argv), Console()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    stopwatch = Stopwatch(torch.device(options.device))
    machine = machine_record()
    machine["commit"] = machine["commit"] or options.commit
    rates = measured_rates(stopwatch, DTYPES[options.dtype], is_smoke=options.smoke)
    results = Results(options, machine, rates)
    turns = ROUNDS * len(options.pairs) * len(options.batch_sizes) * len(options.horizons) * len(options.only)
    with Progress(console=console) as progress:
        bar = progress.add_task("turns", total=turns)
        for name in options.pairs:
            for row in measure_pair(name, options, results, stopwatch):
                progress.console.print(told(row), highlight=False, markup=False, soft_wrap=True)
                progress.advance(bar)
    results.finish()
    console.print(f"{results.path} written", soft_wrap=True)
    ours = [row["status"] for row in results.finished if row["implementation"] in GATED]
    return 1 if "refused" in ours or "failed" in ours else 0


if __name__ == "__main__":
    sys.exit(main())
