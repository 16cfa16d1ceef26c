"""What `check` says of chat templates: their words, where a turn begins and how it ends.

pytest tests/distill/test_check_templates.py
"""

from dataclasses import replace

import pytest
from chat_templates import BRACKETS, TEMPLATE, THINKING_TEMPLATE
from tiny_models import make_tokenizer
from transformers import PreTrainedTokenizerFast

from esr_distill.checks.chat_templates import (
    is_thought_open,
    template_finding,
    thinking_finding,
    turn_beginning,
    turn_end_finding,
)
from esr_distill.config import DataConfig

DATA = DataConfig("prompts.jsonl")
PLAIN = replace(DATA, chat_template=False)
# As today's models have it: open unless thinking is off, which is written as an empty thought.
OPEN_THOUGHT = TEMPLATE.replace("#2;{% endif %}", "#2;<think>{% endif %}")
SWITCHED = TEMPLATE.replace(
    "#2;{% endif %}",
    "#2;{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}",
)


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def templates_of(student: str | None, teacher: str | None, data: DataConfig = DATA, prompt="1+2="):
    return template_finding(with_template(student), with_template(teacher), prompt, data)


def test_equal_templates():
    finding = templates_of(TEMPLATE, TEMPLATE)
    assert finding.level == "ok" and "as the same 10 tokens" in finding.message  # #1;1+2=#2;


def test_other_words_are_a_warning_while_the_teacher_reads_the_students():
    finding = templates_of(TEMPLATE, BRACKETS)
    assert finding.level == "warning" and "the teacher reads the student's" in finding.message
    assert finding.values["first_difference"] == 0
    assert finding.fix.startswith("set data.teacher_template to teacher")


def test_other_words_are_meant_where_the_teacher_reads_its_own():
    finding = templates_of(TEMPLATE, BRACKETS, replace(DATA, teacher_template="teacher"))
    assert finding.level == "ok" and "each model reads its own" in finding.message


def test_a_template_that_is_missing():
    of_student = templates_of(None, TEMPLATE)
    assert of_student.level == "error" and "data.chat_template must be false" in of_student.message
    assert templates_of(TEMPLATE, None).level == "warning"  # it reads the student's
    of_teacher = templates_of(TEMPLATE, None, replace(DATA, teacher_template="teacher"))
    assert of_teacher.level == "error" and of_teacher.fix == "set data.teacher_template to student"


def test_plain_texts_need_no_template():
    assert templates_of(None, None, PLAIN).level == "ok"
    messages = [{"role": "user", "content": "1+2="}]
    assert templates_of(None, None, PLAIN, messages).level == "error"


# Thinking mode


def thinking_of(student: str, teacher: str, data: DataConfig = DATA):
    return thinking_finding(with_template(student), with_template(teacher), "1+2=", data, 100)


@pytest.mark.parametrize(
    ("template", "thinking", "expected"),
    [
        (TEMPLATE, None, "#2;"),
        (THINKING_TEMPLATE, None, "#2;"),
        (THINKING_TEMPLATE, True, "#2;"),
        (THINKING_TEMPLATE, False, "#2;-+"),
        (OPEN_THOUGHT, None, "#2;<think>"),
        (BRACKETS, None, "#"),
        (None, None, None),
    ],
)
def test_what_stands_before_a_response(template, thinking, expected):
    assert turn_beginning(with_template(template), "1+2=", DATA, thinking) == expected


def test_the_response_prefix_stands_there_too():
    data = replace(DATA, system_prompt="1+2=", response_prefix="9")  # the same words twice: the last ones count
    assert turn_beginning(with_template(TEMPLATE), "1+2=", data, None) == "#2;9"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\n", True),
        ("<think></think>\n", False),
        ("</think><thought>", True),
        ("<reasoning>a</reasoning>", False),
        ("think", False),
        ("", False),
        (None, False),
    ],
)
def test_an_open_thought(text, expected):
    assert is_thought_open(text) is expected


def test_both_templates_alike():
    finding = thinking_of(TEMPLATE, TEMPLATE)
    assert finding.level == "ok" and "data.enable_thinking unset a response begins behind '#2;'" in finding.message
    assert finding.values["reads_enable_thinking"] == {"student": False, "teacher": False}
    assert thinking_of(SWITCHED, SWITCHED, replace(DATA, enable_thinking=False)).level == "ok"


def test_other_beginnings_are_a_warning():
    finding = thinking_of(TEMPLATE, OPEN_THOUGHT)
    assert finding.level == "warning" and "behind '#2;'; the teacher's template has '#2;<think>'" in finding.message


def test_only_one_template_knows_the_switch():
    finding = thinking_of(TEMPLATE, SWITCHED)
    assert finding.level == "warning" and "only the teacher's template reads enable_thinking" in finding.message


def test_the_switch_does_different_things():
    finding = thinking_of(SWITCHED, THINKING_TEMPLATE)
    assert finding.level == "warning" and "with another value of enable_thinking they differ" in finding.message
    finding = thinking_of(SWITCHED, THINKING_TEMPLATE, replace(DATA, enable_thinking=False))
    assert finding.level == "warning" and "the teacher's template has '#2;-+'" in finding.message


def test_rollouts_that_begin_in_a_thought_are_named():
    finding = thinking_of(OPEN_THOUGHT, OPEN_THOUGHT)
    assert finding.level == "warning" and "the first 100 tokens of a rollout are its beginning" in finding.message
    assert "data.response_prefix" in finding.fix


# The end of a turn


def end_of(template: str | None, stop_ids: tuple[int, ...], data: DataConfig = DATA):
    return turn_end_finding(with_template(template), "1+2=", data, stop_ids, "student")


def test_a_turn_that_ends_with_a_stop_id():
    ends = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}<eos>")
    finding = end_of(ends, (2,))
    assert finding.level == "ok" and finding.values == {"text": "<eos>", "ids": [2], "stop_ids": [2]}


def test_a_turn_that_ends_with_another_special_token():
    """As where a base model's tokenizer ends texts with one id, and the template ends turns with another."""
    ends = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}.<bos>")
    finding = end_of(ends, (2, 5))
    assert finding.check == "end of the student's turn" and finding.level == "warning"
    assert "token 1 (<bos>), at which no rollout ends" in finding.message and "generation_config.json" in finding.fix


def test_a_turn_without_an_end_and_no_turn_at_all():
    assert end_of(TEMPLATE, (2,)).level == "ok"
    assert end_of(TEMPLATE, (2,), PLAIN).level == "ok"
    assert "no reply to look at" in end_of("{{ raise_exception('no') }}", (2,)).message
