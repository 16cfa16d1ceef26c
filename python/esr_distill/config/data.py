"""The prompts."""

from dataclasses import dataclass, field
from typing import Any, Literal

from esr_distill.config.require import require

PRIVILEGED_TEMPLATE = "{prompt}\n\n{privileged_context}"
# Arguments of a chat template that the loop gives it by itself.
OWN_TEMPLATE_ARGUMENTS = (
    "messages",
    "conversation",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "enable_thinking",
)


@dataclass(frozen=True)
class DataConfig:
    """The prompts.

    Args:
        prompts: JSONL file (.jsonl, .jsonl.xz or .jsonl.gz); parquet file; folder of parquet files, or a pattern of files such as
            "data/*.parquet"; folder saved by datasets; data set of the hub, owner/name or hf://NAME or hf://NAME@REVISION.
        chat_template: Wrap text prompts as one user message in the tokenizer's chat template.
        system_prompt: System message put before every chat prompt; an error for a prompt that has its own.
        max_prompt_tokens: Longest prompt allowed; unset means whatever fits into both models' context.
        long_prompts: What to do with longer prompts, stop with an error or drop them and say how many.
        prompt_column: Column with the prompts, each a text or a list of chat messages with role and content.
        keep_columns: Columns kept beside prompt and answer; unset keeps all.
        split: Split of a data set of datasets; unset is train.
        dataset_config: Configuration of a data set of the hub.
        stream_prompts: Read prompts while training, this many at a time, instead of all before it; their order is drawn within
            each such window.
        enable_thinking: Passed to the chat template as enable_thinking; unset leaves the template its default.
        chat_template_kwargs: More arguments of the chat template, by name.
        response_prefix: Text put after the generation prompt, or after a plain prompt, for both models; it does not train.
        teacher_template: Whose chat template the teacher's prompts are written in.
        privileged_column: Column with a text that only the teacher sees.
        privileged_template: How the teacher's prompt, or the last user message of it, is made of {prompt} and
            {privileged_context}.
    """

    prompts: str = ""
    chat_template: bool = True
    system_prompt: str | None = None
    max_prompt_tokens: int | None = None
    long_prompts: Literal["error", "drop"] = "error"
    prompt_column: str = "prompt"
    keep_columns: list[str] | None = None
    split: str | None = None
    dataset_config: str | None = None
    stream_prompts: int | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    response_prefix: str | None = None
    teacher_template: Literal["student", "teacher"] = "student"
    privileged_column: str | None = None
    privileged_template: str = PRIVILEGED_TEMPLATE

    def __post_init__(self) -> None:
        sources = (
            "the path of a JSONL file, of parquet files or of a folder saved by datasets, or a data set of the hub"
        )
        require(bool(self.prompts), "data.prompts", sources, self.prompts)
        for name in ("max_prompt_tokens", "stream_prompts"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name}", ">= 1 or unset", value)
        for name in ("split", "dataset_config", "response_prefix", "privileged_column"):
            require(getattr(self, name) != "", f"data.{name}", "a text or unset", "")
        self._check_columns()
        self._check_template()

    def _check_columns(self) -> None:
        require(bool(self.prompt_column), "data.prompt_column", "the name of a column", self.prompt_column)
        privileged, template = self.privileged_column, self.privileged_template
        taken = ("answer", self.prompt_column)
        require(privileged not in taken, "data.privileged_column", f"another column than {taken}", privileged)
        require(
            "{privileged_context}" in template, "data.privileged_template", "a text with {privileged_context}", template
        )
        require(
            privileged is not None or template == PRIVILEGED_TEMPLATE,
            "data.privileged_template",
            "unset unless data.privileged_column is set",
            template,
        )

    def _check_template(self) -> None:
        for name in ("system_prompt", "enable_thinking"):
            value = getattr(self, name)
            require(
                value is None or self.chat_template, f"data.{name}", "unset when data.chat_template is false", value
            )
        arguments = self.chat_template_kwargs
        require(
            not arguments or self.chat_template,
            "data.chat_template_kwargs",
            "unset when data.chat_template is false",
            arguments,
        )
        own = [name for name in OWN_TEMPLATE_ARGUMENTS if name in arguments]
        must_be = "without the arguments that the loop gives by itself (data.enable_thinking is one)"
        require(not own, "data.chat_template_kwargs", must_be, own)

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What the chat template is given beside the messages."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return self.chat_template_kwargs | thinking

    @property
    def has_teacher_prompts(self) -> bool:
        """Whether the teacher may read other prompts than the student."""
        return self.privileged_column is not None or self.teacher_template == "teacher"
