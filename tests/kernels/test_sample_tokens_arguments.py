"""Does the sampler refuse wrong arguments with an error that says what is wrong, and accept the edges?

python -m pytest tests/kernels/test_sample_tokens_arguments.py
"""

import pytest
import torch

from esr_kernels import Impl, SamplerState, sample_tokens


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"batch_size": -1}, ValueError, r"SamplerState.create: batch_size must be >= 0, got -1"),
        ({"batch_size": 2.0}, TypeError, r"batch_size must be an int >= 0, got float"),
        ({"horizon": 0}, ValueError, r"SamplerState.create: horizon must be >= 1, got 0"),
        ({"horizon": True}, TypeError, r"horizon must be an int >= 1, got bool"),
        ({"eos_ids": 5}, TypeError, r"eos_ids must be a sequence of ints, got int"),
        ({"eos_ids": [1, -2]}, ValueError, r"eos_ids must be >= 0, got -2"),
        ({"eos_ids": [1.0]}, TypeError, r"eos_ids must be an int >= 0, got float"),
        ({"pad_id": -1}, ValueError, r"pad_id must be >= 0, got -1"),
        ({"sampling_temperature": -0.1}, ValueError, r"sampling_temperature must be finite and >= 0, got -0.1"),
        ({"sampling_temperature": float("nan")}, ValueError, r"sampling_temperature must be finite and >= 0, got nan"),
        ({"sampling_temperature": float("inf")}, ValueError, r"sampling_temperature must be finite and >= 0, got inf"),
        (
            {"sampling_temperature": "1"},
            TypeError,
            r"sampling_temperature must be a number or a tensor \(B,\), got str",
        ),
        ({"sampling_temperature": torch.ones(3)}, ValueError, r"sampling_temperature must have shape \(B\) = \(2\)"),
        ({"sampling_temperature": torch.tensor([1.0, -1.0])}, ValueError, r"sampling_temperature .* got -1.0 in row 1"),
        ({"sampling_temperature": torch.tensor([1, 1])}, TypeError, r"must have dtype float32, float64, got int64"),
        ({"top_k": -1}, ValueError, r"top_k must be >= 0, got -1"),
        ({"top_k": 1.5}, TypeError, r"top_k must be an int >= 0, got float"),
        ({"top_k": torch.tensor([0, -3])}, ValueError, r"top_k must be >= 0, got -3 in row 1"),
        ({"top_p": 1.1}, ValueError, r"top_p must be in \[0, 1\], got 1.1"),
        ({"top_p": torch.tensor([0.5, float("nan")])}, ValueError, r"top_p must be in \[0, 1\], got nan in row 1"),
        ({"min_p": -0.5}, ValueError, r"min_p must be in \[0, 1\], got -0.5"),
        ({"seed": -1}, ValueError, r"seed must be >= 0, got -1"),
        ({"seed": 2**64}, ValueError, r"seed must be < 2\^64, got 18446744073709551616"),
        ({"seed": torch.tensor([1, 2], dtype=torch.int32)}, TypeError, r"seed must have dtype int64, got int32"),
        ({"request_ids": [1, 2, 3]}, ValueError, r"request_ids must have shape \(B\) = \(2\), got \(3,\)"),
        ({"request_ids": torch.tensor([4, -4])}, ValueError, r"request_ids must be >= 0, got -4 in row 1"),
    ],
)
def test_create_refuses(changed, error, message):
    arguments = {"batch_size": 2, "horizon": 3, "eos_ids": [1], **changed}
    with pytest.raises(error, match=message):
        SamplerState.create(**arguments)


def test_create_needs_eos_ids_and_knows_no_other_names():
    with pytest.raises(TypeError, match="eos_ids"):
        SamplerState.create(2, 3)
    with pytest.raises(TypeError, match="temperature"):
        SamplerState.create(2, 3, eos_ids=(), temperature=1.0)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        ([[0.0]], TypeError, r"sample_tokens: logits_B_V must be a tensor \(B V\), got list"),
        (torch.zeros(2, 4, dtype=torch.int64), TypeError, r"logits_B_V must have dtype .*, got int64"),
        (torch.zeros(3, 4), ValueError, r"logits_B_V must have shape \(B, V\) = \(2, V\), got \(3, 4\)"),
        (torch.zeros(2, 1, 4), ValueError, r"logits_B_V must have shape"),
        (torch.zeros(2, 4, device="meta"), ValueError, r"all tensors must be on one device, got logits_B_V: meta"),
        (torch.zeros(2, 3), ValueError, r"state.eos_ids must be in \[0, V\) = \[0, 3\), got 3"),
        (torch.zeros(2, 0), ValueError, r"state.eos_ids must be in \[0, V\) = \[0, 0\), got 3"),
    ],
)
def test_sample_tokens_refuses(logits, error, message):
    state = SamplerState.create(2, 3, eos_ids=[1, 3])
    with pytest.raises(error, match=message):
        sample_tokens(logits, state, impl=Impl.REFERENCE)
    assert state.lengths_B.tolist() == [0, 0]


def test_pad_id_must_be_in_the_vocabulary():
    state = SamplerState.create(1, 3, eos_ids=[1], pad_id=4)
    with pytest.raises(ValueError, match=r"state.pad_id must be in \[0, V\) = \[0, 4\), got 4"):
        sample_tokens(torch.zeros(1, 4), state, impl=Impl.REFERENCE)


def test_state_must_be_a_sampler_state():
    with pytest.raises(TypeError, match=r"sample_tokens: state must be a SamplerState, got dict"):
        sample_tokens(torch.zeros(1, 4), {}, impl=Impl.REFERENCE)


def test_implementation_is_never_chosen_silently():
    state = SamplerState.create(1, 3, eos_ids=())
    with pytest.raises(TypeError, match=r"logits_B_V must have dtype .* with impl=Impl.FUSED, got float64.*REFERENCE"):
        sample_tokens(torch.zeros(1, 4, dtype=torch.float64), state)
    with pytest.raises(ValueError, match=r"sample_tokens: impl must be one of .*, got 'fast'"):
        sample_tokens(torch.zeros(1, 4), state, impl="fast")
    assert state.lengths_B.tolist() == [0]


def test_fresh_state():
    state = SamplerState.create(2, 3, eos_ids=[6, 4])
    assert state.token_ids_B_K.tolist() == [[6, 6, 6], [6, 6, 6]]
    assert state.request_ids_B.tolist() == [0, 1]
    assert state.active.item() == 2
    assert not state.finished_B.any()
    integers = {"token_ids_B_K", "lengths_B", "next_ids_B", "active", "top_k_B", "seed_B", "request_ids_B", "eos_ids_E"}
    assert {getattr(state, name).dtype for name in integers} == {torch.int64}
    assert state.logprobs_B_K.dtype == state.sampling_logprobs_B_K.dtype == torch.float32
    assert (state.batch_size, state.horizon, state.device) == (2, 3, torch.device("cpu"))


def test_parameter_tensors_are_copied():
    """A state keeps its parameters when the caller's tensor changes afterwards."""
    request_ids = torch.tensor([5, 6])
    temperature = torch.zeros(2, dtype=torch.float64)
    state = SamplerState.create(2, 1, eos_ids=(), request_ids=request_ids, sampling_temperature=temperature)
    request_ids.zero_()
    temperature.fill_(9.0)
    assert state.request_ids_B.tolist() == [5, 6]
    assert state.sampling_temperature_B.tolist() == [0.0, 0.0]


def test_empty_batch_and_vocabulary_of_one():
    empty = SamplerState.create(0, 3, eos_ids=())
    sample_tokens(torch.zeros(0, 4), empty, impl=Impl.REFERENCE)
    assert empty.active.item() == 0
    single = SamplerState.create(1, 1, eos_ids=(), top_k=4, top_p=0.5)
    sample_tokens(torch.tensor([[-3.0]]), single, impl=Impl.REFERENCE)
    assert single.token_ids_B_K.tolist() == [[0]]
    assert single.logprobs_B_K.item() == 0


def test_logits_are_left_alone_and_may_require_grad():
    logits = torch.randn(3, 5, requires_grad=True)
    before = logits.detach().clone()
    state = SamplerState.create(3, 2, eos_ids=(), top_k=2)
    sample_tokens(logits, state, impl=Impl.REFERENCE)
    assert torch.equal(logits, before)
    assert not state.logprobs_B_K.requires_grad
