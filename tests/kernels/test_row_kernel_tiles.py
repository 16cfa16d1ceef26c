"""Does the width of the tiles leave the results alone? `pytest tests/kernels/test_row_kernel_tiles.py`

The default tile holds the whole row of the other tests; here a row takes several, the last of them ragged.
"""

import pytest
import torch

from esr_kernels import ForwardKL, GeneralizedJSD, ReverseKL, token_divergence
from esr_kernels.testing.inputs import make_logit_pair
from esr_kernels.tile_config import TileConfig, choose_tile_config
from esr_kernels.token_divergence import backward_kernel, forward_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB_SIZE = 700


def run(divergence, impl, dtype=torch.float32):
    student, teacher = (logits.to(DEVICE, dtype) for logits in make_logit_pair(6, VOCAB_SIZE, seed=3))
    # Row 1 rises by 1e4 between tiles, row 2 falls; in row 3 the first tile is masked on one side, in row 4 on the other.
    ramp = torch.linspace(0, 1e4, VOCAB_SIZE, device=DEVICE, dtype=dtype)
    student[1] += ramp
    teacher[1] += ramp
    student[2] -= ramp
    teacher[2] -= ramp
    student[3, :300] = -float("inf")
    teacher[4, :300] = -float("inf")
    student.requires_grad_()
    token_ids = torch.tensor([0, 699, 650, 3, 310, -1], device=DEVICE)
    output = token_divergence(student, teacher, divergence, token_ids_N=token_ids, stop_ids=(5, 130, 650), impl=impl)
    output.divergence_N.backward(torch.tensor([0.3, -2.0, 1.5, 0.7, 1e-3, 0.0], device=DEVICE, dtype=dtype))
    return torch.stack(output).detach(), student.grad


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), GeneralizedJSD(0.3)], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("block_vocab", [128, 256])
def test_a_row_of_many_tiles_equals_the_oracle(monkeypatch, divergence, block_vocab):
    tile = TileConfig(block_vocab, num_warps=1)
    for module in (forward_kernel, backward_kernel):
        monkeypatch.setattr(module, "choose_tile_config", lambda vocab_size: tile)
    statistics, gradient = run(divergence, "fused")
    expected_statistics, expected_gradient = run(divergence, "reference", torch.float64)
    torch.testing.assert_close(statistics.double(), expected_statistics, rtol=1e-5, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("vocab_size, expected", [(1, 128), (128, 128), (129, 256), (2048, 2048), (151936, 2048)])
def test_a_tile_covers_a_short_row_and_walks_a_long_one(vocab_size, expected):
    assert choose_tile_config(vocab_size).block_vocab == expected


@pytest.mark.parametrize("block_vocab, num_warps", [(64, 4), (384, 4), (256, 3), (256, 0)])
def test_a_tile_that_no_kernel_takes_is_refused(block_vocab, num_warps):
    with pytest.raises(ValueError, match=r"TileConfig: (block_vocab|num_warps) must be a power of 2"):
        TileConfig(block_vocab, num_warps)
