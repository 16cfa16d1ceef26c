"""Make the teacher and the student that the demo ships, from nothing, in about ten minutes on one core.

    python -m esr_distill.demo.make_models --task rewrite --output DIR
    python -m esr_distill.demo.make_models --task pointer --output DIR

The teacher is a 0.64 M parameter Llama trained from random weights on worked sums (`chain_sum.py`). The student's fault
is constructed: it is the teacher after a few more steps on sums in which every carry and borrow is forgotten (17+5=12).
It has the teacher's format and much of its skill, and it is wrong wherever a carry or a borrow occurs, in the first
step as in the last.

The output folder holds `teacher/`, `student/` (config, safetensors, tokenizer) and `recipe.json` with everything needed
to make them again and the accuracies measured. The same seed on the same machine with the same torch gives the same
bytes. The folder appears only when it is complete.
"""

import argparse
import hashlib
import json
import math
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from esr_distill.demo.chain_sum import TASKS, ChainSumProblem, draw_problems, extract_answer, make_problems
from esr_distill.demo.character_tokenizer import make_character_tokenizer

SHIPPED_MODELS = Path(__file__).parent / "models"
HELD_OUT_SEED = 20_000
NUM_HELD_OUT = 1024
# bf16 halves the files; it is used where it costs at most this much greedy accuracy.
MAX_BF16_ACCURACY_LOSS = 0.005


@dataclass(frozen=True)
class Stage:
    """One supervised run: AdamW, 50 steps of warm-up, cosine decay to 5 % of the learning rate.

    Each batch holds problems of one length, so nothing is padded. Lengths start at 2 and 3 terms for `short_fraction`
    of the steps, then the longest grows to `max_terms` over the next quarter.
    """

    name: str
    num_steps: int
    max_terms: int
    batch_size: int  # at max_terms; shorter problems come in larger batches of about as many tokens
    learning_rate: float
    short_fraction: float = 0.0
    forget_carry: bool = False


@dataclass(frozen=True)
class Recipe:
    """`teacher_stages` follow one another from random weights; `student_stage` starts from the finished teacher."""

    num_terms: int  # of the problems that the demo trains and evaluates on
    rope_theta: float
    teacher_stages: tuple[Stage, ...]
    student_stage: Stage


RECIPES = {
    "rewrite": Recipe(
        num_terms=7,
        rope_theta=500.0,
        teacher_stages=(
            Stage("base", 1500, max_terms=9, batch_size=32, learning_rate=2e-3, short_fraction=0.45),
            Stage("fine-tune", 600, max_terms=7, batch_size=48, learning_rate=1.5e-3),
        ),
        student_stage=Stage("forget", 120, max_terms=7, batch_size=48, learning_rate=1e-3, forget_carry=True),
    ),
    "pointer": Recipe(
        num_terms=9,
        rope_theta=500.0,
        teacher_stages=(
            Stage("base", 1200, max_terms=9, batch_size=48, learning_rate=2e-3, short_fraction=0.45),
            Stage("fine-tune", 500, max_terms=9, batch_size=48, learning_rate=1.5e-3),
        ),
        student_stage=Stage("forget", 120, max_terms=9, batch_size=48, learning_rate=1e-3, forget_carry=True),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m esr_distill.demo.make_models", description="Make a demo teacher and student from nothing."
    )
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--output", type=Path, help="folder to make or replace (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    # The order of float additions depends on the number of threads; one thread makes the weights reproducible.
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    output = arguments.output or SHIPPED_MODELS / arguments.task
    make_models(arguments.task, RECIPES[arguments.task], arguments.seed, output)


def make_models(task: str, recipe: Recipe, seed: int, output: Path) -> None:
    """Train, round, evaluate and save one pair. `output` is replaced only if it is a folder that this function made.

    Raises:
        FileExistsError: `output` exists and holds no recipe.json.
    """
    if output.exists() and not (output / "recipe.json").is_file():
        raise FileExistsError(f"make_models: output must be new or hold a recipe.json, got {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    tokenizer = make_character_tokenizer()
    held_out = make_problems(task, NUM_HELD_OUT, HELD_OUT_SEED, recipe.num_terms, recipe.num_terms, split="held_out")
    torch.manual_seed(seed)
    model = make_random_model(tokenizer, recipe.rope_theta)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        for index, stage in enumerate(recipe.teacher_stages):
            train_stage(model, tokenizer, task, stage, random.Random(f"{seed}-{index}"), console)
        teacher = round_and_save(model, tokenizer, held_out, temporary / "teacher")
        console.print(f"teacher: {teacher}")
        model = load_model(temporary / "teacher")
        train_stage(model, tokenizer, task, recipe.student_stage, random.Random(f"{seed}-student"), console)
        student = round_and_save(model, tokenizer, held_out, temporary / "student")
        console.print(f"student: {student}")
        record = {
            "task": task,
            "seed": seed,
            "recipe": asdict(recipe),
            "num_parameters": model.num_parameters(),
            "held_out": {"num_terms": recipe.num_terms, "count": NUM_HELD_OUT, "seed": HELD_OUT_SEED},
            "teacher": teacher,
            "student": student,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        (temporary / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")
        replace_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    console.print(f"wrote {output}")


def make_random_model(tokenizer: PreTrainedTokenizerFast, rope_theta: float) -> LlamaForCausalLM:
    """The architecture of every demo model: 3 layers of width 128, tied embeddings, 642,304 parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def load_model(folder: Path) -> LlamaForCausalLM:
    """A saved model in float32, whatever dtype it is stored in."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train_stage(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    stage: Stage,
    rng: random.Random,
    console: Console,
) -> None:
    """Train in place on worked sums of the training split; the loss covers the response and `<eos>` only."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    columns = ("[progress.description]{task.description}", BarColumn(), "{task.completed}/{task.total}",
               TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.4f}"))  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"{task}: {stage.name}", total=stage.num_steps, loss=math.nan)
        for step in range(1, stage.num_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * learning_rate_factor(step, stage.num_steps)
            num_terms = draw_num_terms(rng, stage, step)
            # Sums of two and three terms are cheap and carry the arithmetic: always 256 of them.
            batch_size = 256 if num_terms < 4 else min(256, stage.batch_size * (stage.max_terms + 1) // (num_terms + 1))
            problems = draw_problems(rng, task, batch_size, num_terms, num_terms, forget_carry=stage.forget_carry)
            token_ids_B_T, labels_B_T = encode_worked_problems(tokenizer, problems)
            loss = model(input_ids=token_ids_B_T, labels=labels_B_T).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update(bar, advance=1, loss=loss.item())


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up over 50 steps times a cosine from 1 to 0.05; steps count from 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return min(1.0, step / 50) * (0.05 + 0.95 * cosine)


def draw_num_terms(rng: random.Random, stage: Stage, step: int) -> int:
    """The length of one batch: uniform up to the curriculum's present maximum, which gets an extra 30 %."""
    progress = step / stage.num_steps
    if progress < stage.short_fraction:
        return rng.randint(2, 3)
    grown = int((stage.max_terms - 3) * (progress - stage.short_fraction) / 0.25)
    longest = min(stage.max_terms, 3 + grown)
    return longest if rng.random() < 0.3 else rng.randint(2, longest)


def encode_worked_problems(
    tokenizer: PreTrainedTokenizerFast, problems: Sequence[ChainSumProblem]
) -> tuple[Tensor, Tensor]:
    """Ids (B, T) of `<bos> prompt response <eos>` and labels (B, T) with -100 on the prompt; one length per batch."""
    rows = tokenizer([problem.prompt + problem.response for problem in problems]).input_ids
    token_ids_B_T = torch.tensor([row + [tokenizer.eos_token_id] for row in rows])
    labels_B_T = token_ids_B_T.clone()
    labels_B_T[:, : 1 + len(problems[0].prompt)] = -100
    return token_ids_B_T, labels_B_T


@torch.no_grad()
def greedy_responses(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[ChainSumProblem],
    batch_size: int = 256,
) -> list[str]:
    """Greedy continuations of the prompts, at most 8 tokens longer than the longest worked response of a batch."""
    model.eval()
    responses = []
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        inputs = tokenizer([problem.prompt for problem in batch], padding=True, return_tensors="pt")
        limit = max(len(problem.response) for problem in batch) + 8
        output = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False, max_new_tokens=limit
        )
        responses += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return responses


def greedy_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[ChainSumProblem]
) -> float:
    """The share of problems whose greedy response ends in the right answer."""
    responses = greedy_responses(model, tokenizer, problems)
    correct = sum(extract_answer(text) == problem.answer for text, problem in zip(responses, problems, strict=True))
    return correct / len(problems)


def round_and_save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: Sequence[ChainSumProblem], folder: Path
) -> dict[str, object]:
    """Save in bf16 if that costs at most `MAX_BF16_ACCURACY_LOSS`, else in float32. Returns recipe.json's entry."""
    float32_accuracy = accuracy = greedy_accuracy(model, tokenizer, held_out)
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict({name: weight.bfloat16().float() for name, weight in model.state_dict().items()})
    bf16_accuracy = greedy_accuracy(rounded, tokenizer, held_out)
    dtype = torch.float32
    if bf16_accuracy >= float32_accuracy - MAX_BF16_ACCURACY_LOSS:
        model, dtype, accuracy = rounded, torch.bfloat16, bf16_accuracy
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(held_out)),
        "accuracy_before_rounding": float32_accuracy,
        "storage_dtype": str(dtype).removeprefix("torch."),
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }


def replace_folder(complete: Path, target: Path) -> None:
    """Rename `complete` to `target`, moving an older `target` out of the way first."""
    complete.chmod(0o755)  # mkdtemp makes it private
    if target.exists():
        retired = complete.with_name(complete.name + "-old")
        target.rename(retired)
        complete.rename(target)
        shutil.rmtree(retired)
    else:
        complete.rename(target)


if __name__ == "__main__":
    main()
