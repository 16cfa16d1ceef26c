"""What a vLLM server is asked for, field by field, and what it must not be asked for."""

import hashlib

from esr_distill.input_error import InputError
from esr_distill.rollout.rollout_request import RolloutRequest
from esr_distill.sampler_settings import SamplerSettings

# What vLLM takes. It raises a lower temperature to the first without a word, and more biases can stop it.
TEMPERATURES = 0.01, 2.0
MAX_LOGIT_BIASES = 1024


def check_sampler(sampler: SamplerSettings, num_cut: int) -> None:
    """What vLLM would draw otherwise than it is written. Raises InputError."""
    temperature, (low, high) = sampler.sampling_temperature, TEMPERATURES
    if not (temperature == 0 or low <= temperature <= high):
        raise InputError(f"sampling_temperature must be 0 or in [{low}, {high}] for a vLLM server, got {temperature!r}")
    if sampler.top_p == 0:
        raise InputError("top_p must be above 0 for a vLLM server, got 0.0")
    if temperature > 0 and sampler.top_p < 1 and sampler.min_p > 0:
        raise InputError(
            "top_p and min_p must not be combined for a vLLM server, which applies min_p first, "
            f"got {sampler.top_p!r} and {sampler.min_p!r}"
        )
    if num_cut > MAX_LOGIT_BIASES:
        raise InputError(
            f"vocab_size must cut at most {MAX_LOGIT_BIASES} ids off the student's head for a vLLM server, got {num_cut}"
        )


def row_seed(seed: int, request_id: int) -> int:
    """63 bits from both, so that the streams of neighbouring seeds and rows have nothing in common."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {request_id}".encode(), digest_size=8).digest(), "big") >> 1


def sampling_fields(request: RolloutRequest, width: int) -> dict:
    """All fields that shape a response: for one that is left out, the server takes the model's generation_config.json."""
    sampler, limit = request.sampler, width if request.vocab_size is None else request.vocab_size
    return {
        "n": 1,
        "max_tokens": request.horizon,
        "temperature": sampler.sampling_temperature,
        "top_k": sampler.top_k,
        "top_p": sampler.top_p,
        "min_p": sampler.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # The list of allowed ids takes 1024 of them. -100 is the strongest bias, a factor of 4e-44; the answer is checked.
        "logit_bias": {str(i): -100.0 for i in range(limit, width)} or None,
        "ignore_eos": True,  # that of the server's files; ours are:
        "stop_token_ids": list(request.eos_ids),
        "logprobs": 1,
        "return_token_ids": True,
    }
