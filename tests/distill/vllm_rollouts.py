"""Rollouts of ragged prompts from a vLLM server, and the log-probs that they must have by the student's own forward."""

from pathlib import Path

import numpy as np
import torch
from tiny_models import BOS, EOS, PAD, make_prompt_batch
from vllm_stub import VllmStub

from esr_distill.rollout import RolloutBatch, SamplerSettings, generate_rollouts
from esr_distill.rollout.vllm_server import VllmServerBackend

RAGGED = [[BOS, 5, 13, 7, 14, 9, 15], [BOS, 4], [BOS], [BOS, 8, 8, 13, 3, 15], [BOS, 12, 14, 11, 15], [BOS, 6, 6]]
PLAIN = SamplerSettings()


def make_backend(stub: VllmStub, folder: Path, **options) -> VllmServerBackend:
    return VllmServerBackend(stub.url, folder, **({"timeout_s": 20.0} | options))


def roll_out(backend, model, rows=RAGGED, request_ids=None, samples_per_prompt=1, **changed) -> RolloutBatch:
    options = {"horizon": 20, "sampler": PLAIN, "eos_ids": (EOS,), "pad_id": PAD, "seed": 7} | changed
    prompts = make_prompt_batch(rows, request_ids, options["pad_id"], samples_per_prompt)
    return generate_rollouts(model, prompts, backend=backend, **options)


def responses(rollouts: RolloutBatch) -> list[list[int]]:
    lengths = rollouts.response_lengths_B.tolist()
    return [ids[:length] for ids, length in zip(rollouts.response_ids_B_K.tolist(), lengths, strict=True)]


@torch.no_grad()
def student_logits(model, prompt: list[int], response: list[int]) -> np.ndarray:
    """(K, V) float64 logits of the rows that predict the response, from one forward over the whole sequence."""
    logits_T_V = model(torch.tensor([prompt + response])).logits[0].double()
    return logits_T_V[len(prompt) - 1 : -1].numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def assert_logprobs(found_B_K, model, rows, rollouts, distribution) -> None:
    """`distribution` maps (K, V) logits to log-probs, or is None where they must be NaN."""
    for row, (prompt, response) in enumerate(zip(rows, responses(rollouts), strict=True)):
        found = found_B_K[row, : len(response)].double().numpy()
        if distribution is None:
            assert np.isnan(found).all()
        else:
            expected = distribution(student_logits(model, prompt, response))[np.arange(len(response)), response]
            np.testing.assert_allclose(found, expected, atol=2e-5)
        assert found_B_K[row, len(response) :].tolist() == [0.0] * (found_B_K.shape[1] - len(response))
