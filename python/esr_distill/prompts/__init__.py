"""Left-padded batches of prompts. Which prompts make a step's batch is a function of the seed and the step alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esr_distill.input_error import InputError
from esr_distill.prompts.prompt_encoder import tokenize_prompts
from esr_distill.prompts.prompt_set import PromptSet
from esr_distill.prompts.prompt_sources import PromptRecord, read_prompt_file
from esr_distill.prompts.prompt_stream import PromptStream

__all__ = [
    "PromptBatch",
    "PromptRecord",
    "PromptSet",
    "PromptStream",
    "next_prompt_batch",
    "pad_prompts",
    "rank_rows",
    "read_prompt_file",
    "tokenize_prompts",
]


@dataclass(frozen=True)
class PromptBatch:
    """B tokenised prompts, padded on the left.

    Attributes:
        prompt_ids_B_P: (B, P) int64.
        prompt_mask_B_P: (B, P) bool, True at prompt tokens.
        request_ids_B: (B,) int64, the number of each rollout in the run; with the seed it names the row's random stream.
        samples_per_prompt: this many rows in a row hold the same prompt, so that it is read once.
        teacher_prompts: what the teacher reads instead, row by row; None where it reads the same.
        columns_B: the other columns of each row's prompt, by name; None where none were read.
    """

    prompt_ids_B_P: Tensor
    prompt_mask_B_P: Tensor
    request_ids_B: Tensor
    samples_per_prompt: int = 1
    teacher_prompts: "PromptBatch | None" = None
    columns_B: list[dict] | None = None

    @property
    def for_teacher(self) -> "PromptBatch":
        """What the teacher reads."""
        return self if self.teacher_prompts is None else self.teacher_prompts


def next_prompt_batch(
    prompts: PromptSet | PromptStream,
    batch_size: int,
    step: int,
    seed: int,
    samples_per_prompt: int = 1,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> PromptBatch:
    """The batch of training step `step` (0-based). A function of its arguments alone, so resuming needs no saved state.

    Prompts take turns: step s has the turns from s m to (s + 1) m - 1, with m = batch_size / samples_per_prompt. Of n prompts,
    turns e n to (e + 1) n - 1 are epoch e, a permutation of all of them drawn from (seed, e); a batch may cross from one
    epoch to the next. A stream permutes window by window instead. Each prompt fills `samples_per_prompt` rows, which are
    requests of their own.

    `batch_size` is that of all ranks together. Rank r gets the r-th part of the same batch, whatever the world size is: other
    turns than every other rank, and the request ids, hence the random streams, that these rows have on one rank.
    """
    rows = rank_rows(batch_size, samples_per_prompt, rank, world_size)
    first = step * batch_size
    # Every rank takes the whole batch from a stream, so that all of them meet a bad prompt in the same step.
    chosen = prompts.at_turns([(first + row) // samples_per_prompt for row in range(batch_size)], seed)
    return pad_prompts(chosen, rows, [first + row for row in rows], samples_per_prompt)


def rank_rows(batch_size: int, samples_per_prompt: int, rank: int, world_size: int) -> range:
    """The rows of the global batch that a rank works on: whole prompts with all their samples, in the global order.

    Raises:
        InputError: the prompts of a batch do not divide evenly.
    """
    if not 0 <= rank < world_size:
        raise InputError(f"rank must be in [0, {world_size}), got {rank}")
    if batch_size % (samples_per_prompt * world_size):
        raise InputError(
            f"rollout.batch_size must be a multiple of rollout.samples_per_prompt = {samples_per_prompt} "
            f"times the number of processes = {world_size}, got {batch_size}"
        )
    share = batch_size // world_size
    return range(rank * share, (rank + 1) * share)


def pad_prompts(
    prompts: PromptSet, indices: Sequence[int], request_ids: Sequence[int], samples_per_prompt: int = 1
) -> PromptBatch:
    """Left-pad the chosen prompts to the longest of them, and those of the teacher to the longest of theirs."""
    request_ids_B = torch.tensor(list(request_ids), device=prompts.device)

    def padded(token_ids: list[list[int]], **more) -> PromptBatch:
        rows = [token_ids[i] for i in indices]
        width = max(len(row) for row in rows)
        ids = [[prompts.pad_id] * (width - len(row)) + row for row in rows]
        mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
        ids_B_P, mask_B_P = torch.tensor(ids, device=prompts.device), torch.tensor(mask, device=prompts.device)
        return PromptBatch(ids_B_P, mask_B_P, request_ids_B, samples_per_prompt, **more)

    teacher_ids, columns = prompts.teacher_token_ids, prompts.columns
    return padded(
        prompts.token_ids,
        teacher_prompts=None if teacher_ids is None else padded(teacher_ids),
        columns_B=None if columns is None else [columns[i] for i in indices],
    )
