"""Is what cannot work refused before the first step?  pytest tests/distill/test_preflight.py"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_model, make_tokenizer
from tokenizers import Tokenizer, models
from transformers import Gemma2Config, GPT2Config, MambaConfig, PreTrainedTokenizerFast

from esr_distill.config import (
    DataConfig,
    HorizonScheduleConfig,
    LossConfig,
    ModelConfig,
    RolloutConfig,
    SelectionConfig,
    SelectionRule,
    TrainConfig,
)
from esr_distill.input_error import InputError
from esr_distill.preflight import (
    check_options,
    check_token_ids,
    check_tokenizer_pair,
    check_vocab_sizes,
    context_length,
    fit_prompts,
    prompt_limit,
)
from esr_distill.prompts import PromptSet

CONFIG = TrainConfig(ModelConfig("student", "teacher"), DataConfig("prompts.jsonl"))
DATA = CONFIG.data
NO_CONTEXT = SimpleNamespace(config=MambaConfig())  # a recurrent model has no longest position


def with_vocab_size(vocab_size: int | None) -> TrainConfig:
    return replace(CONFIG, loss=LossConfig(vocab_size=vocab_size))


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])))


# Tokenizers


def test_same_tokenizer_passes_with_other_special_tokens():
    teacher = make_tokenizer()
    teacher.eos_token = "."
    teacher.chat_template = "{{ 1 }}"
    check_tokenizer_pair(make_tokenizer(), teacher)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (("a", "b", "d"), r"differs in 1 ids, first at id 2 \('c'\)"),
        (("b", "a", "c"), r"differs in 2 ids, first at id 0 \('a'\)"),
        (("a", "b"), r"differs in 1 ids, first at id 2 \('c'\)"),
        (("a", "b", "c", "d", "e"), r"differs in 2 ids, first at id 3 \('d'\)"),
    ],
)
def test_other_tokenizers_are_refused(teacher, message):
    with pytest.raises(InputError, match=r"model\.teacher must have the student's tokenizer, got one that " + message):
        check_tokenizer_pair(word_tokenizer("a", "b", "c"), word_tokenizer(*teacher))


def test_an_added_token_is_a_difference():
    teacher = make_tokenizer()
    teacher.add_tokens(["<think>"])
    with pytest.raises(InputError, match=r"differs in 1 ids, first at id 19 \('<think>'\)"):
        check_tokenizer_pair(make_tokenizer(), teacher)


# Vocabularies


def test_equal_widths_pass():
    check_vocab_sizes(make_model(0), make_model(1), with_vocab_size(None))
    check_vocab_sizes(make_model(0), make_model(1), with_vocab_size(19))


@pytest.mark.parametrize(("student", "teacher"), [(19, 32), (32, 19)])
def test_unequal_widths(student, teacher):
    pair = make_model(0, vocab_size=student), make_model(1, vocab_size=teacher)
    with pytest.raises(
        InputError,
        match=f"model.teacher must have the student's vocabulary size {student}, got {teacher}; "
        "if the surplus is padding, set loss.vocab_size to 19 or less",
    ):
        check_vocab_sizes(*pair, with_vocab_size(None))
    check_vocab_sizes(*pair, with_vocab_size(19))
    check_vocab_sizes(*pair, with_vocab_size(17))
    with pytest.raises(InputError, match=r"loss\.vocab_size must be at most 19 for this pair, got 20"):
        check_vocab_sizes(*pair, with_vocab_size(20))


def test_a_cut_that_loses_tokens():
    """The tokenizer's largest id is 18."""
    pair = make_model(0), make_model(1)
    check_token_ids(make_tokenizer(), *pair, with_vocab_size(None))
    check_token_ids(make_tokenizer(), *pair, with_vocab_size(19))
    with pytest.raises(InputError, match=r"loss\.vocab_size must be above the tokenizer's largest id 18, got 18"):
        check_token_ids(make_tokenizer(), *pair, with_vocab_size(18))


@pytest.mark.parametrize(("widths", "option"), [((19, 20), "student"), ((20, 19), "teacher")])
def test_a_token_that_a_model_cannot_embed(widths, option):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    pair = [make_model(seed, vocab_size=width) for seed, width in enumerate(widths)]
    with pytest.raises(InputError, match=f"model.{option} must embed the tokenizer's ids up to 19, got 19 embeddings"):
        check_token_ids(tokenizer, *pair, with_vocab_size(None))


@pytest.mark.parametrize("kind", ["token_ids", "token_classes"])
def test_a_rule_about_an_id_that_no_token_has(tmp_path, kind):
    """The tokenizer's largest id is 18. The rule stands inside of another."""
    pair = make_model(0, vocab_size=24), make_model(1, vocab_size=24)
    for last in (18, 19):
        table = tmp_path / f"{last}.json"
        table.write_text(f'{{"3": "digit", "{last}": "digit", "99": "other"}}')
        fields = {"token_ids": [3, last]} if kind == "token_ids" else {"table": str(table), "classes": ["digit"]}
        rules = [SelectionRule("any", rules=[SelectionRule("finished"), SelectionRule(kind, **fields)])]
        config = replace(CONFIG, selection=SelectionConfig(rules))
        check_options(config, torch.device("cpu"))
        if last == 18:
            check_token_ids(make_tokenizer(), *pair, config)
            continue
        option = "token_ids" if kind == "token_ids" else "table"
        with pytest.raises(
            InputError, match=rf"selection\.rules\.{option} must hold ids of the tokenizer, at most 18, got 19"
        ):
            check_token_ids(make_tokenizer(), *pair, config)


def test_a_table_of_classes_is_read_before_anything_is_loaded():
    rules = [SelectionRule("token_classes", table="nowhere.json", classes=["planning"])]
    with pytest.raises(InputError, match=r"selection\.rules\.table must be a JSON file .*, got 'nowhere\.json'"):
        check_options(replace(CONFIG, selection=SelectionConfig(rules)), torch.device("cpu"))


# An adaptive horizon, which grows from 8 to 20 with what the tokens 6, 7 and at last 15 to 19 show.


def check_adaptive(*rules: SelectionRule, combine: str = "all") -> None:
    schedule = HorizonScheduleConfig("adaptive", start=8, increment=4, agreement=0.8)
    selection = SelectionConfig(list(rules), combine)
    config = replace(CONFIG, horizon=schedule, rollout=RolloutConfig(horizon=20), selection=selection)
    check_options(config, torch.device("cpu"))


FINISHED, BEST = SelectionRule("finished"), SelectionRule("top", score="divergence", tokens=1)


@pytest.mark.parametrize(
    "rules",
    [
        [],
        [SelectionRule("prefix", tokens=16)],
        [SelectionRule("suffix", start=7)],
        [SelectionRule("window", tokens=10, start=6)],
        [SelectionRule("window", tokens=1, start="last"), BEST],
        [SelectionRule("scatter", tokens=1), FINISHED, SelectionRule("token_ids", token_ids=[7])],
        [SelectionRule("any", rules=[SelectionRule("prefix", tokens=3), FINISHED])],
        [SelectionRule("all", rules=[SelectionRule("prefix", tokens=3), BEST], complement=True)],
    ],
)
def test_rules_that_leave_late_tokens_to_an_adaptive_horizon(rules):
    check_adaptive(*rules)


@pytest.mark.parametrize(
    ("rules", "horizon"),
    [
        ([SelectionRule("prefix", tokens=15)], 20),
        ([SelectionRule("prefix", tokens=6)], 8),
        ([SelectionRule("suffix", start=8)], 8),
        ([SelectionRule("prefix", tokens=8, complement=True)], 8),
        ([SelectionRule("window", tokens=4, start="middle")], 8),  # tokens 2 to 5
        (
            [BEST, SelectionRule("any", rules=[SelectionRule("prefix", tokens=3), SelectionRule("prefix", tokens=12)])],
            20,
        ),
    ],
)
def test_rules_by_which_an_adaptive_horizon_would_never_move(rules, horizon):
    message = rf"selection\.rules must leave tokens of the last quarter .* got none at a horizon of {horizon}$"
    with pytest.raises(InputError, match=message):
        check_adaptive(*rules)
    # The other kinds do not look at these tokens.
    check_options(replace(CONFIG, selection=SelectionConfig(rules)), torch.device("cpu"))


# Lengths


def test_context_length():
    long, short = make_model(0), make_model(1, Gemma2Config, max_position_embeddings=40)
    assert context_length(long) == 128
    assert context_length(long, short) == 40
    assert context_length(make_model(0, GPT2Config, max_position_embeddings=50)) == 50
    assert context_length(NO_CONTEXT) is None
    assert context_length(NO_CONTEXT, short) == 40


def test_prompt_and_response_share_the_context():
    """The whole rollout goes through both models, so prompt + horizon must be at most the shorter context."""
    student, teacher = make_model(0), make_model(1, max_position_embeddings=40)
    limit, source = prompt_limit(None, 30, "rollout.horizon", student, teacher)
    assert (limit, source) == (10, "context 40 minus rollout.horizon 30")
    ids = torch.arange(40)[None] % 19
    assert teacher(ids).logits.shape[1] == limit + 30


def test_max_prompt_tokens():
    data = replace(DATA, max_prompt_tokens=25)
    assert prompt_limit(data.max_prompt_tokens, 100, "rollout.horizon", make_model(0)) == (25, "data.max_prompt_tokens")
    assert prompt_limit(data.max_prompt_tokens, 110, "rollout.horizon", make_model(0))[0] == 18


def test_no_known_context():
    assert prompt_limit(None, 100, "rollout.horizon", NO_CONTEXT)[0] >= 10**9
    assert prompt_limit(7, 100, "rollout.horizon", NO_CONTEXT)[0] == 7


@pytest.mark.parametrize("horizon", [128, 129, 100000])
def test_a_horizon_that_leaves_no_room(horizon):
    with pytest.raises(
        InputError, match=rf"rollout\.horizon must leave room for a prompt .* context of 128, got {horizon}"
    ):
        prompt_limit(None, horizon, "rollout.horizon", make_model(0))
    assert prompt_limit(None, 127, "rollout.horizon", make_model(0))[0] == 1


def make_set(*lengths: int) -> PromptSet:
    return PromptSet(
        [[length] * length for length in lengths], [str(length) for length in lengths], 3, torch.device("cpu")
    )


def fit(prompts: PromptSet, limit: int, long_prompts: str) -> tuple[PromptSet, int]:
    return fit_prompts(
        prompts, limit=limit, limit_source="context 8 minus 2", long_prompts=long_prompts, option="data.prompts"
    )


@pytest.mark.parametrize("long_prompts", ["error", "drop"])
def test_prompts_that_fit_stay(long_prompts):
    prompts = make_set(3, 6, 1)
    assert fit(prompts, 6, long_prompts) == (prompts, 0)


def test_a_long_prompt_is_an_error():
    message = (
        r"data\.prompts must hold prompts of at most 6 tokens \(context 8 minus 2\), got 2 of 4 that are longer, "
        r"the longest 9 tokens; data\.long_prompts: drop leaves them out"
    )
    with pytest.raises(InputError, match=message):
        fit(make_set(3, 7, 9, 6), 6, "error")


def test_long_prompts_are_dropped_with_their_answers():
    kept, dropped = fit(make_set(3, 7, 9, 6), 6, "drop")
    assert dropped == 2
    assert kept == make_set(3, 6)


@pytest.mark.parametrize("long_prompts", ["error", "drop"])
def test_nothing_left(long_prompts):
    with pytest.raises(InputError, match=r"got 2 of 2 that are longer, the longest 9 tokens$"):
        fit(make_set(7, 9), 6, long_prompts)
