"""A folder with tiny models and prompts, and the options of a small run in it."""

import json
from pathlib import Path

from tiny_models import make_model, save_pair, write_prompts

from esr_distill.config import DataConfig, ModelConfig, OptimizerConfig, RolloutConfig, RunConfig, TrainConfig


def make_folder(folder: Path) -> None:
    save_pair(folder)
    write_prompts(folder / "prompts.jsonl", count=20)
    # answers that some of the student's replies end in
    problems = [("1+1=", "36"), ("7+7=", "7"), ("5+5=", "5"), ("4+4=", "1"), ("3+3=", "4")]
    lines = [json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in problems]
    (folder / "problems.jsonl").write_text("".join(lines))
    tied = folder / "tied"
    make_model(3, tie_word_embeddings=True).save_pretrained(tied)
    for file in (folder / "student").glob("token*"):
        (tied / file.name).write_bytes(file.read_bytes())


def small_config(folder: Path, name: str, steps: int = 4, **groups) -> TrainConfig:
    defaults = {
        "rollout": RolloutConfig(horizon=9, batch_size=8, sampling_temperature=1.0, top_p=1.0),
        "optimizer": OptimizerConfig(learning_rate=1e-3, max_grad_norm=1e6),
        "run": RunConfig(output_dir=str(folder / name), steps=steps, save_every=100, keep_checkpoints=9),
        "model": ModelConfig(str(folder / "student"), str(folder / "teacher"), device="cpu"),
        "data": DataConfig(str(folder / "prompts.jsonl"), chat_template=False),
    }
    return TrainConfig(**(defaults | groups))
