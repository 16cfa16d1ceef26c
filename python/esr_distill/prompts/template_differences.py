"""Do student and teacher write the same prompt as the same token ids? They share ids, not always a chat template."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from esr_distill.config import DataConfig
from esr_distill.input_error import InputError
from esr_distill.prompts.chat_prompts import PromptWriter


@dataclass(frozen=True)
class TemplateDifferences:
    """One prompt, written by both chat templates.

    Attributes:
        student_text, teacher_text: what each template writes, up to where the model's turn begins.
        student_ids, teacher_ids: the token ids that each model would read; None where there is no template or it refuses the
            messages.
        student_error, teacher_error: why there are no ids.
    """

    student_text: str | None
    teacher_text: str | None
    student_ids: list[int] | None
    teacher_ids: list[int] | None
    student_error: str | None
    teacher_error: str | None

    @property
    def are_equal(self) -> bool:
        """Both models would read the same ids."""
        return self.student_ids is not None and self.student_ids == self.teacher_ids

    @property
    def first_difference(self) -> int | None:
        """Index of the first token that differs, or where the shorter one ends; None where nothing can be compared."""
        if self.student_ids is None or self.teacher_ids is None or self.are_equal:
            return None
        pairs = zip(self.student_ids, self.teacher_ids, strict=False)
        shorter = min(len(self.student_ids), len(self.teacher_ids))
        return next((index for index, (student, teacher) in enumerate(pairs) if student != teacher), shorter)

    def describe(self) -> str:
        """One sentence for a reader."""
        if self.are_equal:
            return f"student and teacher write the prompt as the same {len(self.student_ids)} tokens"
        for who, error in (("student", self.student_error), ("teacher", self.teacher_error)):
            if error is not None:
                return f"the {who} has no prompt to compare: {error}"
        return (
            f"student and teacher write the prompt differently from token {self.first_difference} on: "
            f"{self.student_text!r} and {self.teacher_text!r}"
        )


def template_differences(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    data: DataConfig | None = None,
) -> TemplateDifferences:
    """Write the same messages with both tokenizers' chat templates and compare the ids.

    `data` gives system prompt, thinking mode, template arguments and response prefix.
    """
    data = data or DataConfig(prompts="messages")
    student, teacher = (_written(tokenizer, messages, data) for tokenizer in (student_tokenizer, teacher_tokenizer))
    return TemplateDifferences(student[0], teacher[0], student[1], teacher[1], student[2], teacher[2])


def _written(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], data: DataConfig
) -> tuple[str | None, list[int] | None, str | None]:
    writer = PromptWriter(tokenizer, data, "the messages")
    try:
        writer.is_chat(messages)
        return writer.chat_text(messages) + (data.response_prefix or ""), writer.token_ids(messages), None
    except InputError as error:
        return None, None, str(error)
