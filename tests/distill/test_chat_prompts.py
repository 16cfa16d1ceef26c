"""Do the ids of a prompt follow thinking mode, template arguments, prefix and privileged context, and are templates that
cannot work refused?  pytest tests/distill/test_chat_prompts.py
"""

import pytest
import torch
from chat_templates import BRACKETS, TEMPLATE, THINKING_TEMPLATE, encode
from tiny_models import BOS, make_tokenizer

from esr_distill.config import DataConfig
from esr_distill.input_error import InputError
from esr_distill.prompts.prompt_encoder import teacher_prompt, tokenize_prompts
from esr_distill.prompts.prompt_set import PromptSet
from esr_distill.prompts.prompt_sources import PromptRecord
from esr_distill.prompts.template_differences import template_differences

CPU = torch.device("cpu")
USER = [{"role": "user", "content": "4="}]


def tokenizer_with(template: str | None):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def tokenize(*prompts, template=TEMPLATE, teacher=None, contexts=None, **options) -> PromptSet:
    contexts = contexts or [None] * len(prompts)
    records = [PromptRecord(prompt, privileged_context=text) for prompt, text in zip(prompts, contexts, strict=True)]
    return tokenize_prompts(
        records,
        tokenizer_with(template),
        DataConfig("prompts.jsonl", **options),
        pad_id=0,
        device=CPU,
        teacher_tokenizer=None if teacher is None else tokenizer_with(teacher),
    )


# Thinking mode, template arguments, response prefix


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "#1;4=#2;"),
        ({"enable_thinking": True}, "#1;4=#2;"),
        ({"enable_thinking": False}, "#1;4=#2;-+"),
        ({"chat_template_kwargs": {"effort": 3}}, "#1;4=#2;..."),
        ({"chat_template_kwargs": {"effort": 1}, "enable_thinking": False, "system_prompt": "7"}, "#0;7#1;4=#2;.-+"),
        ({"response_prefix": "-+"}, "#1;4=#2;-+"),
        ({"response_prefix": "5", "enable_thinking": False}, "#1;4=#2;-+5"),
    ],
)
def test_ids_follow_the_options(options, expected):
    for prompt in ("4=", USER):
        assert tokenize(prompt, template=THINKING_TEMPLATE, **options).token_ids == [encode(expected)]


def test_a_prompt_with_a_system_message_of_its_own():
    own = [{"role": "system", "content": "8"}, *USER]
    assert tokenize(own).token_ids == [encode("#0;8#1;4=#2;")]
    message = r"data\.system_prompt must be unset for prompts with a system message of their own, got '7' before '8'"
    with pytest.raises(InputError, match=message):
        tokenize(USER, own, system_prompt="7")


def test_a_prefix_also_follows_a_plain_text():
    prompts = tokenize("4=", "12=", template=None, chat_template=False, response_prefix="-+")
    assert prompts.token_ids == [[BOS, *encode("4=-+")], [BOS, *encode("12=-+")]]


def test_a_prefix_that_the_template_writes_is_refused():
    message = (
        r"data\.response_prefix must not repeat what the chat template writes at the end, got '-\+' after '#1;4=#2;-\+'"
    )
    with pytest.raises(InputError, match=message):
        tokenize("4=", template=THINKING_TEMPLATE, enable_thinking=False, response_prefix="-+")


def test_an_argument_that_no_template_reads_is_refused():
    message = r"data\.enable_thinking must be unset for a chat template that does not read it, got False"
    with pytest.raises(InputError, match=message):
        tokenize("4=", enable_thinking=False)
    with pytest.raises(InputError, match=r"data\.chat_template_kwargs must hold variables of .* template, got 'efort'"):
        tokenize("4=", template=THINKING_TEMPLATE, chat_template_kwargs={"efort": 3})


def test_one_of_several_templates():
    templates = {"default": TEMPLATE, "short": TEMPLATE.replace("#2;", "2;")}
    assert tokenize("4=", template=templates).token_ids == [encode("#1;4=#2;")]
    chosen = tokenize("4=", template=templates, chat_template_kwargs={"chat_template": "short"})
    assert chosen.token_ids == [encode("#1;4=2;")]
    with pytest.raises(
        InputError, match=r"data\.chat_template_kwargs must choose a chat template, got \{\} .*multiple"
    ):
        tokenize("4=", template={"a": TEMPLATE, "b": TEMPLATE})


# The generation prompt


def test_a_template_without_a_generation_prompt_is_refused():
    no_turn = TEMPLATE.replace("{% if add_generation_prompt %}#2;{% endif %}", "")
    message = r"chat template must end in a generation prompt when add_generation_prompt is true, got '#1;4='"
    with pytest.raises(InputError, match=message):
        tokenize("4=", template=no_turn)
    with pytest.raises(InputError, match=message):
        tokenize("4=", template="#1;4=")  # writes no message at all


def test_a_template_that_leaves_the_text_out():
    """As those of models for images, which expect a message in pieces."""
    pieces = TEMPLATE.replace("{{ m.content }}", "{% for piece in m.content %}{{ piece.text }}{% endfor %}")
    with pytest.raises(InputError, match=r"chat template must write the text of a message, got '#1;#2;' for '4='"):
        tokenize("4=", template=pieces)


def test_a_template_whose_user_message_asks_for_the_reply():
    assert tokenize("4=", template=BRACKETS).token_ids == [encode("1;4=#")]
    messages = [*USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "5="}]
    assert tokenize(messages, template=BRACKETS).token_ids == [encode("1;4=#4.1;5=#")]


def test_every_prompt_must_end_in_the_generation_prompt():
    template = TEMPLATE.replace("#2;{% endif %}", "{% if messages[0].content != '4=' %}#2;{% endif %}{% endif %}")
    assert len(tokenize("1=", "5=", template=template).token_ids) == 2
    message = r"data\.prompts must end in the generation prompt '#2;' that .* writes for the first prompt, got '#1;4='"
    with pytest.raises(InputError, match=message):
        tokenize("1=", "4=", template=template)


def test_errors_inside_a_template_are_input_errors():
    with pytest.raises(InputError, match=r"data\.prompts must suit the tokenizer's chat template, got .*user"):
        tokenize("4=", template="{{ messages[0].content + 5 }}")


# The teacher's own prompts


def test_without_options_the_teacher_reads_the_students_prompts():
    assert tokenize("4=", teacher=THINKING_TEMPLATE).teacher_token_ids is None
    assert tokenize("4=", privileged_column="hint").teacher_token_ids is None  # evaluation: there is no teacher


def test_the_teachers_template():
    reversed_roles = TEMPLATE.replace("'user' %}1", "'user' %}9")
    prompts = tokenize("4=", "12=", teacher=reversed_roles, teacher_template="teacher", response_prefix="-")
    assert prompts.token_ids == [encode("#1;4=#2;-"), encode("#1;12=#2;-")]
    assert prompts.teacher_token_ids == [encode("#9;4=#2;-"), encode("#9;12=#2;-")]


@pytest.mark.parametrize(("student", "teacher"), [(TEMPLATE, THINKING_TEMPLATE), (THINKING_TEMPLATE, TEMPLATE)])
def test_thinking_mode_may_be_known_to_one_template_alone(student, teacher):
    prompts = tokenize("4=", template=student, teacher=teacher, teacher_template="teacher", enable_thinking=False)
    expected = [
        encode("#1;4=#2;-+" if template is THINKING_TEMPLATE else "#1;4=#2;") for template in (student, teacher)
    ]
    assert [prompts.token_ids[0], prompts.teacher_token_ids[0]] == expected
    # Evaluation reads the same options and has no teacher.
    alone = tokenize("4=", template=student, teacher_template="teacher", enable_thinking=False)
    assert alone.token_ids == prompts.token_ids


def test_a_teacher_without_a_template():
    message = r"data\.teacher_template must be student for a teacher without a chat template, got 'teacher'"
    with pytest.raises(InputError, match=message):
        tokenize("4=", teacher_template="teacher", teacher="")


def test_privileged_context_in_a_text_and_in_messages():
    options = {"privileged_column": "hint", "privileged_template": "{privileged_context};{prompt}"}
    messages = [*USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "5="}]
    prompts = tokenize("4=", messages, teacher=TEMPLATE, contexts=["77", "88"], **options)
    assert prompts.token_ids == [encode("#1;4=#2;"), encode("#1;4=#2;4#1;5=#2;")]
    assert prompts.teacher_token_ids == [encode("#1;77;4=#2;"), encode("#1;4=#2;4#1;88;5=#2;")]
    assert prompts.lengths == [len("#1;77;4=#2;"), len("#1;4=#2;4#1;88;5=#2;")] and prompts.longest == 20
    assert messages[-1] == {"role": "user", "content": "5="}  # the record is as it was

    plain = tokenize("4=", template=None, teacher="", chat_template=False, contexts=["77"], **options)
    assert plain.teacher_token_ids == [[BOS, *encode("77;4=")]]


def test_the_template_of_privileged_context_is_filled_once():
    """Braces in a prompt or a context are text."""
    data = DataConfig("p", privileged_column="hint")
    record = PromptRecord("f{privileged_context} {x}", privileged_context="{prompt}")
    assert teacher_prompt(record, data, "data.prompts") == "f{privileged_context} {x}\n\n{prompt}"


def test_privileged_context_that_is_missing():
    message = r"data\.prompts must have a column 'hint' \(data\.privileged_column\), got none"
    with pytest.raises(InputError, match=message):
        tokenize("4=", teacher=TEMPLATE, privileged_column="hint")
    with pytest.raises(InputError, match=r"must have a message of the user for data\.privileged_column"):
        system = [{"role": "system", "content": "4="}]
        tokenize(system, teacher=TEMPLATE, contexts=["7"], privileged_column="hint")


def test_the_digest_knows_what_the_teacher_reads():
    options = {"privileged_column": "hint", "privileged_template": "{privileged_context}{prompt}", "teacher": TEMPLATE}
    one, other = (tokenize("4=", contexts=[text], **options) for text in ("7", "8"))
    assert one.token_ids == other.token_ids and one.digest != other.digest
    assert tokenize("4=").digest == tokenize("4=").digest != one.digest


# Differences of two templates


def test_equal_templates():
    found = template_differences(tokenizer_with(TEMPLATE), tokenizer_with(THINKING_TEMPLATE), USER)
    assert found.are_equal and found.first_difference is None
    assert found.student_ids == found.teacher_ids == encode("#1;4=#2;")
    assert found.describe() == "student and teacher write the prompt as the same 8 tokens"


def test_different_templates():
    data = DataConfig("p", enable_thinking=False, response_prefix="5")
    found = template_differences(tokenizer_with(TEMPLATE), tokenizer_with(THINKING_TEMPLATE), USER, data)
    assert (found.student_ids, found.teacher_ids) == (encode("#1;4=#2;5"), encode("#1;4=#2;-+5"))
    assert not found.are_equal and found.first_difference == 8
    assert found.describe() == (
        "student and teacher write the prompt differently from token 8 on: '#1;4=#2;5' and '#1;4=#2;-+5'"
    )
    longer = template_differences(tokenizer_with(TEMPLATE), tokenizer_with(TEMPLATE.replace("#2;{%", "#2;9{%")), USER)
    assert longer.first_difference == 8 and len(longer.teacher_ids) == 9


def test_a_template_that_is_missing_or_refuses():
    found = template_differences(tokenizer_with(TEMPLATE), tokenizer_with(None), USER)
    assert not found.are_equal and found.first_difference is None and found.teacher_ids is None
    assert found.describe().startswith("the teacher has no prompt to compare: ") and "template" in found.teacher_error
    refusing = tokenizer_with("{{ raise_exception('no system role') }}")
    assert "no system role" in template_differences(refusing, tokenizer_with(TEMPLATE), USER).student_error
