"""Sample rollouts of a step: rows of samples.jsonl, and a table to look at."""

import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from esr_distill.json_numbers import finite_or_none
from esr_distill.prefix_positions import PrefixPositions
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_kernels import DivergenceOutput

SAMPLES_FILE = "samples.jsonl"


class SampleWatch:
    """Keeps the first rollouts of a step as rows:

        watch = SampleWatch(tokenizer, step, count)
        train_step(run, step - 1, horizon, watch)
        watch.rows

    A row holds the prompt as the student read it and the rollout, both with their special tokens; the rollout's tokens; how many
    of them were scored; the mean divergence of those in nats, None where none was; and whether it ended by itself or was cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, step: int, count: int) -> None:
        self.tokenizer, self.step, self.count = tokenizer, step, count
        self.rows: list[dict] = []

    def __call__(self, rollouts: RolloutBatch, positions: PrefixPositions, divergence: DivergenceOutput) -> None:
        means_B, scored_B = mean_by_rollout(divergence.divergence_N.detach(), positions.row_N, rollouts.batch_size)
        lengths_B = rollouts.response_lengths_B.tolist()
        for row in range(min(self.count, rollouts.batch_size)):
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
                }
            )


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
