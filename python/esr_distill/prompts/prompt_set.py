"""Prompts as token ids, in an order that depends only on the seed."""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class PromptSet:
    """Prompts as token ids, with what batching needs.

    Attributes:
        answers: expected answers, None where there is none.
        pad_id: fills the columns before a prompt.
        teacher_token_ids: what the teacher reads instead; None where it reads the same.
        columns: the other columns of each prompt, by name; None where none were read.
    """

    token_ids: list[list[int]]
    answers: list[str | None]
    pad_id: int
    device: torch.device
    teacher_token_ids: list[list[int]] | None = None
    columns: list[dict] | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt, of the longer one where the teacher reads another."""
        others = self.token_ids if self.teacher_token_ids is None else self.teacher_token_ids
        return [max(len(ids), len(other)) for ids, other in zip(self.token_ids, others, strict=True)]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids in their order, of both models' where they differ."""
        ids = self.token_ids if self.teacher_token_ids is None else [self.token_ids, self.teacher_token_ids]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    def digest_before(self, turns: int) -> str:
        """SHA-256 of the prompts that the first `turns` turns are drawn from: of all."""
        return self.digest

    def subset(self, indices: Iterable[int]) -> "PromptSet":
        """The prompts of these indices, in their order."""
        indices = list(indices)

        def chosen(values: list | None) -> list | None:
            return None if values is None else [values[i] for i in indices]

        return replace(
            self,
            token_ids=chosen(self.token_ids),
            answers=chosen(self.answers),
            teacher_token_ids=chosen(self.teacher_token_ids),
            columns=chosen(self.columns),
        )

    def first(self, count: int) -> "PromptSet":
        """The first `count` prompts, or all where there are fewer."""
        return self.subset(range(min(count, len(self.token_ids))))

    def at_turns(self, turns: Sequence[int], seed: int) -> "PromptSet":
        """The prompts whose turn it is: turn i is place i % n of epoch i // n, whose order is drawn from (seed, epoch)."""
        count = len(self.token_ids)
        return self.subset(epoch_order(count, seed, turn // count)[turn % count] for turn in turns)

    @classmethod
    def join(cls, parts: Sequence["PromptSet"]) -> "PromptSet":
        """The prompts of all parts, which were made alike."""

        def joined(name: str) -> list | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else [item for value in values for item in value]

        names = ("token_ids", "answers", "teacher_token_ids", "columns")
        return replace(parts[0], **{name: joined(name) for name in names})


@functools.lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of `count` prompts in one epoch: a permutation that is a function of (count, seed, epoch) alone."""
    # manual_seed mixes its argument, so neighbouring sums give unrelated orders; it takes 64 bits.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**64)
    return tuple(torch.randperm(count, generator=generator).tolist())
