"""Are contradictory options of the prompts refused, and do all of them survive flags, YAML and a saved config?

pytest tests/distill/test_data_config.py
"""

import pytest
import yaml

from esr_distill.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from esr_distill.config_file import load_saved_config, read_config, save_config, train_parser
from esr_distill.input_error import InputError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ""}, r"data\.prompts must be the path of a JSONL file, of parquet files or .* hub, got ''"),
        ({"max_prompt_tokens": 0}, r"data\.max_prompt_tokens must be >= 1 or unset, got 0"),
        ({"stream_prompts": 0}, r"data\.stream_prompts must be >= 1 or unset, got 0"),
        ({"prompt_column": ""}, r"data\.prompt_column must be the name of a column, got ''"),
        ({"split": ""}, r"data\.split must be a text or unset, got ''"),
        ({"response_prefix": ""}, r"data\.response_prefix must be a text or unset, got ''"),
        (
            {"privileged_column": "question", "prompt_column": "question"},
            r"data\.privileged_column must be another column than \('answer', 'question'\), got 'question'",
        ),
        ({"privileged_column": "answer"}, r"data\.privileged_column must be another column than .*, got 'answer'"),
        (
            {"privileged_column": "hint", "privileged_template": "{prompt}"},
            r"data\.privileged_template must be a text with \{privileged_context\}, got '\{prompt\}'",
        ),
        (
            {"privileged_template": "{privileged_context}"},
            r"data\.privileged_template must be unset unless data\.privileged_column is set, got '\{privileged_cont",
        ),
        (
            {"chat_template": False, "enable_thinking": False},
            r"data\.enable_thinking must be unset when data\.chat_template is false, got False",
        ),
        (
            {"chat_template": False, "chat_template_kwargs": {"effort": 1}},
            r"data\.chat_template_kwargs must be unset when data\.chat_template is false, got \{'effort': 1\}",
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": True, "effort": 1}},
            r"data\.chat_template_kwargs must be without .*data\.enable_thinking is one\), got \['enable_thinking'\]",
        ),
        ({"chat_template_kwargs": {"tokenize": True}}, r"data\.chat_template_kwargs must be .*, got \['tokenize'\]"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**({"prompts": "p.jsonl"} | options))


def test_what_the_template_is_given():
    assert DataConfig("p").template_arguments == {}
    assert DataConfig("p", enable_thinking=False).template_arguments == {"enable_thinking": False}
    both = DataConfig("p", enable_thinking=True, chat_template_kwargs={"effort": "low"})
    assert both.template_arguments == {"effort": "low", "enable_thinking": True}


def parse(arguments: list[str]) -> TrainConfig:
    parser = train_parser()
    required = ["--model.student", "s", "--model.teacher", "t", "--data.prompts", "p.jsonl"]
    return read_config(parser.parse_args([*required, *arguments]), parser)


def test_flags_and_yaml_reach_the_options(tmp_path):
    file = tmp_path / "run.yaml"
    group = {"enable_thinking": False, "keep_columns": ["id", "level"], "chat_template_kwargs": {"effort": 2}}
    file.write_text(yaml.safe_dump({"data": group}))
    data = parse(["--config", str(file), "--data.stream_prompts", "64", "--data.response_prefix", "<think>\n\n"]).data
    assert (data.enable_thinking, data.keep_columns, data.chat_template_kwargs) == (
        False,
        ["id", "level"],
        {"effort": 2},
    )
    assert (data.stream_prompts, data.response_prefix) == (64, "<think>\n\n")
    assert parse(["--data.enable_thinking", "null"]).data.enable_thinking is None
    assert parse(["--data.enable_thinking", "true"]).data.enable_thinking is True
    assert parse(["--data.chat_template_kwargs", '{"effort": "low"}']).data.chat_template_kwargs == {"effort": "low"}


def test_a_saved_config_comes_back_equal(tmp_path):
    data = DataConfig(
        "hf://owner/sums@main",
        prompt_column="question",
        keep_columns=["id"],
        split="test",
        dataset_config="main",
        stream_prompts=100,
        enable_thinking=False,
        chat_template_kwargs={"effort": "low", "tools": [{"name": "add"}]},
        response_prefix="<think>\n\n</think>\n\n",
        teacher_template="teacher",
        privileged_column="solution",
        privileged_template="{prompt}\n\nA solution: {privileged_context}",
    )
    config = TrainConfig(ModelConfig("s", "t"), data, run=RunConfig(output_dir=str(tmp_path)))
    save_config(config, tmp_path)
    assert load_saved_config(tmp_path).data == data
