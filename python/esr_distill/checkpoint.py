"""Checkpoints: a folder that appears whole or not at all, in Hugging Face format plus what exact resuming needs."""

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from esr_distill.complete_files import complete_folder, read_json, write_errors, write_json, write_text
from esr_distill.devices.sharding import load_whole_optimizer_state, whole_optimizer_state
from esr_distill.input_error import InputError
from esr_distill.kept_checkpoints import (
    checkpoint_folder,
    evaluation_at,
    find_checkpoints,
    latest_checkpoint,
    remove_checkpoints,
)
from esr_distill.model_card import model_card
from esr_distill.models.adapters import has_adapter, save_adapter
from esr_distill.resume import lasting_options
from esr_distill.training_run import TrainingRun

STATE_FILE, OPTIMIZER_FILE, CARD_FILE = "trainer_state.json", "optimizer.pt", "README.md"
RANDOM_STATES, TORCH_RANDOM_STATE, CUDA_RANDOM_STATE = "random_states", "torch_random_state", "cuda_random_state"

__all__ = [
    "TrainerState",
    "checkpoint_folder",
    "find_checkpoints",
    "latest_checkpoint",
    "load_training_state",
    "recorded_options",
    "save_checkpoint",
]


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands: optimizer steps done, seconds spent in them, and what an adaptive horizon has come to."""

    step: int
    train_seconds: float
    horizon: dict | None = None


def save_checkpoint(run: TrainingRun, state: TrainerState, output_dir: Path) -> Path:
    """Write `checkpoint-<step>`: weights, or the adapter where one is trained, tokenizer, a card, optimizer, schedule, random
    states, step.

    A folder of that name is complete: a write that fails leaves the earlier checkpoints as they were. Older ones beyond
    `run.keep_checkpoints` and `run.keep_best` go afterwards.

    The main process writes, from what all of them have: every process calls it, and it returns when the folder is there.
    Neither the number of processes nor shards show in it, but for each process's random states.

    Raises:
        WriteError: in every process, where the disk is full, say.
    """
    final = checkpoint_folder(output_dir, state.step)
    optimizer_state = whole_optimizer_state(run.optimizer)
    states = run.devices.gathered(random_states(run))
    with run.whole_student() as student:
        training_state = {"optimizer": optimizer_state, RANDOM_STATES: states}
        run.devices.done_by_main(lambda: write_checkpoint(run, student, state, final, training_state))
    return final


def write_checkpoint(
    run: TrainingRun, student: PreTrainedModel, state: TrainerState, final: Path, training_state: dict
) -> None:
    settings, output_dir = run.config.run, final.parent
    record = asdict(state) | {
        "prompts_sha256": run.prompts.digest,
        "prompts_read_sha256": run.prompts.digest_before(turns_of(run, state.step)),
        "options": lasting_options(run.config),
    }
    with write_errors(final), complete_folder(final) as partial:
        if has_adapter(student):
            save_adapter(student, partial)
        else:
            student.save_pretrained(partial)
        run.tokenizer.save_pretrained(partial)
        adapted = (state.horizon or {}).get("horizon")
        card = model_card(run.config, state.step, evaluation_at(output_dir, state.step), horizon=adapted)
        write_text(partial / CARD_FILE, card)
        with open(partial / OPTIMIZER_FILE, "wb") as file:
            torch.save(training_state | {"scheduler": run.scheduler.state_dict()}, file)
        write_json(partial / STATE_FILE, record)
    remove_checkpoints(output_dir, newest=settings.keep_checkpoints, keep_best=settings.keep_best)


def turns_of(run: TrainingRun, steps: int) -> int:
    """How many prompts had their turn in so many steps."""
    return steps * run.config.rollout.batch_size // run.config.rollout.samples_per_prompt


def random_states(run: TrainingRun) -> dict:
    """The states of this process's generators."""
    states = {TORCH_RANDOM_STATE: torch.get_rng_state()}
    if run.device.type == "cuda":
        states[CUDA_RANDOM_STATE] = torch.cuda.get_rng_state(run.device)
    return states


def recorded_options(checkpoint: Path) -> dict | None:
    """The options of the run that the checkpoint is of, those that must last; None where an older version wrote it."""
    return read_state(checkpoint).get("options")


def load_training_state(run: TrainingRun, checkpoint: Path) -> TrainerState:
    """Put optimizer, schedule and random states back; the weights were loaded with the model.

    Raises:
        InputError: a file of the checkpoint is damaged, or the prompts are not those that the run has read, so that it could not
            go on as it would have.
    """
    record = read_state(checkpoint)
    check_prompts(run, record)
    saved = read_training_state(checkpoint, run.device)
    try:
        load_whole_optimizer_state(run.optimizer, saved["optimizer"])
        load_schedule(run, saved["scheduler"])
    except (KeyError, ValueError) as error:
        raise damaged(checkpoint / OPTIMIZER_FILE, str(error)) from error
    # Checkpoints of one process had its states beside the rest, before there were others. A process that the run did not have
    # then keeps the states of its own seed.
    states = saved.get(RANDOM_STATES, [saved])
    if run.devices.rank < len(states):
        mine = states[run.devices.rank]
        torch.set_rng_state(mine[TORCH_RANDOM_STATE].cpu())
        if run.device.type == "cuda" and CUDA_RANDOM_STATE in mine:
            torch.cuda.set_rng_state(mine[CUDA_RANDOM_STATE].cpu(), run.device)
    return TrainerState(record["step"], record["train_seconds"], record.get("horizon"))


def check_prompts(run: TrainingRun, record: dict) -> None:
    """The prompts are those that the run began with, and of a stream those that it has read."""
    found = {"prompts_sha256": run.prompts.digest}
    if "prompts_read_sha256" in record:  # older versions kept the beginning of a stream alone
        found["prompts_read_sha256"] = run.prompts.digest_before(turns_of(run, record["step"]))
    if any(record[name] != digest for name, digest in found.items()):
        raise InputError(
            "data.prompts must hold the prompts that the run began with and has read since, "
            f"got {run.config.data.prompts!r}, which gives others"
        )


def load_schedule(run: TrainingRun, saved: dict) -> None:
    """Put the schedule of the learning rate back. Where run.steps has changed, the next step has the rate of the new length."""
    schedule, groups = run.scheduler, run.optimizer.param_groups
    rates = [
        base * factor(saved["last_epoch"]) for base, factor in zip(saved["base_lrs"], schedule.lr_lambdas, strict=True)
    ]
    schedule.load_state_dict(saved | {"_last_lr": rates})
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def read_state(checkpoint: Path) -> dict:
    """What STATE_FILE says. Raises InputError where it is missing or damaged."""
    path = checkpoint / STATE_FILE
    try:
        record = read_json(path)
    except OSError as error:
        raise damaged(path, error.strerror) from None
    except ValueError:
        raise damaged(path, "no JSON") from None
    for name in ("step", "train_seconds", "prompts_sha256"):
        if not isinstance(record, dict) or name not in record:
            raise damaged(path, f"no {name}")
    return record


def read_training_state(checkpoint: Path, device: torch.device) -> dict:
    """What OPTIMIZER_FILE holds. Raises InputError where it is missing or damaged."""
    path = checkpoint / OPTIMIZER_FILE
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = error.strerror if isinstance(error, OSError) else (str(error) or "an early end").splitlines()[0]
        raise damaged(path, reason) from error


def damaged(path: Path, found: str) -> InputError:
    return InputError(
        f"{path} must be the file that the run wrote there, got {found}; "
        f"move {path.parent} away to go on from an earlier checkpoint"
    )
