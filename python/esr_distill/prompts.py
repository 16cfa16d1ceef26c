"""From a JSONL file to left-padded batches of prompt ids, in an order that depends only on the seed."""

import gzip
import hashlib
import json
import lzma
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from esr_distill.config import DataConfig
from esr_distill.input_error import InputError

OPENERS = {".xz": lzma.open, ".gz": gzip.open}


@dataclass(frozen=True)
class PromptRecord:
    """One line of a prompt file: a text or chat messages, and the expected answer where there is one."""

    prompt: str | list
    answer: str | None = None


@dataclass(frozen=True)
class PromptBatch:
    """B tokenised prompts, padded on the left.

    Attributes:
        prompt_ids_B_P: (B, P) int64.
        prompt_mask_B_P: (B, P) bool, True at prompt tokens.
        request_ids_B: (B,) int64, the number of each rollout in the run; with the seed it names the row's random stream.
        samples_per_prompt: this many rows in a row hold the same prompt, so that it is read once.
    """

    prompt_ids_B_P: Tensor
    prompt_mask_B_P: Tensor
    request_ids_B: Tensor
    samples_per_prompt: int = 1


@dataclass(frozen=True)
class PromptSet:
    """All prompts of a file as token ids, with what batching needs."""

    token_ids: list[list[int]]
    answers: list[str | None]
    pad_id: int
    device: torch.device

    @property
    def longest(self) -> int:
        return max(len(ids) for ids in self.token_ids)

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids in their order."""
        return hashlib.sha256(json.dumps(self.token_ids).encode()).hexdigest()


def read_prompt_file(path: str | Path, option: str) -> list[PromptRecord]:
    """Read a JSONL file. `option` is the name of the option that gave the path, for messages.

    Raises:
        InputError: no such file, no UTF-8 text, no lines, or a line that is not an object with a "prompt".
    """
    path = Path(path)
    if not path.is_file():
        found = "is no file" if path.exists() else "does not exist"
        raise InputError(f"{option} must be a JSONL file, got {str(path)!r}, which {found}")
    records = []
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    records.append(_parse_line(line, f"{option}: {path}, line {number}"))
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{option} must be a readable JSONL file, got {str(path)!r} ({error})") from None
    if not records:
        raise InputError(f"{option} must hold at least one prompt, got {str(path)!r}, which is empty")
    return records


def _parse_line(line: str, where: str) -> PromptRecord:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} must be JSON, got {line.strip()[:60]!r} ({error.msg})") from None
    prompt = fields.get("prompt") if isinstance(fields, dict) else None
    is_messages = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)
    if not (isinstance(prompt, str) or is_messages) or not prompt:
        raise InputError(
            f'{where} must be an object with a non-empty "prompt" (text or messages), got {line.strip()[:60]!r}'
        )
    answer = fields.get("answer")
    return PromptRecord(prompt, None if answer is None else str(answer))


def tokenize_prompts(
    records: list[PromptRecord],
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    pad_id: int,
    device: torch.device,
    option: str = "data.prompts",
) -> PromptSet:
    """Tokenise every prompt, through the chat template where `data` or the record asks for it.

    `option` is the name of the option that gave the prompts, for messages.

    Raises:
        InputError: a chat template is wanted and the tokenizer has none or it refuses the messages, or a prompt gives
            no token.
    """
    try:
        token_ids = [_prompt_ids(record, tokenizer, data, option) for record in records]
    except InputError:
        raise
    except Exception as error:  # tokenizers raises nothing more special for a character that it does not know
        raise InputError(
            f"{option} must hold text that the tokenizer can split, got an error from it ({error})"
        ) from error
    for record, ids in zip(records, token_ids, strict=True):
        if not ids:
            raise InputError(f"{option}: a prompt must give at least one token, got none for {record.prompt!r}")
    return PromptSet(token_ids, [record.answer for record in records], pad_id, device)


def _prompt_ids(record: PromptRecord, tokenizer: PreTrainedTokenizerBase, data: DataConfig, option: str) -> list[int]:
    is_messages = isinstance(record.prompt, list)
    if not (data.chat_template or is_messages):
        return tokenizer(record.prompt)["input_ids"]
    if not tokenizer.chat_template:
        name = type(tokenizer).__name__
        if is_messages:
            raise InputError(f"{option} must hold texts for a tokenizer without a chat template, got messages ({name})")
        raise InputError(
            f"data.chat_template must be false for a tokenizer without a chat template, got true ({name} has none)"
        )
    messages = record.prompt if is_messages else [{"role": "user", "content": record.prompt}]
    if data.system_prompt is not None:
        messages = [{"role": "system", "content": data.system_prompt}, *messages]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise InputError(f"{option} must suit the tokenizer's chat template, got {messages!r} ({error})") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def next_prompt_batch(
    prompts: PromptSet, batch_size: int, step: int, seed: int, samples_per_prompt: int = 1
) -> PromptBatch:
    """The batch of training step `step` (0-based). A function of its arguments alone, so resuming needs no saved state.

    Every epoch is a permutation of the file drawn from (seed, epoch); a batch may cross from one epoch to the next. Each prompt
    fills `samples_per_prompt` rows, which are requests of their own.
    """
    request_ids = range(step * batch_size, (step + 1) * batch_size)
    count = len(prompts.token_ids)
    turns = [i // samples_per_prompt for i in request_ids]
    orders = {epoch: _epoch_order(count, seed, epoch) for epoch in {i // count for i in turns}}
    batch = pad_prompts(prompts, [orders[i // count][i % count] for i in turns], list(request_ids))
    return replace(batch, samples_per_prompt=samples_per_prompt)


def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    # manual_seed mixes its argument, so neighbouring sums give unrelated orders; it takes 64 bits.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**64)
    return torch.randperm(count, generator=generator).tolist()


def pad_prompts(prompts: PromptSet, indices: list[int], request_ids: list[int]) -> PromptBatch:
    """Left-pad the chosen prompts to the longest of them."""
    rows = [prompts.token_ids[i] for i in indices]
    width = max(len(row) for row in rows)
    ids = [[prompts.pad_id] * (width - len(row)) + row for row in rows]
    mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    return PromptBatch(
        torch.tensor(ids, device=prompts.device),
        torch.tensor(mask, device=prompts.device),
        torch.tensor(request_ids, device=prompts.device),
    )
