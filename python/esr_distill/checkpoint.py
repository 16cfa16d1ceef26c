"""Checkpoints: a folder that appears whole or not at all, in Hugging Face format plus what exact resuming needs."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from esr_distill.complete_files import complete_folder, read_json, write_json, write_text
from esr_distill.devices.sharding import load_whole_optimizer_state, whole_optimizer_state
from esr_distill.input_error import InputError
from esr_distill.kept_checkpoints import evaluation_at, find_checkpoints, latest_checkpoint, remove_checkpoints
from esr_distill.model_card import model_card
from esr_distill.models.adapters import has_adapter, save_adapter
from esr_distill.training_run import TrainingRun

STATE_FILE, OPTIMIZER_FILE, CARD_FILE = "trainer_state.json", "optimizer.pt", "README.md"
RANDOM_STATES, TORCH_RANDOM_STATE, CUDA_RANDOM_STATE = "random_states", "torch_random_state", "cuda_random_state"

__all__ = ["TrainerState", "find_checkpoints", "latest_checkpoint", "load_training_state", "save_checkpoint"]


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands: optimizer steps done, and seconds spent in them."""

    step: int
    train_seconds: float


def save_checkpoint(run: TrainingRun, state: TrainerState, output_dir: Path) -> Path:
    """Write `checkpoint-<step>`: weights, or the adapter where one is trained, tokenizer, a card, optimizer, schedule, random
    states, step.

    A folder of that name is complete: a write that fails leaves the earlier checkpoints as they were. Older ones beyond
    `run.keep_checkpoints` and `run.keep_best` go afterwards.

    The main process writes, from what all of them have: every process calls it, and it returns when the folder is there.
    Neither the number of processes nor shards show in it, but for each process's random states.
    """
    final = output_dir / f"checkpoint-{state.step:06d}"
    optimizer_state = whole_optimizer_state(run.optimizer)
    states = run.devices.gathered(random_states(run))
    with run.whole_student() as student:
        if run.devices.is_main:
            write_checkpoint(run, student, state, final, {"optimizer": optimizer_state, RANDOM_STATES: states})
    run.devices.barrier()
    return final


def write_checkpoint(
    run: TrainingRun, student: PreTrainedModel, state: TrainerState, final: Path, training_state: dict
) -> None:
    settings, output_dir = run.config.run, final.parent
    with complete_folder(final) as partial:
        if has_adapter(student):
            save_adapter(student, partial)
        else:
            student.save_pretrained(partial)
        run.tokenizer.save_pretrained(partial)
        write_text(partial / CARD_FILE, model_card(run.config, state.step, evaluation_at(output_dir, state.step)))
        torch.save(training_state | {"scheduler": run.scheduler.state_dict()}, partial / OPTIMIZER_FILE)
        write_json(partial / STATE_FILE, asdict(state) | {"prompts_sha256": run.prompts.digest})
    remove_checkpoints(output_dir, newest=settings.keep_checkpoints, keep_best=settings.keep_best)


def random_states(run: TrainingRun) -> dict:
    """The states of this process's generators."""
    states = {TORCH_RANDOM_STATE: torch.get_rng_state()}
    if run.device.type == "cuda":
        states[CUDA_RANDOM_STATE] = torch.cuda.get_rng_state(run.device)
    return states


def load_training_state(run: TrainingRun, checkpoint: Path) -> TrainerState:
    """Put optimizer, schedule and random states back; the weights were loaded with the model.

    Raises:
        InputError: the prompts are not those that the run began with, so it could not go on as it would have.
    """
    state = read_json(checkpoint / STATE_FILE)
    if state.pop("prompts_sha256") != run.prompts.digest:
        raise InputError(
            "data.prompts must hold the prompts that the run began with, "
            f"got {run.config.data.prompts!r}, which gives others"
        )
    saved = torch.load(checkpoint / OPTIMIZER_FILE, map_location=run.device, weights_only=True)
    load_whole_optimizer_state(run.optimizer, saved["optimizer"])
    run.scheduler.load_state_dict(saved["scheduler"])
    # Checkpoints of one process had its states beside the rest, before there were others. A process that the run did not have
    # then keeps the states of its own seed.
    states = saved.get(RANDOM_STATES, [saved])
    if run.devices.rank < len(states):
        mine = states[run.devices.rank]
        torch.set_rng_state(mine[TORCH_RANDOM_STATE].cpu())
        if run.device.type == "cuda" and CUDA_RANDOM_STATE in mine:
            torch.cuda.set_rng_state(mine[CUDA_RANDOM_STATE].cpu(), run.device)
    return TrainerState(**state)
