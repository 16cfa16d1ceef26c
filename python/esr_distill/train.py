"""Distil a student: load, then prompts -> rollouts -> divergence -> step, with metrics, checkpoints and a clean stop.

What the method is: the student writes its own responses, each stopped after `rollout.horizon` tokens (Early Stopping
Rollout, arXiv 2605.27028); the frozen teacher scores every position; the student moves toward the teacher's distribution.
What is left out, on purpose: no policy gradient and no ratio or clipping (the gradient of the divergence at the drawn
positions is exact, and rollouts come from the current weights); no reward; no replay buffer.

    esr-distill train --config run.yaml
    esr-distill train --resume runs/esr
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from esr_distill.checkpoint import (
    TrainerState,
    checkpoint_folder,
    latest_checkpoint,
    load_training_state,
    recorded_options,
    save_checkpoint,
)
from esr_distill.complete_files import WriteError
from esr_distill.config import TrainConfig
from esr_distill.config_file import CONFIG_FILE, changed_options
from esr_distill.devices.follower_log import open_log
from esr_distill.devices.launcher import join_processes
from esr_distill.horizon_schedule import HorizonSchedule
from esr_distill.input_error import InputError
from esr_distill.monitoring.full_length_probe import FullLengthProbe, describe_probe
from esr_distill.monitoring.run_log import RunLog
from esr_distill.monitoring.sample_table import SampleWatch, sample_table
from esr_distill.monitoring.trackers import check_trackers
from esr_distill.progress import TrainingProgress, print_line
from esr_distill.resume import check_options, check_steps
from esr_distill.resume_command import resume_command, what_is_left
from esr_distill.run_folder import begin_folder, check_new_folder
from esr_distill.stop_signal import StopSignal
from esr_distill.train_step import train_step
from esr_distill.training_run import TrainingRun, prepare_run


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: `finished` is False where Ctrl-C stopped it; `checkpoint` is what it left, None before the first step."""

    finished: bool
    step: int
    checkpoint: Path | None


def train(config: TrainConfig, console: Console, *, resume: bool = False) -> TrainResult:
    """Run `config` to its last step, or from its newest checkpoint on if `resume`. Started by a launcher it is one of several
    processes, of which the main one prints and writes.

    Raises:
        InputError: bad input, most of it found before any training; a fresh run into a folder that holds a run; a run that goes
            on with other options; a full disk.
    """
    devices = join_processes(config)
    console, output_dir = devices.console(console), Path(config.run.output_dir)
    checkpoint = latest_checkpoint(output_dir) if resume else None
    if not resume:
        devices.done_by_main(lambda: check_new_folder(config))
    check_trackers(config.monitoring.trackers)
    run = prepare_run(config, console, None if checkpoint is None else str(checkpoint), devices)
    probe = FullLengthProbe.prepare(run)
    log = open_log(config, output_dir, devices)
    horizons = HorizonSchedule(config.horizon, config.rollout.horizon, config.run.steps)
    if checkpoint is None:
        state = begin(run, log, console)
    else:
        state = go_on(run, checkpoint, log, horizons, console)
        if state.step == config.run.steps:
            print_line(console, f"all {state.step} steps were done already; the student is in {checkpoint}")
            return TrainResult(True, state.step, checkpoint)
        print_line(console, f"going on after step {state.step}")
    with log:
        try:
            return training_loop(run, state, horizons, log, probe, console)
        except InputError as error:
            raise InputError(f"{error}; {what_is_left(output_dir, devices)}") from error


def begin(run: TrainingRun, log: RunLog, console: Console) -> TrainerState:
    """Before the first step: the folder, and the options in it and on the screen."""
    run.devices.done_by_main(lambda: begin_folder(run.config))
    print_line(console, f"options without their defaults (all of them in {log.output_dir / CONFIG_FILE}):")
    print_line(console, "\n".join(f"  {line}" for line in changed_options(run.config)))
    log.start_anew()
    return TrainerState(step=0, train_seconds=0.0)


def go_on(run: TrainingRun, checkpoint: Path, log: RunLog, horizons: HorizonSchedule, console: Console) -> TrainerState:
    """Put everything back to where it was after the checkpoint's step, once it is the same run."""
    options = recorded_options(checkpoint)
    if options is None:
        print_line(console, f"{checkpoint} is of an older version and does not say its options: they are not compared")
    else:
        check_options(run.config, options, checkpoint)
    state = load_training_state(run, checkpoint)
    check_steps(run.config, state.step, checkpoint)
    run.devices.done_by_main(lambda: log.go_on_after(state.step))
    if state.horizon is not None:
        horizons.restore(state.horizon)
    elif run.config.horizon.kind == "adaptive":
        horizons.observe_again(run.devices.from_main(log.steps()), state.step)
    return state


def training_loop(
    run: TrainingRun,
    state: TrainerState,
    horizons: HorizonSchedule,
    log: RunLog,
    probe: FullLengthProbe | None,
    console: Console,
) -> TrainResult:
    """Steps, evaluations, probes and checkpoints until the last step or a stop signal; the last one is always saved."""
    config, settings = run.config, run.config.run
    finished = stopped = False
    with StopSignal(console) as stop, TrainingProgress(console, settings.steps, state.step) as progress:
        if state.step == 0:
            record_accuracy(run, state, log, console)
            if not run.devices.any(stop.received):
                record_probe(run, state, log, console, probe, horizons.horizon(0))
            if run.devices.any(stop.received):
                print_line(
                    console, "stopped before the first step: nothing is saved, begin again with the same command"
                )
                return TrainResult(False, 0, None)
        while not (finished or stopped):
            with saved_before_bad_input(run, state, log):
                record = watched_step(run, state.step, horizons.horizon(state.step), log, console)
            horizons.observe(record)
            state = TrainerState(state.step + 1, state.train_seconds + record["seconds"], horizons.state)
            log.write({**record, "train_seconds": state.train_seconds})
            progress.show(record)
            finished = state.step >= settings.steps
            with saved_before_bad_input(run, state, log):
                if finished or state.step % config.evaluation.every == 0:
                    record_accuracy(run, state, log, console)
                if finished or is_due(config.monitoring.probe_every, state.step):
                    record_probe(run, state, log, console, probe, record["horizon"])
            stopped = run.devices.any(stop.received)
            if finished or stopped or state.step % settings.save_every == 0:
                checkpoint = save_checkpoint(run, state, log.output_dir)
    if finished:
        print_line(console, f"finished {state.step} steps; the student is in {checkpoint}")
    else:
        command = resume_command(log.output_dir, run.devices)
        print_line(console, f"stopped after step {state.step}; go on with: {command}")
    return TrainResult(finished, state.step, checkpoint)


@contextmanager
def saved_before_bad_input(run: TrainingRun, state: TrainerState, log: RunLog) -> Iterator[None]:
    """Input that turns out to be bad in the middle of a run (a line of a stream, what a server says) does not cost the steps that
    are done: all processes meet it in the same place, and save them.

    A number that is not finite is no bad input: a run that goes on from there would come to it again.
    """
    try:
        yield
    except WriteError:
        raise
    except InputError:
        if state.step > 0 and not run.devices.from_main(checkpoint_folder(log.output_dir, state.step).exists()):
            save_checkpoint(run, state, log.output_dir)
        raise


def is_due(every: int | None, step: int) -> bool:
    """Whether something that happens each `every` steps, or never, happens after this one."""
    return every is not None and step % every == 0


def watched_step(run: TrainingRun, step: int, horizon: int, log: RunLog, console: Console) -> dict:
    """`train_step`, some of whose rollouts are shown and recorded where it is their turn. Returns its metrics."""
    settings = run.config.monitoring
    if not is_due(settings.samples_every, step + 1):
        return train_step(run, step, horizon)
    watch = SampleWatch.of(run, step + 1)
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
