"""The prompts."""

from dataclasses import dataclass
from typing import Literal

from esr_distill.config.require import require


@dataclass(frozen=True)
class DataConfig:
    """The prompts.

    Args:
        prompts: JSONL file (.jsonl, .jsonl.xz or .jsonl.gz); each line has "prompt", a text or a list of chat messages.
        chat_template: Wrap text prompts as one user message in the tokenizer's chat template.
        system_prompt: System message put before every chat prompt.
        max_prompt_tokens: Longest prompt allowed; unset means whatever fits into both models' context.
        long_prompts: What to do with longer prompts, stop with an error or drop them and say how many.
    """

    prompts: str = ""
    chat_template: bool = True
    system_prompt: str | None = None
    max_prompt_tokens: int | None = None
    long_prompts: Literal["error", "drop"] = "error"

    def __post_init__(self) -> None:
        require(bool(self.prompts), "data.prompts", "the path of a JSONL file", self.prompts)
        limit = self.max_prompt_tokens
        require(limit is None or limit >= 1, "data.max_prompt_tokens", ">= 1 or unset", limit)
        require(
            self.system_prompt is None or self.chat_template,
            "data.system_prompt",
            "unset when data.chat_template is false",
            self.system_prompt,
        )
