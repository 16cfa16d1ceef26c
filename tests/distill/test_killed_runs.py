"""Does a run that is killed at any moment leave only checkpoints that load, and end as if nothing had happened?

pytest tests/distill/test_killed_runs.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_train import losses, tiny_config

from esr_distill.config import RunConfig
from esr_distill.config_file import save_config
from esr_distill.train import train

TESTS = Path(__file__).resolve().parent
KILLS = 20
# Forks a child for each attempt from a process that has imported everything and computed nothing, kills it at a random moment,
# and loads whatever checkpoints lie there in a second child: a process that has started threads must not fork. The first is
# killed when it has saved, the others within twice the time that this took: as many steps on a slow machine.
# tqdm's lock is shared by forked processes: a run killed while it holds it would stop the others for ever.
PROGRAM = """
import json, os, random, signal, sys, threading, time
from pathlib import Path
import torch
from rich.console import Console
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from esr_distill.checkpoint import find_checkpoints
from esr_distill.config_file import load_saved_config
from esr_distill.train import train

output_dir, kills = Path(sys.argv[1]), int(sys.argv[2])
config = load_saved_config(output_dir)
waits = random.Random(1)
tqdm.set_lock(threading.RLock())

def start(work):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child

def run():
    train(config, Console(quiet=True), resume=bool(find_checkpoints(output_dir)))

def load_all():
    steps = []
    for folder in find_checkpoints(output_dir):
        AutoModelForCausalLM.from_pretrained(folder)
        torch.load(folder / "optimizer.pt", weights_only=True)
        steps.append(json.loads((folder / "trainer_state.json").read_text())["step"])
    print(json.dumps({"was_killed": was_killed, "steps": steps}), flush=True)

began = time.monotonic()
for kill in range(kills):
    child = start(run)
    if kill == 0:
        while not find_checkpoints(output_dir):
            time.sleep(0.01)
        to_first_checkpoint = time.monotonic() - began
    else:
        time.sleep(waits.uniform(0.02, 2 * to_first_checkpoint))
    os.kill(child, signal.SIGKILL)
    was_killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert os.waitpid(start(load_all), 0)[1] == 0, f"a checkpoint does not load after kill {kill}"
"""


def config_in(folder: Path, tmp_path: Path):
    return tiny_config(tmp_path, run=RunConfig(output_dir=str(folder), steps=400, save_every=1, keep_checkpoints=2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_twenty_times_at_random_moments(tmp_path):
    killed, whole = config_in(tmp_path / "killed", tmp_path), config_in(tmp_path / "whole", tmp_path)
    (tmp_path / "killed").mkdir()
    save_config(killed, tmp_path / "killed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "killed"), str(KILLS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(states) == KILLS and sum(state["was_killed"] for state in states) > KILLS / 2
    steps = [max(state["steps"], default=0) for state in states]
    assert steps == sorted(steps) and steps[-1] > 0  # nothing that was saved is lost
    console = Console(quiet=True)
    if steps[-1] < killed.run.steps:
        assert train(killed, console, resume=True).finished
    train(whole, console)
    assert losses(killed) == losses(whole)
