"""Are accuracy and divergence by position those computed by hand?  pytest tests/distill/test_evaluate.py"""

import functools
import math
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny_models import BOS, EOS, PAD, make_model, make_rollouts, make_tokenizer

import esr_distill.evaluation.evaluate as evaluate_module
from esr_distill.config import DataConfig, EvalConfig, EvaluationConfig
from esr_distill.evaluation.evaluate import Evaluation, decode_replies, divergence_by_position, split_replies
from esr_distill.evaluation.grades import Reply
from esr_distill.input_error import InputError
from esr_distill.models import StopIds
from esr_distill.prompts import PromptRecord
from esr_distill.rollout import GREEDY, SamplerSettings
from esr_distill.rollout.hf_generate import HFGenerateBackend
from esr_kernels import ForwardKL, ReverseKL

SETTINGS = EvaluationConfig(prompts="problems.jsonl", scorer="number_after_hash", max_tokens=8, batch_size=2)
DATA = DataConfig("prompts.jsonl", chat_template=False)


def prepare(
    answers: dict[str, str | None], data: DataConfig = DATA, model=None, rollouts=None, vocab_size=None, **changed
) -> Evaluation:
    return Evaluation.prepare(
        [PromptRecord(prompt, answer) for prompt, answer in answers.items()],
        make_tokenizer(),
        data,
        replace(SETTINGS, **changed),
        stop=StopIds((EOS,), PAD),
        model=model or make_model(),
        device=torch.device("cpu"),
        rollouts=rollouts,
        vocab_size=vocab_size,
    )


def answer_with(monkeypatch, replies: dict[str, str]) -> list[dict]:
    """A model that answers prompts from a table ("$" is EOS); returns the options of each batch."""
    tokenizer, calls = make_tokenizer(), []

    def scripted(model, prompts, **options):
        rows = zip(prompts.prompt_ids_B_P.tolist(), prompts.prompt_mask_B_P.tolist(), strict=True)
        rows = [[token for token, is_real in zip(ids, mask, strict=True) if is_real] for ids, mask in rows]
        texts = [replies[text] for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
        prompt_options = {
            "request_ids": prompts.request_ids_B.tolist(),
            "samples_per_prompt": prompts.samples_per_prompt,
        }
        calls.append(options | {"texts": texts} | prompt_options)
        responses = [tokenizer(text.rstrip("$"))["input_ids"][1:] + [EOS] * text.endswith("$") for text in texts]
        return make_rollouts(rows, responses)

    monkeypatch.setattr(evaluate_module, "generate_rollouts", scripted)
    return calls


def test_accuracy_by_hand(monkeypatch):
    """Right: 1+2, 3+3 and 20+1 (cut right after its answer). Wrong: a wrong sum, no '#'."""
    calls = answer_with(monkeypatch, {"1+2=": "#3$", "3+3=": "6#06$", "9-1=": "#9$", "20+1=": "21.00#21", "5-5=": "0$"})
    problems = prepare({"1+2=": "3", "3+3=": "6", "9-1=": "8", "20+1=": "7-7 #### 21", "5-5=": "0"})
    result = problems.accuracy(make_model())
    assert result.accuracy == pytest.approx(3 / 5)
    assert result.standard_error == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert result.count == 5
    assert result.mean_length == pytest.approx((3 + 5 + 3 + 8 + 2) / 5)  # EOS counts
    assert result.finished == pytest.approx(4 / 5)

    assert [call["texts"] for call in calls] == [["#3$", "6#06$"], ["#9$", "21.00#21"], ["0$"]]
    assert [call["request_ids"] for call in calls] == [[0, 1], [2, 3], [4]]
    for call in calls:
        assert (call["horizon"], call["sampler"], call["eos_ids"], call["pad_id"]) == (8, GREEDY, (EOS,), PAD)


@pytest.mark.parametrize(("reply", "accuracy"), [("#3$", 1.0), ("#4$", 0.0)])
def test_a_certain_accuracy_has_no_standard_error(monkeypatch, reply, accuracy):
    answer_with(monkeypatch, {"1+2=": reply, "2+1=": reply})
    result = prepare({"1+2=": "3", "2+1=": "3"}).accuracy(make_model())
    assert (result.accuracy, result.standard_error) == (accuracy, 0.0)


def test_replies_keep_the_order_and_progress_changes_nothing(monkeypatch):
    answer_with(monkeypatch, {"1=": "#1$", "2=": "2", "3=": "#3$"})
    problems = prepare({"1=": "1", "2=": "2", "3=": "3"})
    replies = [Reply("#1", 3, True), Reply("2", 1, False), Reply("#3", 3, True)]
    assert problems.replies(make_model()) == replies
    assert problems.replies(make_model(), Console(quiet=True)) == replies
    assert problems.score(replies).accuracy == pytest.approx(2 / 3)


def test_one_reply_to_each_problem():
    with pytest.raises(ValueError, match="there must be 2 x 1 replies, got 1"):
        prepare({"1=": "1", "2=": "2"}).score([Reply("#1", 3, True)])


def test_limit_takes_the_first_problems():
    problems = prepare({"1=": "1", "2=": "2", "3=": None}, limit=2)
    assert problems.problems.answers == ["1", "2"]


def test_decoded_replies():
    rollouts = make_rollouts([[BOS, 5], [BOS]], [[4, 13, EOS], [5, 6, 7, 8]], pad_id=EOS)
    assert decode_replies(rollouts, make_tokenizer()) == [Reply("1+", 3, True, 0), Reply("2345", 4, False, 1)]


def test_decoded_replies_count_how_often_their_end_occurs():
    """The EOS is not part of the end; nor is the padding, though it has the same id."""
    rollouts = make_rollouts([[BOS]] * 2, [[4, 5, 6, 4, 5, 6, EOS], [4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7]], pad_id=EOS)
    assert [reply.end_repeats for reply in decode_replies(rollouts, make_tokenizer())] == [2, 3]


def test_a_real_model_gives_the_same_replies_at_every_batch_size():
    answers = {"1+2=": "3", "30-4+5=": "31", "7=": "7", "99-90=": "9", "5=": "5"}
    model = make_model(4)
    replies = [prepare(answers, batch_size=size, max_tokens=12).replies(model) for size in (1, 2, 5)]
    assert replies[0] == replies[1] == replies[2]
    assert len({reply.text for reply in replies[0]}) > 1
    assert all(reply.finished or reply.length == 12 for reply in replies[0])


def surplus_model():
    """Its head has three ids more than the tokenizer, and it likes these best."""
    model = make_model(4, vocab_size=22)
    with torch.no_grad():
        model.lm_head.weight[19:] = 3 * model.lm_head.weight[5:8]
    return model


@pytest.mark.parametrize("backend", [None, HFGenerateBackend])
def test_ids_beyond_a_cut_vocabulary_are_not_drawn(backend):
    answers, model = {"1+2=": "3", "30-4+5=": "31", "7=": "7"}, surplus_model()
    drawn = {}
    for vocab_size in (None, 19):
        rollouts = None if backend is None else backend()
        problems = prepare(answers, model=model, rollouts=rollouts, vocab_size=vocab_size, max_tokens=12)
        batches = problems.batches(model, problems.settings.sampler, 0)
        drawn[vocab_size] = [ids for batch in batches for ids in batch.response_ids_B_K.flatten().tolist()]
    assert max(drawn[None]) > 18 >= max(drawn[19])


def test_the_divergence_of_a_cut_vocabulary_is_that_of_the_cut_distributions():
    student, teacher = surplus_model(), make_model(2, vocab_size=24).requires_grad_(False)
    rollouts = make_rollouts(PROMPTS, RESPONSES)
    sum_K, _ = divergence_by_position(student, teacher, rollouts, stop_ids=(), vocab_size=19)
    expected = 0.0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            p, q = (
                model(ids).logits[0, len(prompt) - 1 : -1, :19].double().log_softmax(-1) for model in (student, teacher)
            )
        expected += (p.exp() * (p - q)).sum().item()
    assert sum_K.sum().item() == pytest.approx(expected, rel=1e-4)


# Several samples of each problem

SAMPLED = {"samples_per_problem": 3, "sampling_temperature": 1.0, "seed": 5, "max_tokens": 12}


def test_sampled_replies_are_the_same_at_every_batch_size():
    """Below 3 a batch holds a part of one problem's samples, from 6 on several problems."""
    answers, model = {"1+2=": "3", "30-4+5=": "31", "7=": "7", "99-90=": "9", "5=": "5"}, make_model(4)
    replies = [prepare(answers, batch_size=size, **SAMPLED).replies(model) for size in (1, 2, 3, 5, 6, 15)]
    assert all(drawn == replies[0] for drawn in replies)
    assert len(replies[0]) == 15 and len({reply.text for reply in replies[0]}) > 5


def test_a_sample_does_not_depend_on_how_many_there_are_nor_on_the_limit():
    answers, model = {"1+2=": "3", "30-4+5=": "31", "7=": "7"}, make_model(4)
    three = prepare(answers, **SAMPLED).replies(model)
    two = prepare(answers, limit=2, **SAMPLED | {"samples_per_problem": 2}).replies(model)
    assert two == [three[0], three[1], three[3], three[4]]


def test_the_seed_and_the_sampler_change_the_replies():
    answers, model = {"1+2=": "3", "30-4+5=": "31"}, make_model(4)
    changes = [{}, {"seed": 6}, {"sampling_temperature": 0.3}, {"top_k": 2}, {"top_p": 0.4}, {"min_p": 0.5}]
    drawn = [[reply.text for reply in prepare(answers, **SAMPLED | change).replies(model)] for change in changes]
    assert len({tuple(texts) for texts in drawn}) == len(changes)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 5])
def test_batches_hold_every_sample_once_in_order(batch_size, num_samples):
    pieces = split_replies(4, num_samples, batch_size)
    drawn = [(problem, sample) for problems, samples in pieces for problem in problems for sample in samples]
    assert drawn == [(problem, sample) for problem in range(4) for sample in range(num_samples)]
    assert all(len(problems) * len(samples) <= batch_size for problems, samples in pieces)
    # no batch is smaller than it must be: another problem, or another sample of a problem that is not whole, would not fit
    largest = max(len(problems) * len(samples) for problems, samples in pieces)
    assert largest == (min(batch_size // num_samples, 4) * num_samples if num_samples <= batch_size else batch_size)


def test_samples_of_a_problem_share_its_prompt(monkeypatch):
    calls = answer_with(monkeypatch, {"1+2=": "#3$", "3+3=": "#6$"})
    problems = prepare(
        {"1+2=": "3", "3+3=": "6"}, samples_per_problem=2, sampling_temperature=0.5, batch_size=5, seed=9
    )
    result = problems.accuracy(make_model())
    (call,) = calls
    assert call["texts"] == ["#3$", "#3$", "#6$", "#6$"]
    assert call["request_ids"] == [0, 2**32, 1, 2**32 + 1] and call["samples_per_prompt"] == 2
    assert (call["sampler"], call["seed"]) == (SamplerSettings(sampling_temperature=0.5), 9)
    assert (result.count, result.samples_per_problem, result.accuracy) == (2, 2, 1.0)


def test_measures_of_samples_by_hand():
    problems = prepare({"1=": "1", "2=": "2"}, samples_per_problem=3, sampling_temperature=1.0)
    texts = ["#1", "#4", "#1", "#5", "#5", "#2"]
    result = problems.score([Reply(text, 3, True) for text in texts])
    assert result.accuracy == pytest.approx(3 / 6)
    assert result.standard_error == pytest.approx(math.sqrt(2 * (1 / 6) ** 2 / 2))  # means 2/3 and 1/3
    values = {name: estimate.value for name, estimate in result.estimates.items()}
    assert values["majority"] == pytest.approx(1 / 2)
    assert values["pass@2"] == pytest.approx((1 + 2 / 3) / 2)
    assert values["pass@3"] == pytest.approx(1.0)


def test_a_backend_whose_draws_depend_on_the_batch_only_answers_greedily():
    backend = HFGenerateBackend()
    with pytest.raises(
        InputError, match=r"evaluation\.sampling_temperature must be 0 for the backend hf_generate, .*got 1\.0"
    ):
        prepare({"1=": "1"}, rollouts=backend, sampling_temperature=1.0)
    assert prepare({"1=": "1"}, rollouts=backend).rollouts is backend


def test_boxes_of_the_scorer_that_needs_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"evaluation\.scorer must be one whose package is installed"):
        prepare({"1=": "1"}, scorer="boxed_math")


@pytest.mark.parametrize("group", ["evaluation.", ""])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"samples_per_problem": 0}, "samples_per_problem must be >= 1, got 0"),
        ({"samples_per_problem": 4}, "samples_per_problem must be 1 for {}sampling_temperature 0, .*, got 4"),
        ({"sampling_temperature": -1.0}, r"sampling_temperature must be >= 0, got -1\.0"),
        ({"sampling_temperature": math.nan}, "sampling_temperature must be a finite number, got nan"),
        ({"sampling_temperature": 1.0, "top_p": 1.1}, r"top_p must be in \[0, 1\], got 1\.1"),
        ({"sampling_temperature": 1.0, "min_p": -0.1}, r"min_p must be in \[0, 1\], got -0\.1"),
        ({"sampling_temperature": 1.0, "top_k": -1}, "top_k must be >= 0, got -1"),
        ({"top_p": 0.9}, r"top_p must be 1\.0 for {}sampling_temperature 0, which is greedy, got 0\.9"),
        ({"top_k": 3}, "top_k must be 0 for {}sampling_temperature 0, which is greedy, got 3"),
        ({"min_p": 0.1}, r"min_p must be 0\.0 for {}sampling_temperature 0, which is greedy, got 0\.1"),
        ({"seed": 2**64}, r"seed must be in \[0, 2\*\*64\)"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"limit": 0}, "limit must be >= 1 or unset, got 0"),
    ],
)
def test_options_that_contradict(group, changed, message):
    make = EvaluationConfig if group else functools.partial(EvalConfig, model="m", prompts="p")
    with pytest.raises(InputError, match="^" + group.replace(".", r"\.") + message.format(group)):
        make(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"backend": "hf_generate", "sampling_temperature": 1.0},
            "^backend must be inprocess for a sampling_temperature above 0, got 'hf_generate'",
        ),
        ({"save_replies": True}, "^save_replies must be false unless output is set, got True"),
    ],
)
def test_options_of_the_command_that_contradict(changed, message):
    with pytest.raises(InputError, match=message):
        EvalConfig(model="m", prompts="p", **changed)


@pytest.mark.parametrize(
    ("answers", "changed", "message"),
    [
        (
            {"1=": "1", "2=": None},
            {},
            r'evaluation\.prompts must have an "answer" to every prompt, got none to prompt 2',
        ),
        (
            {"1=": "1", "2=": "two"},
            {},
            r"must have answers in which number_after_hash finds one to compare with, got 'two' to prompt 2",
        ),
        ({"1=": "none"}, {"scorer": "last_number"}, r"answers in which last_number finds one .*, got 'none'"),
        ({"1=": "see #"}, {}, r"answers in which number_after_hash finds one .*, got 'see #'"),
        ({"1=": "1", "1" * 130: "1"}, {}, r"evaluation\.prompts must hold prompts of at most 120 tokens .*got 1 of 2"),
        ({"1=": "1"}, {"max_tokens": 128}, r"evaluation\.max_tokens must leave room for a prompt"),
    ],
)
def test_problems_that_cannot_be_scored(answers, changed, message):
    with pytest.raises(InputError, match=message):
        prepare(answers, **changed)


# Divergence by position

PROMPTS = [[BOS, 5, 13, 7, 15], [BOS], [BOS, 8, 9]]
RESPONSES = [[4, 6, EOS], [10, 11, 12, 8, 3], [EOS]]


def expected_divergence(student, teacher, stop_ids: list[int], is_forward: bool) -> list[tuple[float, int]]:
    """Sum and count by response position, from each model's own logits, one rollout at a time, in float64.

    The stop ids become one event: their log-probs are added and put in their place.
    """
    table = [[0.0, 0] for _ in range(max(map(len, RESPONSES)))]
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        for t in range(len(response)):
            events = []
            for model in (student, teacher):
                with torch.no_grad():
                    logprobs = model(torch.tensor([prompt + response[:t]])).logits[0, -1].double().log_softmax(-1)
                others = [logprobs[i] for i in range(19) if i not in stop_ids]
                stop = [torch.logsumexp(logprobs[stop_ids], 0)] if stop_ids else []
                events.append(torch.stack(others + stop))
            p, q = events[::-1] if is_forward else events
            table[t][0] += (p.exp() * (p - q)).sum().item()
            table[t][1] += 1
    return [tuple(entry) for entry in table]


@pytest.mark.parametrize("stop_ids", [(), (EOS,), (EOS, 4, 9)])
@pytest.mark.parametrize("divergence", [None, ReverseKL(), ForwardKL()])
def test_divergence_by_position(stop_ids, divergence):
    student, teacher = make_model(1), make_model(2, hidden_size=24).requires_grad_(False)
    sum_K, count_K = divergence_by_position(
        student, teacher, make_rollouts(PROMPTS, RESPONSES), stop_ids=stop_ids, divergence=divergence
    )
    expected = expected_divergence(student, teacher, list(stop_ids), isinstance(divergence, ForwardKL))
    assert count_K.tolist() == [3, 2, 2, 1, 1]
    assert sum_K.tolist() == pytest.approx([value for value, _ in expected], rel=1e-4)
    assert count_K.tolist() == [count for _, count in expected]
    assert (sum_K.dtype, count_K.dtype) == (torch.float64, torch.float64)


def test_no_divergence_from_itself():
    model = make_model(1).requires_grad_(False)
    sum_K, _ = divergence_by_position(model, model, make_rollouts(PROMPTS, RESPONSES), stop_ids=(EOS,))
    assert sum_K.abs().max() < 1e-5


def test_sampled_batches_differ_by_seed():
    problems = prepare({"1+2=": "3", "30-4+5=": "31"}, max_tokens=12)
    model, sampler = make_model(4), SamplerSettings()
    drawn = [
        [rollouts.token_ids_B_T.tolist() for rollouts in problems.batches(model, sampler, seed)] for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
