"""Is everything that can go wrong with a vLLM server one clear error, and never a rollout?

pytest tests/distill/test_vllm_errors.py
"""

import math

import pytest
from tiny_models import BOS, EOS, VOCAB_SIZE, make_model
from vllm_rollouts import RAGGED, make_backend, responses, roll_out
from vllm_stub import VllmStub

from esr_distill.input_error import InputError
from esr_distill.rollout import SamplerSettings


def edit(**changes):
    """A tampering that changes fields of the one choice."""

    def tamper(path: str, answer: dict) -> dict:
        if path == "/v1/completions":
            for name, change in changes.items():
                answer["choices"][0][name] = change(answer["choices"][0][name])
        return answer

    return tamper


def only(path_of_change: str, change):
    return lambda path, answer: change(answer) if path == path_of_change else answer


def looks(answer: dict) -> bool:
    """Whether it answers the look at the weights that follows a push."""
    return "prompt_logprobs" in answer["choices"][0]


def spoilt(told: list) -> list:
    return [{token_id: {"logprob": math.nan} for token_id in entry} if entry else entry for entry in told]


DRAW, TOKENS = "/v1/completions", [5, 6, 7]  # what the script gives at horizon 3
WRONG_ANSWERS = {
    "no JSON": (only(DRAW, lambda answer: b"<html>gateway</html>"), "with a JSON object, got b'<html>gateway</html>'"),
    "a JSON list": (only(DRAW, lambda answer: b"[]"), r"with a JSON object, got b'\[\]'"),
    "no choices": (only(DRAW, lambda answer: {}), "answer a prompt with 1 choice, got None"),
    "two choices": (
        only(DRAW, lambda answer: {"choices": answer["choices"] * 2}),
        "answer a prompt with 1 choice, got 2",
    ),
    "no token ids": (
        edit(token_ids=lambda _: None),
        "token ids of prompt and response .*, got token_ids of type NoneType",
    ),
    "another prompt": (edit(prompt_token_ids=lambda ids: [BOS, *ids]), "and another prompt than it was sent"),
    "no log-probs": (edit(logprobs=lambda _: None), "a log-prob for each of 3 tokens, got None"),
    "an unknown log-prob": (
        edit(logprobs=lambda _: {"token_logprobs": [-1.0, None, -1.0]}),
        r"a log-prob for each of 3 tokens, got \[-1.0, None, -1.0\]",
    ),
    "too few log-probs": (
        edit(logprobs=lambda _: {"token_logprobs": [-1.0]}),
        r"a log-prob for each of 3 tokens, got \[-1.0\]",
    ),
    "ids of another vocabulary": (
        edit(token_ids=lambda _: [5, VOCAB_SIZE, 7]),
        f"draw ids below {VOCAB_SIZE}, the student's vocabulary, got {VOCAB_SIZE}",
    ),
    "a negative id": (edit(token_ids=lambda _: [5, -1, 7]), "draw ids below 19, the student's vocabulary, got -1"),
    "cut short": (
        edit(
            token_ids=lambda ids: ids[:2],
            logprobs=lambda _: {"token_logprobs": [-1.0, -2.0]},
            finish_reason=lambda _: "abort",
        ),
        r"its first EOS or after 3 tokens, got 2 tokens, finish_reason 'abort' and EOS at \[\]",
    ),
    "nothing drawn": (
        edit(
            token_ids=lambda _: [],
            logprobs=lambda _: {"token_logprobs": []},
        ),
        "its first EOS or after 3 tokens, got 0 tokens",
    ),
    "on behind EOS": (edit(token_ids=lambda _: [5, EOS, 7]), r"got 3 tokens, finish_reason 'length' and EOS at \[2\]"),
    "on behind EOS to the next": (edit(token_ids=lambda _: [5, EOS, EOS]), r"got 3 tokens, .* and EOS at \[2, 3\]"),
    "no log-probs of a prompt": (
        only(DRAW, lambda answer: edit(prompt_logprobs=lambda _: None)(DRAW, answer) if looks(answer) else answer),
        r"return log-probs of a prompt \(prompt_logprobs\), got",
    ),
    "a log-prob of a prompt that is no number": (
        only(DRAW, lambda answer: edit(prompt_logprobs=spoilt)(DRAW, answer) if looks(answer) else answer),
        "have the student's distribution after loading its weights, got log-probs that are off by nan nats a token",
    ),
    "no model": (
        only("/v1/models", lambda answer: {"data": []}),
        "name a model and its max_model_len under /v1/models",
    ),
    "logits for log-probs": (
        only("/server_info", lambda answer: {"vllm_config": {"model_config": {"logprobs_mode": "raw_logits"}}}),
        "run with --logprobs-mode raw_logprobs or processed_logprobs, got 'raw_logits'",
    ),
    "no log-prob mode": (only("/server_info", lambda answer: {"vllm_config": "text"}), "run with .*, got None"),
}


@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_wrong_answers_are_errors(stub, student, tmp_path, name):
    stub.script = {(BOS, 4): TOKENS}
    stub.tamper, text = WRONG_ANSWERS[name]
    with pytest.raises(InputError, match=f"^the vLLM server at {stub.url} must .*{text}"):
        roll_out(make_backend(stub, tmp_path), student, [[BOS, 4]], horizon=3)


def test_the_script_of_the_wrong_answers_is_right_untampered(stub, student, tmp_path):
    stub.script = {(BOS, 4): TOKENS}
    assert responses(roll_out(make_backend(stub, tmp_path), student, [[BOS, 4]], horizon=3)) == [TOKENS]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logprobs_that_are_not_finite_are_the_models_fault(stub, student, tmp_path, value):
    stub.script = {(BOS, 4): TOKENS}
    stub.tamper = edit(logprobs=lambda _: {"token_logprobs": [-1.0, value, -1.0]})
    with pytest.raises(FloatingPointError, match="must be finite"):
        roll_out(make_backend(stub, tmp_path), student, [[BOS, 4]], horizon=3)


REFUSALS = {
    "vLLM's words": (
        400,
        {"error": {"message": "Token id 99 is out of vocabulary", "code": 400}},
        "Token id 99 is out",
    ),
    "an error as text": (500, {"error": "Failed to pause"}, "Failed to pause"),
    "FastAPI's words": (422, {"detail": "Unprocessable"}, "Unprocessable"),
    "a page": (502, "<html>", "<html>"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_told_in_the_servers_words(stub, student, tmp_path, name):
    status, answer, words = REFUSALS[name]
    stub.refuse[DRAW] = status, answer
    with pytest.raises(InputError, match=rf"must accept POST /v1/completions, got status {status} \(.*{words}"):
        roll_out(make_backend(stub, tmp_path), student)


@pytest.mark.parametrize("path", ["/server_info", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version"])
def test_a_server_without_dev_mode_is_told_so(stub, student, tmp_path, path):
    stub.refuse[path] = 404, {"detail": "Not Found"}
    with pytest.raises(InputError, match=r"started with VLLM_SERVER_DEV_MODE=1, got status 404 \(Not Found\)"):
        roll_out(make_backend(stub, tmp_path), student)
    assert stub.completions() == []


def test_a_server_that_was_killed_is_an_error(student, tmp_path):
    stub = VllmStub()
    backend = make_backend(stub, tmp_path)
    roll_out(backend, student)
    stub.stop()
    with pytest.raises(
        InputError, match=rf"^the vLLM server at {stub.url} must answer GET /v1/models within 20 s, got URL"
    ):
        roll_out(backend, student)
    with pytest.raises(InputError, match="must answer GET /v1/models"):
        backend.describe(student)


@pytest.mark.parametrize("path", ["/collective_rpc", "/v1/completions"])
def test_a_server_that_dies_on_the_way_is_an_error(stub, student, tmp_path, path):
    stub.drop.add(path)
    with pytest.raises(InputError, match=f"must answer POST {path} within 20 s, got RemoteDisconnected"):
        roll_out(make_backend(stub, tmp_path), student)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_answer_is_an_error(stub, student, tmp_path):
    stub.script, stub.delay_s = {(BOS, 4): TOKENS}, 1.0
    with pytest.raises(InputError, match="must answer POST /v1/completions within 0.3 s, got TimeoutError"):
        roll_out(make_backend(stub, tmp_path, timeout_s=0.3), student, [[BOS, 4]], horizon=3)


def test_after_a_refusal_nothing_more_is_asked_for(stub, student, tmp_path):
    stub.refuse[DRAW] = 400, {"error": {"message": "no"}}
    with pytest.raises(InputError, match="got status 400"):
        roll_out(make_backend(stub, tmp_path, concurrency=1), student, [[BOS]] * 50)
    assert len(stub.completions()) < 10


# Requests that vLLM would meet otherwise than they are written, and those that nobody can meet.
IMPOSSIBLE = {
    "too cold": (
        {"sampler": SamplerSettings(sampling_temperature=0.005)},
        r"must be 0 or in \[0.01, 2.0\] .*, got 0.005",
    ),
    "too hot": ({"sampler": SamplerSettings(sampling_temperature=2.5)}, r"must be 0 or in \[0.01, 2.0\] .*, got 2.5"),
    "no mass": ({"sampler": SamplerSettings(top_p=0.0)}, "top_p must be above 0 for a vLLM server, got 0.0"),
    "min-p before top-p": (
        {"sampler": SamplerSettings(top_p=0.9, min_p=0.1)},
        "top_p and min_p must not be combined .*, got 0.9 and 0.1",
    ),
    "no horizon": ({"horizon": 0}, "horizon must be >= 1, got 0"),
    "beyond the model": ({"horizon": 125}, "at most the model's 128 positions together, got '7 \\+ 125'"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_requests_are_errors_before_anything_is_sent(stub, student, tmp_path, name):
    changed, text = IMPOSSIBLE[name]
    with pytest.raises(InputError, match=text):
        roll_out(make_backend(stub, tmp_path), student, **changed)
    assert stub.calls == []


def test_a_cut_that_the_server_cannot_express_is_an_error(stub, tmp_path):
    with pytest.raises(InputError, match="vocab_size must cut at most 1024 ids .*, got 1025"):
        roll_out(make_backend(stub, tmp_path), make_model(vocab_size=1044), vocab_size=19)


def test_a_server_with_less_context_is_an_error(stub, student, tmp_path):
    stub.max_model_len = 26
    with pytest.raises(InputError, match=r"\(--max-model-len\) for prompt and horizon, got 7 \+ 20 for its 26 tokens"):
        roll_out(make_backend(stub, tmp_path), student)
    stub.max_model_len = 27
    assert roll_out(make_backend(stub, tmp_path), student).batch_size == len(RAGGED)
