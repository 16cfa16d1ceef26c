"""What both chat templates make of the first prompt: the ids, where the model's turn begins, and how it ends."""

import re
from dataclasses import replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from esr_distill.checks.finding import Finding
from esr_distill.config import DataConfig
from esr_distill.input_error import InputError
from esr_distill.prompts.chat_prompts import PROBE, PromptWriter, chat_messages
from esr_distill.prompts.template_differences import template_differences

# A thought is opened and closed by tags of these names in the templates of today's models.
THOUGHT_TAG = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>")
SHOWN = 60


def is_plain(prompt: str | list[dict], data: DataConfig) -> bool:
    """Whether no template has a part in it."""
    return isinstance(prompt, str) and not data.chat_template


def template_finding(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, prompt: str | list[dict], data: DataConfig
) -> Finding:
    """Whether both templates write the first prompt as the same ids."""
    check = "chat templates"
    if is_plain(prompt, data):
        return Finding(check, "ok", "prompts are plain texts (data.chat_template is false): no template writes them")
    found = template_differences(student, teacher, prompt, data)
    values = {
        "student_text": found.student_text,
        "teacher_text": found.teacher_text,
        "first_difference": found.first_difference,
    }
    if found.student_error is not None:
        return Finding(check, "error", found.describe(), "mend the option that the message names", values)
    if found.are_equal:
        return Finding(check, "ok", found.describe(), values=values)
    if data.teacher_template == "teacher":
        level = "ok" if found.teacher_error is None else "error"
        fix = None if level == "ok" else "set data.teacher_template to student"
        return Finding(check, level, f"{found.describe()}; each model reads its own", fix, values)
    return Finding(
        check,
        "warning",
        f"{found.describe()}; the teacher reads the student's",
        "set data.teacher_template to teacher, so that the teacher scores behind a prompt in its own words, or leave it where "
        "the difference is known to do no harm",
        values,
    )


def turn_beginning(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], data: DataConfig, thinking: bool | None
) -> str | None:
    """What the template writes between the last message's text and the model's first token; None where it refuses."""
    try:
        writer = PromptWriter(tokenizer, replace(data, enable_thinking=thinking), "the first prompt")
        if not writer.is_chat(prompt):
            return None
        text = writer.chat_text(prompt) + (data.response_prefix or "")
    except InputError:
        return None
    content = chat_messages(prompt, data.system_prompt)[-1]["content"].strip()
    return text[text.rfind(content) + len(content) :]


def is_thought_open(text: str | None) -> bool:
    """Whether the last tag of a thought is one that opens it."""
    tags = THOUGHT_TAG.findall(text or "")
    return bool(tags) and tags[-1] == ""


def reads_thinking(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> bool:
    """Whether the template has a variable enable_thinking."""
    try:
        return re.search(r"\benable_thinking\b", PromptWriter(tokenizer, data).template()) is not None
    except InputError:
        return False


def thinking_finding(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    data: DataConfig,
    horizon: int,
) -> Finding:
    """With which words a response begins, whether in a thought, and whether both templates take enable_thinking alike."""
    check = "thinking mode"
    if is_plain(prompt, data):
        return Finding(check, "ok", "prompts are plain texts: nothing stands before a response")
    pair = {"student": student, "teacher": teacher}
    beginnings = {
        name: {
            str(thinking): turn_beginning(tokenizer, prompt, data, thinking)
            for thinking in dict.fromkeys((data.enable_thinking, None, True, False))
        }
        for name, tokenizer in pair.items()
    }
    reads = {name: reads_thinking(tokenizer, data) for name, tokenizer in pair.items()}
    now = {name: texts[str(data.enable_thinking)] for name, texts in beginnings.items()}
    values = {"enable_thinking": data.enable_thinking, "beginnings": beginnings, "reads_enable_thinking": reads}
    setting = "unset" if data.enable_thinking is None else str(data.enable_thinking).lower()
    message = f"with data.enable_thinking {setting} a response begins behind {shown(now['student'])}"
    if now["teacher"] != now["student"]:
        return Finding(
            check,
            "warning",
            f"{message}; the teacher's template has {shown(now['teacher'])}",
            "set data.enable_thinking to what both templates have, or write the same words with data.response_prefix",
            values,
        )
    if reads["student"] != reads["teacher"]:
        who = "student" if reads["student"] else "teacher"
        return Finding(
            check,
            "warning",
            f"{message}; only the {who}'s template reads enable_thinking",
            "set data.enable_thinking to the mode in which the teacher is to be imitated, and look at the first tokens below",
            values,
        )
    if beginnings["student"] != beginnings["teacher"]:
        return Finding(
            check,
            "warning",
            f"{message}, in both templates; with another value of enable_thinking they differ",
            "set data.enable_thinking, so that no default decides",
            values,
        )
    if is_thought_open(now["student"]):
        return Finding(
            check,
            "warning",
            f"{message}, inside a thought: the first {horizon} tokens of a rollout are its beginning",
            "set data.enable_thinking to false or close the thought with data.response_prefix, unless thoughts are to be trained",
            values,
        )
    return Finding(check, "ok", f"{message}, in both templates", values=values)


def shown(text: str | None) -> str:
    if text is None:
        return "nothing that could be read"
    return repr(text if len(text) <= SHOWN else "..." + text[-SHOWN:])


def turn_end_finding(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    data: DataConfig,
    stop_ids: tuple[int, ...],
    owner: str,
) -> Finding:
    """Whether a rollout ends at the token with which a template ends the model's turn. `owner` is whose template it is."""
    check = f"end of the {owner}'s turn"
    if is_plain(prompt, data):
        return Finding(check, "ok", "prompts are plain texts: no template ends a turn")
    messages = [*chat_messages(prompt, data.system_prompt), {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **data.template_arguments)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        return Finding(check, "ok", f"the template writes no reply to look at ({error})")
    after = text[text.rfind(PROBE) + len(PROBE) :] if PROBE in text else ""
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    special = [i for i in ids if i in tokenizer.added_tokens_decoder]
    values = {"text": after, "ids": ids, "stop_ids": list(stop_ids)}
    if not special:
        return Finding(check, "ok", f"the template ends a reply with {shown(after)}, no special token", values=values)
    first = special[0]
    message = f"the template ends a reply with {shown(after)}, token {first} ({tokenizer.convert_ids_to_tokens(first)})"
    if first in stop_ids:
        return Finding(check, "ok", f"{message}, which ends a rollout", values=values)
    fix = "put that id into the eos_token_id of a model's generation_config.json"
    return Finding(check, "warning", f"{message}, at which no rollout ends", fix, values)
