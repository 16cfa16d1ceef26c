"""From a prompt to the token ids that a model reads: chat template, system prompt, thinking mode, response prefix."""

import re
from dataclasses import dataclass, field

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from esr_distill.config import DataConfig
from esr_distill.input_error import InputError

# Arguments that apply_chat_template has itself; all others are variables of the template.
TEMPLATE_INPUTS = ("tools", "documents", "chat_template")
# A reply that no template changes, put where the model's own would stand.
PROBE = "REPLY0BEGINS0HERE"


@dataclass
class PromptWriter:
    """Writes prompts for one tokenizer with the options of the data group.

    `option` is the name of the option that gave the prompts, for messages. The first chat prompt shows what the template
    writes where the model's turn begins (the generation prompt), and every later one must end in the same.
    """

    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    option: str = "data.prompts"
    _generation_prompt: str | None = field(default=None, init=False, repr=False)

    def token_ids(self, prompt: str | list[dict]) -> list[int]:
        """Raises InputError where the prompt needs a chat template that the tokenizer lacks or that refuses it."""
        # A template writes the special tokens by itself; for a plain text the tokenizer adds them.
        is_chat = self.is_chat(prompt)
        text = self.chat_text(prompt) if is_chat else prompt
        text += self.data.response_prefix or ""
        return self.tokenizer(text, add_special_tokens=not is_chat)["input_ids"]

    def is_chat(self, prompt: str | list[dict]) -> bool:
        """Whether the prompt goes through the chat template.

        Raises:
            InputError: it must, and there is none.
        """
        is_messages = isinstance(prompt, list)
        if not (self.data.chat_template or is_messages):
            return False
        if not (self.tokenizer.chat_template or "chat_template" in self.data.chat_template_kwargs):
            name = type(self.tokenizer).__name__
            if is_messages:
                raise InputError(
                    f"{self.option} must hold texts for a tokenizer without a chat template, got messages ({name})"
                )
            raise InputError(
                f"data.chat_template must be false for a tokenizer without a chat template, got true ({name} has none)"
            )
        return True

    def chat_text(self, prompt: str | list[dict]) -> str:
        """The prompt in the template's words, up to where the model's turn begins.

        Raises:
            InputError: the template refuses the messages, leaves their text out, does not end in a generation prompt, or writes
                the response prefix by itself.
        """
        messages = chat_messages(prompt, self.data.system_prompt)
        text = self._render(messages, is_generation=True)
        if self._generation_prompt is None:
            self._generation_prompt = self._find_generation_prompt(messages, text)
            self._check_content(messages, text)
        if not text.endswith(self._generation_prompt):
            raise InputError(
                f"{self.option} must end in the generation prompt {self._generation_prompt!r} that the chat template "
                f"writes for the first prompt, got {text[-60:]!r}"
            )
        prefix = self.data.response_prefix
        if prefix is not None and text.endswith(prefix):
            raise InputError(
                f"data.response_prefix must not repeat what the chat template writes at the end, got {prefix!r} "
                f"after {text[-60:]!r}"
            )
        return text

    def template(self) -> str:
        """The source of the template that is used.

        Raises:
            InputError: the tokenizer has several, and none is chosen.
        """
        arguments = self.data.chat_template_kwargs
        try:
            return self.tokenizer.get_chat_template(arguments.get("chat_template"), arguments.get("tools"))
        except ValueError as error:
            raise InputError(
                f"data.chat_template_kwargs must choose a chat template, got {arguments} ({error})"
            ) from None

    def _render(self, messages: list[dict], *, is_generation: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=is_generation, tokenize=False, **self.data.template_arguments
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(
                f"{self.option} must suit the tokenizer's chat template, got {messages!r} ({error})"
            ) from None

    def _check_content(self, messages: list[dict], text: str) -> None:
        # Templates for images take a message apart into pieces and write nothing where it is a plain text.
        last = messages[-1]["content"].strip()
        if text and last not in text:
            raise InputError(
                f"the tokenizer's chat template must write the text of a message, got {text[-60:]!r} for {last[:60]!r}"
            )

    def _find_generation_prompt(self, messages: list[dict], text: str) -> str:
        """What the template adds where a reply is asked for; "" where it adds nothing, since a reply follows directly."""
        without = self._render(messages, is_generation=False)
        if text != without and text.startswith(without):
            return text[len(without) :]
        try:
            with_reply = self._render([*messages, {"role": "assistant", "content": PROBE}], is_generation=False)
        except InputError:
            with_reply = ""
        if not text or with_reply.startswith(text) and with_reply[len(text) :].lstrip().startswith(PROBE):
            return ""
        raise InputError(
            f"the tokenizer's chat template must end in a generation prompt when add_generation_prompt is true, "
            f"got {text[-60:]!r}"
        )


def chat_messages(prompt: str | list[dict], system_prompt: str | None) -> list[dict]:
    """The prompt as messages, behind the system prompt where there is one.

    Raises:
        InputError: the prompt has a system message of its own.
    """
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if system_prompt is None:
        return messages
    own = [message["content"] for message in messages if message["role"] == "system"]
    if own:
        raise InputError(
            f"data.system_prompt must be unset for prompts with a system message of their own, got {system_prompt!r} before "
            f"{own[0]!r}"
        )
    return [{"role": "system", "content": system_prompt}, *messages]


def check_template_arguments(data: DataConfig, writers: list[PromptWriter]) -> None:
    """Every argument that `data` gives to chat templates is read by one of the templates in use.

    Raises:
        InputError: one is not, so that it would change nothing.
    """
    templates = [writer.template() for writer in writers]
    for name, value in data.template_arguments.items():
        if name in TEMPLATE_INPUTS or any(re.search(rf"\b{re.escape(name)}\b", template) for template in templates):
            continue
        if name == "enable_thinking":
            raise InputError(
                f"data.enable_thinking must be unset for a chat template that does not read it, got {value}"
            )
        raise InputError(f"data.chat_template_kwargs must hold variables of the chat template, got {name!r}")
