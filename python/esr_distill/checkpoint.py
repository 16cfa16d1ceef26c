"""Checkpoints: a folder that appears whole or not at all, in Hugging Face format plus what exact resuming needs."""

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from esr_distill.complete_files import complete_folder, read_json, write_json
from esr_distill.input_error import InputError
from esr_distill.training_run import TrainingRun

FOLDER = re.compile(r"checkpoint-(\d+)")
STATE_FILE, OPTIMIZER_FILE = "trainer_state.json", "optimizer.pt"


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands: optimizer steps done, and seconds spent in them."""

    step: int
    train_seconds: float


def save_checkpoint(run: TrainingRun, state: TrainerState, output_dir: Path) -> Path:
    """Write `checkpoint-<step>`: weights, tokenizer, optimizer, schedule, random state, step.

    A folder of that name is complete: a write that fails leaves the earlier checkpoints as they were. Older ones beyond
    `run.keep_checkpoints` go afterwards.
    """
    final = output_dir / f"checkpoint-{state.step:06d}"
    with complete_folder(final) as partial:
        run.student.save_pretrained(partial)
        run.tokenizer.save_pretrained(partial)
        torch.save(
            {
                "optimizer": run.optimizer.state_dict(),
                "scheduler": run.scheduler.state_dict(),
                "torch_random_state": torch.get_rng_state(),
            },
            partial / OPTIMIZER_FILE,
        )
        write_json(partial / STATE_FILE, asdict(state) | {"prompts_sha256": run.prompts.digest})
    for old in find_checkpoints(output_dir)[: -run.config.run.keep_checkpoints]:
        shutil.rmtree(old)
    return final


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not output_dir.is_dir():
        return []
    return sorted(
        (p for p in output_dir.iterdir() if FOLDER.fullmatch(p.name)), key=lambda p: int(p.name.split("-")[1])
    )


def latest_checkpoint(output_dir: Path) -> Path:
    """The newest complete checkpoint. Raises InputError where there is none."""
    checkpoints = find_checkpoints(output_dir)
    if not checkpoints:
        raise InputError(
            f"--resume must name the folder of a run with a checkpoint, got {str(output_dir)!r}, which has none"
        )
    return checkpoints[-1]


def load_training_state(run: TrainingRun, checkpoint: Path) -> TrainerState:
    """Put optimizer, schedule and random state back; the weights were loaded with the model.

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
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["torch_random_state"].cpu())
    return TrainerState(**state)
