"""From records to token ids, the student's and, where it reads another prompt, the teacher's."""

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from esr_distill.config import DataConfig
from esr_distill.input_error import InputError
from esr_distill.prompts.chat_prompts import PromptWriter, check_template_arguments
from esr_distill.prompts.prompt_set import PromptSet
from esr_distill.prompts.prompt_sources import PromptRecord

PLACEHOLDERS = re.compile(r"\{(prompt|privileged_context)\}")


class PromptEncoder:
    """Tokenises records with the options of the data group, any number at a time.

    With a `teacher_tokenizer` the teacher gets prompts of its own where `data` asks for them (`data.privileged_column`,
    `data.teacher_template`); without one there are only the student's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        *,
        pad_id: int,
        device: torch.device,
        option: str = "data.prompts",
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.data, self.option, self.pad_id, self.device = data, option, pad_id, device
        self.student_writer = PromptWriter(tokenizer, data, option)
        self.teacher_writer = None
        if teacher_tokenizer is not None and data.has_teacher_prompts:
            is_own = data.teacher_template == "teacher"
            self.teacher_writer = PromptWriter(teacher_tokenizer if is_own else tokenizer, data, option)
        self._has_checked_arguments = False

    def encode(self, records: Sequence[PromptRecord]) -> PromptSet:
        """Every record as token ids.

        Raises:
            InputError: a chat template is wanted and there is none, it refuses the messages, or it does not read an argument that
                it is given; a prompt gives no token; the teacher's context is missing.
        """
        token_ids = [self._ids(self.student_writer, record.prompt) for record in records]
        teacher_ids = None
        if self.teacher_writer is not None:
            prompts = [teacher_prompt(record, self.data, self.option) for record in records]
            teacher_ids = [self._ids(self.teacher_writer, prompt) for prompt in prompts]
        return PromptSet(
            token_ids,
            [record.answer for record in records],
            self.pad_id,
            self.device,
            teacher_ids,
            [record.columns for record in records],
        )

    def _ids(self, writer: PromptWriter, prompt: str | list[dict]) -> list[int]:
        if not self._has_checked_arguments and writer.is_chat(prompt):
            self._check_template_arguments()
        try:
            ids = writer.token_ids(prompt)
        except InputError:
            raise
        except Exception as error:  # tokenizers raises nothing more special for a character that it does not know
            raise InputError(
                f"{self.option} must hold text that the tokenizer can split, got an error from it ({error})"
            ) from error
        if not ids:
            raise InputError(f"{self.option}: a prompt must give at least one token, got none for {prompt!r}")
        return ids

    def _check_template_arguments(self) -> None:
        teacher = self.teacher_writer
        if teacher is not None and not teacher.tokenizer.chat_template and self.student_writer.tokenizer.chat_template:
            name = type(teacher.tokenizer).__name__
            raise InputError(
                f"data.teacher_template must be student for a teacher without a chat template, got 'teacher' ({name})"
            )
        # Without a teacher here (evaluation) an argument may be meant for the teacher's template alone.
        if teacher is not None or self.data.teacher_template == "student":
            check_template_arguments(self.data, [self.student_writer, *filter(None, [teacher])])
        self._has_checked_arguments = True


def teacher_prompt(record: PromptRecord, data: DataConfig, option: str) -> str | list[dict]:
    """The prompt with the privileged context in it: in the text, or in the last message of the user.

    Raises:
        InputError: there is no such context, or no message of the user.
    """
    if data.privileged_column is None:
        return record.prompt
    if record.privileged_context is None:
        raise InputError(f"{option} must have a column {data.privileged_column!r} (data.privileged_column), got none")

    def filled(prompt: str) -> str:
        values = {"prompt": prompt, "privileged_context": record.privileged_context}
        return PLACEHOLDERS.sub(lambda found: values[found[1]], data.privileged_template)

    if isinstance(record.prompt, str):
        return filled(record.prompt)
    last = max((i for i, message in enumerate(record.prompt) if message["role"] == "user"), default=None)
    if last is None:
        raise InputError(f"{option} must have a message of the user for data.privileged_column, got {record.prompt!r}")
    messages = list(record.prompt)
    messages[last] = messages[last] | {"content": filled(messages[last]["content"])}
    return messages


def tokenize_prompts(
    records: Sequence[PromptRecord],
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    pad_id: int,
    device: torch.device,
    option: str = "data.prompts",
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> PromptSet:
    """All records at once, as `PromptEncoder` does it.

    `option` is the name of the option that gave the prompts, for messages.
    """
    encoder = PromptEncoder(
        tokenizer, data, pad_id=pad_id, device=device, option=option, teacher_tokenizer=teacher_tokenizer
    )
    return encoder.encode(records)
