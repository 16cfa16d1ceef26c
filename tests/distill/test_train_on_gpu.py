"""Does the loop run on a CUDA device as on a CPU?  pytest -m gpu tests/distill/test_train_on_gpu.py

Not run on a GPU yet.
"""

from dataclasses import replace

import pytest
from rich.console import Console
from test_train import losses, tiny_config

from esr_distill.config import RunConfig
from esr_distill.train import train

pytestmark = pytest.mark.gpu


def on_device(config, device: str, folder, autocast: bool = False):
    model = replace(config.model, device=device, autocast=autocast)
    return replace(config, model=model, run=RunConfig(output_dir=str(folder), steps=4, save_every=100))


def test_the_first_loss_equals_that_of_the_cpu(tmp_path):
    config = tiny_config(tmp_path)
    runs = [on_device(config, device, tmp_path / device) for device in ("cpu", "cuda")]
    for run in runs:
        train(run, Console(quiet=True))
    on_cpu, on_gpu = (losses(run) for run in runs)
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=1e-4)
    assert len(on_gpu) == 4


def test_a_run_under_autocast_learns_finite_numbers(tmp_path):
    config = on_device(tiny_config(tmp_path), "cuda", tmp_path / "autocast", autocast=True)
    assert train(config, Console(quiet=True)).finished
    assert all(0 <= loss < 100 for loss in losses(config))
