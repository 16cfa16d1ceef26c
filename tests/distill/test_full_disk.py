"""Does a run whose files cannot be written say so in one line, and keep what it had?  pytest tests/distill/test_full_disk.py"""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from test_train import losses, tiny_config
from transformers import AutoModelForCausalLM

from esr_distill.config import OptimizerConfig
from esr_distill.config_file import load_saved_config, save_config
from esr_distill.train import train

pytest.importorskip("resource")

QUIET = Console(quiet=True)
STEADY = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_fraction=0.0)
# The system refuses to make a file larger than so many bytes, as a full disk does; Python ignores the signal that comes with it.
# What the program prints goes through pipes, which have no size.
PROGRAM = """
import resource, sys
from esr_distill.command_line import main
folder, *limits = sys.argv[1:]
for limit in map(int, limits):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    status = main(["train", "--resume", folder])
    print("status", status, file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def attempts(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a run of two steps that was to go on to four while no file could exceed a limit, and the line in which
    each attempt ended."""
    config = tiny_config(tmp_path_factory.mktemp("full"), steps=2, optimizer=STEADY)
    train(config, QUIET)
    folder = Path(config.run.output_dir)
    save_config(replace(config, run=replace(config.run, steps=4, save_every=1)), folder)
    weights = (folder / "checkpoint-000002" / "model.safetensors").stat().st_size
    metrics = (folder / "metrics.jsonl").stat().st_size
    assert (
        metrics + 100 < weights - 1000 < weights + 1000 < (folder / "checkpoint-000002" / "optimizer.pt").stat().st_size
    )
    limits = [str(limit) for limit in (weights + 1000, weights - 1000, metrics + 100)]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder), *limits]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr and lines.count("status 2") == 3
    return folder, [lines[number - 1] for number, line in enumerate(lines) if line == "status 2"]


@pytest.mark.parametrize(
    ("attempt", "name"), [(0, "checkpoint-000003"), (1, "checkpoint-000003"), (2, "metrics.jsonl")]
)
def test_one_line_says_what_could_not_be_written_what_is_left_and_how_to_go_on(attempts, attempt, name):
    """The optimizer's states, by torch; the weights, by safetensors; a line of the metrics, by Python."""
    folder, messages = attempts
    expected = (
        f"esr-distill train: {folder / name} could not be written (REASON); "
        f"{folder / 'checkpoint-000002'} is whole, go on with: esr-distill train --resume {folder}"
    )
    assert re.fullmatch(re.escape(expected).replace("REASON", "[^()]*File too large[^;]*"), messages[attempt])


def test_what_was_there_stays_and_the_run_goes_on_exactly(attempts):
    folder, _ = attempts
    assert {path.name for path in folder.iterdir()} == {"checkpoint-000002", "config.yaml", "metrics.jsonl"}
    AutoModelForCausalLM.from_pretrained(folder / "checkpoint-000002")
    config = load_saved_config(folder)
    assert train(config, QUIET, resume=True).finished
    whole = tiny_config(folder.parent, "whole", steps=4, optimizer=STEADY)
    train(whole, QUIET)
    assert losses(config) == losses(whole) and len(losses(whole)) == 4
