"""Do the references give on a CUDA device what they give on a CPU?  pytest -m gpu tests/kernels/test_references_on_gpu.py

Not run on a GPU yet.
"""

import pytest
import torch

from esr_kernels import (
    ForwardKL,
    GeneralizedJSD,
    Impl,
    OutputHead,
    ReverseKL,
    SamplerState,
    TotalVariation,
    gather_logprobs,
    linear_divergence,
    linear_prefix_logprobs,
    sample_tokens,
    token_divergence,
)

pytestmark = pytest.mark.gpu
REFERENCE = Impl.REFERENCE


def seeded(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL(), GeneralizedJSD(0.5), TotalVariation()], ids=repr)
def test_token_divergence_in_float64(divergence):
    student, teacher = seeded(7, 101, scale=3.0), seeded(8, 101, scale=3.0)[:7]
    ids = torch.arange(7)
    results = []
    for device in ("cpu", "cuda"):
        logits = student.to(device).requires_grad_()
        output = token_divergence(
            logits, teacher.to(device), divergence, token_ids_N=ids.to(device), stop_ids=(3, 5), impl=REFERENCE
        )
        output.divergence_N.sum().backward()
        results.append([*(field.detach().cpu() for field in output), logits.grad.cpu()])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-10, atol=1e-12)


def test_linear_ops_in_float64():
    hidden, weight, teacher = seeded(2, 9, 16), seeded(33, 16), seeded(18, 8)
    ids = torch.arange(18).reshape(2, 9) % 33
    starts = torch.tensor([2, 4])
    results = []
    for device in ("cpu", "cuda"):
        rows, head = hidden.to(device).reshape(18, 16), OutputHead(weight.to(device), softcap=5.0)
        divergence = linear_divergence(
            rows, head, teacher.to(device), seeded(33, 8).to(device), ReverseKL(), impl=REFERENCE
        )
        prefix = linear_prefix_logprobs(
            hidden.to(device), head, ids.to(device), starts.to(device), horizon=4, impl=REFERENCE
        )
        gathered = gather_logprobs(rows, head, ids.reshape(18, 1).to(device), impl=REFERENCE)
        results.append([divergence.divergence_N.cpu(), *(field.cpu() for field in prefix), gathered.cpu()])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-10, atol=1e-12)


def test_the_sampler_draws_the_same_tokens():
    logits = seeded(64, 997, scale=3.0)
    tokens = []
    for device in ("cpu", "cuda"):
        state = SamplerState.create(
            64, 5, eos_ids=(1, 2), sampling_temperature=0.8, top_k=50, top_p=0.9, seed=11, device=device
        )
        for _ in range(5):
            sample_tokens(logits.to(device), state, impl=REFERENCE)
        tokens.append((state.token_ids_B_K.cpu(), state.lengths_B.cpu()))
    assert torch.equal(tokens[0][0], tokens[1][0])
    assert torch.equal(tokens[0][1], tokens[1][1])
