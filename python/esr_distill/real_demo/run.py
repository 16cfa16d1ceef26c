"""`esr-distill demo-real`: fetch a real model, fine-tune a copy as the teacher, distil the untouched model from it.

The distillation is the ordinary training command on a prompt file. Each stage leaves its result in `output_dir` and is
not repeated when the demo is started again: a stopped distillation goes on from its checkpoint, a stopped fine-tuning
starts anew.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from esr_distill.checkpoint import find_checkpoints, latest_checkpoint
from esr_distill.complete_files import read_json, write_json
from esr_distill.config import DataConfig, ModelConfig, OptimizerConfig, RolloutConfig, RunConfig, TrainConfig
from esr_distill.config_file import load_saved_config
from esr_distill.exit_status import INTERRUPTED
from esr_distill.input_error import InputError
from esr_distill.machine import machine_record
from esr_distill.metrics import read_metrics
from esr_distill.models import choose_device
from esr_distill.progress import make_console
from esr_distill.real_demo import fine_tune_teacher as fine_tuning
from esr_distill.real_demo.fetch_smollm2 import MODEL_NAME, ORIGIN, fetch_smollm2
from esr_distill.real_demo.gsm8k import INSTRUCTION, Slices, cut_slices, load_problems, write_prompt_file
from esr_distill.real_demo.measurement import MAX_REPLY_TOKENS, Measurement
from esr_distill.real_demo.remembered import remembered
from esr_distill.real_demo.report import print_table, summary, write_picture
from esr_distill.real_demo.settings import RealDemoConfig
from esr_distill.train import train

ROLLOUT_BATCH_SIZE = 16
LEARNING_RATE = 5e-5


def run_real_demo(demo: RealDemoConfig) -> int:
    """Run all stages and leave results.json and demo-real.png; returns the exit status, 130 after Ctrl-C."""
    console = make_console()
    try:
        return run_stages(demo, console)
    except KeyboardInterrupt:
        console.print("stopped; the stages that were finished are kept for the next start with the same options")
        return INTERRUPTED


def run_stages(demo: RealDemoConfig, console: Console) -> int:
    start = time.perf_counter()
    output_dir = Path(demo.output_dir)
    device = choose_device(demo.device)
    slices = make_slices(demo)
    config = distillation_config(demo, output_dir, device)
    write_prompt_file(Path(config.data.prompts), slices.distillation)

    console.rule("1/5 the model")
    student = fetch_smollm2(output_dir / "models", console)

    console.rule("2/5 the teacher")
    autocast = config.model.autocast
    console.print(f"{device.type}, {torch.get_num_threads()} threads, bfloat16 autocast {'on' if autocast else 'off'}")
    teacher = Path(config.model.teacher)
    fine_tuned = fine_tuning.fine_tune_teacher(
        student,
        teacher,
        slices.teacher,
        config.data,
        console,
        steps=demo.teacher_steps,
        device=device,
        autocast=autocast,
    )

    console.rule("3/5 before")
    measurement = Measurement.prepare(student, slices.held_out, config.data, horizon=demo.horizon, device=device)
    key = measurement_key(demo, fine_tuned["settings"])

    def measure(name: str, folder: Path, reference: Path | None, settings: dict) -> dict:
        path = output_dir / "measured" / f"{name.replace(' ', '-')}.json"
        result = remembered(path, settings, lambda: measurement.of(folder, reference, console))
        console.print(summary(name, result))
        return result

    models = {
        "teacher": measure("teacher", teacher, None, key),
        "student before": measure("student before", student, teacher, key),
    }

    console.rule("4/5 distillation")
    result = train(config, console, resume=prepare_run_folder(config))
    if not result.finished:
        console.print("demo-real goes on from here when it is started again with the same options")
        return INTERRUPTED

    console.rule("5/5 after")
    trained = latest_checkpoint(result.checkpoint.parent)
    models["student after"] = measure("student after", trained, teacher, {**key, "config": run_key(config)})
    results = {
        "settings": asdict(demo),
        "machine": machine_record(),
        "model": read_json(student / ORIGIN),
        "teacher": fine_tuned,
        "models": models,
        "distillation": distillation_record(config),
    }
    results["stage_seconds"] = stage_seconds(results)
    write_json(output_dir / "results.json", results)
    write_picture(results, output_dir / "demo-real.png")
    print_table(results, console)
    console.print(
        f"{output_dir}/results.json and demo-real.png written; "
        f"{time.perf_counter() - start:.0f} s now, {sum(results['stage_seconds'].values()):.0f} s in all stages"
    )
    return 0


def make_slices(demo: RealDemoConfig) -> Slices:
    """Disjoint problems: one for each row of each fine-tuning step, one for each rollout, and the held-out ones."""
    return cut_slices(
        load_problems("train"),
        load_problems("test"),
        teacher=demo.teacher_steps * fine_tuning.BATCH_SIZE,
        distillation=demo.steps * ROLLOUT_BATCH_SIZE,
        held_out=demo.problems,
    )


def distillation_config(demo: RealDemoConfig, output_dir: Path, device: torch.device) -> TrainConfig:
    """The training command's config: float32 student, bfloat16 teacher, rollouts at temperature 1, reverse KL."""
    return TrainConfig(
        model=ModelConfig(
            student=str(output_dir / "models" / MODEL_NAME),
            teacher=str(output_dir / "teacher"),
            teacher_dtype="bfloat16" if use_autocast(demo, device) else "float32",
            autocast=use_autocast(demo, device),
            device=device.type,
        ),
        data=DataConfig(prompts=str(output_dir / "prompts.jsonl"), system_prompt=INSTRUCTION),
        rollout=RolloutConfig(horizon=demo.horizon, batch_size=ROLLOUT_BATCH_SIZE, sampling_temperature=1.0, top_p=1.0),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=0.0),
        run=RunConfig(
            output_dir=str(output_dir / "run"), steps=demo.steps, seed=demo.seed, save_every=10, keep_checkpoints=1
        ),
    )


def use_autocast(demo: RealDemoConfig, device: torch.device) -> bool:
    """What `demo.autocast` means on this machine: without bfloat16 instructions a CPU is slower with it."""
    if demo.autocast != "auto":
        return demo.autocast == "on"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cuda" or any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def measurement_key(demo: RealDemoConfig, teacher_settings: dict) -> dict:
    """Everything that a measurement of teacher and untouched student depends on."""
    return {
        "problems": demo.problems,
        "horizon": demo.horizon,
        "instruction": INSTRUCTION,
        "max_reply_tokens": MAX_REPLY_TOKENS,
        "teacher": teacher_settings,
    }


def run_key(config: TrainConfig) -> dict:
    """The training config as JSON values."""
    return json.loads(json.dumps(asdict(config)))


def prepare_run_folder(config: TrainConfig) -> bool:
    """Whether to resume: a run with the same options goes on (or is finished).

    Raises:
        InputError: the folder holds a run with other options, which is not for the demo to delete.
    """
    folder = Path(config.run.output_dir)
    if not find_checkpoints(folder):
        return False
    if load_saved_config(folder) == config:
        return True
    raise InputError(
        f"output_dir must hold no run with other options, got {str(folder)!r}; remove it or choose another"
    )


def distillation_record(config: TrainConfig) -> dict:
    """Settings, loss and time of the finished run, from its metrics file."""
    steps = read_metrics(Path(config.run.output_dir) / "metrics.jsonl", "step")
    return {
        "config": run_key(config),
        "loss": [step["loss"] for step in steps],
        "mean_length": [step["mean_length"] for step in steps],
        "train_seconds": steps[-1]["train_seconds"],
        "stage_seconds": {
            name: sum(step["stage_seconds"][name] for step in steps) for name in steps[0]["stage_seconds"]
        },
        "generated_tokens": sum(step["response_tokens"] for step in steps),
        "trained_tokens": sum(step["trained_tokens"] for step in steps),
    }


def stage_seconds(results: dict) -> dict[str, float]:
    """How long each stage took when it ran, which may have been in an earlier start."""
    models = results["models"]
    return {
        "fetch and convert": results["model"]["seconds"],
        "fine-tune the teacher": results["teacher"]["seconds"],
        "measure teacher and student": models["teacher"]["seconds"] + models["student before"]["seconds"],
        "distil": results["distillation"]["train_seconds"],
        "measure the result": models["student after"]["seconds"],
    }
