"""How long the native sampler takes on a CPU, against torch.multinomial and the warpers of Hugging Face, at 64 rows.

python -m bench.bench_sampler_cpu                   # a few minutes on two cores; bench/results, by the processor's name
python -m bench.bench_sampler_cpu --smoke           # tiny shapes; its times mean nothing

Inputs, candidates and gate are those of bench/cases/sampler_cases.py. Candidates of a setting take turns; the PyTorch reference,
which the gate compares with, is timed once. The target: ours, with its two log-probs, not slower than torch.multinomial of the
softmax and a gather of the log-softmax. The file is written whole after each setting; the exit status is 1 where ours was
refused.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from bench.cases.comparison import Group, measured_rows
from bench.cases.sampler_cases import HUGGING_FACE, MULTINOMIAL, NO_FILTER, USUAL, WITH_LOGPROBS, sampler_group
from bench.cases.settings import full_settings, smoke_settings
from bench.record_demo import RESULTS, ROOT, machine_folder
from bench.reports.logit_precision_report import markdown
from bench.timing import Budget, Stopwatch
from esr_distill.complete_files import write_json
from esr_distill.machine import machine_record
from esr_kernels import Impl, sample_tokens

BATCH_SIZE = 64
SETTINGS = (NO_FILTER, (USUAL[0],), (USUAL[1],))
NAMES = ("ours", MULTINOMIAL + WITH_LOGPROBS, MULTINOMIAL, HUGGING_FACE + WITH_LOGPROBS)
REFERENCE = "PyTorch reference, once"


def reference_row(group: Group, stopwatch: Stopwatch) -> dict:
    inputs, ours = group.inputs[0], group.candidates[0]
    ours.state.rewind()
    seconds = stopwatch.seconds(lambda: sample_tokens(inputs.logits_B_V, inputs.state, impl=Impl.REFERENCE))
    ours.state.check(1)
    times = dict.fromkeys(("median_ms", "p10_ms", "p90_ms"), 1e3 * seconds)
    facts = {"implementation": REFERENCE, "is_ours": False, "has_logprobs": True, "status": "timed", "repetitions": 1}
    return {"case": group.case, **group.setting, **facts, **times}


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number > 0, got {text}")
    return int(text)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=positive, help="of torch; default: all cores")
    parser.add_argument("--out", type=Path, help="folder of sampler_cpu.json; default: bench/results, by the machine")
    parser.add_argument("--budget-seconds", type=positive, default=180, help="fewer repetitions when short, at least 6")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: does it run?")
    options = parser.parse_args(argv)
    if options.smoke:
        options.out = options.out or ROOT / "runs" / "sampler-cpu-smoke"
        if options.out.resolve().is_relative_to(RESULTS):
            parser.error(f"--out must not be under bench/results with --smoke, got {options.out}")
    return options


def table_of(rows: list[dict]) -> str:
    ours = {(row["dtype"], row["sampler"]): row.get("median_ms") for row in rows if row["is_ours"]}
    lines = []
    for row in rows:
        start = row["dtype"], row["sampler"], row["implementation"]
        if row["status"] != "timed":
            lines.append([*start, f"{row['status']}: {row['message'].splitlines()[0]}", "", "", ""])
            continue
        spread, our_ms = f"{row['p10_ms']:.2f} to {row['p90_ms']:.2f}", ours[start[:2]]
        ratio = f"{row['median_ms'] / our_ms:.2f}" if our_ms else "ours was not timed"
        lines.append([*start, f"{row['median_ms']:.2f}", spread, str(row["repetitions"]), ratio])
    return markdown(["dtype", "sampler", "implementation", "median ms", "p10 to p90", "n", "x ours"], lines)


def main(argv: list[str] | None = None) -> int:
    options, console = parsed(argv), Console()
    # The processor's name stands in the record, so a GPU beside it must not.
    machine = {**machine_record(), "gpu": None}
    torch.set_num_threads(options.threads or machine["cores"])
    machine["torch_threads"] = torch.get_num_threads()
    path = (options.out or RESULTS / machine_folder(machine)) / "sampler_cpu.json"
    settings = smoke_settings() if options.smoke else full_settings()
    settings = replace(settings, device="cpu", calls_per_sample=1)
    cases = [(dtype, setting) for dtype in (torch.float32, torch.bfloat16) for setting in SETTINGS]
    stopwatch, budget = Stopwatch(torch.device("cpu")), Budget(options.budget_seconds, len(cases), fewest=6, most=20)
    results = {"is_smoke": options.smoke, "is_finished": False, "machine": machine, "rows": []}
    with Progress(console=console) as progress:
        bar = progress.add_task("settings", total=len(cases))
        for dtype, setting in cases:
            group = sampler_group(settings, "CPU", setting, BATCH_SIZE, dtype=dtype)
            group = replace(group, candidates=[other for other in group.candidates if other.name in NAMES])
            results["rows"] += [*measured_rows(group, stopwatch, budget), reference_row(group, stopwatch)]
            budget.group_is_done()
            results["is_finished"] = len({(row["dtype"], row["sampler"]) for row in results["rows"]}) == len(cases)
            write_json(path, results)
            progress.advance(bar)
    console.print(table_of(results["rows"]), f"{path} written", sep="\n", soft_wrap=True, markup=False, highlight=False)
    return 0 if all(row["status"] == "timed" for row in results["rows"] if row["is_ours"]) else 1


if __name__ == "__main__":
    sys.exit(main())
