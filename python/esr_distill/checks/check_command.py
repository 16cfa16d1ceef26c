"""`esr-distill check`: would this config train, and train what is meant? Asked with the run's own parts, before any training.

Each question gets one finding: ok, a warning or an error, with a fix in words. Questions that need what another one did not find
are named as not asked. The check is one process; of how many the run will be is told to it (`PlannedLaunch`).
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from esr_distill import preflight
from esr_distill.checks.chat_templates import template_finding, thinking_finding, turn_end_finding
from esr_distill.checks.finding import STYLES, Finding
from esr_distill.checks.first_rollouts import (
    agreement_finding,
    determinism_finding,
    draw_first_rollouts,
    vocabulary_finding,
)
from esr_distill.checks.lengths import context_finding
from esr_distill.checks.memory import estimate_memory, memory_finding
from esr_distill.checks.planned_launch import ONE_PROCESS, PlannedLaunch
from esr_distill.checks.tokens import (
    have_other_widths,
    load_tokenizers,
    stop_finding,
    stop_sources,
    tokenizer_finding,
)
from esr_distill.complete_files import write_json
from esr_distill.config import DevicesConfig, TrainConfig
from esr_distill.distill_loss import make_divergence
from esr_distill.evaluation.evaluate_command import check_output
from esr_distill.exit_status import BAD_INPUT
from esr_distill.input_error import InputError
from esr_distill.json_numbers import finite_or_none
from esr_distill.machine import machine_record
from esr_distill.models import choose_device
from esr_distill.monitoring.full_length_probe import FullLengthProbe
from esr_distill.monitoring.trackers import check_trackers
from esr_distill.prompts.prompt_encoder import PromptEncoder
from esr_distill.prompts.prompt_sources import PromptRecord, read_prompts
from esr_distill.training_run import TrainingRun, prepare_run

Answer = TypeVar("Answer")
AS_THE_MESSAGE_SAYS = "change what the message names"
LESS_MEMORY = "free the device's memory, or ask for less of it"
OF_TEMPLATES = ("chat templates", "thinking mode")
OF_THE_RUN = (
    "stop ids",
    "end of the turn",
    "context",
    "vocabulary",
    "teacher determinism",
    "agreement",
    "memory",
    "probe",
)


@dataclass
class CheckReport:
    """Findings in the order of the questions, and the questions that could not be asked. `memory_fix` is what to do where the
    check itself finds the device full."""

    findings: list[Finding] = field(default_factory=list)
    not_asked: list[str] = field(default_factory=list)
    memory_fix: str = LESS_MEMORY

    @property
    def has_errors(self) -> bool:
        return any(finding.level == "error" for finding in self.findings)

    def add(self, *findings: Finding) -> None:
        self.findings += findings

    def attempt(self, check: str, ask: Callable[[], Answer], fix: str = AS_THE_MESSAGE_SAYS) -> Answer | None:
        """What `ask` gives, or None and an error with the words of its exception."""
        try:
            return ask()
        except torch.OutOfMemoryError as error:
            first_line = str(error).splitlines()[0]
            self.add(Finding(check, "error", first_line, self.memory_fix))
        except (InputError, FloatingPointError) as error:
            self.add(Finding(check, "error", str(error), fix))
        return None

    def record(self) -> dict:
        """All of it as JSON values."""
        return finite_or_none(
            {"findings": [asdict(finding) for finding in self.findings], "not_asked": list(self.not_asked)}
        )


def check_config(config: TrainConfig, console: Console, output: str | None = None, processes: int = 1) -> int:
    """Ask everything about a run of so many processes, print a table, write `output` as JSON if it is given. The exit status is 0
    unless there is an error."""
    launch = PlannedLaunch(processes, config.devices)
    if output is not None:
        check_output(Path(output))
    start = time.perf_counter()
    report = ask_everything(config, console, launch)
    console.print(report_table(report))
    counts = {level: sum(finding.level == level for finding in report.findings) for level in STYLES}
    console.print(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['error']} errors", highlight=False)
    if report.not_asked:
        console.print(f"not asked, for want of what came before: {', '.join(report.not_asked)}", highlight=False)
    if output is not None:
        seconds = time.perf_counter() - start
        options = {"options": finite_or_none(asdict(config)), "processes": processes}
        where = {"machine": machine_record(), "seconds": seconds}
        write_json(Path(output), {"has_errors": report.has_errors, **report.record(), **options, **where})
    return BAD_INPUT if report.has_errors else 0


def ask_everything(config: TrainConfig, console: Console, launch: PlannedLaunch | None = None) -> CheckReport:
    """All questions, from those that need least. `launch` is one process where none is given."""
    launch = launch or PlannedLaunch(1, config.devices)
    report = CheckReport()
    if launch.processes > 1 and launch.is_student_sharded:
        report.memory_fix = (
            f"{LESS_MEMORY}, e.g. with --model.device cpu: a check has both models whole, the run has shards"
        )
    device = report.attempt("options", lambda: check_options(config))
    if device is None:
        report.not_asked.append("processes")
    else:
        report.attempt("processes", lambda: launch.check(config, device), launch.fix)
    records = report.attempt("prompts", lambda: first_records(config))
    tokenizers = report.attempt("tokenizers", lambda: load_tokenizers(config.model))
    if tokenizers is not None:
        report.add(tokenizer_finding(*tokenizers))
    if tokenizers is not None and records is not None:
        prompt = records[0].prompt
        report.add(template_finding(*tokenizers, prompt, config.data))
        report.add(thinking_finding(*tokenizers, prompt, config.data, config.rollout.horizon))
    else:
        report.not_asked += OF_TEMPLATES
    if report.has_errors:
        report.not_asked += OF_THE_RUN
        return report
    run = prepare_leniently(config, report, console)
    if run is None:
        report.not_asked += OF_THE_RUN
        return report
    ask_about_run(run, config, records, report, tokenizers[1], launch)
    return report


def check_options(config: TrainConfig) -> torch.device:
    """What can be known of options without a model. Returns the device. Raises InputError."""
    device = choose_device(config.model.device)
    make_divergence(config.loss)
    preflight.check_options(config, device)
    check_trackers(config.monitoring.trackers)
    return device


def first_records(config: TrainConfig) -> list[PromptRecord]:
    """All prompts, or the first window of those that are read while training."""
    found = read_prompts(config.data)
    return found if isinstance(found, list) else list(islice(found.records(), config.data.stream_prompts))


def prepare_leniently(config: TrainConfig, report: CheckReport, console: Console) -> TrainingRun | None:
    """The run as training prepares it, but without prompts that are too long and, where the models' vocabularies are an obstacle,
    with these cut, so that the other questions can be asked. The findings on context and vocabulary tell of both."""
    # A check is one process, whatever the run will be, and has no use for shards.
    lenient = replace(config, data=replace(config.data, long_prompts="drop"), devices=DevicesConfig())
    run = report.attempt("run", lambda: prepare_run(lenient, console))
    if run is not None or config.loss.vocab_size is not None or not have_other_widths(config.model):
        return run
    known = max(load_tokenizers(config.model)[0].get_vocab().values()) + 1
    cut = replace(lenient, loss=replace(config.loss, vocab_size=known))
    run = CheckReport().attempt("run", lambda: prepare_run(cut, Console(quiet=True)))
    if run is not None:
        report.findings.pop()  # the finding on the vocabulary says it better
    return run


def ask_about_run(
    run: TrainingRun,
    config: TrainConfig,
    records: list[PromptRecord],
    report: CheckReport,
    teacher_tokenizer: PreTrainedTokenizerBase,
    launch: PlannedLaunch = ONE_PROCESS,
) -> None:
    """What needs both models. `config` is the one that was given, which the run may have been more lenient than."""
    sources, merged = stop_sources(run, teacher_tokenizer), run.stop.eos_ids
    report.add(stop_finding(sources, merged, config.loss.merge_stop_ids, run.tokenizer))
    prompt = records[0].prompt
    report.add(turn_end_finding(run.tokenizer, prompt, config.data, merged, "student"))
    if not config.model.is_teacher_base:
        report.add(turn_end_finding(teacher_tokenizer, prompt, config.data, merged, "teacher"))

    encoder = PromptEncoder(
        run.tokenizer,
        config.data,
        pad_id=run.stop.pad_id,
        device=run.device,
        teacher_tokenizer=teacher_tokenizer,
    )
    report.add(context_finding(run, encoder.encode(records).lengths, config))
    first = report.attempt("agreement", lambda: draw_first_rollouts(run))
    if first is None:
        report.not_asked += ["vocabulary", "teacher determinism"]
    else:
        report.add(vocabulary_finding(run, first, config.loss.vocab_size))
        report.add(determinism_finding(run, first))
        report.add(agreement_finding(run, first))
    estimate = report.attempt("memory", lambda: estimate_memory(run, launch))
    if estimate is not None:
        report.add(memory_finding(run, estimate, launch))
    if config.monitoring.probe_every is not None:
        probe = report.attempt("probe", lambda: FullLengthProbe.prepare(run))
        if probe is not None:
            count, tokens = config.monitoring.probe_prompts, config.monitoring.probe_tokens
            report.add(Finding("probe", "ok", f"{count} prompts with up to {tokens} tokens of answer fit the context"))


def report_table(report: CheckReport) -> Table:
    table = Table(show_lines=True)
    table.add_column("check", no_wrap=True)
    table.add_column("level", no_wrap=True)
    table.add_column("found", ratio=3, overflow="fold")
    table.add_column("what to do", ratio=2, overflow="fold")
    for finding in report.findings:
        # Text: brackets in messages are no markup
        level = Text(finding.level, style=STYLES[finding.level])
        table.add_row(Text(finding.check), level, Text(finding.message), Text(finding.fix or ""))
    return table
