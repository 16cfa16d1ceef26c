"""`esr-distill demo`: one tiny student, three arms, one table, one picture, one page.

Everything goes through the ordinary training command: the demo only writes the problems, runs `train` once an arm, and
measures the results on held-out problems.
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from esr_distill.checkpoint import find_checkpoints
from esr_distill.complete_files import write_json, write_text
from esr_distill.config import DataConfig, EvaluationConfig, TrainConfig
from esr_distill.config_file import CONFIG_FILE, load_saved_config
from esr_distill.demo.arms import (
    BATCH_SIZE,
    HELD_OUT_PROBLEMS,
    MODELS,
    TASK_SETTINGS,
    TRAINING_PROBLEMS,
    arm_config,
    arms_of,
)
from esr_distill.demo.chain_sum import ChainSumProblem, check_no_shared_prompt, correct_steps, make_problems
from esr_distill.demo.report import print_table, write_picture, write_report
from esr_distill.demo.settings import DemoConfig
from esr_distill.evaluation.evaluate import Evaluation
from esr_distill.exit_status import INTERRUPTED
from esr_distill.input_error import InputError
from esr_distill.machine import machine_record
from esr_distill.metrics import read_metrics
from esr_distill.models import choose_device, find_stop_ids, load_model, load_tokenizer
from esr_distill.progress import make_console
from esr_distill.prompts import PromptRecord
from esr_distill.train import train

RESULTS = "results.json"


def run_demo(demo: DemoConfig) -> int:
    """Run all arms and leave results.json, demo.png and report.html; returns the exit status."""
    console = make_console()
    output_dir = Path(demo.output_dir or ("runs/demo" if demo.task == "rewrite" else f"runs/demo-{demo.task}"))
    start = time.perf_counter()
    check_folders(demo, output_dir)
    problems = write_problems(demo, output_dir)
    measurement = Measurement.prepare(demo, problems)
    teacher, student = (measurement.load(MODELS / demo.task / role) for role in ("teacher", "student"))
    console.print(f"task {demo.task}: {len(problems)} held-out problems of {TASK_SETTINGS[demo.task].max_terms} terms")
    results = {
        "settings": asdict(demo) | asdict(TASK_SETTINGS[demo.task]),
        "machine": machine_record(),
        "models": {"teacher": measurement.of(teacher, teacher), "student": measurement.of(student, teacher)},
        "arms": {},
    }
    for name, arm in arms_of(demo.task).items():
        config = arm_config(name, demo, output_dir)
        console.rule(arm.title)
        result = train(config, console, resume=prepare_folder(config, output_dir))
        if not result.finished:
            console.print("the demo goes on from here when it is started again with the same options")
            return INTERRUPTED
        trained = measurement.of(measurement.load(result.checkpoint), teacher)
        results["arms"][name] = {"title": arm.title, **training_record(Path(config.run.output_dir)), **trained}
    results["total_seconds"] = time.perf_counter() - start
    write_json(output_dir / RESULTS, results)
    write_picture(results, output_dir / "demo.png")
    write_report(results, output_dir / "demo.png", output_dir / "report.html")
    print_table(results, console)
    console.print(f"{output_dir / RESULTS}, demo.png and report.html written; {results['total_seconds']:.0f} s in all")
    return 0


def check_folders(demo: DemoConfig, output_dir: Path) -> None:
    """Raise InputError where an arm's folder holds something else than a run of the demo: `prepare_folder` deletes it."""
    for name in arms_of(demo.task):
        folder = output_dir / name
        if not folder.is_dir() or not any(folder.iterdir()):
            continue
        if (folder / CONFIG_FILE).is_file():
            prompts = Path(load_saved_config(folder).data.prompts)
            if prompts.resolve() == (output_dir / TRAINING_PROBLEMS).resolve():
                continue
        raise InputError(f"output_dir must hold nothing but the demo's own runs under {name!r}, got {str(folder)!r}")


def write_problems(demo: DemoConfig, output_dir: Path) -> list[ChainSumProblem]:
    """Write training prompts of mixed lengths and held-out problems of the greatest length; returns the latter."""
    settings = TASK_SETTINGS[demo.task]
    count = demo.steps * BATCH_SIZE
    training = make_problems(demo.task, count, demo.seed, settings.min_terms, settings.max_terms, split="training")
    held_out = make_problems(
        demo.task, demo.problems, demo.seed, settings.max_terms, settings.max_terms, split="held_out"
    )
    check_no_shared_prompt(training, held_out)
    for name, problems in ((TRAINING_PROBLEMS, training), (HELD_OUT_PROBLEMS, held_out)):
        lines = [json.dumps({"prompt": problem.prompt, "answer": problem.answer}) for problem in problems]
        write_text(output_dir / name, "\n".join(lines) + "\n")
    return held_out


def prepare_folder(config: TrainConfig, output_dir: Path) -> bool:
    """Whether to resume the arm: a demo that was stopped goes on, a finished one or one with other options starts anew."""
    folder = Path(config.run.output_dir)
    stopped = find_checkpoints(folder) and not (output_dir / RESULTS).exists()
    if stopped and load_saved_config(folder) == config:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


@dataclass(frozen=True)
class Measurement:
    """What is measured of a model: greedy accuracy, right steps by number, and reverse KL by response position."""

    evaluation: Evaluation
    problems: list[ChainSumProblem]
    device: torch.device

    @classmethod
    def prepare(cls, demo: DemoConfig, problems: list[ChainSumProblem]) -> "Measurement":
        device = choose_device(demo.device)
        folder = MODELS / demo.task / "student"
        tokenizer = load_tokenizer(str(folder), "student")
        model = load_model(str(folder), "student", dtype="float32", attn_implementation="sdpa", device=device)
        evaluation = Evaluation.prepare(
            [PromptRecord(problem.prompt, problem.answer) for problem in problems],
            tokenizer,
            DataConfig(prompts="held-out problems", chat_template=False),
            EvaluationConfig(
                scorer="number_after_hash", max_tokens=TASK_SETTINGS[demo.task].full_length, batch_size=256
            ),
            stop=find_stop_ids(tokenizer, model),
            model=model,
            device=device,
        )
        return cls(evaluation, problems, device)

    def load(self, folder: Path) -> PreTrainedModel:
        model = load_model(str(folder), "model", dtype="float32", attn_implementation="sdpa", device=self.device)
        return model.requires_grad_(False)

    def of(self, model: PreTrainedModel, teacher: PreTrainedModel) -> dict:
        """Everything about one model, as JSON values."""
        replies = self.evaluation.replies(model)
        verdicts = [correct_steps(p, reply.text) for p, reply in zip(self.problems, replies, strict=True)]
        sum_K, count_K = self.evaluation.own_divergence(model, teacher)
        return {
            **asdict(self.evaluation.score(replies)),
            "right_steps": torch.tensor(verdicts, dtype=torch.float64).mean(0).tolist(),
            "reverse_kl_by_position": (sum_K / count_K).tolist(),
            "rollouts_by_position": count_K.tolist(),
        }


def training_record(folder: Path) -> dict:
    """Wall time, stage times, tokens and the accuracy curve of a finished arm, from its metrics file."""
    steps = read_metrics(folder / "metrics.jsonl", "step")
    stages = {name: sum(step["stage_seconds"][name] for step in steps) for name in steps[0]["stage_seconds"]}
    return {
        "steps": len(steps),
        "train_seconds": steps[-1]["train_seconds"],
        "stage_seconds": stages,
        "generated_tokens": sum(step["response_tokens"] for step in steps),
        "trained_tokens": sum(step["trained_tokens"] for step in steps),
        "longest_rollout": max(step["longest_rollout"] for step in steps),
        "loss": [step["loss"] for step in steps],
        "curve": [
            {key: record[key] for key in ("step", "train_seconds", "accuracy", "standard_error", "count")}
            for record in read_metrics(folder / "metrics.jsonl", "evaluation")
        ],
    }
