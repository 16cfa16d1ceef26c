"""Does a vLLM server draw with the student's present weights, whatever changed them, and get them only when they changed?

The server is a stub of its interface (vllm_stub.py) that loads the checkpoint it is told of and draws from it.

pytest tests/distill/test_vllm_weights.py
"""

from pathlib import Path

import pytest
import torch
from tiny_models import BOS, make_model
from vllm_rollouts import RAGGED, assert_logprobs, log_softmax, make_backend, responses, roll_out

from esr_distill.input_error import InputError
from esr_distill.rollout import GREEDY, vllm_weights


def test_pushed_weights_are_the_students(stub, student, tmp_path):
    roll_out(make_backend(stub, tmp_path / "not there yet"), student)
    assert stub.model.state_dict().keys() == student.state_dict().keys()
    for name, weight in stub.model.state_dict().items():
        assert torch.equal(weight, student.state_dict()[name]), name
    first_draw = stub.paths().index("/v1/completions")
    pushing = [path for path in stub.paths()[:first_draw] if path not in ("/v1/models", "/server_info")]
    assert pushing == ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"]
    assert Path(stub.loaded[0]).is_absolute() and Path(stub.loaded[0]).name == stub.version
    assert list((tmp_path / "not there yet").iterdir()) == []


def test_tied_weights_arrive(stub, tmp_path):
    student = make_model(5, tie_word_embeddings=True)
    rollouts = roll_out(make_backend(stub, tmp_path), student)
    assert_logprobs(rollouts.logprobs_B_K, student, RAGGED, rollouts, log_softmax)


def test_unchanged_weights_are_not_pushed_again(stub, student, tmp_path):
    backend = make_backend(stub, tmp_path)
    roll_out(backend, student)
    backend.release()
    roll_out(backend, student, sampler=GREEDY)
    student(torch.tensor([[BOS, 4]])).logits.sum().backward()  # gradients are no weights
    roll_out(backend, student, seed=8)
    assert len(stub.loaded) == 1 and len(stub.completions()) == 3 * len(RAGGED)


@torch.no_grad()
def scale_one_weight(model) -> None:
    next(model.parameters())[5, 0] *= 1.5


@torch.no_grad()
def scale_behind_the_counter(model) -> None:
    next(model.parameters()).data[5, 0] *= 1.5


def optimizer_step(**options):
    def step(model) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
        model(torch.tensor([[BOS, 4]])).logits.square().sum().backward()
        optimizer.step()

    return step


CHANGES = {
    "one weight": scale_one_weight,
    "through .data, which no counter sees": scale_behind_the_counter,
    "AdamW": optimizer_step(foreach=False),
    "AdamW, foreach": optimizer_step(foreach=True),
    "AdamW, fused, which no counter sees": optimizer_step(fused=True),
    "a loaded checkpoint": lambda model: model.load_state_dict(make_model(4).state_dict()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_are_pushed(stub, student, tmp_path, name):
    backend = make_backend(stub, tmp_path)
    roll_out(backend, student)
    CHANGES[name](student)
    rollouts = roll_out(backend, student)
    assert len(stub.loaded) == len(set(stub.loaded)) == 2  # never a path that was read before
    assert_logprobs(rollouts.logprobs_B_K, student, RAGGED, rollouts, log_softmax)


def test_another_model_is_pushed_though_it_lies_in_the_same_memory(stub, tmp_path):
    backend = make_backend(stub, tmp_path)
    for seed in (3, 4, 3):
        student = make_model(seed)
        rollouts = roll_out(backend, student)
        assert_logprobs(rollouts.logprobs_B_K, student, RAGGED, rollouts, log_softmax)
        del student
    assert len(stub.loaded) == 3


def test_a_server_that_was_started_anew_gets_the_weights_again(stub, student, tmp_path):
    backend = make_backend(stub, tmp_path)
    before = responses(roll_out(backend, student))
    stub.model, stub.version = make_model(99), "default"
    assert responses(roll_out(backend, student)) == before
    assert len(stub.loaded) == 2


def test_a_server_that_keeps_an_old_weight_is_found_out(stub, student, tmp_path):
    backend = make_backend(stub, tmp_path)
    stub.not_loaded = ("lm_head.weight",)
    text = r"must have the student's distribution after loading its weights, got log-probs that are off by [1-9][0-9.]* nats"
    for pushes in (1, 2):
        with pytest.raises(InputError, match=text):
            roll_out(backend, student)
        assert len(stub.loaded) == pushes
    stub.not_loaded = ()
    assert roll_out(backend, student).batch_size == len(RAGGED)


def test_it_is_found_out_though_the_first_rollouts_failed(stub, student, tmp_path):
    backend = make_backend(stub, tmp_path)
    stub.not_loaded, stub.drop = ("lm_head.weight",), {"/v1/completions"}
    with pytest.raises(InputError, match="RemoteDisconnected"):
        roll_out(backend, student)
    stub.drop.clear()
    with pytest.raises(InputError, match="must have the student's distribution"):
        roll_out(backend, student)
    assert len(stub.loaded) == 1


def test_a_server_in_bfloat16_is_no_other_server(stub, student, tmp_path):
    stub.dtype = torch.bfloat16
    rollouts = roll_out(make_backend(stub, tmp_path), student)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_logprobs(rollouts.logprobs_B_K, student, RAGGED, rollouts, log_softmax)


def test_the_look_at_the_weights_is_short_and_follows_a_push_alone(stub, student, tmp_path):
    backend = make_backend(stub, tmp_path)
    for seed in (1, 2, 3):
        roll_out(backend, student, [[BOS, *[5, 13, 7] * 25], [BOS]], seed=seed)
    looks = [body for path, body in stub.calls if path == "/v1/completions" and "prompt_logprobs" in body]
    assert [body["prompt"] for body in looks] == [[BOS, *[5, 13, 7] * 21]]
    assert not student.training


@pytest.mark.parametrize("version", ["default", "esr-of-another-trainer", None])
def test_weights_that_change_on_the_way_are_an_error_and_pushed_next_time(stub, student, tmp_path, version):
    def start_anew_after_drawing(path: str, answer: dict) -> dict:
        if path == "/v1/completions":
            stub.version = version
        return answer

    backend = make_backend(stub, tmp_path)
    stub.tamper = start_anew_after_drawing
    with pytest.raises(InputError, match=rf"must hold the weights 'esr-.*-000001' while it draws, got {version!r}"):
        roll_out(backend, student)
    stub.tamper = lambda path, answer: answer
    roll_out(backend, student)
    assert len(stub.loaded) == 2


def test_the_folder_has_another_path_on_the_server(stub, student, tmp_path):
    stub.folders = ("/weights", str(tmp_path))
    roll_out(make_backend(stub, tmp_path, weights_folder_on_server="/weights"), student)
    assert stub.loaded[0].startswith("/weights/")


def test_a_prefix_cache_in_use_is_waited_for(stub, student, tmp_path):
    stub.busy = 3
    roll_out(make_backend(stub, tmp_path), student)
    assert stub.paths().count("/reset_prefix_cache") == 4


def test_a_prefix_cache_that_stays_in_use_is_an_error(stub, student, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_weights, "IDLE_SECONDS", 0.2)
    stub.busy = 10**6
    with pytest.raises(InputError, match="must serve nobody else while its weights change, got a prefix cache in use"):
        roll_out(make_backend(stub, tmp_path), student)
    assert stub.completions() == []


def test_adapters_are_refused(stub, student, tmp_path):
    student._hf_peft_config_loaded = True
    with pytest.raises(InputError, match="a transformers model without adapters, got LlamaForCausalLM with adapters"):
        roll_out(make_backend(stub, tmp_path), student)


def test_weights_that_do_not_load_are_an_error_and_are_pushed_next_time(stub, student, tmp_path):
    backend = make_backend(stub, tmp_path)
    roll_out(backend, student)
    scale_one_weight(student)
    stub.refuse["/collective_rpc"] = 500, {"error": {"message": "Call to collective_rpc method failed: no such file"}}
    with pytest.raises(
        InputError, match=r"must accept POST /collective_rpc, got status 500 \(Call to .* no such file\)"
    ):
        roll_out(backend, student)
    assert list(tmp_path.iterdir()) == []
    del stub.refuse["/collective_rpc"]
    rollouts = roll_out(backend, student)
    assert_logprobs(rollouts.logprobs_B_K, student, RAGGED, rollouts, log_softmax)


def test_a_server_that_may_hold_half_of_other_weights_gets_the_old_ones_again(stub, student, tmp_path):
    backend = make_backend(stub, tmp_path)
    before = responses(roll_out(backend, student))
    saved = student.lm_head.weight.detach().clone()
    student.lm_head.weight.data.zero_()
    stub.refuse["/reset_prefix_cache"] = 500, {"error": {"message": "out of memory"}}
    with pytest.raises(InputError, match="out of memory"):
        roll_out(backend, student)
    stub.refuse.clear()
    student.lm_head.weight.data.copy_(saved)
    assert responses(roll_out(backend, student)) == before
    assert len(stub.loaded) == 3
