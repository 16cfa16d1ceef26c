"""Sample rollouts of a step: rows of samples.jsonl, and a table to look at."""

import json

import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from esr_distill.json_numbers import finite_or_none
from esr_distill.prefix_positions import PrefixPositions
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_distill.training_run import TrainingRun
from esr_kernels import DivergenceOutput

SAMPLES_FILE = "samples.jsonl"


class SampleWatch:
    """Keeps the first rollouts of a step as rows:

        watch = SampleWatch.of(run, step)
        train_step(run, step - 1, horizon, watch)
        watch.rows

    A row holds the prompt as the student read it and the rollout, both with their special tokens; the rollout's tokens; how many
    of them were scored; the mean divergence of those in nats, None where none was; whether it ended by itself or was cut; and,
    where the prompts have other columns, the prompt's values of those, as far as they are JSON values.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, step: int, count: int, columns_B: list[dict] | None = None
    ) -> None:
        self.tokenizer, self.step, self.count, self.columns_B = tokenizer, step, count, columns_B
        self.rows: list[dict] = []

    @classmethod
    def of(cls, run: TrainingRun, step: int) -> "SampleWatch":
        """Of `monitoring.samples` rollouts of step `step`, which counts from 1."""
        config, count = run.config, run.config.monitoring.samples
        return cls(run.tokenizer, step, count, columns_of_step(run, step, min(count, config.rollout.batch_size)))

    def __call__(self, rollouts: RolloutBatch, positions: PrefixPositions, divergence: DivergenceOutput) -> None:
        means_B, scored_B = mean_by_rollout(divergence.divergence_N.detach(), positions.row_N, rollouts.batch_size)
        lengths_B = rollouts.response_lengths_B.tolist()
        for row in range(min(self.count, rollouts.batch_size)):
            columns = {} if self.columns_B is None else json_values(self.columns_B[row])
            prompt_P = rollouts.token_ids_B_T[row, : rollouts.prompt_width]
            is_prompt_P = rollouts.attention_mask_B_T[row, : rollouts.prompt_width].bool()
            self.rows.append(
                {
                    "kind": "sample",
                    "step": self.step,
                    "prompt": self.tokenizer.decode(prompt_P[is_prompt_P].tolist()),
                    "rollout": self.tokenizer.decode(rollouts.response_ids_B_K[row, : lengths_B[row]].tolist()),
                    "tokens": lengths_B[row],
                    "scored_tokens": scored_B[row],
                    "divergence": finite_or_none(means_B[row]) if scored_B[row] else None,
                    "finished": bool(rollouts.stopped_by_eos_B[row]),
                    **({"columns": columns} if columns else {}),
                }
            )


def columns_of_step(run: TrainingRun, step: int, count: int) -> list[dict] | None:
    """The other columns of the prompts of a step's first `count` rollouts; None where the prompts have none.

    What a step shows its watch are rollouts, of all processes; whose prompts they answer is a function of the step.
    """
    rollout = run.config.rollout
    requests = range((step - 1) * rollout.batch_size, (step - 1) * rollout.batch_size + count)
    return run.prompts.at_turns([i // rollout.samples_per_prompt for i in requests], run.config.run.seed).columns


def json_values(columns: dict) -> dict:
    """The columns that a JSON file can hold; parquet files may have others, such as bytes and dates."""
    return {name: value for name, value in columns.items() if is_json(value)}


def is_json(value: object) -> bool:
    try:
        json.dumps(finite_or_none(value))
    except (TypeError, ValueError):
        return False
    return True


def mean_by_rollout(value_N: torch.Tensor, row_N: torch.Tensor, batch_size: int) -> tuple[list[float], list[int]]:
    """Mean of a value over the positions of each rollout (NaN without one), and their number."""
    sums_B = torch.zeros(batch_size, dtype=torch.float64, device=value_N.device).index_add_(0, row_N, value_N.double())
    counts_B = torch.bincount(row_N, minlength=batch_size)
    return (sums_B / counts_B).tolist(), counts_B.tolist()


def sample_table(rows: list[dict], width: int) -> Table:
    """The rows of one step; texts are cut to `width` characters."""
    table = Table(title=f"rollouts of step {rows[0]['step']}", show_lines=True)
    for name in ("prompt", "rollout"):
        table.add_column(name, overflow="fold", ratio=1)
    for name in ("tokens", "divergence a token", "end"):
        table.add_column(name, justify="right")
    for row in rows:
        divergence = row["divergence"]
        table.add_row(
            Text(cut(row["prompt"], width)),  # Text: brackets in it are no markup
            Text(cut(row["rollout"], width)),
            str(row["tokens"]),
            "-" if divergence is None else f"{divergence:.3f}",
            "finished" if row["finished"] else "cut",
        )
    return table


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
