"""Distil a student: load, then prompts -> rollouts -> divergence -> step, with metrics, checkpoints and a clean stop.

What the method is: the student writes its own responses, each stopped after `rollout.horizon` tokens (Early Stopping
Rollout, arXiv 2605.27028); the frozen teacher scores every position; the student moves toward the teacher's distribution.
What is left out, on purpose: no policy gradient and no ratio or clipping (the gradient of the divergence at the drawn
positions is exact, and rollouts come from the current weights); no reward; no replay buffer.

    esr-distill train --config run.yaml
    esr-distill train --resume runs/esr
"""

import signal
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from esr_distill.checkpoint import (
    TrainerState,
    find_checkpoints,
    latest_checkpoint,
    load_training_state,
    save_checkpoint,
)
from esr_distill.config import TrainConfig
from esr_distill.config_file import CONFIG_FILE, changed_options, save_config
from esr_distill.devices.follower_log import open_log
from esr_distill.devices.launcher import join_processes
from esr_distill.horizon_schedule import HorizonSchedule
from esr_distill.input_error import InputError
from esr_distill.monitoring.full_length_probe import FullLengthProbe, describe_probe
from esr_distill.monitoring.run_log import RunLog
from esr_distill.monitoring.sample_table import SampleWatch, sample_table
from esr_distill.monitoring.trackers import check_trackers
from esr_distill.progress import TrainingProgress
from esr_distill.train_step import train_step
from esr_distill.training_run import TrainingRun, prepare_run


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: `finished` is False where Ctrl-C stopped it; `checkpoint` is what it left."""

    finished: bool
    step: int
    checkpoint: Path


class StopSignal:
    """First Ctrl-C (or SIGTERM): stop after the current step. Second: stop at once, losing that step."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.received = False

    def __enter__(self) -> "StopSignal":
        self.previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, *_: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        self.console.print("stopping after this step; once more stops at once")


def train(config: TrainConfig, console: Console, *, resume: bool = False) -> TrainResult:
    """Run `config` to its last step, or from its newest checkpoint on if `resume`. Started by a launcher it is one of several
    processes, of which the main one prints and writes.

    Raises:
        InputError: bad input, found before any training; or a fresh run into a folder that holds a run.
    """
    devices = join_processes(config)
    console, output_dir = devices.console(console), Path(config.run.output_dir)
    checkpoint = latest_checkpoint(output_dir) if resume else None
    if not resume and find_checkpoints(output_dir):
        raise InputError(
            f"run.output_dir must not hold another run's checkpoints, got {str(output_dir)!r}; "
            f"go on with it by --resume {output_dir}, or choose another folder"
        )
    check_trackers(config.monitoring.trackers)
    run = prepare_run(config, console, None if checkpoint is None else str(checkpoint), devices)
    probe = FullLengthProbe.prepare(run)
    log = open_log(config, output_dir, devices)
    if checkpoint is None:
        try:
            if devices.is_main:
                output_dir.mkdir(parents=True, exist_ok=True)
                save_config(config, output_dir)
        except OSError as error:
            raise InputError(
                f"run.output_dir must be a folder that can be written, got {str(output_dir)!r} ({error.strerror})"
            ) from None
        console.print(f"options without their defaults (all of them in {output_dir / CONFIG_FILE}):")
        console.print("\n".join(f"  {line}" for line in changed_options(config)), highlight=False, markup=False)
        log.start_anew()
        state = TrainerState(step=0, train_seconds=0.0)
    else:
        state = load_training_state(run, checkpoint)
        log.go_on_after(state.step)
        if state.step == config.run.steps:
            console.print(f"all {state.step} steps were done already; the student is in {checkpoint}")
            return TrainResult(True, state.step, checkpoint)
        console.print(f"going on after step {state.step}")
    with log:
        return training_loop(run, state, log, probe, console)


def training_loop(
    run: TrainingRun, state: TrainerState, log: RunLog, probe: FullLengthProbe | None, console: Console
) -> TrainResult:
    """Steps, evaluations, probes and checkpoints until the last step or a stop signal; the last one is always saved."""
    config, settings = run.config, run.config.run
    horizons = HorizonSchedule(config.horizon, config.rollout.horizon, settings.steps)
    for record in run.devices.from_main(log.steps()):
        horizons.observe(record)
    if state.step == 0:
        record_accuracy(run, state, log, console)
        record_probe(run, state, log, console, probe, horizons.horizon(0))
    finished = stopped = False
    with StopSignal(console) as stop, TrainingProgress(console, settings.steps, state.step) as progress:
        while not (finished or stopped):
            record = watched_step(run, state.step, horizons.horizon(state.step), log, console)
            horizons.observe(record)
            state = TrainerState(state.step + 1, state.train_seconds + record["seconds"])
            log.write({**record, "train_seconds": state.train_seconds})
            progress.show(record)
            finished = state.step == settings.steps
            if finished or state.step % config.evaluation.every == 0:
                record_accuracy(run, state, log, console)
            if finished or is_due(config.monitoring.probe_every, state.step):
                record_probe(run, state, log, console, probe, record["horizon"])
            stopped = run.devices.any(stop.received)
            if finished or stopped or state.step % settings.save_every == 0:
                checkpoint = save_checkpoint(run, state, log.output_dir)
    if finished:
        console.print(f"finished {state.step} steps; the student is in {checkpoint}")
    else:
        console.print(f"stopped after step {state.step}; go on with: esr-distill train --resume {log.output_dir}")
    return TrainResult(finished, state.step, checkpoint)


def is_due(every: int | None, step: int) -> bool:
    """Whether something that happens each `every` steps, or never, happens after this one."""
    return every is not None and step % every == 0


def watched_step(run: TrainingRun, step: int, horizon: int, log: RunLog, console: Console) -> dict:
    """`train_step`, some of whose rollouts are shown and recorded where it is their turn. Returns its metrics."""
    settings = run.config.monitoring
    if not is_due(settings.samples_every, step + 1):
        return train_step(run, step, horizon)
    watch = SampleWatch(run.tokenizer, step + 1, settings.samples)
    record = train_step(run, step, horizon, watch)
    log.write_samples(watch.rows)
    console.print(sample_table(watch.rows, settings.sample_width))
    return record


def record_accuracy(run: TrainingRun, state: TrainerState, log: RunLog, console: Console) -> None:
    """Evaluate the student as rollouts are drawn, where evaluation is configured. Its time is no training time."""
    if run.evaluation is None:
        return
    with run.autocast(), run.whole_student() as student:
        result = run.evaluation.accuracy(student, devices=run.devices)
    log.write({"kind": "evaluation", "step": state.step, "train_seconds": state.train_seconds, **result.record()})
    console.print(f"step {state.step}: {result}")


def record_probe(
    run: TrainingRun,
    state: TrainerState,
    log: RunLog,
    console: Console,
    probe: FullLengthProbe | None,
    horizon: int,
) -> None:
    """Answer the probe's prompts at full length, where there is a probe. Its time is no training time."""
    if probe is None:
        return
    with run.whole_student() as student:
        record = probe.measure(run.with_whole_student(student), min(horizon, run.config.trained_tokens))
    log.write({"kind": "probe", "step": state.step, "train_seconds": state.train_seconds, **record})
    console.print(describe_probe(record, state.step), highlight=False)
