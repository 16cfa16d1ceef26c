"""The teacher of the demo: a copy of the student, fine-tuned on worked GSM8K solutions.

It is no stronger model. It has learnt the form of the solutions (short steps, `#### answer`) and a little of the task,
so it differs from the student enough for a distillation to show. Its accuracy is measured and printed with the rest.
"""

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esr_distill.complete_files import complete_folder, read_json, write_json
from esr_distill.config import DataConfig, OptimizerConfig
from esr_distill.hidden_states import output_head
from esr_distill.models import load_model, load_tokenizer
from esr_distill.prompts import PromptRecord, tokenize_prompts
from esr_distill.real_demo.gsm8k import Problem
from esr_distill.training_run import make_optimizer

BATCH_SIZE = 8
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, weight_decay=0.01)
IGNORED = -100
RECORD = "fine_tuning.json"
STEPS_BETWEEN_LINES = 10


def fine_tune_teacher(
    student: Path,
    folder: Path,
    problems: Sequence[Problem],
    data: DataConfig,
    console: Console,
    *,
    steps: int,
    device: torch.device,
    autocast: bool,
) -> dict:
    """Make the teacher at `folder` from the model at `student`, or keep the one that was made with the same settings.

    Takes `steps` batches of `BATCH_SIZE` problems in order. Returns the record beside the model: settings, the loss of
    each step, seconds.
    """
    settings = {"student": student.name, "steps": steps, "batch_size": BATCH_SIZE, "autocast": autocast}
    settings |= {"learning_rate": OPTIMIZER.learning_rate, "system_prompt": data.system_prompt}
    if (folder / RECORD).is_file() and read_json(folder / RECORD)["settings"] == settings:
        console.print(f"teacher: {folder} is there already, made with the same settings")
        return read_json(folder / RECORD)
    tokenizer = load_tokenizer(str(student), "student")
    model = load_model(str(student), "student", dtype="float32", attn_implementation="sdpa", device=device)
    rows = encode_solutions(tokenizer, problems, data)
    start = time.perf_counter()
    losses = fine_tune(model, rows, steps, pad_id=tokenizer.pad_token_id, autocast=autocast, console=console)
    record = {"settings": settings, "loss": losses, "seconds": time.perf_counter() - start}
    with complete_folder(folder) as partial:
        model.bfloat16().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / RECORD, record)
    return record


def encode_solutions(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], data: DataConfig
) -> list[tuple[list[int], list[int]]]:
    """Prompt ids, as the loop makes them, and response ids of each problem; a response ends with EOS."""
    prompts = tokenize_prompts(
        [PromptRecord(problem.question) for problem in problems],
        tokenizer,
        data,
        pad_id=tokenizer.pad_token_id,
        device=torch.device("cpu"),
    )
    responses = [tokenizer(problem.solution, add_special_tokens=False)["input_ids"] for problem in problems]
    eos_id = tokenizer.eos_token_id
    return [(prompt, [*response, eos_id]) for prompt, response in zip(prompts.token_ids, responses, strict=True)]


def make_batch(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded token ids, attention mask and labels, each (B, T).

    Labels are `IGNORED` on the prompt and on padding, and the token itself on the response, its EOS included, even
    where the pad id is the EOS id.
    """
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids, mask, labels = [], [], []
    for prompt, response in rows:
        padding = width - len(prompt) - len(response)
        ids.append(prompt + response + [pad_id] * padding)
        mask.append([1] * (width - padding) + [0] * padding)
        labels.append([IGNORED] * len(prompt) + response + [IGNORED] * padding)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


def fine_tune(
    model: PreTrainedModel,
    rows: Sequence[tuple[list[int], list[int]]],
    steps: int,
    *,
    pad_id: int,
    autocast: bool,
    console: Console,
) -> list[float]:
    """Train in place, step s on rows s * BATCH_SIZE and following; the loss of each step, before its update."""
    optimizer, scheduler = make_optimizer(model, OPTIMIZER, steps)
    losses = []
    with fine_tuning_progress(console) as progress:
        bar = progress.add_task("fine-tuning the teacher", total=steps, loss=math.nan)
        for step in range(steps):
            batch = make_batch(rows[step * BATCH_SIZE : (step + 1) * BATCH_SIZE], pad_id)
            # Autocast keeps its bfloat16 copies of the weights until it ends: it must not outlive a step.
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=autocast):
                loss = response_loss(model, *(tensor.to(model.device) for tensor in batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            progress.update(bar, advance=1, loss=losses[-1])
            if not console.is_terminal and (step + 1) % STEPS_BETWEEN_LINES == 0:
                console.print(f"fine-tuning the teacher: step {step + 1}  loss {losses[-1]:.4f}")
    return losses


def response_loss(model: PreTrainedModel, ids_B_T: Tensor, mask_B_T: Tensor, labels_B_T: Tensor) -> Tensor:
    """Mean cross-entropy over all labelled tokens of the batch; only the rows that predict one are projected."""
    hidden_B_T_D = model.base_model(input_ids=ids_B_T, attention_mask=mask_B_T, use_cache=False).last_hidden_state
    targets_B_S = labels_B_T[:, 1:]  # S = T - 1: column t predicts token t + 1
    labelled_B_S = targets_B_S != IGNORED
    logits_N_V = output_head(model).logits(hidden_B_T_D[:, :-1][labelled_B_S])
    return torch.nn.functional.cross_entropy(logits_N_V.float(), targets_B_S[labelled_B_S])


def fine_tuning_progress(console: Console) -> AbstractContextManager[Progress]:
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=24),
               TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn())  # fmt: skip
    return Progress(*columns, console=console, disable=not console.is_terminal)
